"""vLLM options that are refused at start-up, since they conflict with reductions."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from foldserve.server.engine import withdrawal
from foldserve.server.engine.tower_graphs import check_graphs

RECURRENT_ON_CPU: tuple[torch.dtype, ...] = (torch.bfloat16,)  # dtypes of vLLM's CPU kernels of gated-delta layers


def refuse_options(*, encoder_graphs: bool, tower_adapters: bool, video_pruning_rate: float | None) -> None:
    """Raises ValueError if an option is on that would bypass reductions or miscount vision tokens."""
    if encoder_graphs:
        raise ValueError(
            "cudagraph_mm_encoder in --compilation-config does not go with foldserve: a graph of the vision tower "
            "would leave reductions out. Leave the option out; --tower-graphs has graphs with the default reduction"
        )
    if tower_adapters:
        raise ValueError(
            "--enable-tower-connector-lora does not go with foldserve: vLLM lays adapters of the vision tower out for "
            "as many tokens as the decoder gets, which reductions change. Leave the option out: adapters of the "
            "decoder work"
        )

    if video_pruning_rate:
        raise ValueError(
            "--video-pruning-rate does not go with foldserve: vLLM would remove tokens of every video that no plan "
            "knows of. Leave the option out"
        )


def check_options(vllm_config: VllmConfig) -> None:
    """`refuse_options` for an engine's configuration; also refuses dtypes that recurrent layers lack on a CPU."""
    model = vllm_config.model_config
    if model.is_hybrid and current_platform.is_cpu() and model.dtype not in RECURRENT_ON_CPU:
        raise ValueError(
            "this model's recurrent layers run in bfloat16 only on a CPU, and "
            f"{str(model.dtype).removeprefix('torch.')} was asked for: start with --dtype bfloat16"
        )
    lora, multimodal = vllm_config.lora_config, model.multimodal_config
    refuse_options(
        encoder_graphs=vllm_config.compilation_config.cudagraph_mm_encoder,
        tower_adapters=lora is not None and lora.enable_tower_connector_lora,
        video_pruning_rate=None if multimodal is None else multimodal.video_pruning_rate,
    )


class EarlyChecks(VerifyAndUpdateConfig):
    """vLLM's hook for a model's configuration. It fails half a minute before the engine process, which checks again."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_options(vllm_config)
        withdrawal.check_decoder(vllm_config)
        check_graphs(vllm_config)


def with_early_checks(own: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """`EarlyChecks` after vLLM's own hook for an architecture. Idempotent."""
    if issubclass(own, EarlyChecks):
        return own

    def verify(vllm_config: VllmConfig) -> None:
        own.verify_and_update_config(vllm_config)
        EarlyChecks.verify_and_update_config(vllm_config)

    return type(f"Early{own.__name__}", (EarlyChecks, own), {"verify_and_update_config": staticmethod(verify)})
