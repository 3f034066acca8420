"""Every method in a real engine against plain PyTorch, on a CLIP tower and on a SigLIP tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foldserve.reducers import METHODS, Stage
from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.method import AcrossFrames
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan
from tests.engine.conftest import MAX_TOKENS, Case, greedy
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import README, assert_documented, between_marks, in_short
from tests.engine.reference import Reference
from tests.images import photo

Answer = tuple[list[int], list[float]]
Expect = Callable[[Case], Answer]

ANY_TOWER: list[dict[str, object]] = [
    {"method": "folder", "ratio": 0.66},
    {"method": "illava", "ratio": 0.5, "layers": [0, 2]},
    {"method": "illava", "keep_tokens": 10, "layers": [1]},
    {"method": "tome", "ratio": 0.5},
    {"method": "tome", "ratio": 0.01},
    {"method": "pool", "ratio": 0.75},
    {"method": "pool", "ratio": 0.5, "window": "row"},
    {"method": "random", "ratio": 0.5},
    {"method": "downsample", "ratio": 0.5},
    {"method": "visionzip", "ratio": 0.7},
    {"method": "pixelprune", "tau": 60, "positions": "renumber"},
    {"method": "pixelprune+folder", "tau": 30, "ratio": 0.7, "positions": "renumber"},
    {"method": "pixelprune+divprune", "tau": 30, "ratio": 0.75, "positions": "renumber"},
    {"method": "pixelprune+mmtok", "tau": 30, "ratio": 0.75, "query": "Where is it?", "positions": "renumber"},
    {"method": "divprune", "ratio": 0.66},
    {"method": "divprune", "ratio": 0.75, "rest": "merge"},
    {"method": "divprune", "ratio": 0.5, "geometry": "centered"},
    {"method": "cdpruner", "ratio": 0.8},
    {"method": "mmtok", "ratio": 0.5, "query": "What is the color of the car on the left?"},
    {"method": "mmtok", "ratio": 0.5, "query": "Where is it?"},
    {"method": "mmtok", "keep_tokens": 20},
]
WITH_CLASS_TOKEN: list[dict[str, object]] = [
    {"method": "folder_cls", "ratio": 0.66},
    {"method": "turbo", "ratio": 0.5},
    {"method": "prumerge", "ratio": 0.75},
    {"method": "visionzip", "ratio": 0.7, "class_token": False},
    {"method": "visionzip", "keep_tokens": 6},
]
REDUCTIONS = {"clip": ANY_TOWER + WITH_CLASS_TOKEN, "siglip": ANY_TOWER}
ON_BOTH = [(tower, reduction) for tower, reductions in REDUCTIONS.items() for reduction in reductions]


def one_image(seed: int, reduction: dict[str, object]) -> Case:
    return Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(seed)], [reduction])


@pytest.fixture(scope="module")
def siglip_reference(siglip: Path) -> Reference:
    return Reference(siglip)


@pytest.fixture(scope="module")
def expected(expect: Expect, siglip_reference: Reference) -> dict[str, Expect]:
    def by_siglip(case: Case) -> Answer:
        return siglip_reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)

    return {"clip": expect, "siglip": by_siglip}


def assert_same(cases: list[Case], got: list[Answer], wanted: list[Answer]) -> None:
    for case, (tokens, logprobs), (want_tokens, want_logprobs) in zip(cases, got, wanted, strict=True):
        assert tokens == want_tokens, case.reductions
        assert logprobs == pytest.approx(want_logprobs, abs=2e-4), case.reductions


@pytest.mark.parametrize(("tower", "reduction"), ON_BOTH, ids=[f"{tower} {r}" for tower, r in ON_BOTH])
def test_alone(engines: dict[str, Any], expected: dict[str, Expect], tower: str, reduction: dict[str, object]) -> None:
    case = one_image(31, reduction)
    assert_same([case], greedy(engines[tower], [case]), [expected[tower](case)])


@pytest.mark.parametrize("tower", REDUCTIONS)
def test_all_in_one_batch_and_again_from_the_cache(
    engines: dict[str, Any], expected: dict[str, Expect], tower: str
) -> None:
    """One image for all methods, so that a cache that took two plans for the same would show; and in one prompt."""
    cases = [one_image(32, reduction) for reduction in REDUCTIONS[tower]]
    cases += [
        one_image(32, {}),
        Case("USER: no picture at all ASSISTANT:"),
        Case(
            "USER: <image> <image> <image>\nWhich? ASSISTANT:",
            [photo(33), photo(33), photo(34)],
            [
                {"method": "tome", "ratio": 0.5},
                {"method": "random", "ratio": 0.9},
                {"method": "downsample", "ratio": 0.8},
            ],
        ),
    ]
    wanted = [expected[tower](case) for case in cases]
    assert_same(cases, greedy(engines[tower], cases), wanted)
    assert_same(cases[::-1], greedy(engines[tower], cases[::-1]), wanted[::-1])


@pytest.mark.parametrize("tower", REDUCTIONS)
def test_the_map_says_what_is_in_each_token(
    engines: dict[str, Any], reference: Reference, siglip_reference: Reference, tower: str
) -> None:
    plain = {"clip": reference, "siglip": siglip_reference}[tower]
    for reduction in [{}, *REDUCTIONS[tower]]:
        image = photo(35)
        ((found,),) = engine_maps(engines[tower], "<image>", [image], [reduction])
        inside = plain.members(image, reduction)
        assert members(found) == inside, reduction
        assert all(own in [*each, -1] for own, each in zip(found.source, inside, strict=True)), reduction


def test_the_reference_tells_methods_apart(expected: dict[str, Expect]) -> None:
    """Guards the tests above: a reference that ignored the method would make them pass for nothing."""
    for tower, reductions in REDUCTIONS.items():
        answers = {tuple(expected[tower](one_image(31, reduction))[1]) for reduction in [{}, *reductions]}
        assert len(answers) == len(reductions) + 1


def geometry_of(side: int, layers: int, *, class_token: bool) -> VisionGeometry:
    return VisionGeometry(side**2, (side, side), layers, class_token, shows_tower=True)


@pytest.fixture(scope="module")
def build(engines: dict[str, Any]) -> Callable[[int, int, bool], Any]:
    """vLLM's tower of some shape, with random weights."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.clip import CLIPVisionModel
    from vllm.model_executor.models.siglip import SiglipVisionModel

    config = engines["clip"].llm_engine.vllm_config

    @cache
    def tower(side: int, layers: int, clip: bool) -> Any:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 2}
        options = shape | {"image_size": 2 * side, "num_hidden_layers": layers + 1}
        with set_current_vllm_config(config):
            if clip:
                model = CLIPVisionModel(CLIPVisionConfig(**options), num_hidden_layers_override=layers)
            else:
                model = SiglipVisionModel(SiglipVisionConfig(**options), num_hidden_layers_override=layers)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        return model

    return tower


