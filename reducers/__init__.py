"""The reduction methods: pure torch, one paper a file; `plan` computes every token count.

A new method is one file that defines a `Method`, and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from foldserve.reducers.folder import FOLDER, FOLDER_CLS
from foldserve.reducers.method import Method, Stage

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            FOLDER,
            FOLDER_CLS,
        )
    }
)

__all__ = ["METHODS", "Method", "Stage"]
