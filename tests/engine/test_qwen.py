"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size under M-RoPE, against vLLM's own and plain transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import EngineArgs, ModelRegistry, SamplingParams
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from foldserve.reducers.downsample import grid_for
from foldserve.reducers.item import plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import qwen_tower, withdrawal
from foldserve.server.engine.families.registry import FAMILY_CLASSES, family_of
from foldserve.server.engine.mrope import GridPositions
from foldserve.server.engine.processor import FoldProcessor
from tests import qwen_checkpoint
from tests.engine import qwen_tower_reference
from tests.engine.conftest import MAX_TOKENS, Case, FilmCase, greedy, start_engine
from tests.engine.cuda.processes import run
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.qwen_reference import Answer, Film, QwenReference, folder_groups
from tests.engine.watch import forget, watch
from tests.images import page, photo
from tests.qwen_checkpoint import IMAGE, VIDEO
from tests.reducers import naive

SIZES = ((280, 196), (168, 336), (256, 256))
"""(width, height)"""

K = 4  # of 8 layers; Qwen3-VL's first three add deepstack levels
QUERY = "How many people are waiting for the bus, and what does the sign behind them say? Take your time."
"""Of more than 64 tokens."""
KEEP, RENUMBER = {"positions": "keep"}, {"positions": "renumber"}

