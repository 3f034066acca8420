"""Converts a Qwen2.5-VL checkpoint of transformers 5 to the form of transformers 4, which the export to OpenVINO needs.

Published checkpoints have the older form already: `python -m foldserve.loadtest.micro.openvino.older CHECKPOINT TO`.
"""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_older(checkpoint: Path, to: Path) -> None:
    """Copies the checkpoint, with the older field names in its config and its tokenizer's."""
    shutil.copytree(checkpoint, to)
    _rewrite(to / "config.json", _older_config)
    _rewrite(to / "tokenizer_config.json", _older_tokenizer)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=2) + "\n")


def _older_config(config: dict[str, Any]) -> None:
    """The older form has RoPE's fields in the decoder's config and at the top."""
    rope = config["text_config"].pop("rope_parameters")
    theta = rope.pop("rope_theta")
    older = {"rope_theta": theta, "rope_scaling": {"type": "mrope", **rope}}
    config["text_config"].update(older)
    config.update(older)


def _older_tokenizer(config: dict[str, Any]) -> None:
    config["additional_special_tokens"] = config.pop("extra_special_tokens")


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("to", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    write_older(args.checkpoint, args.to)


if __name__ == "__main__":
    main()
