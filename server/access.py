"""The operator's settings of access, admission and shutdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldserve.server.options import option

UNBOUNDED_QUEUE = 1_000_000
"""`max_queue` that turns nobody away."""


def _absolute(path: str) -> Path:
    return Path(path).absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Settings of access and life cycle. Raises ValueError if one is out of bounds."""

    api_keys: Path | None = option(
        None, "FILE", "keys that may ask, see `foldserve hash-key` (default: all may)", parse=_absolute
    )
    open_metrics: bool = option(
        False, None, "/metrics needs no key (default: with --api-keys, one with the scope `metrics`)"
    )
    playground: bool = option(True, None, "do not serve /playground, a page to try the server with")
    max_queue: int = option(
        1024, "N", "answers that may wait besides those that the engine runs; further requests get 503"
    )
    key_concurrent: int | None = option(
        None,
        "N",
        "answers that a key may have in flight if its entry sets no number (default: half of what the server holds)",
    )
    shutdown_timeout_s: int = option(
        30, "S", "seconds that requests in flight have to finish after SIGTERM", flag="--shutdown-timeout"
    )
    engine_timeout_s: int = option(
        60,
        "S",
        "seconds without output of an engine that has work, after which it counts as hung and the server or the batch "
        "ends; more than its longest step",
        flag="--engine-timeout",
    )

    def __post_init__(self) -> None:
        for name, value in (("--max-queue", self.max_queue), ("--shutdown-timeout", self.shutdown_timeout_s)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if self.key_concurrent is not None and self.key_concurrent < 1:
            raise ValueError(f"--key-concurrent must be at least 1, not {self.key_concurrent}")
        if self.engine_timeout_s < 1:
            raise ValueError(f"--engine-timeout must be at least 1, not {self.engine_timeout_s}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Access:
        """Inverse of `to_config`; missing settings have their defaults."""
        path = config.get("api_keys")
        return cls(**{**config, "api_keys": None if path is None else Path(path)})

    def to_config(self) -> dict[str, object]:
        return asdict(self) | {"api_keys": None if self.api_keys is None else str(self.api_keys)}
