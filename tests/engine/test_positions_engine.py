"""Tokens that keep their positions, in a real engine against plain PyTorch: chunks, decode, caches, preemption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import MAX_TOKENS, Case, greedy
from tests.engine.keeping_reference import Answer, KeepingReference
from tests.engine.watch import forget, watch
from tests.images import photo

LONG = 40  # tokens: more than a block of the KV cache
KEEP: dict[str, object] = {"positions": "keep"}
THREE = Case(
    "USER: <image> and <image>\nthen <image> which? ASSISTANT:",
    [photo(1), photo(2), photo(3)],
    [{"ratio": 0.5, **KEEP}, {"ratio": 0.5}, {"method": "folder_cls", "keep_tokens": 20, **KEEP}],
)
"""Images with settings of their own; one of them is renumbered between two that are not."""


@pytest.fixture(scope="module")
def reference(tiny_llava: Path) -> KeepingReference:
    return KeepingReference(tiny_llava)


@pytest.fixture(scope="module")
def expect(reference: KeepingReference) -> Callable[[Case, int], Answer]:
    known: dict[str, Answer] = {}

    def answer(case: Case, tokens: int = MAX_TOKENS) -> Answer:
        key = repr((case.prompt, [image.tobytes()[:4096] for image in case.images], case.reductions, tokens))
        if key not in known:
            known[key] = reference.generate(case.prompt, case.images, case.reductions, tokens)
        return known[key]

    return answer


def one_image(seed: int, question: str = "What is in the picture?", **reduction: object) -> Case:
    return Case(f"USER: <image>\n{question} ASSISTANT:", [photo(seed)], [KEEP | reduction])


def assert_same(case: Case, got: Answer, want: Answer) -> None:
    assert got[0] == want[0], case.reductions
    assert got[1] == pytest.approx(want[1], abs=2e-4), case.reductions


MIXED = [
    *(one_image(11, method=method, ratio=r) for method in ("folder", "folder_cls") for r in (0.25, 0.5, 0.9)),
    one_image(11, ratio=0.5, positions="renumber"),
    Case("USER: no picture at all ASSISTANT:"),
    one_image(11, ratio=0),
    THREE,
]


def test_one_batch_of_all_kinds(llm: Any, expect: Callable[..., Answer]) -> None:
    """Kept and renumbered, several images, text alone; chunks of 50 tokens cut images."""
    for case, got in zip(MIXED, greedy(llm, MIXED), strict=True):
        assert_same(case, got, expect(case))


@pytest.mark.parametrize("case", [one_image(21, ratio=0.25), THREE], ids=["one image", "three images"])
def test_positions_are_those_of_the_reference(llm: Any, reference: KeepingReference, case: Case) -> None:
    """Every row of every step: chunks that begin inside an image, then 40 decode steps."""
    forget(llm)
    places = reference.place(case.prompt, case.images, case.reductions)
    with watch(llm) as seen:
        greedy(llm, [case], LONG)
    (chunks,) = seen.chunks.values()
    images = [place for row, place in enumerate(places[1:]) if place > places[row] + 1]
    assert images and chunks[1][0] == 50 < len(places)  # the first chunk ends inside an image
    (positions,) = seen.positions()
    following = reference.placed.following
    assert positions == [*places, *range(following, following + LONG - 1)]
    assert following > len(places)


def test_decode_goes_on_from_the_full_length(llm: Any, expect: Callable[..., Answer]) -> None:
    case = one_image(22, ratio=0.5)
    (got,) = greedy(llm, [case], LONG)
    assert_same(case, got, expect(case, LONG))


def test_a_prefix_cache_hit_that_skips_the_encoder(llm: Any, expect: Callable[..., Answer]) -> None:
    """The whole image comes from the KV cache: the positions of what follows are known without its embeddings."""
    question = "And what is it that one sees there, on the left of it, behind it and above it, if anything?"
    case = one_image(12, question, ratio=0.66)
    forget(llm)
    greedy(llm, [case])
    llm.llm_engine.reset_encoder_cache()  # else its being skipped would show nothing
    with watch(llm) as seen:
        (got,) = greedy(llm, [case], LONG)
    ((first, _), *_) = next(iter(seen.chunks.values()))
    assert first > 49 + 10 and not seen.encoded  # 49 tokens are left of the image
    assert_same(case, got, expect(case, LONG))


def test_a_prefix_cache_hit_that_ends_inside_the_image(llm: Any, expect: Callable[..., Answer]) -> None:
    """With the encoder's cache and without: the rest of the image is placed from its middle on."""
    forget(llm)
    greedy(llm, [one_image(13, ratio=0.5)])
    for encodes, question in enumerate(("Who is it?", "Where is it?")):
        if encodes:
            llm.llm_engine.reset_encoder_cache()
        case = one_image(13, question, ratio=0.5)
        with watch(llm) as seen:
            (got,) = greedy(llm, [case])
        ((first, _), *_) = next(iter(seen.chunks.values()))
        assert 0 < first < 72 and seen.encoded == encodes
        assert_same(case, got, expect(case))


