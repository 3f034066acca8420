"""Results of one block, and the journal that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from foldserve.loadtest.report.journal import Journal, JournalLine

_T = TypeVar("_T")


class SentRequests(BaseModel):
    """The answered requests as the client saw them, one entry each, and the errors of the others.

    Attributes:
        start_s: time of sending, on any clock.
        e2e_s: time to the last token.
        itl_s: times between the parts of an answer.
        prompt_tokens, output_tokens: counted by the server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_s: list[float]
    ttft_s: list[float]
    e2e_s: list[float]
    itl_s: list[list[float]]
    prompt_tokens: list[int]
    output_tokens: list[int]
    errors: list[str]


class Record(BaseModel):
    """One block.

    Attributes:
        counters, gauges: see `MetricsWatch`.
        cpu_s: CPU time by kind of process; empty for a remote server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sent: SentRequests
    counters: dict[str, float]
    gauges: dict[str, list[float]]
    cpu_s: dict[str, float]


def joined(blocks: Sequence[Record]) -> Record:
    """Joins several blocks, as if each had begun when the one before it ended."""
    start_s: list[float] = []
    end = 0.0
    for sent in (block.sent for block in blocks):
        shift = end - min(sent.start_s)
        start_s += [start + shift for start in sent.start_s]
        end = max(start + e2e + shift for start, e2e in zip(sent.start_s, sent.e2e_s, strict=True))
    fields = {name: _flat([getattr(block.sent, name) for block in blocks]) for name in SentRequests.model_fields}
    return Record(
        sent=SentRequests(**fields | {"start_s": start_s}),
        counters=_by_name([block.counters for block in blocks], sum),
        gauges=_by_name([block.gauges for block in blocks], _flat),
        cpu_s=_by_name([block.cpu_s for block in blocks], sum),
    )


def _flat(lists: Sequence[Sequence[_T]]) -> list[_T]:
    return [value for values in lists for value in values]


def _by_name(blocks: Sequence[Mapping[str, _T]], join: Callable[[list[_T]], _T]) -> dict[str, _T]:
    names = dict.fromkeys(name for block in blocks for name in block)
    return {name: join([block[name] for block in blocks if name in block]) for name in names}


class _Line(JournalLine[Record]):
    key: str = Field(alias="block")
    result: Record = Field(alias="record")


class BlockJournal(Journal[Record]):
    """The records of one run, by `Block.key`."""

    line = _Line
