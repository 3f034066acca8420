"""LLaVA-STF's windows, counts and refusals; its values are held by the golden vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from foldserve.reducers.stf import LAYERS, StfConfig, StfProjector, fusion_input, space_to_depth


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """side, kernel, experts, channels"""
    kernel, experts = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3]))
    return draw(st.integers(kernel, 11)), kernel, experts, experts * draw(st.integers(1, 3))


@given(grids(), st.integers(1, 2))
def test_every_value_is_where_the_definition_says(grid: tuple[int, int, int, int], batch: int) -> None:
    side, kernel, experts, channels = grid
    x = torch.arange(batch * side * side * channels).view(batch, side, side, channels)
    share, windows = channels // experts, side // kernel
    expected = [
        [
            [
                int(x[b, y * kernel + dy, z * kernel + dz, e * share + c])
                for c in range(share)
                for dy in range(kernel)
                for dz in range(kernel)
            ]
            for y in range(windows)
            for z in range(windows)
            for e in range(experts)
        ]
        for b in range(batch)
    ]
    assert space_to_depth(x.flatten(1, 2), kernel, experts).tolist() == expected


@given(grids())
def test_counts_and_widths_are_those_of_the_projector(grid: tuple[int, int, int, int]) -> None:
    side, kernel, experts, channels = grid
    config = StfConfig((2, 1), kernel, experts)
    projector = StfProjector(config, channels, hidden_size=5)
    assert projector(torch.zeros(2, side * side, 2 * channels)).shape == (2, config.tokens(side * side), 5)


def test_with_the_next_layer_it_is_a_strided_convolution() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 81, 6), torch.randn(7, 6 * 4), torch.randn(7)
    convolved = F.conv2d(x.mT.reshape(2, 6, 9, 9), weight.view(7, 6, 2, 2), bias, stride=2)
    torch.testing.assert_close(F.linear(space_to_depth(x, 2), weight, bias), convolved.flatten(2).mT)


@pytest.mark.parametrize(
    ("patches", "kernel", "experts", "tokens"),
    [(576, 2, 1, 144), (729, 2, 1, 169), (576, 4, 4, 144), (576, 3, 1, 64), (576, 24, 1, 1), (16, 2, 8, 32)],
)
def test_token_counts(patches: int, kernel: int, experts: int, tokens: int) -> None:
    assert StfConfig(kernel=kernel, experts=experts).tokens(patches) == tokens


def test_shapes_of_the_released_7b_checkpoint() -> None:
    with torch.device("meta"):
        projector = StfProjector(StfConfig(), channels=1024, hidden_size=4096)
    assert {name: tuple(weight.shape) for name, weight in projector.state_dict().items() if "weight" in name} == {
        "fusion.linear_1.weight": (4096, 8192),
        "fusion.linear_2.weight": (1024, 4096),
        "output.linear_1.weight": (16384, 4096),
        "output.linear_2.weight": (4096, 16384),
    }


def test_states_are_joined_deepest_first_without_the_class_token() -> None:
    states = {i: torch.full((1, 5, 2), float(i)) for i in range(4)}
    states[3][:, 0] = torch.nan
    assert fusion_input(states, StfConfig((3, 1))).tolist() == [[[3.0, 3.0, 1.0, 1.0]] * 4]


def test_config_reads_what_it_writes() -> None:
    config = StfConfig((5, 2), kernel=4, experts=2)
    assert config.to_json() == {"layers": [5, 2], "kernel": 4, "experts": 2}
    assert StfConfig.parse(config.to_json()) == config
    assert StfConfig().layers == LAYERS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "needs an object `stf` with a list `layers`, `kernel` and `experts`, not None"),
        ({"layers": [2, 1], "kernel": 2}, "needs an object `stf`"),
        ({"layers": [2, 1], "kernel": 2, "experts": 1, "expert": 1}, "needs an object `stf`"),
        ({"layers": 23, "kernel": 2, "experts": 1}, "needs an object `stf`"),
        ({"layers": [], "kernel": 2, "experts": 1}, "stf.layers must be block numbers from 1, deepest first, not ()"),
        ({"layers": [1, 2], "kernel": 2, "experts": 1}, r"deepest first, not (1, 2)"),
        ({"layers": [2, 2], "kernel": 2, "experts": 1}, r"deepest first, not (2, 2)"),
        ({"layers": [2, 0], "kernel": 2, "experts": 1}, r"block numbers from 1, deepest first, not (2, 0)"),
        ({"layers": [2, True], "kernel": 2, "experts": 1}, "block numbers from 1"),
        ({"layers": ["2"], "kernel": 2, "experts": 1}, "block numbers from 1"),
        ({"layers": [2], "kernel": 0, "experts": 1}, "stf.kernel must be an integer of at least 1, not 0"),
        ({"layers": [2], "kernel": 2.0, "experts": 1}, "stf.kernel must be an integer of at least 1, not 2.0"),
        ({"layers": [2], "kernel": 2, "experts": True}, "stf.experts must be an integer of at least 1, not True"),
    ],
)
def test_bad_configs_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        StfConfig.parse(value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StfConfig((5, 1)), "stf.layers names block 5, but the vision tower has 4 blocks"),
        (StfConfig((4,), experts=3), "stf.experts must divide the vision tower's 8 channels, 3 does not"),
        (StfConfig((4,), kernel=5), "a square grid of at least 5 x 5 tokens (stf.kernel), not 16 tokens"),
    ],
)
def test_towers_that_do_not_fit_are_refused(config: StfConfig, message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.check(blocks=4, channels=8, patches=16)
    assert message in str(error.value)


@pytest.mark.parametrize("patches", [0, 1, 15, 18])
def test_a_grid_that_is_not_square_is_refused(patches: int) -> None:
    with pytest.raises(ValueError, match="square grid"):
        StfConfig().tokens(patches)
    with pytest.raises(ValueError, match="square grid"):
        space_to_depth(torch.zeros(1, patches, 4), 2)
