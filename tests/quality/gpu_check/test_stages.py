"""When stages pass and when they fail, with made-up jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from foldserve.server.quality.gpu_check.burst import check_burst
from foldserve.server.quality.gpu_check.comparison import require_alike
from foldserve.server.quality.gpu_check.correctness import check_ratio_zero, check_reference, check_smoke
from foldserve.server.quality.gpu_check.job_runner import StageFailed
from foldserve.server.quality.gpu_check.jobs import (
    Answer,
    AnswerJob,
    AnswerResult,
    BurstResult,
    Case,
    KernelsResult,
    LoadResult,
    LoadRow,
    MachineResult,
    TowerResult,
    TowerRow,
)
from foldserve.server.quality.gpu_check.load import RATIOS, measure_load
from foldserve.server.quality.gpu_check.on_gpu import check_graphs, check_kernels, check_machine, check_sync
from foldserve.server.quality.gpu_check.references import References
from foldserve.server.quality.gpu_check.tower import check_tower
from tests.quality.gpu_check.job_runners import Scripted

KNOWN = References.load()
STOCK = "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
OURS = "foldserve.server.engine.families.llava.FoldLlavaForConditionalGeneration"


def right(case: Case) -> Answer:
    """The reference of a case, or of any that resembles it, as long as is asked."""
    names = [known.name for known in KNOWN.cases]
    name = case.name.partition(", request")[0]
    answer = KNOWN.answers[names.index(name) if name in names else 1]
    longer = {key: (getattr(answer, key) * 4)[: case.tokens] for key in ("ids", "logprobs", "margins")}
    return answer.model_copy(update=longer)


def answers(spec: AnswerJob, **changed: Any) -> AnswerResult:
    has_graphs = not spec.engine.arguments.get("enforce_eager")
    given: dict[str, Any] = {
        "model_class": OURS if spec.engine.foldserve else STOCK,
        "runner": "v2",
        "rounds": (tuple(map(right, spec.cases)),) * spec.rounds,
        "steps": {"CUDAGraphMode.FULL": 30, "CUDAGraphMode.NONE": 4} if has_graphs else {"CUDAGraphMode.NONE": 34},
        "preemptions": 3,
        "cached_tokens": 50,
        "held_blocks": 0,
    }
    return AnswerResult(**given | changed)


def with_last(answer: Answer, **changed: float) -> Answer:
    """With another last token, log-probability or margin."""
    return answer.model_copy(update={key: (*getattr(answer, key)[:-1], value) for key, value in changed.items()})


def last_case(spec: AnswerJob, **changed: float) -> dict[str, Any]:
    return {"rounds": ((*map(right, spec.cases[:-1]), with_last(right(spec.cases[-1]), **changed)),) * spec.rounds}


def job_runner(tmp_path: Path, answer: Callable[[str, str, Any], BaseModel]) -> Scripted:
    return Scripted(tmp_path, answer)


def all_right(name: str, job: str, spec: Any) -> BaseModel:
    return answers(spec)


@pytest.mark.parametrize("stage", [check_smoke, check_ratio_zero, check_reference, check_graphs, check_sync])
def test_right_answers_pass(stage: Callable[..., Any], tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, all_right)
    assert stage(scripted).line
    plugins = [env["VLLM_PLUGINS"] for _, _, env in scripted.ran]
    assert plugins == (["", "foldserve"] if stage is check_ratio_zero else ["foldserve"] * len(plugins))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"margins": KNOWN.answers[-1].margins[-1] + 0.02}, "the margin of token 11 is"),
        ({"logprobs": float("nan")}, "the log-probability of token 11 is nan"),
        ({"ids": 7}, "token 11 is 7, not"),
    ],
    ids=str,
)
def test_one_wrong_token_fails_the_reference(changed: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=f"1 of 27 cases are wrong, such as cdpruner 0.8: {message}"):
        check_reference(job_runner(tmp_path, lambda name, job, spec: answers(spec, **last_case(spec, **changed))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preemptions": 0}, "0 requests were preempted"),
        ({"cached_tokens": 0}, "0 tokens came from the prefix cache"),
        ({"held_blocks": 2}, "2 KV blocks"),
    ],
    ids=str,
)
def test_a_reference_that_tried_too_little_fails(changed: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=message):
        check_reference(job_runner(tmp_path, lambda name, job, spec: answers(spec, **changed)))


def test_other_counts_of_tokens_fail_the_smoke_test(tmp_path: Path) -> None:
    def unreduced(name: str, job: str, spec: AnswerJob) -> AnswerResult:
        rounds = [answer.model_copy(update={"prompt_tokens": 170}) for answer in map(right, spec.cases)]
        return answers(spec, rounds=(tuple(rounds),))

    with pytest.raises(StageFailed, match="cases are wrong, such as no image: 170 tokens in the prompt"):
        check_smoke(job_runner(tmp_path, unreduced))


def test_rounding_does_not_fail_the_smoke_test_and_garbage_does(tmp_path: Path) -> None:
    def off(by: float) -> Callable[[str, str, AnswerJob], AnswerResult]:
        def answer(name: str, job: str, spec: AnswerJob) -> AnswerResult:
            moved = [a.model_copy(update={"margins": tuple(m + by for m in a.margins)}) for a in map(right, spec.cases)]
            return answers(spec, rounds=(tuple(moved),))

        return answer

    check_smoke(job_runner(tmp_path, off(1.0)))
    with pytest.raises(StageFailed, match="27 of 27"):
        check_smoke(job_runner(tmp_path, off(5.0)))


def test_one_bit_fails_ratio_zero(tmp_path: Path) -> None:
    value = right(KNOWN.cases[1]).logprobs[-1]

    def answer(name: str, job: str, spec: AnswerJob) -> AnswerResult:
        return answers(spec, **({} if "stock" in name else last_case(spec, logprobs=value - 1e-9)))

    with pytest.raises(StageFailed, match="vLLM's own"):
        check_ratio_zero(job_runner(tmp_path, answer))


@pytest.mark.parametrize("changed", [{"model_class": STOCK}, {"runner": "v1"}], ids=str)
def test_ratio_zero_needs_two_different_models_on_one_runner(changed: dict[str, str], tmp_path: Path) -> None:
    def answer(name: str, job: str, spec: AnswerJob) -> AnswerResult:
        return answers(spec, **({} if "stock" in name else changed))

    with pytest.raises(StageFailed, match="was compared with"):
        check_ratio_zero(job_runner(tmp_path, answer))


def test_ratio_zero_asks_for_nothing_or_for_zero(tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, all_right)
    check_ratio_zero(scripted)
    (_, stock, _), (_, ours, _) = scripted.ran
    assert len(stock.cases) >= 32 and not any(case.reductions for case in stock.cases)
    assert {str(reduction) for case in ours.cases for reduction in case.reductions} == {"{}", "{'ratio': 0}"}


def test_graphs_that_were_not_replayed_fail(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="no graph was tried"):
        check_graphs(job_runner(tmp_path, lambda name, job, spec: answers(spec, steps={"CUDAGraphMode.NONE": 34})))


def test_graphs_that_answer_something_else_fail(tmp_path: Path) -> None:
    def answer(name: str, job: str, spec: AnswerJob) -> AnswerResult:
        return answers(spec, **({} if "eager" in name else last_case(spec, ids=7)))

    with pytest.raises(StageFailed, match="fp32: 1 of 40 cases are wrong"):
        check_graphs(job_runner(tmp_path, answer))


def test_graphs_have_batches_of_all_sizes(tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, all_right)
    check_graphs(scripted)
    assert [name for name, _, _ in scripted.ran][:3] == ["graphs-fp32-eager", "graphs-fp32", "graphs-fp32-k8-eager"]
    for _, spec, _ in scripted.ran:
        assert len({case.tokens for case in spec.cases}) == 40 == spec.engine.arguments["max_num_seqs"]
        if spec.engine.withdraw_layer is None:
            assert "withdraw" not in str(spec.cases) and "fastv" not in str(spec.cases)


def test_sixteen_bits_are_compared_as_a_whole() -> None:
    same = [right(case) for case in KNOWN.cases]
    assert require_alike(same, same, followed=1, margin=0, what="") == (1, 0)
    parted = [answer.model_copy(update={"ids": (7, *answer.ids[1:])}) for answer in same]
    require_alike(same, [*parted[:2], *same[2:]], followed=0.9, margin=0.1, what="")
    with pytest.raises(StageFailed, match="288 of 324 tokens alike"):
        require_alike(same, [*parted[:3], *same[3:]], followed=0.9, margin=0.1, what="")
    moved = [answer.model_copy(update={"margins": tuple(m + 1 for m in answer.margins)}) for answer in same]
    with pytest.raises(StageFailed, match="margins within 1"):
        require_alike(same, [*moved[:4], *same[4:]], followed=0.9, margin=0.1, what="")
    with pytest.raises(StageFailed, match="0 of 324"):
        require_alike(same, parted, followed=0.9, margin=0.1, what="")


def test_sync_is_an_error_in_the_job(tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, all_right)
    check_sync(scripted)
    ((_, spec, env),) = scripted.ran
    assert env["VLLM_GPU_SYNC_CHECK"] == "error" and spec.engine.arguments["jit_monitor_mode"] == "error"


def test_machine(tmp_path: Path) -> None:
    def seen(error: float) -> Scripted:
        found = MachineResult(
            device="H", capability="9.0", torch="2", gemm_tflops=800, copy_gb_per_s=3000, silu_error=error
        )
        return job_runner(tmp_path, lambda name, job, spec: found)

    assert "800 TFLOP/s" in check_machine(seen(0.002)).line
    for error in (0.9, float("nan")):
        with pytest.raises(StageFailed, match="not for this GPU"):
            check_machine(seen(error))


def towers(**changed: Any) -> Callable[[str, str, Any], BaseModel]:
    """A result of both engines; `changed` for the demo model's."""
    rows = tuple(TowerRow(images=n, graph_ms=0.8 * n, eager_ms=3.3, difference=1e-6) for n in (1, 2))
    good = TowerResult(rows=rows, replays=30, eager_replays=0, requests=40, alike=40)
    return lambda name, job, spec: good.model_copy(update=changed if "demo" in name else {})


