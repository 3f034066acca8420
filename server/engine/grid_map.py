"""Where each token of an image went: for people who look at a reduction. Nothing of this runs while a server answers.

The engine computes a map between two steps, by its own tower and reducers: `MappingWorker.token_groups`, which
`collective_rpc` calls with what the processor has made of one image.
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

Groups: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Of one grid, for each token the group it went into, -1 if it was dropped; and for each group the token it stands
for."""

CANNOT_MAP = (
    "this engine can't say where tokens go: none can with pipeline parallelism, and others need foldserve's worker for "
    "it, which `foldserve serve` sets"
)


class GridMap(NamedTuple):
    """Where the tokens of one grid went.

    Attributes:
        group: for each token, in raster order, the index of its group; -1 if it was dropped.
        sizes: of each group, in tokens.
        source: token that each group stands for; -1 for a class token that stays, whose size is 0.
    """

    region: Region
    group: Sequence[int]
    sizes: Sequence[int]
    source: Sequence[int]

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
    """Whether the engine's workers know `token_groups`."""
    return str(vllm_config.parallel_config.worker_cls).startswith("foldserve.")


def needs_engine(regions: Sequence[Region]) -> bool:
    """Whether it depends on the image's pixels where tokens go."""
    return any(region.plan is not None and _by_counts(region) is None for region in regions)


def grid_maps(regions: Sequence[Region], found: Sequence[Groups | None]) -> list[GridMap]:
    """The map of an image.

    Args:
        found: by the engine, for the regions that are encoded; empty where it need not be asked.
    """
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
    """When each grid of a video begins to be shown.

    Args:
        times: of the pictures that were taken; some models make one grid of two of them.
    """
    pictures = -(-len(times) // grids)
    return [round(time, 3) for time in times[::pictures]]


def _by_region(regions: Sequence[Region], found: Sequence[Groups | None]) -> Iterator[Groups | None]:
    """What was found for each region that is encoded; that of a video whose frames are one grid is divided."""
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
    """What the plan alone says."""
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
    """What the processor made of an image, as vLLM sends it to its engine."""
    return [bytes(buffer) for buffer in MsgpackEncoder().encode(item)]


class MappingWorker:
    """Mixin before vLLM's worker. Modification: `token_groups`."""

    @torch.inference_mode()
    def token_groups(self, packed: Sequence[bytes]) -> list[Groups | None] | None:
        """Encodes one image, and says where the tokens of its grids went; the first rank answers, all compute.

        Args:
            packed: see `pack`; the plan removes tokens before the decoder.

        Returns:
            For each grid that is encoded, None where nothing was removed by what the tower gave.
        """
        worker: Any = self
        buffers = [bytearray(buffer) for buffer in packed]  # torch wants to be able to write
        item: MultiModalKwargsItem = MsgpackDecoder(MultiModalKwargsItem).decode(buffers)
        ((_, inputs),) = group_and_batch_mm_items([item], device=worker.device)
        found: list[Groups | None] = worker.get_model().token_groups(**cast(Mapping[str, Any], inputs))
        return found if get_tensor_model_parallel_rank() == 0 else None
