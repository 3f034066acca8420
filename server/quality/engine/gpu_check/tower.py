"""Job `tower`: images through the vision tower, with CUDA graphs (`--tower-graphs`) and then without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import LLM

from foldserve.server.engine.family import PLAN_FIELDS
from foldserve.server.engine.tower_graphs import TowerGraphs
from foldserve.server.quality.engine.gpu_check.engine import model_of, noise_answers, start_engine
from foldserve.server.quality.engine.gpu_check.timing import median_s
from foldserve.server.quality.gpu_check.jobs import TowerJob, TowerResult, TowerRow


def run(spec: TowerJob) -> TowerResult:
    llm = start_engine(spec.engine)
    model = model_of(llm)
    graphs: TowerGraphs = model.tower_graphs
    batches = [_images(model, size) for size in sorted(graphs.sizes)]
    replayed, with_s = _encoded(model, batches)
    with_ids, replays = _answers(llm, spec, graphs)
    graphs.clear()
    eager, without_s = _encoded(model, batches)
    without_ids, eager_replays = _answers(llm, spec, graphs)
    rows = [
        TowerRow(
            images=len(right),
            graph_ms=1e3 * with_one_s,
            eager_ms=1e3 * without_one_s,
            difference=float((own - right).abs().max() / right.abs().max()),
        )
        for own, right, with_one_s, without_one_s in zip(replayed, eager, with_s, without_s, strict=True)
    ]
    return TowerResult(
        rows=tuple(rows),
        replays=replays,
        eager_replays=eager_replays,
        requests=len(with_ids),
        alike=sum(own == right for own, right in zip(with_ids, without_ids, strict=True)),
    )


def _images(model: Any, count: int) -> dict[str, Any]:
    """Inputs of `embed_multimodal`: images of noise with the plan of the graphs."""
    side, plan = model.config.vision_config.image_size, torch.tensor(model.tower_graphs.plan.to_ints())
    device = next(model.vision_tower.parameters()).device
    random = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=random).to(device)
    return {"pixel_values": pixels, PLAN_FIELDS["image"]: [plan] * count}


@torch.inference_mode()
def _encoded(model: Any, batches: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[float]]:
    """Embeddings of each batch, and the median of the seconds that they take."""
    embeds = [torch.stack([*model.embed_multimodal(**batch)]).float() for batch in batches]
    return embeds, [median_s(partial(model.embed_multimodal, **batch)) for batch in batches]


def _answers(llm: LLM, spec: TowerJob, graphs: TowerGraphs) -> tuple[list[list[int]], int]:
    """Ids of each request's answer, and how many graphs were replayed for them."""
    llm.llm_engine.reset_encoder_cache()
    graphs.replays.clear()
    return noise_answers(llm, spec.requests, 4, spec.reduction, tokens=spec.tokens), graphs.replays.total()
