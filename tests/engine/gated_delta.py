"""The gated delta rule of vLLM's linear-attention layers in fp32 on a CPU, where vLLM has kernels for bf16 only.

It runs token by token, and reads and writes the states that vLLM's KV cache manager gives to a request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

from foldserve.server.engine import refused_options

_of_vllm = gdn_attention.cpu_gdn_attention_core


def install() -> None:
    """Makes it the operation of engines that start later in this process; in bf16 it is vLLM's own still."""
    gdn_attention.cpu_gdn_attention_core = attend
    refused_options.RECURRENT_ON_CPU = (torch.bfloat16, torch.float32)


def attend(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    """As vLLM's: (tokens, channels), (tokens, heads) twice, writes (tokens, heads, head_dim)."""
    if mixed_qkv.dtype == torch.bfloat16:
        _of_vllm(mixed_qkv, b, a, core_attn_out, layer_name)
        return
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    layer = context.no_compile_layers[name]
    if context.attn_metadata is None:  # a profile run
        return
    step = context.attn_metadata[name]
    starts, slots = step.non_spec_query_start_loc.tolist(), step.non_spec_state_indices_tensor.tolist()
    for i, goes_on in enumerate(continues(step)):
        rows, states = slice(starts[i], starts[i + 1]), [state[slots[i]] for state in layer.kv_cache]
        channels, memory = (state.clone() if goes_on else torch.zeros_like(state) for state in states)
        after = _sequence(layer, mixed_qkv[rows], b[rows], a[rows], channels, memory, core_attn_out[rows])
        for state, new in zip(states, after, strict=True):
            state.copy_(new)


def continues(step: Any) -> list[bool]:
    """Whether each sequence of a step has states already."""
    prompts = step.has_initial_state[step.num_decodes :].tolist() if step.num_prefills else []
    return [True] * step.num_decodes + prompts


def _sequence(
    layer: Any, mixed: Tensor, b: Tensor, a: Tensor, channels: Tensor, state: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """From the states of a sequence, (3, channels) inputs of the convolution and (heads, values, keys), to the next."""
    inputs = torch.cat([channels, mixed])
    convolved = F.silu(F.conv1d(inputs.T, layer.conv1d.weight, groups=inputs.shape[1])).T
    query, key, value = (part[0] for part in layer.rearrange_mixed_qkv(convolved))  # (tokens, heads, head_dim)
    times = value.shape[1] // key.shape[1]
    query, key = (F.normalize(x, dim=-1).repeat_interleave(times, dim=1) for x in (query, key))
    share = b.sigmoid()
    stays = (-layer.A_log.exp() * F.softplus(a + layer.dt_bias)).exp()
    for token in range(len(mixed)):
        state = state * stays[token, :, None, None]
        new = share[token, :, None] * (value[token] - torch.einsum("hvk,hk->hv", state, key[token]))
        state = state + torch.einsum("hv,hk->hvk", new, key[token])
        out[token] = torch.einsum("hvk,hk->hv", state, query[token]) * query.shape[-1] ** -0.5
    return inputs[-len(channels) :], state
