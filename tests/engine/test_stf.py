"""LLaVA-STF, converted and served by a real engine, against plain PyTorch on the authors' checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig, SiglipVisionConfig

from foldserve.reducers import METHODS
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry, make_plan
from foldserve.reducers.stf import StfConfig
from foldserve.server.convert.stf import convert
from foldserve.server.engine.families.llava_stf import ARCHITECTURE
from foldserve.server.engine.families.registry import family_of
from tests import stf_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.stf_reference import StfReference
from tests.images import photo

PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
TOKENS = 36
K = 1


def make(folder: Path, image_size: int, experts: int = 1) -> tuple[Path, Path]:
    """The authors' checkpoint, and the same one converted."""
    stf_checkpoint.write(folder / "source", experts=experts, image_size=image_size)
    stf_checkpoint.write_tower(folder / "clip", image_size=image_size)
    source, tower = folder / "source", folder / "clip"
    return source, convert(source, folder / "converted", vision_tower=tower, experts=experts)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 x 12 patches: 36 tokens."""
    return make(tmp_path_factory.mktemp("stf"), image_size=168)


@pytest.fixture(scope="module")
def stf_llm(checkpoint: tuple[Path, Path]) -> Iterator[Any]:
    """Chunks of 24 tokens cut every image; prefix caching is on."""
    yield start_engine(checkpoint[1], max_num_batched_tokens=24, enable_prefix_caching=True)


@pytest.fixture(scope="module")
def stf_reference(checkpoint: tuple[Path, Path]) -> StfReference:
    return StfReference(*checkpoint)


def one_image(seed: int, **reduction: object) -> Case:
    return Case(PROMPT, [photo(seed)], [reduction])


def assert_same(got: list[tuple[list[int], list[float]]], cases: list[Case], reference: StfReference) -> None:
    for case, (tokens, logprobs) in zip(cases, got, strict=True):
        want = reference.generate(case.prompt, case.images, case.reductions, len(tokens))
        assert tokens == want[0], case.reductions
        assert logprobs == pytest.approx(want[1], abs=2e-4)


def test_mixed_batch(stf_llm: Any, stf_reference: StfReference) -> None:
    """The checkpoint's own count, FOLDER on top of it, several images and none, all in one batch; then once more."""
    cases = [one_image(1, ratio=ratio) for ratio in (0.0, 0.25, 0.5, 0.9)]
    cases += [
        one_image(2),
        one_image(2, method="stf"),
        one_image(3, keep_tokens=2),
        Case("USER: no picture at all ASSISTANT:"),
        Case(
            "USER: <image> <image> <image>\nWhich? ASSISTANT:", [photo(1), photo(1), photo(4)], [{"ratio": 0.5}, {}, {}]
        ),
    ]
    assert_same(greedy(stf_llm, cases), cases, stf_reference)
    assert_same(greedy(stf_llm, cases), cases, stf_reference)  # every cache is warm


def test_same_image_at_two_ratios_shares_nothing(stf_llm: Any, stf_reference: StfReference) -> None:
    half, plain = one_image(7, ratio=0.5), one_image(7)
    for cases in ([half, plain], [plain], [half]):
        assert_same(greedy(stf_llm, cases), cases, stf_reference)


