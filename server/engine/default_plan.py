"""The plan of an image of which a request says nothing."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine.family import Family
from foldserve.server.settings import Settings


def default_plan(vllm_config: VllmConfig, family: Family, layout: Layout) -> ItemPlan:
    """Plan of the server's default reduction, or of no reduction if it is impossible, which requests are told.

    If the count depends on pixels, the plan keeps all tokens but one.
    """
    settings = Settings.from_config(vllm_config.additional_config)
    reduction = family.with_positions(settings.default_reduction, settings.positions)
    cells = None if reduction.pruning is None else Cells.of(torch.arange(layout.tokens) < layout.tokens - 1)
    try:
        return plan_item(reduction, layout, cells)
    except InvalidReduction:
        return plan_item(Reduction(), layout)
