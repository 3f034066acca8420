"""What a user may ask of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from foldserve.loadtest.grid import Load, ServerName, Variant, variants
from foldserve.loadtest.workloads import WORKLOADS

_NEEDED = ("httpx", "jinja2", "matplotlib", "pandas", "PIL", "vllm")


@dataclass(frozen=True, slots=True)
class Options:
    """A run.

    Attributes:
        model: that servers are started with, or None where they run already.
        url, control_url: of servers that run already: ours, and a plain vLLM.
        control: a plain vLLM with the same options is started too.
        beside: both are up at the same time.
        restart: servers are started anew for every round, so that intervals hold what differs from start to start.
        methods, ratios, withdraw: of the grid; ratio 0 is measured in any case.
        concurrency, rate: of the grid; the latter in requests/s.
        workload: a name from `WORKLOADS`.
        trace: is replayed instead, at each of `speed`.
        requests: of a block, for all loads or for each of them; of a trace, at most so many.
        blocks: of every point in a round, for all loads or for each of them.
        rounds: so many, each of them all of the grid.
        warm_up: requests of each variant after a server's start, not counted.
        output_tokens: of an answer; None: as the workload says.
        words: of a question.
        images: folder to take images from; None: they are made up, `image_size` pixels wide and high.
        repeat_images: how many different images there are; 0: each differs from all others.
        withdraw_layer: K of the server that is started.
        quality: the card of `foldserve evaluate`, for accuracy beside throughput.
        shape_from: a checkpoint, as `model`, for what the arithmetic predicts.
        seed: of arrival times.
        output: the folder to write to; results that lie there are not measured again.

    Raises:
        ValueError: something that can't be measured.
    """

    output: Path
    model: str | None = None
    url: str | None = None
    control_url: str | None = None
    control: bool = True
    beside: bool = False
    restart: bool = True
    methods: Sequence[str] = ("folder",)
    ratios: Sequence[float] = (0.25, 0.5, 0.66, 0.75, 0.9)
    withdraw: Sequence[bool] = (False,)
    concurrency: Sequence[int] = (1, 8, 64)
    rate: Sequence[float] = ()
    workload: str = "chat"
    trace: Path | None = None
    speed: Sequence[float] = (1.0,)
    requests: Sequence[int] = (128,)
    blocks: Sequence[int] = (1,)
    rounds: int = 4
    warm_up: int = 2
    output_tokens: int | None = None
    words: int = 48
    images: Path | None = None
    image_size: int = 336
    repeat_images: int = 0
    withdraw_layer: int | None = None
    quality: Path | None = None
    shape_from: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        """What is wrong, in words."""
        found = [
            f"--ratios are shares of vision tokens, each in [0, 1), not {r}" for r in self.ratios if not 0 <= r < 1
        ]
        for name in ("concurrency", "rate", "speed", "requests", "blocks"):
            found += [f"--{name} must be above 0, not {value}" for value in getattr(self, name) if value <= 0]
        for name in ("rounds", "words", "image_size"):
            if getattr(self, name) < 1:
                found.append(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.workload not in WORKLOADS:
            found.append(f"--workload is one of {', '.join(WORKLOADS)}, not {self.workload!r}")
        elif not self.trace and self.burstiness != 1 and not self.rate:
            found.append(f"--workload {self.workload} is about arrival times: give --rate")
        elif uneven := self._uneven():
            found += uneven
        else:
            too_few = [load for load in self._loads() if (load.concurrency or 0) > load.requests]
            found += [f"{load.requests} requests can't be {load}: raise --requests" for load in too_few]
        if (self.model is None) == (self.url is None):
            found.append("a model to serve or the --url of a server is needed, one of them")
        if any(self.withdraw) and self.url is None and self.withdraw_layer is None:
            found.append("--withdraw on needs --withdraw-layer K, which the server is started with")
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            found.append(f'a load test needs {" and ".join(missing)}: pip install "foldserve[loadtest]"')
        return found

    def _uneven(self) -> list[str]:
        loads = len(self._arrivals())
        counts = {name: len(getattr(self, name)) for name in ("requests", "blocks")}
        return [
            f"--{name} takes one number, or one a load, {loads}: not {count}"
            for name, count in counts.items()
            if count not in (1, loads)
        ]

    @property
    def burstiness(self) -> float:
        return WORKLOADS[self.workload].burstiness

    @property
    def answer_tokens(self) -> int:
        """Output tokens of every request."""
        return self.output_tokens or WORKLOADS[self.workload].output_tokens

    @property
    def has_control(self) -> bool:
        return self.control_url is not None or (self.url is None and self.control)

    def grid(self) -> tuple[list[Variant], list[Load]]:
        """Variants and loads."""
        return variants(self.methods, self.ratios, self.withdraw, self.has_control), self._loads()

    def _arrivals(self) -> list[Load]:
        """What arrives at a rate has no fixed concurrency."""
        if self.trace:
            return [Load(speed=speed) for speed in self.speed]
        at_once = [Load(concurrency=n) for n in self.concurrency] if self.burstiness == 1 else []
        return [*at_once, *(Load(rate=rate) for rate in self.rate)]

    def _loads(self) -> list[Load]:
        arrivals = self._arrivals()
        requests, blocks = (
            numbers if len(numbers) > 1 else [*numbers] * len(arrivals) for numbers in (self.requests, self.blocks)
        )
        return [
            replace(load, requests=count, blocks=times)
            for load, count, times in zip(arrivals, requests, blocks, strict=True)
        ]

    def urls(self) -> dict[ServerName, str]:
        """Of servers that run already."""
        given: dict[ServerName, str | None] = {"foldserve": self.url, "vllm": self.control_url}
        return {name: url.rstrip("/") for name, url in given.items() if url is not None}

    def server_options(self, engine_options: Sequence[str]) -> dict[ServerName, list[str]]:
        """Command lines of the servers to start, after `serve`."""
        if self.model is None:
            return {}
        common = [self.model, *engine_options]
        ours = [] if self.withdraw_layer is None else ["--withdraw-layer", str(self.withdraw_layer)]
        return {"foldserve": common + ours, "vllm": common}
