"""`foldserve map` from its arguments to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from foldserve.server.quality.maps.drawing import MapGrid, draw
from foldserve.server.quality.maps.options import MapOptions


def run(options: MapOptions, small_model: Path, engine_options: Sequence[str]) -> None:
    """Reduces the image in an engine of its own and writes the picture."""
    try:
        with Image.open(options.image) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"{options.image} is no image that Pillow reads: {error}") from error

    from foldserve.server.quality.engine.mapping import MappingModel  # vLLM, which takes seconds

    model = MappingModel(options.model or str(small_model), engine_options)
    plan, maps = model.map(image, options.requested_reduction, options.question)
    grids = [
        MapGrid(it.region.name, it.region.rows, it.region.columns, it.region.box, it.group, it.sizes) for it in maps
    ]
    what = f"{plan.method}: {plan.kept} of {plan.encoded} vision tokens stay, {plan.ratio:.1%} are removed"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(image, grids, what).save(options.output)
    print(f"{what}. Written to {options.output}.")