def test_tower(tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, towers())
    passed = check_tower(scripted)
    times = "3.30 -> 0.80 at 1, 3.30 -> 1.60 at 2"
    assert passed.line == f"40 answers alike; ms without -> with graphs, by images: {times}"
    assert passed.details["7b-shape"]["replays"] == 30
    (_, demo, env), (_, large, _) = scripted.ran
    assert env["VLLM_PLUGINS"] == "foldserve" and demo.engine.arguments["dtype"] == "float32"
    for spec in (demo, large):
        assert spec.engine.settings["tower_graphs"] and not spec.engine.arguments.get("enforce_eager")
        assert spec.engine.settings["default_reduction"] == spec.reduction


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alike": 39}, "39 of 40 answers"),
        ({"replays": 0}, "0 graphs replayed with them"),
        ({"eager_replays": 3}, "3 without: nothing was compared"),
        ({"rows": (TowerRow(images=1, graph_ms=1, eager_ms=3, difference=2e-3),)}, "are off by 0.002"),
        ({"rows": (TowerRow(images=1, graph_ms=1, eager_ms=3, difference=float("nan")),)}, "are off by nan"),
    ],
    ids=str,
)
def test_graphs_of_the_tower_that_compute_something_else_fail(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=message):
        check_tower(job_runner(tmp_path, towers(**changed)))


