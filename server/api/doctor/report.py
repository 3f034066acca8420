"""The result of `foldserve doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they import vLLM, which may be missing
    from foldserve.server.api.doctor.machine import Machine
    from foldserve.server.api.doctor.versions import Versions
    from foldserve.server.engine.facts.choices import EngineFacts
    from foldserve.server.engine.facts.kv import KvFacts
    from foldserve.server.engine.facts.model import ModelFacts


@dataclass(frozen=True, slots=True)
class Problem:
    """`text`: what is wrong and what to do, in one line. `stops`: the server would not start."""

    text: str
    stops: bool = True


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """None: unknown, because of an earlier problem.

    Attributes:
        options_added: options that `foldserve serve` fills in.
        methods: names of the methods before the decoder that the model can be served with.
        decoder_methods: those that it can be served with if there is a withdrawal layer.
    """

    problems: tuple[Problem, ...]
    versions: Versions
    machine: Machine | None = None
    options_added: tuple[str, ...] = ()
    model: ModelFacts | None = None
    methods: tuple[str, ...] = ()
    decoder_methods: tuple[str, ...] = ()
    engine: EngineFacts | None = None
    kv: KvFacts | None = None

    @property
    def can_start(self) -> bool:
        return not any(problem.stops for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        return {"starts": self.can_start, **asdict(self)}
