"""Identities of items: one grammar, keys of today's caches, and uuids that read as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.engine.identity import WITHDRAW, ItemIdentity
from tests.images import photo

PIECES = ("@", "~", "5", "0", "\N{ARABIC-INDIC DIGIT FIVE}", ":", "fastv", "withdraw", "lora:3f", "\n", "x")
LOOK_ALIKES = ("cat@576", "~fastv:3", "cat~withdraw:0", "cat~a:0", "a@1~b_c:2", "@0", "\n@5", "cat@5@6", "x~y:1@7")

PINNED: list[tuple[dict[str, Any], str]] = [
    ({}, "cat"),
    ({"ratio": 0}, "cat"),
    ({"ratio": 0.5}, "ddb3e9c40c5d474f4af0c52cda575ea85fb87472d2db0a3a282d0ac4207b02ce"),
    (
        {"ratio": 0.5, "positions": "keep"},
        "f9ac8e7716f6c90e66e0b163fddae7b6a6c4921ee3bafd2f993cd146bf47d1ed@144",
    ),
    ({"withdraw": True}, "cat~withdraw:0"),
    (
        {"ratio": 0.5, "withdraw": True},
        "d335d11b7a1ec23be2b51cb83c5b227548c0a4f1755b0700f1806ab5dfdcc0a5~withdraw:0",
    ),
    ({"method": "fastv"}, "cat~fastv:72"),
    (
        {"method": "folder+fastv", "ratio": 0.5, "positions": "keep"},
        "66445c3b8c644de94a498a9046302a67bb601f489a432ba8eb0cfdc2728a58b3@144~fastv:36",
    ),
    ({"method": "random", "keep_tokens": 36}, "f354b8b2a5ba4faf0d000775aa90af931719dc602f06de1a82262b0657c4b95d"),
    ({"method": "pool", "ratio": 0.75}, "c22ca8d06fda6263c50aa03c1c64ce727a7f681fe79a8fd4beae4a52ce780a7a"),
    ({"method": "illava_decoder", "ratio": 0.25}, "cat~illava_decoder:108"),
    (
        {"method": "divprune", "ratio": 0.5, "geometry": "centered", "rest": "merge"},
        "bae6e4d6d554f8db9a458bc0eb670b08737e88b51fc25697f3f76ea55fc0f238",
    ),
    ({"method": "mmtok", "ratio": 0.5}, "097999fc40eddb8335db596f1bd12a56abcd9353a005a14edbcb3551f80b897b"),
    (
        {"method": "mmtok", "ratio": 0.5, "query": "the left car"},
        "cb48963128e0fb986b035b6bc47d5736f67b3ac14a91f71a67210a99c8d22ac5",
    ),
]
"""What is asked for an image named "cat" -> its identity: a change of one empties every deployment's caches."""


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = EngineArgs(model=str(tiny_llava), dtype="float32").create_model_config()
    return MULTIMODAL_REGISTRY.create_processor(config)


def identities(processor: Any, uuid: str, **asked: Any) -> list[str]:
    items = processor.info.parse_mm_data({"image": [photo(1)]})
    prompt = processor.info.get_tokenizer().encode("<image> x")
    uuids = {"image": [uuid]}
    return list(processor(prompt, items, uuids, hf_processor_mm_kwargs=asked)["mm_hashes"]["image"])


@pytest.mark.parametrize(("asked", "identity"), PINNED)
def test_keys_of_caches_change_on_purpose_only(processor: Any, asked: dict[str, Any], identity: str) -> None:
    assert identities(processor, "cat", foldserve=asked) == [identity]
    ItemIdentity.parse(identity)


def test_what_pixels_decide_is_part_of_the_identity(processor: Any) -> None:
    """Also under a name that a client gives; how it was decided is not: the same cells are the same tokens."""

    def of(**asked: Any) -> str:
        return identities(processor, "cat", foldserve={"method": "pixelprune"} | asked)[0]

    assert of() == of(tau=1) == of(tau=60, ratio=0) == "cat"  # of a photo nothing goes
    found = [of(tau=60), of(tau=40), of(tau=60, keep_tokens=130), of(tau=60, positions="renumber")]
    found += [of(tau=60, predictor="sliding"), of(tau=60, method="pixelprune+folder", ratio=0.9)]
    assert len(set(found)) == len(found)
    assert of(tau=60) == found[0] == of(tau=60, keep_tokens=10) == of(tau=60, method="pixelprune+folder", ratio=0.01)
    assert ["@144" in one for one in found] == [True, True, True, False, True, True]
    kept = ItemIdentity.parse(of(tau=60, method="pixelprune+fastv", decoder_ratio=0.5)).kept
    assert 2 <= kept < 72  # half of what pixels leave


