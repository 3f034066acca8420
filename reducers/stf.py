"""LLaVA-STF: Learning Compact Vision Tokens for Efficient Large Multimodal Models, a trained projector.

MBTF (multi-block token fusion) mixes the channels of several blocks' hidden states. STF (spatial token fusion) then
turns every k x k window of tokens into one. The checkpoint fixes the number of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import isqrt
from reprlib import repr as _short

import torch
from torch import Tensor, nn

from foldserve.reducers.method import InProjector

LAYERS = (23, 21, 18, 15, 12, 9, 6, 3)
"""CLIP-L blocks of the released checkpoints. The paper starts at 24, but the checkpoints' select layer -2 is 23."""

Mlp = Callable[[str, int, int, int], nn.Module]
"""(name, input width, inner width, output width) -> modules `linear_1`, `act` (exact GELU) and `linear_2`."""


@dataclass(frozen=True, slots=True)
class StfConfig:
    """The object `stf` in a checkpoint's config.json.

    Raises:
        ValueError: a value that no checkpoint can have.
    """

    layers: tuple[int, ...] = LAYERS  # blocks, from 1, whose outputs are fused; deepest first
    kernel: int = 2  # side k of a window, in tokens
    experts: int = 1  # E tokens per window, each from its own share of the channels

    def __post_init__(self) -> None:
        whole = all(type(i) is int and i >= 1 for i in self.layers)
        if not self.layers or not whole or any(a <= b for a, b in pairwise(self.layers)):
            raise ValueError(f"stf.layers must be block numbers from 1, deepest first, not {_short(self.layers)}")
        for name in ("kernel", "experts"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"stf.{name} must be an integer of at least 1, not {_short(value)}")

    @classmethod
    def parse(cls, value: object) -> StfConfig:
        """Read the JSON object; raises ValueError if any field is missing, since a default could be silently wrong."""
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or sorted(value) != sorted(names) or not isinstance(value["layers"], list):
            raise ValueError(
                f"config.json needs an object `stf` with a list `layers`, `kernel` and `experts`, not {_short(value)}"
            )
        return cls(tuple(value["layers"]), value["kernel"], value["experts"])

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"layers": list(self.layers)}

    def check(self, *, blocks: int, channels: int, patches: int) -> None:
        """Raises ValueError if the tower does not fit; `patches` is without the class token."""
        if self.layers[0] > blocks:
            raise ValueError(f"stf.layers names block {self.layers[0]}, but the vision tower has {blocks} blocks")
        if channels % self.experts:
            raise ValueError(f"stf.experts must divide the vision tower's {channels} channels, {self.experts} does not")
        self.tokens(patches)

    def tokens(self, patches: int) -> int:
        """Tokens per image after the projector; raises ValueError unless `patches` is a square of at least a window."""
        return (_side(patches, self.kernel) // self.kernel) ** 2 * self.experts

    def fused_width(self, channels: int) -> int:
        return self.kernel**2 * channels // self.experts


def space_to_depth(x: Tensor, kernel: int, experts: int = 1) -> Tensor:
    """(B, side * side, C) -> (B, (side // k) ** 2 * E, k * k * C / E): stack the tokens of each window on the channels.

    Drops incomplete windows at the end of rows and columns. The new channel order is c * k * k + dy * k + dx, so a
    linear layer on the result is a convolution with stride k. Of the E adjacent tokens of a window, token e has the
    channels [e * C / E, (e + 1) * C / E).
    """
    batch, patches, channels = x.shape
    side = _side(patches, kernel)
    windows = side // kernel
    grid = x.view(batch, side, side, channels)[:, : windows * kernel, : windows * kernel]
    grid = grid.reshape(batch, windows, kernel, windows, kernel, channels)  # (B, y, dy, x, dx, C)
    tokens = grid.permute(0, 1, 3, 5, 2, 4)  # (B, y, x, C, dy, dx)
    return tokens.reshape(batch, windows * windows * experts, -1)


class StfProjector(nn.Module):
    """MBTF, space-to-depth and the projection to the decoder's width.

    Args:
        channels: C, width of the vision tower.
        hidden_size: width of the decoder.
        mlp: builds the two trained parts, `fusion` and `output`; for tensor parallelism, for example.
    """

    def __init__(self, config: StfConfig, channels: int, hidden_size: int, mlp: Mlp | None = None) -> None:
        super().__init__()
        mlp = mlp or plain_mlp
        self.kernel, self.experts = config.kernel, config.experts
        self.fusion = mlp("fusion", len(config.layers) * channels, 4 * channels, channels)
        self.output = mlp("output", config.fused_width(channels), 16 * channels, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """(B, patches, layers * C) of `fusion_input` -> (B, tokens, hidden_size)."""
        tokens: Tensor = self.output(space_to_depth(self.fusion(states), self.kernel, self.experts))
        return tokens


def fusion_input(hidden_states: Mapping[int, Tensor], config: StfConfig) -> Tensor:
    """CLIP's hidden states by block, (B, 1 + patches, C) -> (B, patches, layers * C) without the class token."""
    return torch.cat([hidden_states[i][:, 1:] for i in config.layers], dim=-1)


def plain_mlp(_name: str, width: int, inner: int, out: int) -> nn.Module:
    """`Mlp` without tensor parallelism."""
    return nn.Sequential(OrderedDict(linear_1=nn.Linear(width, inner), act=nn.GELU(), linear_2=nn.Linear(inner, out)))


def _side(patches: int, kernel: int) -> int:
    side = isqrt(patches)
    if side * side != patches or side < kernel:
        raise ValueError(
            f"LLaVA-STF needs a square grid of at least {kernel} x {kernel} tokens (stf.kernel), not {patches} tokens"
        )
    return side


class Stf(InProjector):
    name = "stf"
    summary = "Fuses windows of vision tokens in a trained projector; the checkpoint fixes how many are left."
    paper = "Learning Compact Vision Tokens for Efficient Large Multimodal Models"
