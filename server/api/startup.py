"""The table that an operator sees when a server is about to listen, instead of vLLM's hundred lines."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING

from vllm.config import VllmConfig

from foldserve.server.access import Access
from foldserve.server.api.logs.config import STARTUP
from foldserve.server.api.sizes import size
from foldserve.server.engine.facts.choices import model_runner
from foldserve.server.engine.facts.kv import TEXT_TOKENS
from foldserve.server.engine.plugin import ALLOW_VLLM, is_release_vllm, vllm_version
from foldserve.server.limits import Limits

if TYPE_CHECKING:
    from foldserve.server.api.serving import FoldServingChat

_log = logging.getLogger(STARTUP)


def report(chat: FoldServingChat, limits: Limits, access: Access) -> None:
    """Logs the table; of several API processes, only in the first."""
    config = chat.engine_client.vllm_config
    if config.parallel_config._api_process_rank > 0:
        return
    vllm = version("vllm")
    if not is_release_vllm(vllm):
        vllm += f", allowed by {ALLOW_VLLM}; this release is for {vllm_version()}"
    _log.info("version %s on vLLM %s", version("foldserve"), vllm, extra={"facts": facts(chat, limits, access)})


def facts(chat: FoldServingChat, limits: Limits, access: Access) -> dict[str, str]:
    config = chat.engine_client.vllm_config
    name, model = chat.models.base_model_paths[0].name, config.model_config
    page = "/playground, " if access.playground else ""
    return {
        "model": f"{name}: {', '.join(model.architectures)}, {str(model.dtype).removeprefix('torch.')}, "
        f"{model.max_model_len} tokens of context",
        "device": _device(config),
        **_engine(chat),
        "reduction": _reduction(chat),
        "withdrawal": _withdrawal(chat),
        "requests": f"{config.scheduler_config.max_num_seqs} run at once, {access.max_queue} wait; each up to "
        f"{_media(chat, limits)}, {limits.max_body_mb:g} MB in all",
        "access": _access(access),
        "see also": f"{page}/v1/reducers, /docs, /metrics; `foldserve serve --verbose` shows vLLM's own log",
    }


def _media(chat: FoldServingChat, limits: Limits) -> str:
    each = {
        "image": f"{limits.max_images_per_request} images of {limits.max_image_megapixels:g} megapixels",
        "video": f"{limits.max_videos_per_request} videos of {limits.video_frames} frames",
    }
    return ", ".join(text for modality, text in each.items() if modality in chat.checks.takes)


def _access(access: Access) -> str:
    if access.api_keys is None:
        return "open to everybody who reaches it (--api-keys FILE asks for keys)"
    metrics = "open to everybody" if access.open_metrics else "for keys with the scope `metrics`"
    return f"keys; /metrics is {metrics}"


def _device(config: VllmConfig) -> str:
    parallel, cache = config.parallel_config, config.cache_config
    engines = "".join(
        f" x {size} ({kind} parallel)"
        for kind, size in (
            ("tensor", parallel.tensor_parallel_size),
            ("pipeline", parallel.pipeline_parallel_size),
            ("data", parallel.data_parallel_size),
        )
        if size > 1
    )
    blocks = f", KV cache of {cache.num_gpu_blocks} blocks of {cache.block_size} tokens" if cache.num_gpu_blocks else ""
    return f"{config.device_config.device_type}{engines}{blocks}"


def _engine(chat: FoldServingChat) -> dict[str, str]:
    """Without attention backends, which take a tenth of a second to find: `foldserve doctor` shows them."""
    config, family, cost = chat.engine_client.vllm_config, chat.planner.family, chat.kv_cost
    graphs = config.compilation_config.cudagraph_mode
    engine = f"model runner {model_runner(config)}, graphs {'NONE' if graphs is None else graphs.name}"
    if family is None or (encoder := chat.planner.encoder) is None:
        return {"engine": engine}
    image = family.largest.tokens
    sequence = size(cost.sequence_bytes(image + TEXT_TOKENS))
    if cost.withdraw_layer is not None:
        sequence += f" ({size(cost.sequence_bytes(image + TEXT_TOKENS, image))} withdrawn)"
    return {
        "engine": f"{engine}, up to {encoder.images} {family.unit}s of the largest size a tower call",
        "KV cache": f"{sequence} for a sequence of one largest {family.unit} and {TEXT_TOKENS} tokens of text",
    }


def _reduction(chat: FoldServingChat) -> str:
    settings, family = chat.planner.settings, chat.planner.family
    if family is None:
        return "none: this model's vision tower can't reduce"
    default = settings.default_reduction.to_json()
    tokens = f"{'up to ' if family.sizes_matter else ''}{family.largest.tokens}"
    low = json.dumps(chat.planner.low_detail[family.modalities[0]].to_json())
    each = "an image" if family.unit == "image" else "a frame"
    return (
        f"{tokens} tokens {each}; default {json.dumps(default) if default else 'none'}, "
        f'"detail": "low" {low}, positions {chat.planner.default_positions}'
    )


def _withdrawal(chat: FoldServingChat) -> str:
    layer = chat.planner.settings.withdraw_layer
    if layer is None and chat.engine_client.model_config.is_hybrid:
        return "off; the decoder does not take --withdraw-layer"
    if layer is None:
        return "off (--withdraw-layer K)"
    layers = chat.engine_client.model_config.hf_text_config.num_hidden_layers
    return f'from decoder layer K = {layer} of {layers} on, where a request says "withdraw": true'
