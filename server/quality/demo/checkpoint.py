"""The checkpoint that comes with foldserve; `tools/demo_model` trains it."""

from __future__ import annotations

import shutil
from pathlib import Path

from foldserve.server.folders import new_folder

CHECKPOINT = Path(__file__).parent / "checkpoint"


def copy_checkpoint(folder: Path) -> None:
    """Raises FileExistsError if `folder` exists and is not an empty directory."""
    with new_folder(folder) as partial:
        shutil.copytree(CHECKPOINT, partial, dirs_exist_ok=True)