def test_no_cache_takes_one_setting_for_the_other(llm: Any, expect: Callable[..., Answer]) -> None:
    for question in ("What is in the picture?", "And what is it that one sees there?"):
        for positions in ("keep", "renumber", "keep"):
            case = one_image(14, question, ratio=0.66, positions=positions)
            (got,) = greedy(llm, [case])
            assert_same(case, got, expect(case))


@pytest.mark.parametrize("steps", [1, 3, 6], ids=["inside the image", "in the question", "while decoding"])
def test_after_preemption(llm: Any, expect: Callable[..., Answer], steps: int) -> None:
    from vllm import SamplingParams

    forget(llm)
    engine = llm.llm_engine
    cases = [one_image(15, ratio=0.5), one_image(15, ratio=0.5, positions="renumber")]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    for i, case in enumerate(cases):
        engine.add_request(f"preempted-{steps}-{i}", case.to_vllm(), params)
    done: dict[str, Any] = {}
    with watch(llm) as seen:
        for step in range(100):
            if step == steps:
                engine.reset_prefix_cache(reset_running_requests=True)
            done |= {output.request_id: output for output in engine.step() if output.finished}
            if not engine.has_unfinished_requests():
                break
    kept = next(iter(seen.chunks.values()))
    assert [first for first, _ in kept].count(0) == 2  # it began again
    for i, case in enumerate(cases):
        (completion,) = done[f"preempted-{steps}-{i}"].outputs
        ids = list(completion.token_ids)
        logprobs = [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
        assert_same(case, (ids, logprobs), expect(case))


def test_renumbered_requests_are_bit_for_bit_the_same_beside_kept_ones(llm: Any) -> None:
    """Tokens and log-probabilities are equal, not close, and their positions count up from 0."""
    others = [one_image(16, ratio=0.5, positions="renumber"), Case(THREE.prompt, THREE.images, [{"ratio": 0.5}] * 3)]
    others += [one_image(16, ratio=0), Case("USER: no picture at all ASSISTANT:")]

    def beside(positions: str) -> tuple[list[Answer], list[list[int]]]:
        forget(llm)
        with watch(llm) as seen:
            answers = greedy(llm, [*others, one_image(17, keep_tokens=71, positions=positions)])
        return answers, seen.positions()

    kept, kept_positions = beside("keep")
    renumbered, positions = beside("renumber")
    assert kept[:-1] == renumbered[:-1]
    assert all(places == list(range(len(places))) for places in [*positions, *kept_positions[:-1]])
    assert kept_positions[-1] != positions[-1] and kept[-1][1] != renumbered[-1][1]


def test_positions_make_a_difference(expect: Callable[..., Answer]) -> None:
    """Guards the tests above: a reference that ignored positions would make them pass for nothing."""
    kept, renumbered = (expect(one_image(11, ratio=0.5, positions=p))[1] for p in ("keep", "renumber"))
    assert max(abs(a - b) for a, b in zip(kept, renumbered, strict=True)) > 1e-3