def test_kernels(tmp_path: Path) -> None:
    def seen(failures: dict[str, str], catches: bool) -> Scripted:
        found = KernelsResult(checks=60, failures=failures, catches_a_wrong_kernel=catches)
        return job_runner(tmp_path, lambda name, job, spec: found)

    assert "60 checks" in check_kernels(seen({}, True)).line
    with pytest.raises(StageFailed, match="1 of 60 checks, such as match 2: no"):
        check_kernels(seen({"match 2": "no"}, True))
    with pytest.raises(StageFailed, match="was taken for right"):
        check_kernels(seen({}, False))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answered": 199}, "199 of 200"),
        ({"scheduled": 3}, "no burst"),
        ({"encoded": 4}, "the tower had 4"),
        ({"plain_bytes": 2**20, "burst_bytes": 2**21}, "2.0 MiB, 3 unreduced images 1.0 MiB"),
    ],
    ids=str,
)
def test_burst(changed: dict[str, int], message: str, tmp_path: Path) -> None:
    good = {"profiled": 3, "scheduled": 24, "encoded": 3, "answered": 200}
    memory = {"plain_bytes": 2**20, "burst_bytes": 2**20}
    assert "1.00 of its memory" in check_burst(job_runner(tmp_path, lambda *_: BurstResult(**good | memory))).line
    with pytest.raises(StageFailed, match=message):
        check_burst(job_runner(tmp_path, lambda *_: BurstResult(**good | changed)))