def test_queries_are_told_apart_by_what_counts_of_them(processor: Any) -> None:
    def identity(query: str | None, **fields: Any) -> str:
        asked = {"method": "mmtok", "ratio": 0.5} | fields | ({} if query is None else {"query": query})
        (found,) = identities(processor, "cat", foldserve=asked)
        return found

    of_the_car = identity("the left car")
    assert identity("Where is the left car?") == of_the_car  # keywords
    assert identity("the red car") != of_the_car
    assert identity("the left car", query_form="question") != identity("Where is the left car?", query_form="question")
    assert identity("") == identity("  ") == identity(None) != of_the_car
    words = [f"word{number}" for number in range(100)]
    assert identity(" ".join(words)) == identity(" ".join(words[:70])) != identity(" ".join(words[:9]))
    assert identity("cat", ratio=0) == "cat"  # nothing is removed


def test_each_image_has_its_query_in_the_cache_too(processor: Any) -> None:
    """What was not processed before is processed with its own query, whatever is found in the cache."""
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    prompt = processor.info.get_tokenizer().encode("<image> <image> x")
    asked = [{"method": "mmtok", "ratio": 0.5, "query": query} for query in ("red car", "blue", "")]

    def sent(*reductions: dict[str, Any]) -> list[list[int] | None]:
        items = processor.info.parse_mm_data({"image": [photo(1), photo(2)]})
        made = processor(prompt, items, hf_processor_mm_kwargs={"foldserve": list(reductions)}, cache=cache)
        found = made["mm_kwargs"]["image"]
        return [item["image_query"].data.tolist() if "image_query" in item else None for item in found]

    tokenizer = processor.info.get_tokenizer()
    red, blue = (
        [token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"]]
        for words in (["red", "car"], ["blue"])
    )
    assert sent(asked[0], asked[1]) == [red, blue]
    assert sent(asked[0], asked[2]) == [red, None]
    assert sent(asked[1], asked[0]) == [blue, red]
    assert sent({"ratio": 0.5}, {}) == [None, None]


@pytest.mark.parametrize("uuid", LOOK_ALIKES)
@pytest.mark.parametrize("asked", [{}, {"foldserve": {"ratio": 0.5}}], ids=["whole", "reduced"])
def test_a_uuid_that_reads_as_ours_is_refused(processor: Any, uuid: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give the item another uuid, or none"):
        identities(processor, uuid, **asked)


@pytest.mark.parametrize("uuid", ["cat@", "cat@576 ", "5", "~fastv:", "~FastV:3", "@\N{ARABIC-INDIC DIGIT FIVE}", ""])
def test_any_other_uuid_is_taken(processor: Any, uuid: str) -> None:
    assert identities(processor, uuid or "-") == [uuid or "-"]
    assert ItemIdentity.parse(uuid) == ItemIdentity(uuid)


@given(
    base=st.lists(st.sampled_from(PIECES)).map("".join),
    length=st.none() | st.integers(0, 9999),
    decoder=st.sampled_from([(None, 0), (WITHDRAW, 0), ("fastv", 3), ("illava_decoder", 40)]),
)
def test_parsing_is_the_inverse(base: str, length: int | None, decoder: tuple[str | None, int]) -> None:
    try:
        identity = ItemIdentity(base, length, *decoder)
    except ValueError:
        assert any(base.endswith(digit) for digit in "0123456789")
        return
    assert ItemIdentity.parse(str(identity)) == identity
    under_an_adapter = ItemIdentity.parse(f"adapter:{identity}")
    assert under_an_adapter == ItemIdentity(f"adapter:{base}", length, *decoder)


@pytest.mark.parametrize(("decoder", "kept"), [("fastv", -1), ("fastv", 0), (WITHDRAW, 3), (None, 1)])
def test_counts_that_do_not_go_with_the_method(decoder: str | None, kept: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {kept} tokens"):
        ItemIdentity("3f", None, decoder, kept)
