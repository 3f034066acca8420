"""InternVL in both layouts: tiles, marks around them, and all its decoders, against vLLM's own and plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLModel
from vllm import EngineArgs, ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from foldserve.reducers.item import plan_item
from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.internvl import InternVLFamily
from foldserve.server.engine.families.registry import family_of
from tests import intern_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, FilmCase, by_uuid_alone, greedy, start_engine
from tests.engine.intern_reference import Film, InternReference, tiling
from tests.engine.keeping_reference import Answer
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.qwen_reference import folder_groups
from tests.engine.watch import encode_in_pieces, watch
from tests.images import photo

SIZES = ((300, 200), (120, 500), (168, 168), (700, 690), (640, 130))
"""(width, height): 7, 5, 1, 5 and 6 tiles, the whole image among them."""

K = 3  # of 8 layers

CUT: dict[str, Any] = {
    "max_model_len": 768,
    "max_num_batched_tokens": 600,
    "long_prefill_token_threshold": 100,
    "num_gpu_blocks_override": 28,
}
"""Chunks cut every image, and the pool has room for a few of the prompts."""


@dataclass(frozen=True)
class Served:
    """A checkpoint: in OpenGVLab's layout (`chat`) or Hugging Face's."""

    path: Path
    chat: bool
    reference: InternReference
    known: dict[int, Answer] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.chat, "limit_mm_per_prompt": {"image": 4, "video": 2}}

    def asking(self, case: Case) -> Case:
        """With the marks of this layout."""
        return case if self.chat else replace(case, prompt=case.prompt.replace("<image>", "<IMG_CONTEXT>"))

    def expect(self, case: Case) -> Answer:
        """What the reference says, once a case."""
        if id(case) not in self.known:
            films = [(case.film, case.asked)] if isinstance(case, FilmCase) else []
            known = self.reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS, films)
            self.known[id(case)] = known
        return self.known[id(case)]


def serve(folder: Path, layout: str, decoder: str) -> Served:
    plain, chat = intern_checkpoint.write(folder / "plain", decoder), layout == "chat"
    path = intern_checkpoint.write_chat(folder / "chat", plain, decoder) if chat else plain
    return Served(path, chat, InternReference(plain, K, chat=chat, most_tiles=intern_checkpoint.MOST_TILES))


@pytest.fixture(scope="module", params=["chat-qwen2", "hf-qwen3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(tmp_path_factory.mktemp(request.param), *request.param.split("-"))


@pytest.fixture(scope="module")
def llm(served: Served) -> Any:
    return start(served)


def start(served: Served) -> Any:
    """With a withdrawal layer; prefix caching is on, as by default."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 600, "long_prefill_token_threshold": 300}
    return start_engine(served.path, **served.options, **options, **withdrawal.configure(K, device="cpu"))


def ask(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case(ask("<image>\n", "what is it?"), [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case(ask("first <image> then <image>?"), images, [first, second])


def assert_same(llm: Any, served: Served, cases: Sequence[Case]) -> None:
    answers = greedy(llm, [served.asking(case) for case in cases])
    for case, (tokens, logprobs) in zip(cases, answers, strict=True):
        want, expected = served.expect(case)
        assert tokens == want, ([image.size for image in case.images], case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5)


def film(seed: int, frames: int = 3) -> Film:
    return np.stack([np.asarray(photo(seed + i, 140, 112)) for i in range(frames)])


MIXED: list[Case] = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.9, 0.66), strict=True)),
    one_image(*SIZES[0], ratio=0.77),
    one_image(*SIZES[0], ratio=0.25),
    one_image(*SIZES[1], keep_tokens=61),
    one_image(*SIZES[2], method="random", ratio=0.6),
    one_image(*SIZES[2], method="divprune", ratio=0.6),
    one_image(*SIZES[4], method="pool", ratio=0.75),
    one_image(*SIZES[1], ratio=0.6, positions="keep"),
    one_image(*SIZES[4], method="random", ratio=0.6, positions="keep"),
    two_images({"ratio": 0.5, "positions": "keep"}, {"ratio": 0.75}),
    two_images({"ratio": 0.5}, {}),
    one_image(*SIZES[0], method="base_only"),
    one_image(*SIZES[1], method="base_only+folder", ratio=0.6),
    one_image(*SIZES[1], method="base_only+random", ratio=0.6, positions="keep"),
    one_image(*SIZES[4], method="base_only", positions="keep"),
    two_images({"method": "base_only"}, {"ratio": 0.5}),
    Case(ask("hello there")),
]
"""Sizes, ratios, methods and unreduced images in one batch."""


