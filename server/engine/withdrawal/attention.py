"""The attention layers of the withdrawing decoder.

vLLM builds each family's attention modules, and then only the *class* of each attention op changes to one of the two
below (as `torch.nn.utils.parametrize` does). They override two methods, so head counts, scales, quantization, rotary
embeddings and weight names stay as the family made them. Building another op beside it is no alternative: families
call `Attention(...)` in their own modules, with arguments that are not kept and a name that is then taken.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

from foldserve.server.engine.withdrawal.metadata import deep_backend
from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec, ShallowAttentionSpec
from foldserve.server.engine.withdrawal.token_selection import last_token_scores

_NOT_DEEP = ("sliding_window", "attention_chunk_size", "non_causal")


class ShallowAttention(Attention):
    """Layers < K. Modification: the KV spec determines which layers share a KV cache group."""

    bucket: int

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ShallowAttentionSpec:
        return replace_as(_full_attention(self, vllm_config), ShallowAttentionSpec, bucket=self.bucket)


class DeepAttention(Attention):
    """Layers >= K. Modification: KV cache and attention metadata are those of kept tokens."""

    bucket: int

    def get_attn_backend(self) -> type[AttentionBackend]:
        return deep_backend(super().get_attn_backend())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> DeepAttentionSpec:
        return replace_as(_full_attention(self, vllm_config), DeepAttentionSpec, drop=_NOT_DEEP, bucket=self.bucket)


def _full_attention(op: Attention, vllm_config: VllmConfig) -> FullAttentionSpec:
    spec = Attention.get_kv_cache_spec(op, vllm_config)
    if type(spec) is not FullAttentionSpec:
        raise ValueError(
            f"--withdraw-layer needs full attention in every layer; {op.layer_name} has {type(spec).__name__}"
        )
    return spec


def adopt(op: Attention, cls: type[ShallowAttention] | type[DeepAttention], bucket: int, max_tokens: int) -> None:
    """Change a built attention op's class; a sequence has at most `max_tokens` tokens."""
    if type(op) is not Attention:
        raise ValueError(f"--withdraw-layer knows vLLM's Attention only; {op.layer_name} is a {type(op).__name__}")
    if (
        op.sliding_window is not None and op.sliding_window >= max_tokens
    ):  # no effect on attention, but on the kind of cache
        op.sliding_window = None
    op.__class__ = cls
    op.bucket = bucket


def score_in(op: Attention, deep_op: str) -> None:
    """Make the op of layer K-1 score prompts whose image tokens are chosen for the deep layers.

    The op's impl becomes a subclass of itself. vLLM's attention op calls it outside the compiled graph with the layer's
    queries and keys, so nothing is computed twice, and other steps cost one look-up. The scores are stored as
    `deep_scores` in the metadata of the deep layers, found under the name `deep_op`.
    """
    impl: Any = type(op.impl)

    def forward(self: Any, layer: Attention, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        of_step = get_forward_context().attn_metadata
        if isinstance(of_step, dict) and of_step[deep_op].deep_prompts:
            q = query if query.dtype.itemsize > 1 else query.float() * layer._q_scale  # fp8, if the KV cache is
            scores = [last_token_scores(q, key, prompt, self.scale) for prompt in of_step[deep_op].deep_prompts]
            of_step[deep_op].deep_scores = [_over_all_heads(of_prompt) for of_prompt in scores]
        output: Tensor = impl.forward(self, layer, query, key, *args, **kwargs)
        return output

    op.impl.__class__ = type(f"Scoring{impl.__name__}", (impl,), {"forward": forward})


def _over_all_heads(scores: Tensor) -> Tensor:
    """Mean over all ranks: an all-reduce gives every rank the same bits and so the same choice."""
    ranks = get_tensor_model_parallel_world_size()
    return scores if ranks == 1 else tensor_model_parallel_all_reduce(scores) / ranks
