"""A quality card as it was written."""

from __future__ import annotations

import json
from pathlib import Path

from foldserve.server.quality.evaluation.card import Card


def read_card(file: Path) -> Card:
    fields = json.loads(file.read_text())
    fields.pop("summary")
    return Card.model_validate(fields)
