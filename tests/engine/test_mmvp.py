"""MMVP's LLaVA: the tokens of two towers by turns, each tower's reduced by themselves, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, SiglipVisionConfig

from foldserve.reducers.item import plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.mmvp import ARCHITECTURE, MmvpFamily
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.vision import KeptTokens
from tests import mmvp_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.mmvp_reference import MmvpReference
from tests.images import photo

K = 2
PLACES = 144
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    return mmvp_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-mmvp", tiny_llava)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> MmvpReference:
    return MmvpReference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    """Chunks cut every image; prefix caching is on, as by default."""
    yield start_engine(checkpoint, max_num_batched_tokens=300, **withdrawal.configure(K, device="cpu"))


def one_image(seed: int, **reduction: object) -> Case:
    return Case(PROMPT, [photo(seed)], [reduction])


def assert_same(llm: Any, reference: MmvpReference, cases: list[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        assert tokens == want, case.reductions
        assert logprobs == pytest.approx(expected, abs=1e-4), case.reductions


def test_nothing_removed(llm: Any, reference: MmvpReference) -> None:
    """No class of vLLM's to compare with, so the reference alone says what is right."""
    assert_same(llm, reference, [one_image(1), Case(PROMPT, [photo(2)]), Case("USER: no picture ASSISTANT:")])


def test_ratios_and_methods_in_one_batch(llm: Any, reference: MmvpReference) -> None:
    """Twice: the second time from the caches."""
    cases = [one_image(1, ratio=ratio) for ratio in (0.0, 0.25, 0.5, 0.66, 0.9)]
    cases += [
        one_image(2, keep_tokens=100),
        one_image(3, method="random", ratio=0.6),
        one_image(3, method="divprune", ratio=0.66, rest="merge"),
        one_image(3, method="pool", keep_tokens=72),
        one_image(4, ratio=0.5, withdraw=True),
        one_image(4, withdraw=True),
        one_image(5, method="folder+fastv", ratio=0.5),
        Case(
            "USER: <image> and <image>\nDiffer how? ASSISTANT:",
            [photo(1), photo(2)],
            [{"method": "random", "ratio": 0.3}, {"ratio": 0.66, "withdraw": True}],
        ),
    ]
    for _ in range(2):
        assert_same(llm, reference, cases)


def test_kept_positions_are_those_of_the_whole_image(llm: Any, reference: MmvpReference) -> None:
    cases = [one_image(6, ratio=ratio, positions="keep") for ratio in (0.3, 0.66)]
    cases += [
        one_image(7, method="random", ratio=0.5, positions="keep", withdraw=True),
        Case(
            "USER: <image> and <image>\nDiffer how? ASSISTANT:",
            [photo(6), photo(7)],
            [{"ratio": 0.5, "positions": "keep"}, {"ratio": 0.66}],
        ),
    ]
    assert_same(llm, reference, cases)


def test_both_towers_decide_the_answer(checkpoint: Path, reference: MmvpReference) -> None:
    """Guards the tests above: of a reference that ignored one of them they would say nothing."""
    case = one_image(1, ratio=0.5)
    _, expected = reference.generate(case.prompt, case.images, case.reductions, 1)
    for weight in ("dino_tower.encoder.layer.2.mlp.fc2.weight", "multi_modal_projector.clip.linear_2.weight"):
        other = MmvpReference(checkpoint, K)
        other.weights[weight] = -other.weights[weight]
        _, found = other.generate(case.prompt, case.images, case.reductions, 1)
        assert found != pytest.approx(expected, abs=1e-2), weight


def test_prompts_hold_the_tokens_of_both_towers(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.multimodal import MULTIMODAL_REGISTRY

    params = SamplingParams(temperature=0, max_tokens=1)
    cases = [one_image(9), one_image(9, ratio=0.5), one_image(9, ratio=0.77), one_image(9, keep_tokens=101)]
    text = len(llm.get_tokenizer()(PROMPT)["input_ids"]) - 1
    outputs = llm.generate([case.to_vllm() for case in cases], params, use_tqdm=False)
    assert [len(output.prompt_token_ids) - text for output in outputs] == [2 * 144, 2 * 72, 2 * (144 - 110), 2 * 50]
    assert MULTIMODAL_REGISTRY.create_processor(llm.model_config).info.get_max_image_tokens() == 2 * PLACES


def test_tokens_stand_by_place_and_clips_first() -> None:
    model = SimpleNamespace(multi_modal_projector=SimpleNamespace(clip=lambda x: x, dino=lambda x: -x))
    clip = KeptTokens(torch.tensor([[3.0], [1.0], [5.0]]), torch.tensor([3, 1, 5]))
    dino = KeptTokens(torch.tensor([[1.0], [4.0], [5.0]]), torch.tensor([1, 4, 5]))
    layout = family().largest
    features = family().project(model, [clip.features, dino.features])
    grids = [grid._replace(features=own) for grid, own in zip([clip, dino], features, strict=True)]
    packed = family().pack(model, grids, plan_item(Reduction(), layout))
    assert packed.features.flatten().tolist() == [1, -1, 3, -4, 5, -5]
    assert packed.source.tolist() == [2, 3, 6, 9, 10, 11]


def family(**fields: Any) -> MmvpFamily:
    """Of a checkpoint with CLIP-L at 336 pixels, DINOv2-L, and these fields in its config.json."""
    dino = {"model_type": "dinov2", "hidden_size": 1024, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24}
    config = LlavaConfig(architectures=[ARCHITECTURE], **({"dino_config": dino} | fields))
    model_config: Any = SimpleNamespace(hf_config=config)
    found = family_of(model_config)
    assert isinstance(found, MmvpFamily)
    return found


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 1152), (0.5, 576), (0.66, 392)])
def test_counts_of_the_published_sizes(ratio: float, kept: int) -> None:
    """50 % and 66 % are those of FOLDER's table for this model."""
    assert family().largest.parts[0].geometry is family().largest.parts[0].geometry
    plan = plan_item(Reduction("folder", ratio=ratio), family().largest)
    assert (plan.encoded, plan.kept) == (1152, kept)
    assert family().read_plan(plan.to_ints()) == plan


@pytest.mark.parametrize(
    ("reduction", "param"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method"),
        ({"method": "illava", "ratio": 0.5}, "method"),
        ({"method": "downsample", "ratio": 0.5}, "method"),
        ({"keep_tokens": 3}, "keep_tokens"),
        ({"keep_tokens": 289}, "keep_tokens"),
    ],
)
def test_refused(llm: Any, reduction: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction) as caught:
        llm.generate([one_image(1, **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dino_config": None}, "config.json needs an object `dino_config` with the config of a DINOv2, not None"),
        ({"dino_config": {"model_type": "vit"}}, "config of a DINOv2, not {'model_type': 'vit'}"),
        ({"dino_config": {"hidden_size": 768}}, "must be of one width, as in the authors' code, not 1024 and 768"),
        ({"dino_config": {"hidden_size": 1024, "patch_size": 16}}, "is cut into patches of 14 and of 16 pixels"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy must be 'default', not 'full'"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer a number, not [-2, -5]"),
        ({"vision_config": SiglipVisionConfig()}, "needs CLIP as its vision_config, not 'siglip_vision_model'"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        family(**fields)
    assert message in str(error.value)


def test_the_map_shows_both_towers(llm: Any) -> None:
    ((clip, dino),) = engine_maps(llm, "<image>", [photo(3)], [{"ratio": 0.5}])
    assert (clip.region.name, dino.region.name) == ("CLIP", "DINOv2")
    assert members(clip) != members(dino)


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("MMVP", llm)
