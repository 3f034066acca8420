"""Reduced images in a real engine against plain PyTorch: same greedy tokens, whatever shares the batch or the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import foldserve
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry, make_plan
from tests.engine.conftest import MAX_TOKENS, Case, greedy
from tests.images import photo

RATIOS = (0.25, 0.5, 0.66, 0.75, 0.9)
METHODS = ("folder", "folder_cls")
Expect = Callable[[Case], tuple[list[int], list[float]]]


def one_image(seed: int, **reduction: object) -> Case:
    return Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(seed)], [reduction])


def assert_same(got: list[tuple[list[int], list[float]]], cases: list[Case], expect: Expect) -> None:
    for case, (tokens, logprobs) in zip(cases, got, strict=True):
        want_tokens, want_logprobs = expect(case)
        assert tokens == want_tokens, case.reductions
        assert logprobs == pytest.approx(want_logprobs, abs=2e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_equals_plain_pytorch(llm: Any, expect: Expect, method: str, ratio: float) -> None:
    cases = [
        one_image(1, method=method, ratio=ratio),
        Case(
            "USER: <image>\nand <image>\nDiffer how? ASSISTANT:",
            [photo(2), photo(3)],
            [{"method": method, "ratio": ratio}] * 2,
        ),
    ]
    assert_same(greedy(llm, cases), cases, expect)


def test_mixed_batch(llm: Any, expect: Expect) -> None:
    """Ratios, methods, images per prompt, reduced and plain, all in one batch and in one prompt."""
    cases = [one_image(1, method=method, ratio=ratio) for method in METHODS for ratio in (0.0, 0.5, 0.9)]
    cases += [
        one_image(4),
        one_image(5, keep_tokens=2),
        one_image(5, ratio=0.5, scale="official"),
        Case("USER: no picture at all ASSISTANT:"),
        Case(
            "USER: <image> <image> <image>\nWhich? ASSISTANT:",
            [photo(1), photo(1), photo(6)],
            [{"ratio": 0.9}, {}, {"method": "folder_cls", "keep_tokens": 20}],
        ),
    ]
    assert_same(greedy(llm, cases), cases, expect)


def test_same_image_at_two_ratios_shares_nothing(llm: Any, expect: Expect) -> None:
    """At once, and one after the other with every cache warm, in both orders."""
    half, most, plain = one_image(7, ratio=0.5), one_image(7, ratio=0.9), one_image(7)
    in_layer = one_image(7, method="folder_cls", ratio=0.5)
    for cases in ([half, most, plain, in_layer], [most], [half], [plain], [in_layer], [half]):
        assert_same(greedy(llm, cases), cases, expect)


def test_outputs_depend_on_ratio_and_image(expect: Expect) -> None:
    """Guards the tests above: a reference that ignored image or plan would make them pass for nothing."""
    answers = {tuple(expect(one_image(seed, ratio=ratio))[1]) for seed in (1, 2) for ratio in (0.0, 0.5, 0.9)}
    assert len(answers) == 6


def test_blocks_and_prompt_fall_by_the_plan(llm: Any) -> None:
    """Prompt tokens and KV blocks held are those of the text plus exactly `plan.kept`."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    text = len(llm.get_tokenizer()("USER: <image>\nWhat is in the picture? ASSISTANT:")["input_ids"]) - 1
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for i, ratio in enumerate((0.0, *RATIOS)):
        kept = make_plan(Reduction.parse({"ratio": ratio}), VisionGeometry(144)).kept
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.add_request(f"blocks-{i}", one_image(100 + i, ratio=ratio).to_vllm(), params)
        held, prompt_tokens = 0, 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            prompt_tokens = next((len(o.prompt_token_ids) for o in outputs), prompt_tokens)
            for request_id in scheduler.requests:
                held = len(scheduler.kv_cache_manager.get_blocks(request_id).blocks[0])
        assert prompt_tokens == text + kept
        assert held in (-(-(text + kept + 3) // 32), -(-(text + kept + 4) // 32))
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_chats_from_python(llm: Any, expect: Expect) -> None:
    """Three lines, and the same refusals as over HTTP."""
    from vllm import SamplingParams

    def chat(image: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [image, {"type": "text", "text": "What is in the picture?"}]}]

    messages = chat({"type": "image_pil", "image_pil": photo(1)})

    def ask(**fields: Any) -> Any:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        (output,) = llm.chat(messages, params, False, mm_processor_kwargs=foldserve.reduction(**fields))
        return output

    whole, half = ask(), ask(ratio=0.5)
    assert len(whole.prompt_token_ids) - len(half.prompt_token_ids) == 72
    rendered = chat({"type": "image"})
    prompt = llm.get_tokenizer().apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
    case = Case(prompt, [photo(1)], [{"ratio": 0.5}])
    assert list(half.outputs[0].token_ids) == expect(case)[0]
    with pytest.raises(InvalidReduction, match="keep_tokens"):
        ask(keep_tokens=145)