IN_THE_DECODER = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True),
    one_image(*SIZES[0], method="base_only", withdraw=True),
    one_image(*SIZES[4], ratio=0.5, withdraw=True, positions="keep"),
    two_images({"ratio": 0.75}, {"withdraw": True}),
    two_images({"ratio": 0.5, "withdraw": True}, {}),
]
CHOSEN = [
    one_image(*SIZES[0], method="fastv", ratio=0.5),
    one_image(*SIZES[1], method="folder+fastv", ratio=0.5, decoder_ratio=0.5),
    one_image(*SIZES[4], method="folder+fastv", ratio=0.5, decoder_ratio=0.5, positions="keep"),
    one_image(*SIZES[2], method="illava_decoder", ratio=0.5),
    two_images({"ratio": 0.75}, {"method": "fastv", "ratio": 0.5}),
]
"""FastV and iLLaVA's half: the image lies in one piece, between its marks."""


def one_film(seed: int, frames: int = 3, **asked: object) -> FilmCase:
    return FilmCase(ask("see <video>\nwhat happens?"), film=film(seed, frames), asked=asked)


FILMS: list[Case] = [
    one_film(1),
    one_film(2, ratio=0.5),
    one_film(3, frames=4, ratio=0.77, positions="keep"),
    one_film(4, frames=1, method="pool", ratio=0.75),
    one_film(5, method="random", ratio=0.5, positions="keep", withdraw=True),
    one_film(6, frames=2, withdraw=True),
    FilmCase(ask("<image> and <video>?"), [photo(1, *SIZES[0])], [{"ratio": 0.5}], film=film(8), asked={"ratio": 0.75}),
    FilmCase(ask("<image> and <video>?"), [photo(1, *SIZES[0])], [{}], film=film(9), asked={"ratio": 0.5}),
]
"""A plan holds for each frame; text between frames stays."""


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, served: Served) -> None:
    for _ in range(2):
        assert_same(llm, served, MIXED + IN_THE_DECODER + CHOSEN + FILMS)


