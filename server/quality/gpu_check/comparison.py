"""Compares answers with the expected ones.

The likeliest token of a trained model often has a probability of nearly 1, even if the image was reduced wrongly. Its
margin over the second likeliest shows the error: docs/guides/gpu-check.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from foldserve.server.quality.gpu_check.job_runner import StageFailed
from foldserve.server.quality.gpu_check.jobs import Answer, Case


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences from the expected answer, in nats.

    Attributes:
        logprob: of a token's log-probability.
        margin: of a token's margin.
        close: a token with a smaller margin may differ; the tokens after it are not compared.
        compared: least share of all tokens that has to be compared.
    """

    logprob: float
    margin: float
    close: float
    compared: float = 0.9


@dataclass(slots=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        errors: case -> largest difference of margins.
        close: cases whose answers part at a token with a small margin.
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
    """Raises Failed if an answer is wrong or too few tokens were compared."""
    before = f"{what}: " if what else ""
    if comparison.wrong:
        name, wrong = next(iter(comparison.wrong.items()))
        count = f"{len(comparison.wrong)} of {len(comparison.errors)} cases are wrong"
        raise StageFailed(f"{before}{count}, such as {name}: {wrong}", comparison.details)
    if comparison.compared < tolerance.compared * comparison.tokens:
        raise StageFailed(
            f"{before}only {comparison.compared} of {comparison.tokens} tokens could be compared: the others follow "
            "tokens that were hardly likelier than another",
            comparison.details,
        )


def first(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first `tokens` tokens of each answer."""
    return [
        answer.model_copy(update={name: getattr(answer, name)[:tokens] for name in ("ids", "logprobs", "margins")})
        for answer in answers
    ]


def _compare(name: str, right: Answer, answer: Answer, tolerance: Tolerance, comparison: Comparison) -> str:
    """What is wrong with an answer, or ""."""
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
    """Compares 16-bit answers, in which rounding can change which vision tokens are kept, and with them the answer.

    Args:
        followed: least share of tokens before the first difference of their answers.
        margin: largest difference of margins, for nine of ten of these tokens.

    Returns:
        The measured share and difference.
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
        raise StageFailed(
            f"{what}: {same} of {total} tokens alike, of which nine of ten have margins within {ninth:.2g}"
        )
    return same / total, ninth
