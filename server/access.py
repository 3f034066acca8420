"""Who may use the server, how much it takes on, and how it ends: settings of an operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Settings of access and life cycle.

    Attributes:
        api_keys: file of keys, see `foldserve hash-key`; None lets everybody in.
        open_metrics: `/metrics` needs no key, although the rest does; without keys it never needs one.
        max_queue: answers that may wait beside those that the engine can run at once.
        key_concurrent: answers that each key may have in flight whose entry says nothing; None for half of all.
        shutdown_timeout_s: time that requests in flight have to finish after SIGTERM, in whole seconds.
        engine_timeout_s: without any output of the engine, while requests wait for it, after which it counts as hung.

    Raises:
        ValueError: values that don't go together, or out of bounds.
    """

    api_keys: Path | None = None
    open_metrics: bool = False
    max_queue: int = 1024
    key_concurrent: int | None = None
    shutdown_timeout_s: int = 30
    engine_timeout_s: int = 60

    def __post_init__(self) -> None:
        for option, value in (("--max-queue", self.max_queue), ("--shutdown-timeout", self.shutdown_timeout_s)):
            if value < 0:
                raise ValueError(f"{option} must be at least 0, not {value}")
        if self.key_concurrent is not None and self.key_concurrent < 1:
            raise ValueError(f"--key-concurrent must be at least 1, not {self.key_concurrent}")
        if self.engine_timeout_s < 1:
            raise ValueError(f"--engine-timeout must be at least 1, not {self.engine_timeout_s}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Access:
        """Reads what `to_config` wrote; what is missing has its default."""
        path = config.get("api_keys")
        return cls(**{**config, "api_keys": None if path is None else Path(path)})

    def to_config(self) -> dict[str, object]:
        """The JSON value that travels to the API servers."""
        return asdict(self) | {"api_keys": None if self.api_keys is None else str(self.api_keys)}