CUT: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 300,
    "long_prefill_token_threshold": 40,
    "num_gpu_blocks_override": 24,
}
"""Chunks cut every image, and the pool has room for a few of the prompts."""


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> QwenReference:
    return QwenReference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    """With a withdrawal layer; prefix caching is on, as by default."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 300, "max_num_seqs": 8}
    return start_engine(checkpoint, **options, **withdrawal.configure(K, device="cpu"))


def ask(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case(ask(IMAGE, "what is it?"), [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case(ask("first ", IMAGE, "then", IMAGE, "?"), images, [first, second])


BEFORE_THE_DECODER = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size in SIZES[:2] for ratio in (0.5, 0.75)),
    *(one_image(*size, ratio=ratio, positions="renumber") for size in SIZES[:2] for ratio in (0.5, 0.75)),
    two_images({"ratio": 0.5, **KEEP}, {"ratio": 0.75, **RENUMBER}),
    two_images({}, {"ratio": 0.75}),
    one_image(*SIZES[0], method="random", ratio=0.6),
    one_image(*SIZES[1], method="random", ratio=0.6, positions="renumber"),
    one_image(*SIZES[2], method="pool", ratio=0.7),
    one_image(*SIZES[0], method="pool", ratio=0.7, positions="keep"),
    one_image(*SIZES[0], keep_tokens=10),
    one_image(*SIZES[1], keep_tokens=1000),  # more than it has: all stay
    one_image(*SIZES[0], method="downsample", ratio=0.5),
    one_image(*SIZES[1], method="downsample", ratio=0.9),  # fewer pixels than an image may have of its own
    one_image(*SIZES[1], method="downsample", ratio=0.75, positions="keep"),
    one_image(*SIZES[0], method="divprune", ratio=0.6),
    one_image(*SIZES[1], method="divprune", ratio=0.6, geometry="centered", positions="renumber"),
    two_images({"method": "cdpruner", "ratio": 0.8}, {"method": "divprune", "ratio": 0.5, "rest": "merge"}),
    two_images({"method": "downsample", "ratio": 0.66}, {"ratio": 0.5}),
    two_images({}, {"method": "downsample", "ratio": 0.5}),
    one_image(*SIZES[0], method="mmtok", ratio=0.6, query=QUERY),
    one_image(*SIZES[1], method="mmtok", ratio=0.6, query=QUERY, positions="renumber"),
    two_images({"method": "mmtok", "ratio": 0.5}, {"method": "mmtok", "ratio": 0.5, "query": QUERY}),
    one_image(*SIZES[0], method="mmtok", ratio=0.5),  # no query at all in its batch
    Case(ask("hello there")),
]
IN_THE_DECODER = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True, positions="renumber"),
    two_images({"ratio": 0.75}, {"withdraw": True}),
    two_images({"ratio": 0.5, "withdraw": True}, {}),
    one_image(*SIZES[0], method="fastv", ratio=0.5),
    one_image(*SIZES[1], method="folder+fastv", ratio=0.5, decoder_ratio=0.5),
    one_image(*SIZES[0], method="folder+fastv", ratio=0.5, decoder_ratio=0.5, positions="renumber"),
    one_image(*SIZES[1], method="illava_decoder", ratio=0.5),
]


def one_page(width: int, height: int, **reduction: object) -> Case:
    return Case(ask(IMAGE, "what does it say?"), [page(width, width, height, noise=2)], [reduction])


PRUNED: dict[str, Any] = {"method": "pixelprune", "tau": 3}
BY_PIXELS = [
    *(one_page(*size, **PRUNED) for size in SIZES),
    one_page(*SIZES[0], **PRUNED, predictor="sliding", positions="renumber"),
    one_page(*SIZES[1], method="pixelprune"),  # the noise leaves nothing that is exactly alike
    one_page(*SIZES[2], **PRUNED | {"method": "pixelprune+folder"}, ratio=0.75),
    one_page(*SIZES[2], **PRUNED | {"method": "pixelprune+folder"}, ratio=0.01),  # fewer stay of themselves
    one_page(*SIZES[2], **PRUNED | {"method": "pixelprune+folder"}, ratio=0.75, positions="renumber"),
    one_page(*SIZES[0], **PRUNED, withdraw=True),
    Case(
        ask("first ", IMAGE, "then", IMAGE, "and", IMAGE, "?"),
        [page(1, *SIZES[0]), photo(2, *SIZES[1]), page(3, *SIZES[0])],
        [PRUNED, {"ratio": 0.5}, PRUNED],
    ),
]


BEHIND_PIXELS: dict[str, dict[str, Any]] = {
    "divprune": PRUNED | {"method": "pixelprune+divprune", "ratio": 0.75},
    "mmtok": PRUNED | {"method": "pixelprune+mmtok", "ratio": 0.75, "query": QUERY},
}
PIXELS_FIRST = [
    *(one_page(*SIZES[2], **asked) for asked in BEHIND_PIXELS.values()),
    one_page(*SIZES[0], **BEHIND_PIXELS["divprune"], positions="renumber"),
    one_page(*SIZES[0], **BEHIND_PIXELS["mmtok"], positions="renumber"),
    Case(
        ask("first ", IMAGE, "then", IMAGE, "and", IMAGE, "?"),
        [page(1, *SIZES[0]), photo(2, *SIZES[1]), page(3, *SIZES[2])],
        [BEHIND_PIXELS["mmtok"], {"ratio": 0.5}, BEHIND_PIXELS["divprune"]],
    ),
]


LAYERS = {"qwen2_vl": [0, 1], "qwen2_5_vl": [1, 3], "qwen3_vl": [1, 2]}
"""In which iLLaVA may work: Qwen2.5-VL's that see no windows; Qwen3-VL's taps are before, between and behind them."""


@pytest.fixture(scope="module")
def in_the_tower(checkpoint: Path) -> list[Case]:
    layers = LAYERS[checkpoint.name]
    one: dict[str, Any] = {"method": "illava", "layers": layers[:1]}
    two: dict[str, Any] = {"method": "illava"} | ({} if checkpoint.name == "qwen2_5_vl" else {"layers": layers})
    alike = [photo(3, *SIZES[0]), photo(4, *SIZES[0]), photo(5, *SIZES[1])]
    return [
        one_image(*SIZES[0], **one, ratio=0.5),
        one_image(*SIZES[1], **two, ratio=0.7),
        one_image(*SIZES[2], **two, ratio=0.5, positions="renumber"),
        one_image(*SIZES[1], **two, keep_tokens=9),
        one_image(*SIZES[0], method="tome", ratio=0.6),
        one_image(*SIZES[1], method="tome", ratio=0.4, positions="renumber"),
        one_image(*SIZES[0], method="visionzip", ratio=0.6),
        one_image(*SIZES[1], method="visionzip", ratio=0.4, positions="renumber"),
        one_image(*SIZES[2], method="visionzip", keep_tokens=6),
        two_images({"method": "visionzip", "ratio": 0.7}, {**one, "ratio": 0.5}),
        two_images({**one, "ratio": 0.5}, {**two, "ratio": 0.3, **RENUMBER}),
        two_images({**two, "ratio": 0.5}, {}),
        two_images({"ratio": 0.5}, {**one, "ratio": 0.9}),
        Case(ask(IMAGE, IMAGE, IMAGE, "?"), alike, [two | {"ratio": 0.5}] * 3),
        one_image(*SIZES[0], **two, ratio=0.5, decoder=True, decoder_ratio=0.4),
    ]


@pytest.fixture(scope="module")
def expect(reference: QwenReference) -> Callable[[Case], Answer]:
    """What the reference says, once a case."""
    known: dict[int, tuple[Case, Answer]] = {}  # which keeps the case: else another one might get its number

    def generate(case: Case) -> Answer:
        if id(case) not in known:
            films = [(case.film, case.asked)] if isinstance(case, FilmCase) else []
            known[id(case)] = (
                case,
                reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS, films),
            )
        return known[id(case)][1]

    return generate


def assert_same(llm: Any, expect: Callable[[Case], Answer], cases: Sequence[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = expect(case)
        assert tokens == want, ([image.size for image in case.images], case.reductions, getattr(case, "asked", None))
        assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, expect: Callable[[Case], Answer]) -> None:
    for _ in range(2):
        assert_same(llm, expect, BEFORE_THE_DECODER + IN_THE_DECODER)


def test_in_the_tower_beside_others(llm: Any, expect: Callable[[Case], Answer], in_the_tower: list[Case]) -> None:
    assert_same(llm, expect, in_the_tower + BEFORE_THE_DECODER[:5])


def test_pixels_decide_what_enters_the_tower(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """Beside others, and again from the caches."""
    for _ in range(2):
        assert_same(llm, expect, BY_PIXELS + BEFORE_THE_DECODER[:5])


def test_pixels_decide_what_others_choose_from(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """Alone, then beside others, some of which are in the caches by then."""
    for case in PIXELS_FIRST:
        assert_same(llm, expect, [case])
    assert_same(llm, expect, PIXELS_FIRST + BY_PIXELS[:6] + BEFORE_THE_DECODER[:5])


def test_ratio_0_is_vllms_own_bit_for_bit(
    checkpoint: Path, expect: Callable[[Case], Answer], films: list[FilmCase]
) -> None:
    """And on the same engine reduced images and videos in chunks, some of them preempted."""
    (architecture,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    module = FAMILY_CLASSES[architecture].model.partition(".")[0]
    stock_class = f"Stock{architecture}"
    ModelRegistry.register_model(stock_class, f"vllm.model_executor.models.{module}:{architecture}")
    plain = [one_image(*size) for size in SIZES] + [two_images({}, {})]
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **CUT)
    expected = greedy(stock, [replace(case, reductions=()) for case in plain])
    del stock
    ours = start_engine(checkpoint, **CUT)
    assert greedy(ours, [replace(case, reductions=()) for case in plain]) == expected
    assert greedy(ours, plain) == expected
    with watch(ours) as seen:
        assert_same(ours, expect, [*BEFORE_THE_DECODER, *films[-2:]])
    assert seen.preempted


CACHED: list[dict[str, Any]] = [
    {"ratio": 0.5},
    {"ratio": 0.5, **RENUMBER},
    {"ratio": 0.5, "withdraw": True},
    {"method": "pixelprune", "tau": 35},
]
COVERING: dict[str, Any] = {"method": "mmtok", "ratio": 0.5, "query": "what is it?"}
BLOCK, FEW = 32, 3


def first_computed(llm: Any, reference: QwenReference, case: Case) -> tuple[int, int]:
    """The token with which a prompt's computation begins, and images encoded; the answer is the reference's."""
    want, expected = reference.generate(case.prompt, case.images, case.reductions, FEW)
    with watch(llm) as seen:
        ((tokens, logprobs),) = greedy(llm, [case], FEW)
    assert tokens == want, (case.prompt, case.reductions)
    assert logprobs == pytest.approx(expected, abs=2e-5)
    ((start, _), *_) = next(iter(seen.chunks.values()))
    return start, seen.encoded


@pytest.mark.parametrize("reduction", CACHED, ids=str)
def test_prefixes_that_end_inside_an_image_and_behind_it(
    llm: Any, reference: QwenReference, reduction: dict[str, Any]
) -> None:
    """Inside, with the encoder's cache and without: positions and deepstack levels are those of the image's rest."""

    def about(question: str) -> Case:
        return Case(ask(IMAGE, question), [image], [reduction])

    forget(llm)
    image, long = photo(7, *SIZES[0]), "behind it, what is it that one sees, if anything?"
    (output,) = llm.generate([about("who?").to_vllm()], use_tqdm=False)
    tokens, mark = output.prompt_token_ids, llm.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    begin, end = tokens.index(mark), len(tokens) - tokens[::-1].index(mark)
    for question, encoded in (("is it?", 0), ("can it?", 1), (long, 0)):
        if encoded:
            llm.llm_engine.reset_encoder_cache()
        start, images = first_computed(llm, reference, about(question))
        assert begin < start < end and images == encoded
    llm.llm_engine.reset_encoder_cache()  # else its being skipped would show nothing
    start, images = first_computed(llm, reference, about(long))
    assert start >= end and images == 0


@pytest.mark.parametrize("reduction", [*CACHED, COVERING], ids=str)
def test_later_turns_of_a_conversation(llm: Any, reference: QwenReference, reduction: dict[str, Any]) -> None:
    """They read from the cache what was said before, answers included; an image is encoded once."""
    forget(llm)
    letters = llm.get_tokenizer().convert_tokens_to_ids(list("etaoins"))
    says = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=letters)
    prompt, known = "", 0
    images: list[Any] = []
    asked: list[dict[str, Any]] = []
    for shown, question in (([photo(8, *SIZES[0])], "what is it?"), ([photo(9, *SIZES[1])], "and this?"), ([], "why?")):
        prompt += ask(IMAGE * len(shown), question)
        images += shown
        asked += [reduction] * len(shown)
        case = Case(prompt, images, asked)
        llm.llm_engine.reset_encoder_cache()
        assert first_computed(llm, reference, case) == (known // BLOCK * BLOCK, len(shown))
        (output,) = llm.generate([case.to_vllm()], says, use_tqdm=False)
        known = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
        prompt += f"{output.outputs[0].text}<|im_end|>\n"


@pytest.fixture(scope="module")
def info(checkpoint: Path) -> Any:
    """vLLM's processing info, and the family."""
    model_config = EngineArgs(model=str(checkpoint)).create_model_config()
    return MULTIMODAL_REGISTRY.get_processing_info(model_config), family_of(model_config)


