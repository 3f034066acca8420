"""Where each token of an image went, to show a reduction to people. Not part of serving requests.

The engine computes a map between two steps with its own tower and reducers: `collective_rpc` calls
`MappingWorker.token_groups` with the processed inputs of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.utils import group_and_batch_mm_items
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from foldserve.reducers.method import BeforeTower
from foldserve.server.engine.regions import Region
from foldserve.server.engine.worker import is_ours

Groups: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""For one grid: the group of each token (-1 if dropped), and the source token of each group."""

CANNOT_MAP = (
    "this engine can't say where tokens go: none can with pipeline parallelism, and others need foldserve's worker for "
    "it, which `foldserve serve` sets"
)


class GridMap(NamedTuple):
    """Where the tokens of one grid went."""

    region: Region
    group: Sequence[int]  # group of each token, in raster order; -1 if it was dropped
    sizes: Sequence[int]  # tokens in each group
    source: Sequence[int]  # token whose place each group takes; -1 for a kept class token, whose size is 0

    @classmethod
    def of(cls, region: Region, found: Groups) -> GridMap:
        """Groups outside the region's window are dropped."""
        group, source = found
        if region.window is not None:
            rows, columns = region.window
            assert region.plan is not None, "a window is of a tile that is encoded"
            side = round(region.plan.kept**0.5)
            stay = [i for i in range(len(source)) if i // side in rows and i % side in columns]
            places = {old: new for new, old in enumerate(stay)}
            group, source = [places.get(i, -1) for i in group], [source[i] for i in stay]
        sizes = [0] * len(source)
        for i in group:
            if i >= 0:
                sizes[i] += 1
        return cls(region, group, sizes, source)

    def to_json(self) -> dict[str, Any]:
        region = self.region
        return {
            "name": region.name,
            "rows": region.rows,
            "columns": region.columns,
            "box": [round(share, 6) for share in region.box],
            "group": list(self.group),
            "sizes": list(self.sizes),
            "source": list(self.source),
        }


def can_map(vllm_config: VllmConfig) -> bool:
    """Whether the engine's workers have `token_groups`."""
    return is_ours(vllm_config)


def needs_engine(regions: Sequence[Region]) -> bool:
    """Whether the plans alone do not tell where tokens went, because it depends on pixels."""
    return any(region.plan is not None and _by_counts(region) is None for region in regions)


def grid_maps(regions: Sequence[Region], found: Sequence[Groups | None]) -> list[GridMap]:
    """Maps of an image's grids; `found` is the engine's answer for the encoded regions, or empty if not needed."""
    remaining = _by_region(regions, found)
    maps = []
    for region in regions:
        if region.plan is None:
            groups: Groups = [-1] * (region.rows * region.columns), []
        else:
            known, of_engine = _by_counts(region), next(remaining, None)
            groups = cast(Groups, known if known is not None else of_engine)
        maps.append(GridMap.of(region, groups))
    return maps


def seconds_of(times: Sequence[float], grids: int) -> list[float]:
    """Start of each grid of a video; `times` are those of its sampled pictures, of which a grid may have two."""
    pictures = -(-len(times) // grids)
    return [round(time, 3) for time in times[::pictures]]


def _by_region(regions: Sequence[Region], found: Sequence[Groups | None]) -> Iterator[Groups | None]:
    """What was found, per encoded region: a result for all frames of a video is split into frames."""
    encoded = (region for region in regions if region.plan is not None)
    for groups in found:
        region = next(encoded)
        tokens = region.rows * region.columns
        if groups is None or len(groups[0]) == tokens:
            yield groups
            continue
        group, source = groups
        for start in range(0, len(group), tokens):
            own = group[start : start + tokens]
            stay = sorted({i for i in own if i >= 0})
            places = {old: new for new, old in enumerate(stay)}
            yield [places.get(i, -1) for i in own], [source[i] - start for i in stay]


def _by_counts(region: Region) -> Groups | None:
    """Groups that follow from the plan alone, else None."""
    plan = region.plan
    assert plan is not None, "a grid that is not encoded has no tokens"
    if plan.is_identity and plan.encoded == region.rows * region.columns:
        return range(plan.encoded), range(plan.encoded)
    method = plan.reducer
    if isinstance(method, BeforeTower):
        assert plan.whole_grid is not None and plan.grid is not None
        source = method.source(plan.whole_grid, plan.grid, torch.device("cpu"))
        return method.group(plan.whole_grid, plan.grid).tolist(), source.tolist()
    return None


def pack(item: MultiModalKwargsItem) -> list[bytes]:
    """An image's processed inputs, encoded as vLLM sends them to its engine."""
    return [bytes(buffer) for buffer in MsgpackEncoder().encode(item)]


class MappingWorker:
    """Mixin before vLLM's worker. Modification: `token_groups`."""

    @torch.inference_mode()
    def token_groups(self, packed: Sequence[bytes]) -> list[Groups | None] | None:
        """Encode one image (see `pack`) and say where the tokens of each encoded grid went.

        All ranks compute; only the first answers. A grid is None if the plan alone tells.
        """
        worker: Any = self
        buffers = [bytearray(buffer) for buffer in packed]  # torch needs writable memory
        item: MultiModalKwargsItem = MsgpackDecoder(MultiModalKwargsItem).decode(buffers)
        ((_, inputs),) = group_and_batch_mm_items([item], device=worker.device)
        found: list[Groups | None] = worker.get_model().token_groups(**cast(Mapping[str, Any], inputs))
        return found if get_tensor_model_parallel_rank() == 0 else None
