"""What the site needs beside mkdocs-material: `mkdocs.yml` names this file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

_MERMAID = "assets/mermaid.min.js"
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:README|CONTRIBUTING|CHANGELOG|Dockerfile|deploy|tools|tests)[^)\s]*)\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Mermaid from the environment that builds the site: Material takes it from another host otherwise."""
    files.append(File.generated(config, _MERMAID, abs_src_path=str(Path(sys.prefix) / "mermaid.min.js")))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Files of the repository are no pages of the site: they are named, not linked."""
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Mermaid weighs 3.5 MB: only pages with a picture load it."""
    if 'class="mermaid"' not in html:
        return html
    return f'{html}<script src="{get_relative_url(_MERMAID, page.url)}"></script>'
