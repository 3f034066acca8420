"""API keys from the environment, so that they appear in no command line, result or report."""

from __future__ import annotations

import os

CHATS, METRICS = "OPENAI_API_KEY", "METRICS_KEY"  # the first is what `vllm bench serve` reads


def for_chats() -> dict[str, str]:
    """Headers for chat requests."""
    return _bearer(os.environ.get(CHATS))


def for_metrics() -> dict[str, str]:
    """Headers for /metrics; one key may have both scopes."""
    return _bearer(os.environ.get(METRICS) or os.environ.get(CHATS))


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
