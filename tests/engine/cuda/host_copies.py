"""No code of a step copies from unpinned memory to the device: the host would wait for the GPU.

Reads from the device need no check here: all of this runs on the meta device, which holds no values.
`test_cuda.py` runs this in a process that has had no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldserve.reducers import METHODS
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.method import (
    AcrossFrames,
    AfterLastLayer,
    AfterTower,
    BeforeTower,
    InProjector,
    InTower,
    ScoredInDecoder,
)
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan, Reduction, VisionGeometry, make_plan
from foldserve.reducers.stf import StfConfig, StfProjector, fusion_input
from foldserve.reducers.withdraw import take_rows
from foldserve.server.engine.positions import Chunk, SequencePositions, attach, position_changes
from foldserve.server.engine.qwen_tower import encode_reducing, encode_showing_patches
from foldserve.server.engine.vision import KeptTokens, reduce_features
from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.token_selection import last_token_scores, select_tokens
from tests.engine.cuda.copies import HostWaits, host_goes_on
from tests.engine.test_positions import WIDTH, Image
from tests.engine.withdrawal.test_metadata import BLOCK, IMAGE, TEXT, common
from tests.engine.withdrawal.test_token_selection import PROMPTS, batch

META = torch.device("meta")
CLIP = VisionGeometry(144, (12, 12), 4, class_token=True, shows_tower=True)
OnDevice = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    return lambda: host_goes_on(monkeypatch)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


NUMBERS, INDEX = np.arange(3), torch.arange(3)
WAITING: dict[str, Callable[[Tensor], object]] = {
    "a tensor of a list": lambda x: torch.tensor([1, 2], device=x.device),
    "a tensor of numbers": lambda x: x.new_tensor([1, 2]),
    "a tensor of an array": lambda x: torch.as_tensor(NUMBERS, device=x.device),
    "to": lambda x: INDEX.to(x.device, non_blocking=True),
    "to, pinned": lambda x: INDEX.pin_memory().to(x.device),
    "an index": lambda x: x[INDEX],
    "a value": lambda x: x.__setitem__(slice(3), INDEX),
    "copy": lambda x: x[:3].copy_(INDEX),
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_copy_that_waits_is_found(on_device: OnDevice, kind: str) -> None:
    """Else the tests below would prove nothing."""
    with pytest.raises(HostWaits), on_device():
        WAITING[kind](meta(4))


def test_copies_that_do_not_wait_are_allowed(on_device: OnDevice) -> None:
    from vllm.utils.torch_utils import async_tensor_h2d

    with on_device():
        assert async_tensor_h2d(NUMBERS, device=META).is_meta
        assert async_tensor_h2d([1, 2], device=META).is_meta
        meta(3).copy_(INDEX.pin_memory(), non_blocking=True)
        assert (meta(3) * torch.tensor(2.0) + 1).is_meta


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not isinstance(method, InProjector)])
def test_methods(on_device: OnDevice, name: str) -> None:
    method = METHODS[name]
    if isinstance(method, ScoredInDecoder):
        with on_device():
            assert method.reduce(meta(1, 144, WIDTH), meta(1, 144), 100).tokens.shape == (1, 44, WIDTH)
    elif isinstance(method, AfterTower | BeforeTower | InTower):
        options: dict[str, object] = {"layers": [0, 2]} if name == "illava" else {}
        geometry = replace(CLIP, grid=None, frames=4) if isinstance(method, AcrossFrames) else CLIP
        plan = make_plan(Reduction.parse({"method": name, "ratio": 0.4, **options} | AMOUNTS.get(name, {})), geometry)
        with on_device():
            assert run(plan) == plan.kept < 144


AMOUNTS: dict[str, dict[str, object]] = {"pool": {"ratio": 0.75}, "downsample": {"ratio": 0.75}}
"""Of methods that take some only."""


def run(plan: Plan) -> int:
    """Tokens that are left of two images."""
    method = plan.reducer
    if isinstance(method, AfterTower):
        images = [KeptTokens(meta(144, WIDTH), torch.arange(144, device=META))] * 2
        left = reduce_features(images, [plan, plan], queries=[meta(5, WIDTH), meta(0, WIDTH)])
        return len(left[0].features)
    if isinstance(method, BeforeTower):
        assert plan.grid is not None
        assert method.resize(meta(2, 3, 168, 168), plan.grid, 14).is_meta
        return len(method.source((12, 12), plan.grid, META))
    assert isinstance(method, InTower)
    x, sizes = meta(2, 145, WIDTH), torch.ones(2, 145, dtype=torch.int64, device=META)
    for layer in range(CLIP.layers):
        if removed := plan.removed_in(layer):
            count = x.shape[1]
            attention = LayerAttention(meta(2, count, 2, 4), meta(2, count, 2, 4), 0.5, sizes.log(), class_token=True)
            x, sizes, *_ = method.reduce(x, sizes, attention, removed, plan)
    return x.shape[1] - (not isinstance(method, AfterLastLayer))


class QwenVision:
    """What `encode_reducing` knows of Qwen2.5-VL's tower: four layers, two of which see windows of 2 x 2 tokens."""

    spatial_merge_size, spatial_merge_unit, window_size, patch_size = 2, 4, 56, 14
    device, dtype, fullatt_block_indexes = META, torch.float32, (1, 3)

    def __init__(self) -> None:
        self.lengths: list[Tensor] = []
        attention = SimpleNamespace(
            num_attention_heads_per_partition=2,
            hidden_size_per_attention_head=4,
            tp_size=1,
            qkv=lambda x: (torch.cat([x] * 3, dim=-1), None),
            apply_rotary_emb=lambda x, cos, sin: x,
            attn=self._attend,
            proj=lambda x: (x, None),
        )
        layer = SimpleNamespace(attn=attention, norm1=abs, norm2=abs, mlp=abs)
        self.blocks = [_Called(layer, self._attend) for _ in range(4)]

    def _attend(self, query: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor, **others: object) -> Tensor:
        assert cu_seqlens.is_meta and not max_seqlen.is_meta
        self.lengths.append(cu_seqlens)
        return query

    def input_norm(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return pixels

    patch_embed = staticmethod(abs)

    def prepare_encoder_metadata(self, grids: list[list[int]]) -> dict[str, Tensor]:
        ((_, rows, columns),) = grids
        tables = {name: meta(rows * columns, 2) for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin")}
        ends = torch.empty(7, dtype=torch.int32, device=META)
        return {**tables, "window_index": torch.arange(rows * columns // 4, device=META), "cu_window_seqlens": ends}

    def merger(self, hidden: Tensor) -> Tensor:
        return hidden.view(-1, 4 * 8)


class _Called(SimpleNamespace):
    def __init__(self, layer: SimpleNamespace, run: Callable[..., Tensor]) -> None:
        super().__init__(**vars(layer))
        self._run = run

    def __call__(self, hidden: Tensor, **others: Any) -> Tensor:
        return self._run(hidden, **others)


@pytest.mark.parametrize("name", ["illava", "tome", "visionzip"])
def test_a_tower_with_windows(on_device: OnDevice, name: str) -> None:
    """How many tokens a window holds is not known on the host, and not asked for."""
    visual, geometry = QwenVision(), VisionGeometry(24, (4, 6), 4, windowed_layers=(0, 2))
    plan = make_plan(Reduction(name, ratio=0.5), geometry)
    with on_device():
        left = encode_reducing(visual, meta(2 * 96, 8), [1, 8, 12], plan)
    assert [image.features.shape for image in left] == [(12, 4 * 8)] * 2
    assert [len(ends) for ends in visual.lengths] == ([13, 3] if name == "tome" else [13, 3, 13, 3])


def test_a_tower_that_sees_some_cells(on_device: OnDevice) -> None:
    visual, cells = QwenVision(), Cells.of(torch.arange(24) % 3 > 0)
    with on_device():
        left = encode_reducing(visual, meta(2 * 96, 8), [1, 8, 12], Plan("none", 16), cells)
    assert [image.features.shape for image in left] == [(16, 4 * 8)] * 2


def test_what_enters_the_merger_of_a_tower_with_windows(on_device: OnDevice) -> None:
    with on_device():
        images, means = encode_showing_patches(QwenVision(), meta(2 * 96, 8), [1, 8, 12], Plan("none", 24))
    assert [image.features.shape for image in images] == [(24, 4 * 8)] * 2
    assert [mean.shape for mean in means] == [(24, 8)] * 2


def test_positions_of_a_step(on_device: OnDevice) -> None:
    images = [Image(1, 3, 9, [2, 4, 8]), Image(6, 2, 2, None)]
    chunks = [Chunk(images, SequencePositions.of(images), 2, 10), Chunk([], None, 0, 4)]
    with on_device():
        kept = attach(meta(3, WIDTH), torch.arange(3, device=META))
        changes, plain = position_changes(chunks, [kept[1:], meta(2, WIDTH)])
        changes.apply(torch.zeros(20, dtype=torch.int64, device=META))
    assert [item.shape for item in plain] == [(2, WIDTH), (2, WIDTH)]


STEPS: dict[str, tuple[list[TokenMap], list[int], list[int]]] = {
    "decode": ([IMAGE, TEXT], [12, 3], [1, 1]),
    "prefill": ([IMAGE, TEXT], [0, 0], [10, 5]),
    "a request without rows": ([IMAGE, TEXT], [2, 0], [5, 5]),
}


@pytest.mark.parametrize("kind", STEPS)
def test_metadata_of_a_step(on_device: OnDevice, kind: str) -> None:
    from foldserve.server.engine.withdrawal.graph import GraphBuffers
    from foldserve.server.engine.withdrawal.metadata import DeviceBatch, compact

    maps, computed, scheduled = STEPS[kind]
    full = on_meta(common(computed, scheduled, 2, sum(scheduled)))
    scheduler: Any = type("Scheduler", (), {"max_num_seqs": 4, "max_num_batched_tokens": 20})
    buffers = GraphBuffers.of(scheduler, META)
    step = BatchMaps(maps).step(np.array(computed), np.array(scheduled))
    assert step is not None
    with on_device():
        deep = buffers.hold(compact(full, DeviceBatch.of(step, META), BLOCK))
    assert deep.slot_mapping.is_meta and deep.seq_lens.is_meta and deep.block_table_tensor.is_meta


def on_meta(full: Any) -> Any:
    """As vLLM's runners make it on a GPU: `is_prefilling` is on the host too."""
    for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
        setattr(full, name, getattr(full, name).to(META))
    return full


def test_choice_of_a_step(on_device: OnDevice) -> None:
    query, key, hidden, residual, rows = batch("meta")
    with on_device():
        scores = [last_token_scores(query, key, prompt, 0.3) for prompt in PROMPTS]
        select_tokens(PROMPTS, scores, rows, hidden, residual)
        positions, *_ = take_rows(rows, torch.arange(len(hidden), device=META), hidden, residual)
    assert len(positions) == len(rows)


def test_the_projector_that_fuses_tokens(on_device: OnDevice) -> None:
    config = StfConfig((3, 1))
    with META:
        projector = StfProjector(config, channels=8, hidden_size=16)
    with on_device():
        tokens = projector(fusion_input({block: meta(2, 145, 8) for block in (1, 3)}, config))
    assert tokens.shape == (2, 36, 16)