def test_an_image_has_as_many_tokens_as_hugging_face_says(info: Any) -> None:
    """5,000 sizes, some with bounds of the request's own."""
    vllm, family = info
    process, rng = vllm.get_image_processor(), random.Random(0)
    for _ in range(5000):
        size = ImageSize(rng.randint(28, 3000), rng.randint(28, 3000))
        kwargs = {"max_pixels": rng.randint(64**2, 512**2)} if rng.random() < 0.3 else {}
        images = SimpleNamespace(get_image_size=lambda index, size=size: size)
        layout = family.layout(family.shape(images, 0, vllm, kwargs))
        patches = process.get_number_of_image_patches(size.height, size.width, kwargs)
        assert layout.tokens == patches // 4, (size, kwargs)
        assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)


def test_images_alone_are_processed_by_the_image_part_alone(checkpoint: Path) -> None:
    """With the same result; an operator's options go to all parts."""

    def made(options: dict[str, Any] | None) -> tuple[Any, Any]:
        """Ours, and vLLM's way."""
        args = EngineArgs(model=str(checkpoint), mm_processor_kwargs=options)
        processor = MULTIMODAL_REGISTRY.create_processor(args.create_model_config())
        items = processor.info.parse_mm_data({"image": [photo(i, *size) for i, size in enumerate(SIZES)]})
        return processor._apply_stock(items, {}), FoldProcessor._apply_stock(processor, items, {})

    for options in (None, {"size": {"shortest_edge": 4096, "longest_edge": 128 * 128}}):
        ours, whole = made(options)
        assert ("input_ids" in whole) == (checkpoint.name == "qwen3_vl")  # of a text that nobody reads
        assert ("input_ids" in ours) == ("input_ids" in whole and options is not None)
        assert torch.equal(ours["pixel_values"], whole["pixel_values"])
        assert torch.equal(ours["image_grid_thw"], whole["image_grid_thw"])


