"""Stages that compare an engine's answers with expected ones."""

from __future__ import annotations

from typing import Any

from foldserve.server.quality.gpu_check.common import (
    STOCK,
    TRUE_FP32,
    StagePassed,
    ask_ours,
    engine,
    fp32_arguments,
)
from foldserve.server.quality.gpu_check.comparison import Tolerance, compare, first, require
from foldserve.server.quality.gpu_check.job_runner import JobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import Answer, AnswerJob, AnswerResult, Case
from foldserve.server.quality.gpu_check.references import REFERENCES, References

_STOCK_MODEL = "vllm.model_executor.models.llava.LlavaForConditionalGeneration"

FP32 = Tolerance(logprob=2e-3, margin=0.01, close=0.01)
_16_BIT = Tolerance(logprob=0.5, margin=4.0, close=2.0)
"""bf16 against fp32: a larger difference is garbage, not rounding."""
_SMOKE_TOKENS = 2
"""Tokens compared in bf16: those after the end of an answer are arbitrary."""


def check_smoke(job_runner: JobRunner) -> StagePassed:
    known = References.load()
    ask = AnswerJob(engine=engine(job_runner, known.withdraw_layer), cases=known.cases, references=REFERENCES)
    found = ask_ours(job_runner, "smoke", ask)
    expected, answers = (first(each, _SMOKE_TOKENS) for each in (known.answers, found.rounds[0]))
    comparison = compare(known.cases, expected, answers, _16_BIT)
    require(comparison, _16_BIT)
    line = f"{len(known.cases)} requests, methods of every kind, in bf16 on runner {found.runner}, tokens as planned"
    return StagePassed(line, {"engine": found.facts, **comparison.details})


def check_ratio_zero(job_runner: JobRunner) -> StagePassed:
    known = References.load()
    ours = engine(job_runner, async_scheduling=False, max_num_batched_tokens=512)
    plain = unreduced(known)
    asked = tuple(
        case.model_copy(update={"reductions": tuple({"ratio": 0} if i % 2 else {} for i in case.images)})
        for case in plain
    )
    stock = AnswerJob(engine=ours.model_copy(update={"foldserve": False}), cases=plain, references=REFERENCES)
    theirs = job_runner.run("ratio-0-stock", "answer", stock, AnswerResult, **STOCK)
    found = ask_ours(job_runner, "ratio-0-ours", AnswerJob(engine=ours, cases=asked, references=REFERENCES))
    if theirs.model_class != _STOCK_MODEL or found.model_class == _STOCK_MODEL or theirs.runner != found.runner:
        raise StageFailed(
            f"{theirs.model_class} on runner {theirs.runner} was compared with {found.model_class} on {found.runner}"
        )
    for case, right, answer in zip(plain, theirs.rounds[0], found.rounds[0], strict=True):
        if answer != right:
            raise StageFailed(f"{case.name}: {_first_difference(right, answer)}")
    count = sum(len(answer.ids) for answer in found.rounds[0])
    line = f"{len(plain)} requests, {count} tokens and log-probabilities equal bit for bit on runner {found.runner}"
    return StagePassed(line, {"requests": len(plain), "tokens": count, "runner": found.runner})


def unreduced(known: References) -> tuple[Case, ...]:
    """Each prompt of the cases with each image, without reduction; prompts with most images first."""
    prompts = dict.fromkeys(case.prompt for case in known.cases)
    count, tokens = len(known.images), known.cases[0].tokens
    cases = []
    for number, prompt in enumerate(sorted(prompts, key=lambda prompt: -prompt.count("<image>"))):
        marks = prompt.count("<image>")
        for start in range(count if marks else 1):
            images = tuple((start + i) % count for i in range(marks))
            cases.append(Case(name=f"prompt {number}, images {images}", prompt=prompt, images=images, tokens=tokens))
    return tuple(cases)


def _first_difference(right: Answer, answer: Answer) -> str:
    for i, (ours, theirs) in enumerate(
        zip(zip(answer.ids, answer.logprobs, strict=True), zip(right.ids, right.logprobs, strict=True), strict=False)
    ):
        if ours != theirs:
            return f"token {i} is {ours[0]} ({ours[1]!r}), vLLM's own {theirs[0]} ({theirs[1]!r})"
    return f"{answer.prompt_tokens} + {len(answer.ids)} tokens, vLLM's own {right.prompt_tokens} + {len(right.ids)}"


def check_reference(job_runner: JobRunner) -> StagePassed:
    known = References.load()
    arguments: dict[str, Any] = fp32_arguments(job_runner) | {
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 220,  # cuts images; a prompt that has to be computed whole still fits
        "num_gpu_blocks_override": 60,
    }
    ask = AnswerJob(
        engine=engine(job_runner, known.withdraw_layer, **arguments), cases=known.cases, references=REFERENCES, rounds=2
    )
    found = ask_ours(job_runner, "reference", ask, **TRUE_FP32)
    comparisons = [compare(known.cases, known.answers, answers, FP32) for answers in found.rounds]
    for comparison, what in zip(comparisons, ("computed", "partly from the prefix cache"), strict=True):
        require(comparison, FP32, what)
    if not found.preemptions or not found.cached_tokens:
        raise StageFailed(
            f"{found.preemptions} requests were preempted and {found.cached_tokens} tokens came from the prefix cache: "
            "the stage did not try both"
        )
    if found.held_blocks:
        raise StageFailed(f"{found.held_blocks} KV blocks were not given back")
    largest = max(comparison.largest for comparison in comparisons)
    line = (
        f"{len(known.cases)} requests twice, {found.preemptions} preemptions, {found.cached_tokens} cached tokens: "
        f"margins within {largest:.1g} of plain PyTorch's"
    )
    return StagePassed(line, {"runner": found.runner, "preemptions": found.preemptions, **comparisons[0].details})
