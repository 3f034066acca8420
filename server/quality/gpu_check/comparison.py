"""Answers beside those that they should be.

The likeliest token of a trained model often has a probability of nearly 1, whatever was done to the image: what tells a
wrong reduction is its margin, by how much it leads over the next token. docs/guides/gpu-check.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from foldserve.server.quality.gpu_check.bench import Failed
from foldserve.server.quality.gpu_check.jobs import Answer, Case


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an answer may be off, in nats.

    Attributes:
        logprob: of a token.
        margin: of its lead over the next one.
        close: a token that leads by less may be another one; what follows it is not compared.
        compared: share of all tokens that has to be compared at least.
    """

    logprob: float
    margin: float
    close: float
    compared: float = 0.9


@dataclass(slots=True)
class Comparison:
    """What was found.

    Attributes:
        errors: largest difference of margins in each case.
        close: cases that took another way where two tokens were close.
        wrong: case -> what is wrong with it.
    """

    tokens: int = 0
    compared: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    close: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def details(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    cases: Sequence[Case], expected: Sequence[Answer], found: Sequence[Answer], tolerance: Tolerance
) -> Comparison:
    comparison = Comparison()
    for case, right, answer in zip(cases, expected, found, strict=True):
        comparison.tokens += len(right.ids)
        if wrong := _compare(case.name, right, answer, tolerance, comparison):
            comparison.wrong[case.name] = wrong
    return comparison


def require(comparison: Comparison, tolerance: Tolerance, what: str = "") -> None:
    """Raises Failed if an answer is wrong, or too little was compared to say that all are right."""
    before = f"{what}: " if what else ""
    if comparison.wrong:
        name, wrong = next(iter(comparison.wrong.items()))
        count = f"{len(comparison.wrong)} of {len(comparison.errors)} cases are wrong"
        raise Failed(f"{before}{count}, such as {name}: {wrong}", comparison.details)
    if comparison.compared < tolerance.compared * comparison.tokens:
        raise Failed(
            f"{before}only {comparison.compared} of {comparison.tokens} tokens could be compared: the others follow "
            "tokens that were hardly likelier than another",
            comparison.details,
        )


def first(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The answers cut to so many tokens."""
    return [
        answer.model_copy(update={name: getattr(answer, name)[:tokens] for name in ("ids", "logprobs", "margins")})
        for answer in answers
    ]


def _compare(name: str, right: Answer, answer: Answer, tolerance: Tolerance, comparison: Comparison) -> str:
    """What is wrong, or ""."""
    comparison.errors[name] = 0.0
    if answer.prompt_tokens != right.prompt_tokens:
        return f"{answer.prompt_tokens} tokens in the prompt, not {right.prompt_tokens}"
    if len(answer.ids) != len(right.ids):
        return f"{len(answer.ids)} tokens came, not {len(right.ids)}"
    for i, token in enumerate(right.ids):
        if answer.ids[i] != token:
            if right.margins[i] > tolerance.close:
                return f"token {i} is {answer.ids[i]}, not {token}, which leads by {right.margins[i]:.2g}"
            comparison.close.append(name)
            return ""
        for what, is_, should, most in (
            ("log-probability", answer.logprobs[i], right.logprobs[i], tolerance.logprob),
            ("margin", answer.margins[i], right.margins[i], tolerance.margin),
        ):
            if not abs(is_ - should) <= most:  # NaN is wrong too
                return f"the {what} of token {i} is {is_:.4f}, not {should:.4f}"
        comparison.errors[name] = max(comparison.errors[name], abs(answer.margins[i] - right.margins[i]))
        comparison.compared += 1
    return ""


def require_alike(
    expected: Sequence[Answer], found: Sequence[Answer], *, followed: float, margin: float, what: str
) -> tuple[float, float]:
    """For 16 bits, where rounding can choose another token of an image, and another answer follows.

    Args:
        followed: share of the tokens, before two answers part, that is asked for.
        margin: that nine of ten of these may be off at most.

    Returns:
        Both as they are.
    """
    same = total = 0
    errors: list[float] = []
    for right, answer in zip(expected, found, strict=True):
        total += len(right.ids)
        parted = next(
            (i for i, pair in enumerate(zip(right.ids, answer.ids, strict=False)) if len(set(pair)) > 1), None
        )
        both = len(right.ids) if parted is None else parted
        same += both
        errors += (abs(a - b) for a, b in zip(right.margins[:both], answer.margins[:both], strict=False))
    ninth = sorted(errors)[int(0.9 * len(errors))] if errors else float("inf")
    if same < followed * total or not ninth <= margin:
        raise Failed(f"{what}: {same} of {total} tokens alike, of which nine of ten have margins within {ninth:.2g}")
    return same / total, ninth
