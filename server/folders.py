"""Output folders and files that other programs read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder, which is renamed to `path` on success and removed on an error.

    Raises FileExistsError if `path` exists and is not an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; name a new one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Writes sorted, indented JSON, so that equal contents give equal files."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
