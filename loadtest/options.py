"""What a user may ask of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from foldserve.loadtest.grid import Load, ServerName, Variant, variants
from foldserve.loadtest.workloads import WORKLOADS
from foldserve.server.options import flag, option, positional

_WITHDRAW = {"off": (False,), "on": (True,), "both": (False, True)}
_NEEDED = ("httpx", "jinja2", "matplotlib", "pandas", "PIL", "vllm")


@dataclass(frozen=True, slots=True)
class LoadTestOptions:
    """Raises ValueError if what is asked can't be measured."""

    output: Path = option(Path("loadtest-results"), "DIR", "results that lie there are not measured again")
    model: str | None = positional("MODEL", default=None)

    url: str | None = option(None, "URL", "a running server, such as http://localhost:8000", group="servers")
    control_url: str | None = option(None, "URL", "a running plain vLLM, as the control")
    control: bool = option(True, None, "start no plain vLLM")
    beside: bool = option(False, None, "both servers up at once (default: one after the other, in every round)")
    restart: bool = option(True, None, "start servers once, not anew for every round")
    withdraw_layer: int | None = option(None, "K", "of the server that is started")

    methods: Sequence[str] = option(("folder",), "M,M,...", group="grid")
    ratios: Sequence[float] = option((0.25, 0.5, 0.66, 0.75, 0.9), "R,R,...", "beside 0")
    withdraw: Literal["off", "on", "both"] = option("off", None, "whether vision tokens leave the decoder at layer K")
    concurrency: Sequence[int] = option((1, 8, 64), "N,N,...", "requests at once")
    rate: Sequence[float] = option((), "R,R,...", "requests/s that arrive at random (default: none)")
    rounds: int = option(4, "N", "through all of the grid")
    blocks: Sequence[int] = option((1,), "N[,N,...]", "of each point in each round, for all loads or one number a load")

    workload: str = option("chat", "NAME", f"one of {', '.join(WORKLOADS)}", group="requests")
    trace: Path | None = option(None, "JSONL", "replay these requests at their times instead")
    speed: Sequence[float] = option((1.0,), "S,S,...", "of the trace, as factors")
    requests: Sequence[int] = option(
        (128,), "N[,N,...]", "of a block (of a trace, at most), for all loads or one number a load"
    )
    warm_up: int = option(2, "N", "of each variant after a server's start, not counted")
    output_tokens: int | None = option(None, "N", "of an answer (default: 16; long: 256)")
    words: int = option(48, "N", "of a question")
    images: Path | None = option(None, "DIR", "take images from there (default: they are made up)")
    image_size: int = option(336, "PX", "of images and videos that are made up; of videos it must be even")
    repeat_images: int = option(0, "N", "only so many different ones, to see caches (default: all differ)")
    seed: int = option(0, "N", "of arrival times")

    quality: Path | None = option(
        None, "FILE", "quality.json of `foldserve evaluate`: accuracy beside throughput", group="report"
    )
    shape_from: str | None = option(None, "MODEL", "checkpoint that predictions are made for (default: MODEL)")

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        found = [
            f"--ratios are shares of vision tokens, each in [0, 1), not {r}" for r in self.ratios if not 0 <= r < 1
        ]
        for name in ("concurrency", "rate", "speed", "requests", "blocks"):
            found += [f"--{name} must be above 0, not {value}" for value in getattr(self, name) if value <= 0]
        for name in ("rounds", "words", "image_size"):
            if getattr(self, name) < 1:
                found.append(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.workload not in WORKLOADS:
            found.append(f"--workload is one of {', '.join(WORKLOADS)}, not {self.workload!r}")
        elif self.workload == "video" and (self.images or self.image_size % 2):
            found.append("videos are made up, with an even --image-size: leave --images out")
        elif not self.trace and self.burstiness != 1 and not self.rate:
            found.append(f"--workload {self.workload} is about arrival times: give --rate")
        elif uneven := self._unequal_lengths():
            found += uneven
        else:
            too_few = [load for load in self._loads() if (load.concurrency or 0) > load.requests]
            found += [f"{load.requests} requests can't be {load}: raise --requests" for load in too_few]
        if (self.model is None) == (self.url is None):
            found.append("a model to serve or the --url of a server is needed, one of them")
        if self.withdraw != "off" and self.url is None and self.withdraw_layer is None:
            found.append("--withdraw on needs --withdraw-layer K, which the server is started with")
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            found.append(f'a load test needs {" and ".join(missing)}: pip install "foldserve[loadtest]"')
        return found

    def _unequal_lengths(self) -> list[str]:
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
        return variants(self.methods, self.ratios, _WITHDRAW[self.withdraw], self.has_control), self._loads()

    def _arrivals(self) -> list[Load]:
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
        """URLs of servers that are already running."""
        given: dict[ServerName, str | None] = {"foldserve": self.url, "vllm": self.control_url}
        return {name: url.rstrip("/") for name, url in given.items() if url is not None}

    def server_options(self, engine_options: Sequence[str]) -> dict[ServerName, list[str]]:
        """Arguments after `serve` for the servers to start."""
        if self.model is None:
            return {}
        common = [self.model, *engine_options]
        ours = [] if self.withdraw_layer is None else ["--withdraw-layer", str(self.withdraw_layer)]
        return {"foldserve": common + ours, "vllm": common}
