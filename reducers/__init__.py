"""The reduction methods: pure torch, one file per paper. `plan` computes every token count."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.cdpruner import CDPruner
from foldserve.reducers.divprune import DivPrune
from foldserve.reducers.downsample import Downsample
from foldserve.reducers.evs import EVS
from foldserve.reducers.fastv import FastV
from foldserve.reducers.folder import Folder, FolderCls
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.illava import Illava, IllavaDecoder
from foldserve.reducers.method import Method
from foldserve.reducers.mmtok import MMTok
from foldserve.reducers.options import Value
from foldserve.reducers.pixelprune import PixelPrune
from foldserve.reducers.pool import Pool
from foldserve.reducers.prumerge import PruMerge
from foldserve.reducers.random import Random
from foldserve.reducers.stf import Stf
from foldserve.reducers.tome import ToMe, Turbo
from foldserve.reducers.vidcom2 import VidCom2
from foldserve.reducers.visionzip import VisionZip
from foldserve.reducers.withdraw import Withdraw

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Folder(),
            FolderCls(),
            Illava(),
            ToMe(),
            Turbo(),
            PruMerge(),
            Pool(),
            Random(),
            Downsample(),
            Stf(),
            Withdraw(),
            IllavaDecoder(),
            FastV(),
            BaseOnly(),
            DivPrune(),
            CDPruner(),
            VisionZip(),
            PixelPrune(),
            MMTok(),
            VidCom2(),
            EVS(),  # append new methods: the order gives plans their integer codes, which are part of cache keys
        )
    }
)


@cache
def method_with_options(name: str, values: tuple[Value, ...]) -> Method:
    return type(METHODS[name])(*values)


__all__ = ["METHODS", "Method", "Stage", "VisionGeometry", "method_with_options"]
