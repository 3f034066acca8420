"""LLaVA-STF: Learning Compact Vision Tokens for Efficient Large Multimodal Models: MBTF and STF, a trained projector.

MBTF (multi-block token fusion) mixes the tower's hidden states of several blocks on the channels; STF (spatial token
fusion) then turns every k x k window of tokens into one. The number of tokens is a property of the checkpoint.
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

from foldserve.reducers.method import Projector

LAYERS = (23, 21, 18, 15, 12, 9, 6, 3)
"""Hidden states of CLIP-L that the released checkpoints fuse; the paper says 24, but their select layer -2 is 23."""

Mlp = Callable[[str, int, int, int], nn.Module]
"""(name, width in, width inside, width out) -> Linear, exact GELU, Linear, called `linear_1`, `act` and `linear_2`."""


@dataclass(frozen=True, slots=True)
class StfConfig:
    """The object `stf` in a checkpoint's config.json.

    Attributes:
        layers: hidden states to fuse, deepest first; i is the output of block i, counted from 1.
        kernel: side k of a window, in tokens.
        experts: E tokens per window, each of its own share of the channels.

    Raises:
        ValueError: a value that no checkpoint can have.
    """

    layers: tuple[int, ...] = LAYERS
    kernel: int = 2
    experts: int = 1

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
        """Read the JSON object; all three fields are needed, since a guess would give other tokens in silence.

        Raises:
            ValueError: saying what is wrong and what came.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or sorted(value) != sorted(names) or not isinstance(value["layers"], list):
            raise ValueError(
                f"config.json needs an object `stf` with a list `layers`, `kernel` and `experts`, not {_short(value)}"
            )
        return cls(tuple(value["layers"]), value["kernel"], value["experts"])

    def to_json(self) -> dict[str, object]:
        """What `parse` reads."""
        return asdict(self) | {"layers": list(self.layers)}

    def check(self, *, blocks: int, channels: int, patches: int) -> None:
        """Refuse a tower that this configuration does not fit.

        Args:
            blocks: transformer blocks of the tower.
            channels: C, its width.
            patches: tokens per image, without the class token.

        Raises:
            ValueError: saying which value is wrong and what it may be.
        """
        if self.layers[0] > blocks:
            raise ValueError(f"stf.layers names block {self.layers[0]}, but the vision tower has {blocks} blocks")
        if channels % self.experts:
            raise ValueError(f"stf.experts must divide the vision tower's {channels} channels, {self.experts} does not")
        self.tokens(patches)

    def tokens(self, patches: int) -> int:
        """Tokens of one image after the projector.

        Raises:
            ValueError: the patches are no square grid, or one smaller than a window.
        """
        return (_side(patches, self.kernel) // self.kernel) ** 2 * self.experts

    def fused_width(self, channels: int) -> int:
        """Width of one token of a window."""
        return self.kernel**2 * channels // self.experts


def space_to_depth(x: Tensor, kernel: int, experts: int = 1) -> Tensor:
    """Put the tokens of each window, taken in raster order, on the channels; an odd last row and column are dropped.

    Inside a window the order is channel-major, c * k * k + dy * k + dx, so that a linear layer on the result is a
    convolution with stride k. With E experts, token e of a window has the channels [e * C / E, (e + 1) * C / E).

    Args:
        x: (B, side * side, C), tokens of a square grid in raster order.
        kernel: side k of a window.
        experts: E, divides C.

    Returns:
        (B, (side // k) ** 2 * E, k * k * C / E), the E tokens of a window side by side.
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
        config: layers, kernel and experts.
        channels: C, width of the vision tower.
        hidden_size: width of the decoder.
        mlp: how to make the two trained parts, `fusion` and `output`; tensor parallel ones, for instance.
    """

    def __init__(self, config: StfConfig, channels: int, hidden_size: int, mlp: Mlp | None = None) -> None:
        super().__init__()
        mlp = mlp or plain_mlp
        self.kernel, self.experts = config.kernel, config.experts
        self.fusion = mlp("fusion", len(config.layers) * channels, 4 * channels, channels)
        self.output = mlp("output", config.fused_width(channels), 16 * channels, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """(B, patches, layers * C), from `fusion_input` -> (B, tokens, hidden_size)."""
        tokens: Tensor = self.output(space_to_depth(self.fusion(states), self.kernel, self.experts))
        return tokens


def fusion_input(hidden_states: Mapping[int, Tensor], config: StfConfig) -> Tensor:
    """CLIP's hidden states (B, 1 + patches, C), by block -> (B, patches, layers * C) without the class token."""
    return torch.cat([hidden_states[i][:, 1:] for i in config.layers], dim=-1)


def plain_mlp(_name: str, width: int, inner: int, out: int) -> nn.Module:
    """Both linear layers whole."""
    return nn.Sequential(OrderedDict(linear_1=nn.Linear(width, inner), act=nn.GELU(), linear_2=nn.Linear(inner, out)))


def _side(patches: int, kernel: int) -> int:
    side = isqrt(patches)
    if side * side != patches or side < kernel:
        raise ValueError(
            f"LLaVA-STF needs a square grid of at least {kernel} x {kernel} tokens (stf.kernel), not {patches} tokens"
        )
    return side


class Stf(Projector):
    """The entry of the registry."""

    name = "stf"
    summary = "Fuses windows of vision tokens in a trained projector; the checkpoint fixes how many are left."
    paper = "Learning Compact Vision Tokens for Efficient Large Multimodal Models"
