"""FastV and iLLaVA's decoder merge: tokens and log-probabilities of the engine equal plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import AskedCase, Case, Engine, words

K = LAYERS // 2
TOKENS = 8


def fastv(ratio: float) -> str:
    return f'{{"method": "fastv", "ratio": {ratio}}}'


def illava(ratio: float) -> str:
    return f'{{"method": "illava_decoder", "ratio": {ratio}}}'


FOLDER_FASTV = '{"method": "folder+fastv", "ratio": 0.66, "decoder_ratio": 0.5}'
FOLDER_ILLAVA = '{"method": "folder+illava_decoder", "keep_tokens": 49, "decoder_ratio": 0.7}'
QUESTION = f"USER: <image> {words(1, 5)} ASSISTANT:"
TWO = f"USER: {words(2, 20)} <image> {words(4, 9)} <image> {words(5, 33)} ASSISTANT:"

SHORT = [
    AskedCase(QUESTION, (0,), asked=FOLDER_FASTV),
    AskedCase(QUESTION, (0,), asked=FOLDER_ILLAVA),
    AskedCase(f"<image> {words(3, 4)} <image> who", (0, 2), asked=FOLDER_ILLAVA),
]
"""Of at most 120 tokens, for engines whose steps are small."""

TINY = AskedCase("<image> who", (1,), asked='{"method": "folder+fastv", "keep_tokens": 12, "decoder_ratio": 0.5}')
"""Of at most 20 tokens."""

CASES = [
    *SHORT,
    AskedCase(QUESTION, (0,), asked=fastv(0.5)),
    AskedCase(QUESTION, (0,), asked=illava(0.3)),
    Case(QUESTION, (0,)),
    Case(QUESTION, (0,), withdraw=False),
    AskedCase(f"{words(7, 33)} <image> {words(8, 40)}", (3,), asked=fastv(0.99)),
    AskedCase(f"{words(7, 33)} <image> {words(8, 40)}", (3,), asked=illava(0.99)),
    AskedCase(TWO, (1, 2), asked=illava(0.8)),
    AskedCase(TWO, (1, 2), asked=(fastv(0.8), illava(0.5))),
    AskedCase(TWO, (4, 5), asked=('{"withdraw": true}', fastv(0.66))),
    AskedCase(TWO, (4, 5), asked=(illava(0.4), "{}")),
    Case(f"USER: {words(6, 50)} ASSISTANT:"),
]
"""One or two images, each with a method of its own, beside withdrawn and ordinary ones and text alone."""


def test_whole_prompts_wait_for_room_beside_others(small_pool: Engine, expected: Expected) -> None:
    """Steps of 700 tokens for 2,400; the second time the others come from the prefix cache."""
    before = small_pool.steps.copy()
    for _ in range(2):
        outputs = expected.generate(small_pool, K, CASES, TOKENS)
        for case, output in zip(CASES, outputs, strict=True):
            assert not isinstance(case, AskedCase) or output.num_cached_tokens == 0
    seen = small_pool.steps - before
    assert seen["waiting"] and seen["whole"] == 2 * sum(isinstance(case, AskedCase) for case in CASES)
    small_pool.assert_all_blocks_free()


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ('{"withdraw": true}', "kept"),
        (fastv(0.5), "kept"),
        (illava(0.5), "all"),  # what stays takes up what the others are after the layer
        ('{"withdraw": false}', "all"),
    ],
)
def test_who_leaves_skips_the_rest_of_the_last_shallow_layer(
    small_pool: Engine, monkeypatch: pytest.MonkeyPatch, asked: str, rows: str
) -> None:
    (part,) = small_pool.llm.apply_model(lambda model: model.language_model.model.after_attention)
    seen: list[int] = []
    forward = part.forward

    def counted(attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(attended))
        answer: tuple[Tensor, Tensor] = forward(attended, residual)
        return answer

    monkeypatch.setattr(part, "forward", counted)
    assert small_pool.llm.reset_prefix_cache()
    (output,) = small_pool.generate([AskedCase(QUESTION, (0,), asked=asked)], 2)
    vision = 144
    gone = 0 if rows == "all" else vision // 2 if "fastv" in asked else vision
    assert seen == [len(output.prompt_token_ids) - gone, 1]


def test_preempted_prompts_are_computed_whole_again(small_pool: Engine, expected: Expected) -> None:
    before = small_pool.steps["whole_again"]
    expected.generate(small_pool, K, [CASES[3], CASES[0], CASES[4]] * 3, 40)
    assert small_pool.steps["whole_again"] > before
    small_pool.assert_all_blocks_free()


@pytest.mark.parametrize("asked", [fastv(0.5), illava(0.5)])
def test_another_question_about_an_image_chooses_anew(small_pool: Engine, expected: Expected, asked: str) -> None:
    """What comes before the image is shared with others, the image and what follows is not."""
    begin = words(31, 70)
    for question in (words(32, 9), words(33, 12), words(32, 9)):
        (output,) = expected.generate(small_pool, K, [AskedCase(f"{begin} <image> {question}", (2,), asked=asked)], 4)
        assert output.num_cached_tokens == 0
    (output,) = expected.generate(small_pool, K, [Case(f"{begin} {words(34, 9)}")], 4)
    assert output.num_cached_tokens >= 64


def test_methods_show_in_the_answer(expected: Expected) -> None:
    """Else the comparisons with the reference would prove nothing."""
    cases = [case for case in CASES if case.prompt == QUESTION and case.photos == (0,)]
    assert len({tuple(expected.answer(K, case, TOKENS)[1]) for case in cases}) == len(cases) == 6


def test_abort_while_waiting_and_while_decoding(small_pool: Engine, expected: Expected) -> None:
    victim = AskedCase(TWO, (1, 2), asked=fastv(0.5))
    for i, case in enumerate([victim, *CASES[5:9], victim]):
        small_pool.add(f"request-{i}", case, TOKENS)
    small_pool.step()
    small_pool.abort(["request-5"])
    small_pool.step()
    small_pool.abort(["request-0"])
    outputs = []
    while small_pool.llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in small_pool.step() if output.finished]
    assert sorted(output.request_id for output in outputs) == [f"request-{i}" for i in range(1, 5)]
    for output in outputs:
        expected.check(K, CASES[4 + int(output.request_id[-1])], output)
    small_pool.assert_all_blocks_free()


def test_several_sequences_of_one_prompt(small_pool: Engine, expected: Expected) -> None:
    (output,) = small_pool.generate([CASES[4]], TOKENS, n=3, temperature=1.0, top_k=1)  # sampling of one candidate
    tokens = expected.answer(K, CASES[4], TOKENS)[0]
    assert [list(sequence.token_ids) for sequence in output.outputs] == [tokens] * 3


def test_prompts_that_fit_into_no_step_are_refused(small_chunks: Engine, expected: Expected) -> None:
    """Chunks of 50 tokens and 16 sequences: room for 35."""
    with pytest.raises(ValueError, match=r"has room for 35 \(--max-num-batched-tokens 50 less one for each of 15 "):
        small_chunks.add("refused", CASES[3], TOKENS)
    small_chunks.abort(["refused"])
    expected.generate(small_chunks, K, [TINY, CASES[6], Case(QUESTION, (0,))], TOKENS)
    small_chunks.assert_all_blocks_free()


def test_a_uuid_that_looks_like_a_mark_is_refused(small_chunks: Engine) -> None:
    prompt = CASES[6].to_vllm(small_chunks.llm.get_tokenizer()) | {"multi_modal_uuids": {"image": ["mine~fastv:3"]}}
    with pytest.raises(ValueError, match="'mine~fastv:3' ends as identities of foldserve do"):
        small_chunks.llm.generate([prompt], use_tqdm=False)
    small_chunks.assert_all_blocks_free()


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "k 1, no prefix caching": (1, {"enable_prefix_caching": False, "max_num_batched_tokens": 4096}),
    "k 3, buckets, asynchronous scheduler": (
        3,
        {
            "scheduler_cls": "foldserve.server.engine.withdrawal.scheduler.WithdrawingAsyncScheduler",
            "max_num_batched_tokens": 500,
        },
    ),
    "last layer only": (LAYERS - 1, {"max_num_batched_tokens": 1000}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_layers_and_groupings(eight_layers: Path, expected: Expected, variant: str) -> None:
    layer, options = VARIANTS[variant]
    engine = Engine(eight_layers, layer, max_num_seqs=8, **options)
    expected.generate(engine, layer, [CASES[i] for i in (1, 3, 4, 5, 6, 10)], 5)
    engine.assert_all_blocks_free()


def test_a_whole_prompt_may_have_more_images_than_a_step_encodes(eight_layers: Path, expected: Expected) -> None:
    """Steps of 200 tokens encode one image; the tower takes the four of a prompt one by one, and others in between."""
    engine = Engine(eight_layers, K, max_num_batched_tokens=200)
    kept = '{"method": "folder+fastv", "keep_tokens": 9, "decoder_ratio": 0.5}'
    four = AskedCase(f"{'<image> ' * 4}{words(3, 4)}", (0, 1, 2, 3), asked=kept)
    others = [AskedCase(f"<image> {words(i, 4)}", (4 + i % 2,), asked='{"ratio": 0.9}') for i in range(6)]
    tower = engine.llm.apply_model(lambda model: model.vision_tower.vision_model.embeddings.patch_embedding)[0]
    seen: list[int] = []
    hook = tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        expected.generate(engine, K, [*others[:3], four, *others[3:], four], TOKENS)
    finally:
        hook.remove()
    assert set(seen) == {1} and len(seen) >= 6
    assert engine.steps["whole"]
    engine.assert_all_blocks_free()
