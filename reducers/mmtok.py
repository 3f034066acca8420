"""MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import AT_ONCE, Reduced, keep, true_fp32, unit_rows
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import NO_SIDE_INPUTS, QUERY_TOKENS, AfterProjector, Kind, SideInputs
from foldserve.reducers.options import ChoiceOption, Value
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

TEXT_TEMPERATURE = {"keywords": 0.02, "question": 0.01}  # the authors' values for LLaVA and for Qwen-VL

MOST_TOKENS = 4096
"""Largest image. Each pick reads a matrix of 68 MB on a GPU (1 GiB for Qwen-VL's largest image), so time grows with the
cube of the tokens. Keeping 1,024 tokens takes 0.2 s on a CPU once the matrix is computed."""

_PARALLEL = 32768  # elements from which torch splits a CPU operation between threads

_TRIED_FIRST = 8
"""Tokens with the highest bounds, whose best gain becomes the threshold: 288 picks of 2,880 tokens took 0.11 s; 0.5 s
with a single token."""

_PHRASES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_STOP_WORDS = {
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "do", "does", "did",
    "it", "they", "he", "she", "we", "you", "i", "what", "where", "when", "why", "how", "who", "which", "and", "or",
    "but", "so", "if", "then", "question", "answer", "to", "for", "with", "by", "from", "at", "into", "onto",
    "upon",
}  # fmt: skip


def keywords(text: str) -> str:
    """The question without stop words and answer instructions, or the text itself if nothing is left."""
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    words = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in _STOP_WORDS]
    return " ".join(words) or text.strip()


def coverage(
    projected: Tensor,
    tower: Tensor,
    text: Tensor,
    *,
    text_temperature: float,
    vision_temperature: float = 0.2,
    alpha: float = 0.5,
) -> Tensor:
    """How well each vision token covers each target: the query's tokens, then all vision tokens.

    Args:
        projected: (n, D) vision tokens as the decoder gets them.
        tower: (n, C), the projector's input.
        text: (m, D) embeddings of the query's tokens, m <= QUERY_TOKENS.
        alpha: weight of the vision tokens; the query's weight is 1.

    Returns:
        (n, QUERY_TOKENS + n), at least fp32; columns m to QUERY_TOKENS - 1 are 0.
    """
    vision, query, of_tower = unit_rows(projected), unit_rows(text), unit_rows(tower)
    n, m = len(projected), len(text)
    with true_fp32():
        to_text, to_vision = vision @ query.mT, of_tower @ of_tower.mT  # (n, m), (n, n)
    to_text = (to_text / text_temperature).softmax(dim=0) / max(1, m)
    to_vision = (to_vision / vision_temperature).softmax(dim=0) * (alpha / n)
    return torch.cat([F.pad(to_text, (0, QUERY_TOKENS - m)), to_vision], dim=1)


def most_covering(covers: Tensor, kept: int, exclude: Sequence[int] = ()) -> Tensor:
    """(B, n, targets) -> (B, kept) distinct indices, ascending: greedy maximum coverage.

    Each pick adds most to the sum over targets of their best cover by any pick; ties go to the first. `covers` is >= 0.
    Tokens in `exclude`, at most n - 1, are taken only after all others.
    """
    free = min(kept, covers.shape[1] - len(exclude))
    if covers.is_cpu:
        pick = _lazily if covers[0].numel() >= _PARALLEL else _greedily
        picks = torch.cat([pick(own, free, exclude) for own in torch.split(covers, 1)])
    else:
        picks = _greedily(covers, free, exclude)
    if free < kept:  # else there is nothing to copy to the device
        rest = torch.tensor(sorted(exclude)[: kept - free], dtype=torch.int64, device=covers.device)
        picks = torch.cat([picks, rest.expand(len(covers), -1)], dim=1)
    return picks.sort(dim=-1).values


def _greedily(covers: Tensor, kept: int, exclude: Sequence[int]) -> Tensor:
    """(B, n, targets) -> (B, kept) in the order of picking. Picks stay on the device: the host never waits."""
    reached = covers.new_zeros(len(covers), 1, covers.shape[2])
    taken = covers.new_zeros(covers.shape[:2])  # -inf for what can't be picked
    if exclude:
        taken[:, list(exclude)] = -torch.inf
    more = torch.empty_like(covers)
    picks = []
    for _ in range(kept):
        torch.sub(covers, reached, out=more)
        pick = (more.clamp_(min=0).sum(dim=-1) + taken).argmax(dim=-1, keepdim=True)  # (B, 1)
        taken.scatter_(1, pick, -torch.inf)
        reached = torch.maximum(reached, covers.gather(1, pick.unsqueeze(-1).expand_as(reached)))
        picks.append(pick)
    return torch.cat(picks, dim=1)


def _lazily(covers: Tensor, kept: int, exclude: Sequence[int]) -> Tensor:
    """The same picks as `_greedily`, for one image on a CPU (Minoux, Accelerated greedy algorithms, 1978).

    A token's gain never grows, also after rounding. Its earlier gain is therefore an upper bound, and only tokens whose
    bound reaches the best gain are computed again. Steps stay below torch's threshold for threads: on a shared machine
    each pick would wait several times for a core.
    """
    (covers,) = covers
    n, targets = covers.shape
    bound, reached = covers.new_full((n,), torch.inf), covers.new_zeros(targets)
    bound[list(exclude)] = -torch.inf
    at_once = max(1, (_PARALLEL - 1) // targets)

    def gains(tokens: Tensor) -> Tensor:
        rows = covers.index_select(0, tokens)  # `covers[tokens]` would always use threads
        return rows.sub_(reached).clamp_(min=0).sum(dim=-1)

    picks = []
    for left in range(n - len(exclude), n - len(exclude) - kept, -1):
        best = gains(bound.topk(min(_TRIED_FIRST, at_once, left)).indices).max()
        for some in torch.split((bound >= best).nonzero().squeeze(1), at_once):
            bound[some] = gains(some)
        pick = bound.argmax()
        bound[pick] = -torch.inf
        torch.maximum(reached, covers[pick], out=reached)
        picks.append(pick)
    return torch.stack(picks).unsqueeze(0)


class MMTok(AfterProjector):
    """Compares with the decoder's own embeddings of the query, so no text encoder is needed."""

    name = "mmtok"
    summary = "Keeps the vision tokens that cover the words of the question, and the image, best."
    paper = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs"
    options = (
        ChoiceOption(
            "query_form",
            None,
            "what counts of the query: its keywords, or all of it as a question (default: `keywords`; of Qwen-VL "
            "`question`)",
            tuple(TEXT_TEMPERATURE),
        ),
    )
    kind = Kind.DROP
    takes_query = True
    needs_tower = True
    query_form: str

    def resolved_options(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[Value, ...]:
        return (self.query_form or ("question" if geometry.merges_patches else "keywords"),)

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        if geometry.tokens > MOST_TOKENS:
            raise InvalidReduction(
                f"method {self.name!r} compares all tokens with each other for each that it keeps, which takes too "
                f"long of {geometry.tokens}: send an image of {MOST_TOKENS} tokens or less, or choose another method",
                "method",
            )
        return removed

    def query_texts(self, query: str) -> list[str]:
        """Keywords one by one, as the authors tokenize them; a question in one piece."""
        if self.query_form == "keywords":
            return keywords(query).split()
        return [f"Question: {query}"] if query.strip() else []

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, side: SideInputs = NO_SIDE_INPUTS) -> Reduced:
        assert side.tower is not None
        n, temperature = x.shape[1], TEXT_TEMPERATURE[self.query_form]
        projected = x[..., :width]
        queries = side.queries or [projected.new_empty(0, projected.shape[2])] * len(x)
        at_once = max(1, AT_ONCE // (n * (QUERY_TOKENS + n)))
        source = []
        for first in range(0, len(x), at_once):
            some = slice(first, first + at_once)
            each = zip(projected[some], side.tower[some], queries[some], strict=True)
            covers = torch.stack([coverage(*image, text_temperature=temperature) for image in each])
            source.append(most_covering(covers, plan.kept))
        return keep(x, torch.cat(source))
