"""MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import AT_ONCE, Reduced, true_fp32, unit_rows
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import ONLY_TOKENS, QUERY_TOKENS, AfterProjector, Kind, Seen
from foldserve.reducers.options import Choice, Value
from foldserve.reducers.random import keep
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

TEXT_TEMPERATURE = {"keywords": 0.02, "question": 0.01}
"""By the form of the query: the authors' on LLaVA, and on Qwen-VL."""

MOST_TOKENS = 4096
"""Of an image. On a GPU each pick reads a matrix of 68 MB, which would be a GiB of Qwen-VL's largest image, and time
grows with the cube of the tokens. On a CPU to keep 1,024 of them takes 0.2 s once the matrix is there."""

_PARALLEL = 32768
"""Elements from which on torch splits an operation between threads on a CPU."""

_TRIED_FIRST = 8
"""Tokens of the highest bounds, of which the best gain sets the bar: of 2,880 tokens 288 picks took 0.11 s, with one
0.5 s."""

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
    """The words of a question that say what to look at, joined by blanks; the text itself where none is left."""
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
    """How well each vision token covers each target: the query's tokens, and all vision tokens.

    Args:
        projected: (n, D) vision tokens, as the decoder gets them.
        tower: (n, C), what the projector makes them of.
        text: (m, D) embeddings of the query's tokens, m <= QUERY_TOKENS.
        alpha: weight of the vision tokens, that of the query being 1.

    Returns:
        (n, QUERY_TOKENS + n), at least fp32; columns of text tokens that the query does not have are 0.
    """
    vision, query, of_tower = unit_rows(projected), unit_rows(text), unit_rows(tower)
    n, m = len(projected), len(text)
    with true_fp32():
        to_text, to_vision = vision @ query.mT, of_tower @ of_tower.mT  # (n, m), (n, n)
    to_text = (to_text / text_temperature).softmax(dim=0) / max(1, m)
    to_vision = (to_vision / vision_temperature).softmax(dim=0) * (alpha / n)
    return torch.cat([F.pad(to_text, (0, QUERY_TOKENS - m)), to_vision], dim=1)


def most_covering(covers: Tensor, kept: int, exclude: Sequence[int] = ()) -> Tensor:
    """Greedy choice: each pick adds most to how well targets are covered, each by its best token; of equals the first.

    Args:
        covers: (B, n, targets), at least 0.
        kept: at most n.
        exclude: not all tokens; they are taken only after all others, in position order.

    Returns:
        (B, kept) distinct indices, ascending.
    """
    free = min(kept, covers.shape[1] - len(exclude))
    if covers.is_cpu:
        pick = _lazily if covers[0].numel() >= _PARALLEL else _greedily
        picks = torch.cat([pick(own, free, exclude) for own in torch.split(covers, 1)])
    else:
        picks = _greedily(covers, free, exclude)
    rest = torch.tensor(sorted(exclude)[: kept - free], dtype=torch.int64, device=covers.device)
    return torch.cat([picks, rest.expand(len(covers), -1)], dim=1).sort(dim=-1).values


def _greedily(covers: Tensor, kept: int, exclude: Sequence[int]) -> Tensor:
    """(B, n, targets) -> (B, kept) in the order of picking. Nothing is read back from the device."""
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
    """The picks of `_greedily` for one image on a CPU (Minoux, Accelerated greedy algorithms, 1978).

    The more is reached, the less a token can add, also after rounding: what it would have added before is a bound, and
    only tokens whose bound is as high as the best gain are looked at again. No step is split between threads: on a
    machine that others use too, each pick would wait for a core several times.
    """
    (covers,) = covers
    n, targets = covers.shape
    bound, reached = covers.new_full((n,), torch.inf), covers.new_zeros(targets)
    bound[list(exclude)] = -torch.inf
    at_once = max(1, (_PARALLEL - 1) // targets)

    def gains(tokens: Tensor) -> Tensor:
        rows = covers.index_select(0, tokens)  # `covers[tokens]` is split between threads however few they are
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
    """The text that is compared with is the decoder's own embedding of the query, so that no other model is needed."""

    name = "mmtok"
    summary = "Keeps the vision tokens that cover the words of the question, and the image, best."
    paper = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs"
    options = (
        Choice(
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

    def settled(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[Value, ...]:
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
        """Words one by one, as the authors tokenize keywords; a question in one piece."""
        if self.query_form == "keywords":
            return keywords(query).split()
        return [f"Question: {query}"] if query.strip() else []

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, seen: Seen = ONLY_TOKENS) -> Reduced:
        """See `AfterProjector`. As many images pick together as `AT_ONCE` has room for."""
        assert seen.tower is not None
        n, temperature = x.shape[1], TEXT_TEMPERATURE[self.query_form]
        queries = seen.queries or [x.new_empty(0, x.shape[2])] * len(x)
        at_once = max(1, AT_ONCE // (n * (QUERY_TOKENS + n)))
        source = []
        for first in range(0, len(x), at_once):
            some = slice(first, first + at_once)
            each = zip(x[some, :, :width], seen.tower[some], queries[some], strict=True)
            covers = torch.stack([coverage(*image, text_temperature=temperature) for image in each])
            source.append(most_covering(covers, plan.kept))
        return keep(x, torch.cat(source))