def test_a_tower_that_takes_an_image_at_a_time(llm: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one step encodes goes through the tower in pieces."""
    pieces = encode_in_pieces(llm, 260, monkeypatch)
    assert_same(llm, served, MIXED[5:12] + FILMS[:2])
    assert len(pieces) > 1


def test_ratio_0_is_vllms_own_bit_for_bit(served: Served) -> None:
    """And on the same engine reduced images in chunks, some of them preempted."""
    own = "internvl:InternVLChatModel" if served.chat else "interns1:InternS1ForConditionalGeneration"
    stock_class = f"Stock{own.partition(':')[2]}"
    ModelRegistry.register_model(stock_class, f"vllm.model_executor.models.{own}")
    plain = [served.asking(case) for case in (*(one_image(*size) for size in SIZES), two_images({}, {}), one_film(1))]
    as_stock = [replace(case, reductions=()) for case in plain[:-1]]
    stock = start_engine(
        served.path, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **served.options, **CUT
    )
    expected, (of_film,) = greedy(stock, as_stock), greedy(stock, [StockFilm(plain[-1].prompt, film=film(1))])
    del stock
    ours = start_engine(served.path, **served.options, **CUT)
    assert greedy(ours, as_stock) == expected
    assert greedy(ours, plain) == [*expected, of_film]
    with watch(ours) as seen:
        assert_same(ours, served, MIXED)
    assert seen.preempted


class StockFilm(FilmCase):
    def to_vllm(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "multi_modal_data": {"video": [self.film]}}


@pytest.mark.parametrize("decoder", ["phi3", "internlm2"])
def test_decoders_of_internvl2(tmp_path: Path, decoder: str) -> None:
    served = serve(tmp_path, "chat", decoder)
    assert_same(start(served), served, MIXED[5:9] + IN_THE_DECODER + CHOSEN)


@pytest.mark.parametrize(
    ("reduction", "param", "reason"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method", "in tower"),
        ({"method": "illava", "ratio": 0.5}, "method", "in tower"),
        ({"method": "downsample", "ratio": 0.5}, "method", "before tower"),
        ({"ratio": 0.99}, "ratio", "7 grids of 36 tokens, each reduced by itself: ratio 0.99 would remove 35"),
        ({"keep_tokens": 10}, "keep_tokens", "give 14 to 252"),
    ],
    ids=str,
)
def test_refused(llm: Any, served: Served, reduction: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidReduction, match=reason) as caught:
        llm.generate([served.asking(one_image(*SIZES[0], **reduction)).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_videos_that_are_refused(llm: Any) -> None:
    with pytest.raises(InvalidReduction, match="videos have no base tile"):
        llm.generate([one_film(1, method="base_only").to_vllm()], use_tqdm=False)
    case = one_film(1, method="fastv", ratio=0.5)
    with pytest.raises(InvalidReduction, match="text between a video's frames"):
        llm.generate([case.to_vllm()], use_tqdm=False)
    chosen_later = one_film(1, ratio=0.5).to_vllm()
    chosen_later["mm_processor_kwargs"]["num_frames"] = 2
    with pytest.raises(InvalidReduction, match="frames are to be"):
        llm.generate([chosen_later], use_tqdm=False)


def test_graphs_of_the_tower_are_refused(served: Served) -> None:
    """vLLM has them for this model, and runs them instead of what reduces."""
    with pytest.raises(ValueError, match=r"cudagraph_mm_encoder .*does not go with foldserve"):
        start_engine(served.path, compilation_config={"cudagraph_mm_encoder": True}, **served.options)


def test_the_request_may_say_how_many_tiles(llm: Any, served: Served) -> None:
    """As the operator may, with `--mm-processor-kwargs`."""
    most = "max_dynamic_patch" if served.chat else "max_patches"
    case = served.asking(one_image(*SIZES[3], ratio=0.5)).to_vllm()
    case["mm_processor_kwargs"][most] = 2
    (output,) = llm.generate([case], use_tqdm=False)
    columns, rows = tiling(*SIZES[3], intern_checkpoint.SIDE, 2)
    tiles = columns * rows + (columns * rows > 1)
    mark = llm.get_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    assert output.prompt_token_ids.count(mark) == tiles * 18


def test_an_image_that_is_known_may_come_as_its_uuid_alone(llm: Any, served: Served) -> None:
    """Its size is remembered, which its plan is made of."""
    case = served.asking(one_image(*SIZES[0], ratio=0.6))
    first, second = by_uuid_alone(llm, case)
    assert second.prompt_token_ids == first.prompt_token_ids
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    unknown = case.to_vllm() | {"multi_modal_uuids": {"image": ["another"]}, "multi_modal_data": {"image": [None]}}
    with pytest.raises(InvalidReduction, match="send the image with its uuid"):
        llm.generate([unknown], use_tqdm=False)


@pytest.fixture(scope="module")
def info(served: Served) -> Any:
    """vLLM's processing info, and the family, with published tiles: 448 pixels a side, up to 12 of them."""
    model_config = EngineArgs(model=str(served.path), trust_remote_code=served.chat).create_model_config()
    vision = model_config.hf_config.vision_config
    vision.image_size, vision.patch_size = (448, 14) if served.chat else ([448, 448], [14, 14])
    model_config.multimodal_config.mm_processor_kwargs = {"max_dynamic_patch" if served.chat else "max_patches": 12}
    found = MULTIMODAL_REGISTRY.get_processing_info(model_config)
    if not served.chat:
        processor = found.get_hf_processor()
        processor.image_processor.size, processor.image_seq_length = {"height": 448, "width": 448}, 256
    return found, family_of(model_config)


def test_counts_of_published_tiles(info: Any) -> None:
    """5,000 sizes."""
    vllm, family = info
    rng = random.Random(0)
    for _ in range(5000):
        size = ImageSize(rng.randint(10, 4000), rng.randint(10, 4000))
        layout = family.layout(family.shape(SimpleNamespace(get_image_size=lambda _, size=size: size), 0, vllm, {}))
        columns, rows = tiling(size.width, size.height, 448, 12)
        assert layout.tokens == 256 * (columns * rows + (columns * rows > 1)), size
        assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)
    assert family.sizes_matter and family.largest.tokens == vllm.get_max_image_tokens() == 3328
    assert plan_item(Reduction(first="base_only"), family.largest).kept == 256
    assert plan_item(Reduction(first="base_only"), family.layout((1,))).is_identity