METHODS_BEFORE_THE_DECODER = [
    name
    for name, method in METHODS.items()
    if method.stage not in (Stage.DECODER, Stage.PROJECTOR) and not isinstance(method, AcrossFrames)
]


@st.composite
def reductions(draw: st.DrawFn, geometry: VisionGeometry) -> Reduction:
    """One that works on this geometry."""
    method = draw(st.sampled_from(METHODS_BEFORE_THE_DECODER))
    options = {}
    if method == "illava":
        numbers = st.lists(st.integers(0, geometry.layers - 1), min_size=1, unique=True)
        options["layers"] = tuple(sorted(draw(numbers)))
    kept = draw(st.integers(2, geometry.tokens))
    if method == "pool":
        kept = (geometry.grid[0] // draw(st.sampled_from([2, 3]))) ** 2 if geometry.grid else kept
    amount: dict[str, Any] = draw(
        st.sampled_from([{"keep_tokens": kept}, {"ratio": (geometry.tokens - kept) / geometry.tokens}])
    )
    try:
        reduction = Reduction(method, options=tuple(options.items()), **amount)
        make_plan(reduction, geometry)
    except InvalidReduction:
        assume(False)
    return reduction


@given(st.data(), st.integers(2, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=30, deadline=None)
@torch.inference_mode()
def test_the_encoder_gives_what_is_planned(
    build: Callable[[int, int, bool], Any], data: st.DataObject, side: int, layers: int, clip: bool
) -> None:
    """Images of any methods in one batch, on towers of any shape."""
    from foldserve.server.engine.vision import encode_images, reduce_features

    geometry = geometry_of(side, layers, class_token=clip)
    asked = data.draw(st.lists(reductions(geometry), min_size=1, max_size=4))
    plans = [make_plan(reduction, geometry) for reduction in asked]
    sent = [Plan.from_ints(plan.to_ints(), geometry) for plan in plans]
    assert sent == plans
    pixels = torch.randn(len(plans), 3, 2 * side, 2 * side)
    images = reduce_features(
        encode_images(build(side, layers, clip), pixels, sent, "default" if clip else "full"), sent
    )
    assert [image.features.shape for image in images] == [(plan.kept, 16) for plan in plans]
    assert all(image.features.isfinite().all() for image in images)


@given(st.data(), st.sampled_from(["clip", "siglip"]))
@settings(max_examples=15, deadline=None)
def test_the_prompt_holds_what_is_planned(
    engines: dict[str, Any], siglip_reference: Reference, reference: Reference, data: st.DataObject, tower: str
) -> None:
    """Placeholders are those of the plan, and the decoder takes as many tokens from the encoder: vLLM checks that."""
    from vllm import SamplingParams

    plain = reference if tower == "clip" else siglip_reference
    asked = data.draw(reductions(plain.geometry))
    case = one_image(35, asked.to_json())
    params = SamplingParams(temperature=0, max_tokens=1)
    (output,) = engines[tower].generate([case.to_vllm()], params, use_tqdm=False)
    assert len(output.prompt_token_ids) == len(
        plain.prompt_ids(case.prompt, [plan_item(asked, Layout.single(plain.geometry))])
    )


@pytest.mark.parametrize(("tower", "model"), [("clip", "LLaVA-1.5"), ("siglip", "with SigLIP")])
def test_the_page_says_which_methods_work(tower: str, model: str, engines: dict[str, Any]) -> None:
    assert_documented(model, engines[tower])


def test_the_readme_says_it_in_short() -> None:
    assert between_marks(README) == in_short().strip(), "the README is not up to date: run `make reference`"
