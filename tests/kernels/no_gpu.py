"""A GPU for Triton's compiler and its look-up of variants; nothing runs on it."""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


def gpu(capability: int, device: int) -> SimpleNamespace:
    """In the place of Triton's active driver.

    Args:
        device: its number, by which Triton keeps the variants that it has compiled.
    """
    return SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