def test_published_tiles_on_the_meta_device() -> None:
    """transformers' defaults are those of InternVL3: a tile of 448 pixels gives 256 tokens."""
    config = InternVLConfig()
    with torch.device("meta"):
        model = InternVLModel(config)
        features = model.get_image_features(torch.empty(13, 3, 448, 448), return_dict=True).pooler_output
    model_config: Any = SimpleNamespace(hf_config=config)
    family = InternVLFamily.of(model_config)
    assert family is not None
    assert family.layout((13,)).tokens == features.shape[0] * features.shape[1] == 3328
    assert family.layout((1,)).tokens == 256


def test_the_map_shows_each_tile_and_then_the_whole_image(llm: Any, served: Served) -> None:
    reference, image = served.reference, photo(14, *SIZES[0])
    prompt = served.asking(Case("<image>")).prompt
    (maps,) = engine_maps(llm, prompt, [image], [{"ratio": 0.5}])
    with torch.inference_mode():
        tiles = reference.model.model.get_image_features(reference.pixels(image), return_dict=True).pooler_output
    removed = reference.tile.tokens // 2
    assert [members(found) for found in maps] == [
        [sorted(own) for _, own in folder_groups(tile.numpy(), removed)] for tile in tiles
    ]
    columns, rows = tiling(image.width, image.height, reference.side, reference.most_tiles)
    assert [found.region.name for found in maps] == [*(f"tile {i + 1}" for i in range(columns * rows)), "base"]
    assert maps[1].region.box == pytest.approx((1 / columns, 0, 2 / columns, 1 / rows))
    (base_alone,) = engine_maps(llm, prompt, [image], [{"method": "base_only+folder", "ratio": 0.5}])
    assert [set(found.group) for found in base_alone[:-1]] == [{-1}] * (columns * rows)
    assert members(base_alone[-1]) == members(maps[-1])


def test_the_map_shows_each_frame(llm: Any, served: Served) -> None:
    pictures = film(40)
    (maps,) = engine_maps(llm, "<video>", [pictures], [{"ratio": 0.5}], "video")
    assert [found.region.name for found in maps] == ["frame 1", "frame 2", "frame 3"]
    frames = [engine_maps(llm, "<video>", [pictures[i : i + 1]], [{"ratio": 0.5}], "video")[0][0] for i in range(3)]
    assert [members(found) for found in maps] == [members(found) for found in frames]
    assert members(maps[0]) != members(maps[1])


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("InternVL", llm)