def test_the_largest_image(info: Any) -> None:
    vllm, family = info
    assert family.sizes_matter and family.largest.tokens == vllm.get_max_image_tokens() == 256


@pytest.mark.parametrize(
    ("reduction", "param"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method"),
        ({"method": "turbo", "ratio": 0.5}, "method"),
        ({"method": "visionzip", "ratio": 0.5, "class_token": True}, "class_token"),
        ({"method": "vidcom2", "ratio": 0.5}, "method"),
        ({"ratio": 0.99}, "ratio"),
        ({"method": "pool", "ratio": 0.99}, "ratio"),
    ],
    ids=str,
)
def test_refused(llm: Any, reduction: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction) as caught:
        llm.generate([one_image(*SIZES[0], **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_layers_in_which_tokens_may_go(info: Any, checkpoint: Path) -> None:
    _, family = info
    expected = {"qwen2_vl": (0, 1, 2), "qwen2_5_vl": (1, 3), "qwen3_vl": (0, 1, 2, 3)}
    assert family.largest.parts[0].geometry.reducing_layers == expected[checkpoint.name]


def test_a_backend_with_lengths_of_its_own_is_refused_in_the_tower(checkpoint: Path) -> None:
    args = EngineArgs(model=str(checkpoint), mm_encoder_attn_backend=AttentionBackendEnum.FLASHINFER)
    family = family_of(args.create_model_config())
    assert family is not None
    with pytest.raises(InvalidReduction, match="works in tower, where this model can't be reduced"):
        plan_item(Reduction("tome", ratio=0.5), family.largest)


def test_blocks_fall_by_the_plan(llm: Any) -> None:
    case = one_image(*SIZES[0], ratio=0.5)
    tokenizer = llm.get_tokenizer()
    text = len(tokenizer(case.prompt)["input_ids"]) - 1
    (whole,), (output,) = (
        llm.generate([each.to_vllm()], use_tqdm=False) for each in (replace(case, reductions=()), case)
    )
    tokens = len(whole.prompt_token_ids) - text
    assert len(output.prompt_token_ids) == text + tokens - tokens // 2


def film(seed: int, pictures: int = 6) -> Film:
    frames = np.stack([np.asarray(photo(seed + i, 140, 112)) for i in range(pictures)])
    known = {"fps": 2.0, "duration": pictures / 2, "total_num_frames": pictures, "video_backend": "opencv"}
    return frames, {**known, "frames_indices": list(range(pictures)), "do_sample_frames": False}


def one_film(seed: int, **asked: object) -> FilmCase:
    return FilmCase(ask("see ", VIDEO, "what happens?"), film=film(seed), asked=asked)


FILMS = [
    one_film(1),
    one_film(2, ratio=0.5),
    one_film(3, ratio=0.5, positions="renumber"),
    one_film(4, method="pool", ratio=0.6),
    one_film(5, method="pool", ratio=0.6, positions="keep"),
    one_film(6, withdraw=True),
    one_film(10, method="tome", ratio=0.3),
    one_film(14, method="visionzip", ratio=0.5),
    replace(one_film(11), film=film(11, pictures=5)),  # a frame is two pictures
    replace(one_film(13, ratio=0.5), film=film(13, pictures=5)),
    replace(one_film(12, ratio=0.5), film=film(12, pictures=2)),  # one frame: no text between any
    one_film(7, ratio=0.5, withdraw=True),
    FilmCase(
        ask(VIDEO, "and", IMAGE, "?"), [photo(1, *SIZES[0])], [{"ratio": 0.5}], film=film(8), asked={"ratio": 0.75}
    ),
    FilmCase(ask(IMAGE, "and", VIDEO, "?"), [photo(1, *SIZES[0])], [{"ratio": 0.5}], film=film(9)),
]

ACROSS_FRAMES = [
    one_film(1, method="evs", ratio=0.5),
    one_film(2, method="vidcom2", ratio=0.6),
    one_film(1, method="evs", ratio=0.6, positions="renumber"),
    one_film(2, method="vidcom2", ratio=0.8, positions="renumber"),
    one_film(3, method="evs+fastv", ratio=0.3, decoder_ratio=0.5),
    one_film(3, method="vidcom2", ratio=0.5, withdraw=True),
    replace(one_film(12, method="vidcom2", ratio=0.5), film=film(12, pictures=2)),
    FilmCase(
        ask(VIDEO, "and", IMAGE, "?"),
        [photo(1, *SIZES[0])],
        [{"ratio": 0.5}],
        film=film(8, pictures=9),
        asked={"method": "vidcom2", "ratio": 0.75},
    ),
    FilmCase(
        ask(IMAGE, "and", VIDEO, "?"),
        [photo(1, *SIZES[0])],
        [{"ratio": 0.5, **RENUMBER}],
        film=film(9),
        asked={"method": "evs", "ratio": 0.5},
    ),
]
"""Where no text stands between a video's frames."""


@pytest.fixture(scope="module")
def films(checkpoint: Path) -> list[FilmCase]:
    return FILMS if checkpoint.name == "qwen3_vl" else [*FILMS, *ACROSS_FRAMES]


def test_videos(llm: Any, expect: Callable[[Case], Answer], films: list[FilmCase]) -> None:
    """Twice: the second time from the caches. A plan holds for each frame, or the whole; text between frames stays."""
    for _ in range(2):
        assert_same(llm, expect, films)


def test_videos_that_are_refused(llm: Any, reference: QwenReference) -> None:
    refusals: list[tuple[FilmCase, str]] = [
        (one_film(1, method="downsample", ratio=0.5), "makes images smaller, not videos"),
        (one_film(1, ratio=0.999), "have to stay"),
    ]
    if not reference.config.model_type.startswith("qwen3"):
        refusals += [
            (one_film(1, method="evs", ratio=0.7), "the first frame of a video, 20 of 60 tokens .* at most 0.6666")
        ]
    else:
        pictures, metadata = film(1)
        sampled = replace(one_film(1, ratio=0.5), film=(pictures, {**metadata, "do_sample_frames": True}))
        refusals += [
            (one_film(1, method="fastv", ratio=0.5), "text between a video's frames"),
            (
                one_film(1, method="evs", ratio=0.5),
                "text between a video's frames, so that the prompt needs the numbers",
            ),
            (sampled, "frames are to be"),
        ]
    for case, message in refusals:
        with pytest.raises(InvalidReduction, match=message):
            llm.generate([case.to_vllm()], use_tqdm=False)


class WrongRow(GridPositions):
    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        return super().places(feature, source) + torch.tensor([[0], [1], [0]])


class WrongGrid(GridPositions):
    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        grid = self._grids[feature.mm_position.offset]
        return grid._replace(columns=grid.columns - 1).places(source)


@pytest.mark.parametrize("wrong", [WrongRow, WrongGrid])
def test_the_reference_tells_wrong_positions(
    llm: Any, expect: Callable[[Case], Answer], wrong: type[GridPositions], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    monkeypatch.setattr(model.family, "position_map", lambda features: wrong.of(model.family, features))
    forget(llm)
    assert_different(llm, expect)


@pytest.mark.parametrize("checkpoint", ["qwen3_vl"], indirect=True)
def test_the_reference_tells_deepstack_levels_of_other_tokens(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or their absence: FOLDER then looks at all columns, and merges other tokens."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    monkeypatch.setattr(type(model.family), "deciding_columns", lambda family, model: None)
    forget(llm)
    assert_different(llm, expect)


class StaleTables(qwen_tower.TowerPass):
    """Rotary tables of the tokens that were in the places of those that are left."""

    def _lay_out(self) -> None:
        source, self._source = self._source, torch.arange(self._source.shape[1]).expand_as(self._source)
        super()._lay_out()
        tables, self._source = self._tables, source
        super()._lay_out()
        self._tables = tables


class StaleWindows(qwen_tower.TowerPass):
    """Windows as long as they were, up to the end."""

    _before: torch.Tensor

    def _lay_out(self) -> None:
        super()._lay_out()
        if self._windows is not None:
            ends, most = self._cut
            every = ends if not self._is_reduced else self._before
            self._before, self._cut = every, (every.clamp(max=int(ends[-1])), most)


class LevelsLeftBehind(qwen_tower.TowerPass):
    """Deepstack levels of the tokens that stay, without those that go."""

    def _reduce(self, attention: Any, steps: tuple[int, ...]) -> None:
        levels, self._levels, source = self._levels, [], self._source
        super()._reduce(attention, steps)
        places = [torch.searchsorted(old, new) for old, new in zip(source.contiguous(), self._source, strict=True)]
        self._levels = [torch.stack([own[place] for own, place in zip(level, places, strict=True)]) for level in levels]


class RotatedKeys(qwen_tower.TowerPass):
    """Keys with their positions in them."""

    def _attend(self, *args: Any) -> tuple[torch.Tensor, Any]:
        hidden, attention = super()._attend(*args)
        return hidden, replace(attention, unrotated_key=None)


class WindowByWindow(qwen_tower.TowerPass):
    """The last layer's tokens in the order of their windows."""

    def _into_raster_order(self) -> None:
        pass


WRONG_PASSES: dict[str, dict[type[qwen_tower.TowerPass], str]] = {
    "qwen2_vl": {StaleTables: "illava", RotatedKeys: "visionzip"},
    "qwen2_5_vl": {
        StaleTables: "illava",
        StaleWindows: "illava",
        RotatedKeys: "visionzip",
        WindowByWindow: "visionzip",
    },
    "qwen3_vl": {StaleTables: "illava", LevelsLeftBehind: "illava", RotatedKeys: "visionzip"},
}
"""And the method that shows it."""


def test_the_reference_tells_a_wrong_pass(
    llm: Any,
    checkpoint: Path,
    expect: Callable[[Case], Answer],
    in_the_tower: list[Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong, method in WRONG_PASSES[checkpoint.name].items():
        monkeypatch.setattr(qwen_tower, "TowerPass", wrong)
        forget(llm)
        assert_different(llm, expect, next(case for case in in_the_tower if case.reductions[0]["method"] == method))


def assert_different(llm: Any, expect: Callable[[Case], Answer], case: Case = BEFORE_THE_DECODER[3]) -> None:
    ((tokens, logprobs),) = greedy(llm, [case])
    want, expected = expect(case)
    assert tokens != want or logprobs != pytest.approx(expected, abs=1e-3)
    forget(llm)


def test_a_mixture_of_experts_and_published_configs() -> None:
    """In a process of their own: vLLM makes the groups that experts are split over with a process's first engine."""
    run("tests/engine/qwen_experts.py", "tests/engine/qwen_published.py")


@pytest.mark.parametrize("checkpoint", ["qwen2_5_vl"], indirect=True)
def test_vllms_own_pruning_of_videos_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--video-pruning-rate does not go with foldserve"):
        start_engine(checkpoint, video_pruning_rate=0.5)


def test_the_map_says_what_is_in_each_token(llm: Any, checkpoint: Path, reference: QwenReference) -> None:
    image = photo(12, *SIZES[0])
    (rows, columns), levels = reference._grid(image), reference._encode(image)[0]
    n, layers = rows * columns, LAYERS[checkpoint.name]
    pixels = reference._encode(image)[2]
    one: dict[str, Any] = {"method": "illava", "ratio": 0.5, "layers": layers[:1]}
    cases: list[dict[str, Any]] = [one, {"method": "tome", "ratio": 0.6}, {"ratio": 0.6}]
    for asked in cases:
        ((found,),) = engine_maps(llm, IMAGE, [image], [asked])
        removed = int(n * asked["ratio"])
        if "method" in asked:
            visual = reference.model.model.visual
            with torch.inference_mode():
                left = qwen_tower_reference.encode(visual, pixels, (rows, columns), removed, asked)
            expected = [sorted(row * columns + column for row, column in token.held) for token in left]
            source = [token.at[0] * columns + token.at[1] for token in left]
        else:
            groups = folder_groups(levels[0].detach().numpy(), removed)
            expected, source = [sorted(own) for _, own in groups], [first for first, _ in groups]
        assert members(found) == expected, asked
        assert list(found.source) == source, asked
        assert (found.region.rows, found.region.columns) == (rows, columns)


@pytest.mark.parametrize("checkpoint", ["qwen2_5_vl"], indirect=True)
def test_the_map_of_a_video_whose_frames_are_one_grid(llm: Any, reference: QwenReference) -> None:
    pictures, _ = film(14)
    made = reference.processor.video_processor(videos=[pictures], do_sample_frames=False, return_tensors="pt")
    with torch.inference_mode():
        whole = reference.model.model.visual(made["pixel_values_videos"], made["video_grid_thw"]).pooler_output
    n = len(whole) // 3
    for method, choose in naive.ACROSS_FRAMES.items():
        (frames,) = engine_maps(llm, VIDEO, [film(14)], [{"method": method, "ratio": 0.6}], "video")
        assert [frame.region.name for frame in frames] == ["frame 1", "frame 2", "frame 3"]
        found = [f * n + token for f, frame in enumerate(frames) for (token,) in members(frame)]
        assert found == choose(whole, 3, len(whole) - int(len(whole) * 0.6))


def test_the_map_of_a_smaller_image(llm: Any, reference: QwenReference) -> None:
    image = photo(13, *SIZES[1])
    rows, columns = reference._grid(image)
    asked = {"method": "downsample", "ratio": 0.5}
    ((found,),) = engine_maps(llm, IMAGE, [image], [asked])
    less, fewer = grid_for(rows * columns - rows * columns // 2, (rows, columns))
    assert [int(group) for group in found.group] == [
        int((y + 0.5) * less / rows) * fewer + int((x + 0.5) * fewer / columns)
        for y in range(rows)
        for x in range(columns)
    ]


def test_the_page_says_which_methods_work(checkpoint: Path, llm: Any) -> None:
    assert_documented(
        {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}[checkpoint.name], llm
    )
