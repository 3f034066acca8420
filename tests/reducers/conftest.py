"""Settings of the property tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile(
    "untimed", deadline=None
)  # the first call of a torch operator takes longer than hypothesis waits
settings.load_profile("untimed")