def test_prompts_hold_the_checkpoints_count(stf_llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.multimodal import MULTIMODAL_REGISTRY

    params = SamplingParams(temperature=0, max_tokens=1)
    prompts = [one_image(9, ratio=ratio).to_vllm() for ratio in (0.0, 0.5)]
    text = len(stf_llm.get_tokenizer()(PROMPT)["input_ids"]) - 1
    lengths = [len(output.prompt_token_ids) for output in stf_llm.generate(prompts, params, use_tqdm=False)]
    assert lengths == [text + TOKENS, text + TOKENS // 2]
    # what vLLM reserves memory for
    info = MULTIMODAL_REGISTRY.create_processor(stf_llm.model_config).info
    assert info.get_max_image_tokens() == TOKENS


def test_outputs_depend_on_image_and_ratio(stf_reference: StfReference) -> None:
    """Guards the tests above: a reference that ignored image or plan would make them pass for nothing."""
    cases = [one_image(seed, ratio=ratio) for seed in (1, 2) for ratio in (0.0, 0.5)]
    answers = [stf_reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS) for case in cases]
    assert len({tuple(logprobs) for _, logprobs in answers}) == 4


def test_two_ranks_with_experts_and_withdrawal(tmp_path: Path) -> None:
    """Tensor parallel, E = 2, an odd grid, tokens withdrawn in the decoder; in a process of its own."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    command = [sys.executable, "-m", "tests.engine.test_stf", str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "equal to the reference" in ran.stdout


def run_two_ranks(folder: Path) -> None:
    from foldserve.server.engine import withdrawal

    source, converted = make(folder, image_size=182, experts=2)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = start_engine(converted, max_num_batched_tokens=50, **ranks, **withdrawal.configure(K, device="cpu"))
    cases = [one_image(1), one_image(2, ratio=0.5), one_image(1, withdraw=True), one_image(3, ratio=0.5, withdraw=True)]
    assert_same(greedy(llm, cases, 4), cases, StfReference(source, converted, experts=2, layer=K))
    print("equal to the reference")


def geometry(**fields: Any) -> VisionGeometry:
    """Of a checkpoint with CLIP-L at 336 pixels and these fields in its config.json."""
    config = LlavaConfig(architectures=[ARCHITECTURE], **({"stf": StfConfig().to_json()} | fields))
    model_config: Any = SimpleNamespace(hf_config=config)
    found = family_of(model_config)
    assert found is not None
    (part,) = found.largest.parts
    return part.geometry


def test_geometry() -> None:
    assert geometry().tokens == 144
    assert geometry().grid == (12, 12)
    assert geometry() is geometry()
    two_experts = geometry(stf={"layers": [23], "kernel": 5, "experts": 2})
    assert (two_experts.tokens, two_experts.grid) == (32, None)


BEFORE = [m.name for m in METHODS.values() if m.stage.value in ("in_tower", "before_tower") and m.name != "base_only"]
"""`base_only` needs tiles, which nothing that is planned here has."""


@pytest.mark.parametrize("method", BEFORE)
def test_methods_that_work_before_the_projector_are_refused(method: str) -> None:
    with pytest.raises(InvalidReduction, match="its projector is 'stf', which needs every token in place") as error:
        make_plan(Reduction(method, ratio=0.5), geometry())
    assert error.value.param == "method"


def test_stf_is_no_choice() -> None:
    with pytest.raises(InvalidReduction, match="is trained into a checkpoint's projector, and this model's has none"):
        make_plan(Reduction("stf"), VisionGeometry(576))
    with pytest.raises(InvalidReduction, match="gives 144 tokens per image, as the checkpoint was trained") as error:
        make_plan(Reduction("stf", ratio=0.5), geometry())
    assert error.value.param == "ratio"
    plan = make_plan(Reduction("stf"), geometry())
    assert (plan.kept, plan.is_identity) == (144, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stf": None}, "config.json needs an object `stf`"),
        ({"stf": {"layers": [24, 25], "kernel": 2, "experts": 1}}, "deepest first, not (24, 25)"),
        ({"stf": {"layers": [25], "kernel": 2, "experts": 1}}, "names block 25, but the vision tower has 24 blocks"),
        ({"stf": {"layers": [23], "kernel": 25, "experts": 1}}, "at least 25 x 25 tokens (stf.kernel), not 576 tokens"),
        ({"stf": {"layers": [23], "kernel": 2, "experts": 3}}, "must divide the vision tower's 1024 channels"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy must be 'default', not 'full'"),
        ({"vision_config": SiglipVisionConfig()}, "needs a CLIP vision tower, not 'siglip_vision_model'"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        geometry(**fields)
    assert message in str(error.value)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # settings of the process

    run_two_ranks(Path(sys.argv[1]))
