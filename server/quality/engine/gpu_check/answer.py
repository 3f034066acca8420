"""Job `answer`: an engine's answers to the cases."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm import LLM, SamplingParams

from foldserve.server.engine.facts.choices import engine_facts
from foldserve.server.engine.processor import KWARG
from foldserve.server.quality.engine.gpu_check.engine import SchedulerWatch, model_of, runner_name, start_engine
from foldserve.server.quality.gpu_check.jobs import Answer, AnswerJob, AnswerResult, Case
from foldserve.server.quality.gpu_check.references import References


def run(spec: AnswerJob) -> AnswerResult:
    images = References.load(spec.references).images
    llm = start_engine(spec.engine)
    watch = SchedulerWatch(llm)
    rounds = []
    for number in range(spec.rounds):
        order = -1 if number % 2 else 1
        outputs = _generate(llm, spec.cases[::order], images)[::order]
        rounds.append(tuple(map(_answer, outputs)))
    model = type(model_of(llm))
    return AnswerResult(
        model_class=f"{model.__module__}.{model.__qualname__}",
        runner=runner_name(llm),
        rounds=tuple(rounds),
        steps=dict(watch.steps),
        preemptions=watch.preemptions,
        cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
        held_blocks=watch.held_blocks,
        facts=asdict(engine_facts(llm.llm_engine.vllm_config)) if spec.engine.foldserve else {},
    )


def _generate(llm: LLM, cases: tuple[Case, ...], images: list[Any]) -> list[Any]:
    params = [SamplingParams(temperature=0, max_tokens=case.tokens, ignore_eos=True, logprobs=2) for case in cases]
    outputs: list[Any] = llm.generate([_prompt(case, images) for case in cases], params, use_tqdm=False)
    return outputs


def _prompt(case: Case, images: list[Any]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": case.prompt}
    if case.images:
        prompt["multi_modal_data"] = {"image": [images[i] for i in case.images]}
    if case.reductions:
        prompt["mm_processor_kwargs"] = {KWARG: list(case.reductions)}
    return prompt


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    margins = []
    for step in completion.logprobs:
        first, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
        margins.append(first - second)
    ids = tuple(completion.token_ids)
    return Answer(
        prompt_tokens=len(output.prompt_token_ids),
        ids=ids,
        logprobs=tuple(step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)),
        margins=tuple(margins),
    )
