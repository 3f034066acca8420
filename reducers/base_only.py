"""The base tile alone, for tiled images whose details do not matter."""

from __future__ import annotations

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import Kind, Preselection
from foldserve.reducers.refusal import InvalidReduction


class BaseOnly(Preselection):
    """Encodes the base tile only. The tiling decides how many tokens stay, so there is no ratio."""

    name = "base_only"
    summary = "Of an image laid out in tiles, encodes the base tile alone, which shows the whole image."
    kind = Kind.INPUT

    def check(self, geometry: VisionGeometry) -> None:
        if not geometry.any_resolution:
            raise InvalidReduction(
                f"method {self.name!r} needs images that are laid out in tiles, but this model's are not: "
                "choose another method",
                "method",
            )