def rates(*each: float) -> LoadResult:
    rows = tuple(LoadRow(requests_per_s=rate, ttft_ms=20, itl_ms=5, prompt_tokens=607, sequences=100) for rate in each)
    return LoadResult(rows=rows, runner="v2", steps={}, peak_bytes=2**34)


def loaded(stock: float, *ours: float) -> Callable[[str, str, Any], BaseModel]:
    each = {"load-plain": rates(stock), "load-foldserve": rates(*ours), "load-withdrawn": rates(10.5, 18)}
    return lambda name, job, spec: each[name]


def test_load(tmp_path: Path) -> None:
    scripted = job_runner(tmp_path, loaded(10, 10, 14, 18, 25))
    passed = measure_load(scripted)
    assert passed.line == "requests/s of plain vLLM's 10.0: 1.00 at 0, 1.40 at 0.5, 1.80 at 0.66, 2.50 at 0.9"
    assert [row["ratio"] for row in passed.details["rows"]] == [0, *RATIOS, 0, 0.66]
    (_, stock, stock_env), (_, ours, _), (_, withdrawn, _) = scripted.ran
    assert not stock.engine.foldserve and stock_env == {"VLLM_PLUGINS": ""} and stock.reductions == ({},)
    assert ours.image_px == 336 and withdrawn.engine.withdraw_layer == 16
    with pytest.raises(StageFailed, match=r"9\.0 requests/s at ratio 0, 90% of plain vLLM's 10\.0"):
        measure_load(job_runner(tmp_path, loaded(10, 9, 14, 18, 25)))
    with pytest.raises(StageFailed, match="reduction brings nothing") as failed:
        measure_load(job_runner(tmp_path, loaded(10, 10, 10, 10, 10)))
    assert len(failed.value.details["rows"]) == 7


def test_a_load_that_breaks_off_keeps_what_was_measured(tmp_path: Path) -> None:
    def answer(name: str, job: str, spec: Any) -> BaseModel:
        if name == "load-withdrawn":
            raise StageFailed("no memory")
        return loaded(10, 10, 14, 18, 25)(name, job, spec)

    with pytest.raises(StageFailed, match="no memory") as failed:
        measure_load(job_runner(tmp_path, answer))
    assert len(failed.value.details["rows"]) == 5


def test_the_shape_is_that_of_llava_1_5_7b(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from foldserve.server.quality.gpu_check.shape import write_shape

    config = AutoConfig.from_pretrained(write_shape(tmp_path / "shape"))
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_attention_heads, text.vocab_size, text.max_position_embeddings) == (32, 32064, 4096)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (336, 14, 4096)
