"""Maps of regions from given token groups; the groups are tested with the engine."""

from __future__ import annotations

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import Layout, Part, plan_item
from foldserve.reducers.plan import Reduction
from foldserve.server.engine.grid_map import grid_maps
from foldserve.server.engine.regions import WHOLE, Region


def test_a_video_whose_frames_are_one_grid_is_shown_frame_by_frame() -> None:
    layout = Layout((Part(VisionGeometry(4, (2, 2)), 3, can_join=True),))
    (plan,) = plan_item(Reduction(method="vidcom2", keep_tokens=3), layout).grids
    regions = [Region(f"frame {i}", 2, 2, WHOLE, plan) for i in (1, 2, 3)]
    found = [([0, -1, 1, -1, -1, -1, -1, -1, -1, -1, -1, 2], [0, 2, 11])]
    assert [(each.group, each.sizes, each.source) for each in grid_maps(regions, found)] == [
        ([0, -1, 1, -1], [1, 1], [0, 2]),
        ([-1, -1, -1, -1], [], []),
        ([-1, -1, -1, 0], [1], [3]),
    ]
