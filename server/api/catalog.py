"""`GET /v1/reducers`: the methods that this server offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldserve.reducers import METHODS, Method
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.item import Layout, check_method, plan_item
from foldserve.reducers.method import AcrossFrames, InDecoder, InProjector, Preselection
from foldserve.reducers.options import Field
from foldserve.reducers.reduction import FIELDS, Reduction
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.server.api.serving import FoldServingChat
    from foldserve.server.engine.family import Family, Modality


def describe(chat: FoldServingChat) -> dict[str, object]:
    """Methods with their parameters, limits of the served model, and the server's defaults."""
    planner = chat.planner
    family, settings = planner.family, planner.settings
    largest = None if family is None else family.largest
    methods = served_methods(family)
    return {
        "object": "list",
        "model": chat.models.base_model_paths[0].name,
        "vision_tokens_per_image": None if family is None or family.sizes_matter else family.largest.tokens,
        "limits": _limits(chat),
        "default_reduction": settings.default_reduction.to_json(),
        "low_detail": planner.low_detail["image"].to_json(),
        "positions": {
            "default": planner.default_positions,
            "can_keep": planner.positions is not None,
        },
        "withdraw_layer": settings.withdraw_layer,
        "decoder": _decoder(chat),
        "calibration": settings.calibration,
        "auto": None if settings.auto is None else settings.auto.to_config() | {"bounds": settings.auto_bounds},
        "quality": served_card(chat.engine_client.vllm_config.model_config.model),
        "data": [
            {
                "id": method.name,
                "object": "reducer",
                "summary": method.summary,
                "paper": method.paper,
                "stage": method.stage.value,
                "modalities": modalities_of(method, family),
                "options": {option.name: option.schema() for option in _own_fields(method)},
                "max_removed_tokens": _max_removed(method, largest) if largest else 0,
            }
            for method in methods
        ],
    }


def _own_fields(method: Method) -> list[Field[Any]]:
    return [*method.options, *([FIELDS["query"]] if method.takes_query else [])]


def _limits(chat: FoldServingChat) -> dict[str, dict[str, float | None]]:
    """Limits of an image, and of a video where the model takes any, see docs/guides/video.md."""
    family, limits = chat.planner.family, chat.checks.limits
    found: dict[str, dict[str, float | None]] = {}
    if family is not None and "image" in family.modalities:
        found["image"] = {"max_tokens": family.largest.tokens}
    if "video" in chat.checks.takes:
        rule = limits.video_rule
        found["video"] = {"frames": rule.frames, "fps": rule.fps, "max_seconds": limits.max_video_seconds}
    return found


def _decoder(chat: FoldServingChat) -> dict[str, int]:
    """Size of a token in the KV cache; layers with a recurrent state have none."""
    cost = chat.kv_cost
    layers = chat.model_config.get_total_num_hidden_layers()
    return {"layers": layers, "kv_layers": cost.layers, "kv_bytes_per_token_and_layer": cost.token_layer_bytes}


def served_card(model: str) -> dict[str, Any] | None:
    """The `summary` of the quality.json that `foldserve evaluate` wrote into this directory; None without one."""
    file = Path(model) / "quality.json"
    if not file.is_file():
        return None
    summary: dict[str, Any] = json.loads(file.read_text())["summary"]
    return summary


def served_methods(family: Family | None) -> list[Method]:
    """Methods that models of this family support; none if `family` is None, whose images can't be reduced."""
    return [method for method in METHODS.values() if modalities_of(method, family)]


def modalities_of(method: Method, family: Family | None) -> list[Modality]:
    return [] if family is None else [each for each in family.modalities if _works_with(method, family, each)]


def _works_with(method: Method, family: Family, modality: Modality) -> bool:
    """Whether the model has what the method needs, apart from options that a request has to set."""
    try:
        asked = _reduction_by(method)
        if modality == "image":
            family.of_image(asked, family.largest)
            check_method(method, family.largest)
        else:
            family.of_video(asked)
            check_method(method, family.shortest_video)
    except InvalidReduction as refusal:
        return refusal.param in {option.name for option in method.options}
    return True


def _reduction_by(method: Method) -> Reduction:
    """A reduction by this method alone, without an amount."""
    if isinstance(method, Preselection):
        return Reduction(first=method.name)
    return Reduction(decoder=method.name) if isinstance(method, InDecoder) else Reduction(method.name)


def _max_removed(method: Method, largest: Layout) -> int:
    """The most tokens that one image can lose."""
    if isinstance(method, BaseOnly):
        return plan_item(Reduction(first="base_only"), largest).removed
    return 0 if isinstance(method, AcrossFrames | InProjector) else largest.removable
