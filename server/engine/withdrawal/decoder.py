"""The withdrawing decoder: vLLM's own decoder, run in two halves with fewer rows in the second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from foldserve.reducers.withdraw import take_rows
from foldserve.server.engine.withdrawal.attention import DeepAttention, ShallowAttention, adopt, score_in
from foldserve.server.engine.withdrawal.choose import choose
from foldserve.server.engine.withdrawal.config import withdraw_layer
from foldserve.server.engine.withdrawal.layout import bucket_of


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class ShallowHalf(nn.Module):
    """Layers < K, on all rows."""

    def __init__(self, *, layers: nn.ModuleList, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.layers = layers

    def forward(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.layers
        hidden_states, residual = first(positions, hidden_states, None)
        for layer in others:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0, "residual": 0})
class DeepHalf(nn.Module):
    """Layers >= K and the final norm, on the kept rows."""

    def __init__(self, *, layers: nn.ModuleList, norm: nn.Module, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.layers, self.norm = layers, norm

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        normed: Tensor = self.norm(hidden_states, residual)[0]
        return normed


class WithdrawingDecoder(nn.Module):
    """Takes over the parts of a vLLM decoder (`embed_tokens`, `layers`, `norm`); weights keep their names.

    The halves are compiled as two graphs, since they see different numbers of rows; what lies between runs in Python.
    """

    def __init__(self, decoder: Any, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        first = withdraw_layer(vllm_config)
        assert first is not None
        self.embed_tokens, self.layers, self.norm = decoder.embed_tokens, decoder.layers, decoder.norm
        self.hf_to_vllm_mapper = decoder.hf_to_vllm_mapper
        self.make_empty_intermediate_tensors = decoder.make_empty_intermediate_tensors
        for i, layer in enumerate(self.layers):
            side = ShallowAttention if i < first else DeepAttention
            adopt(layer.self_attn.attn, side, bucket_of(i, len(self.layers), first))
        with set_model_tag("shallow_half"):
            self.shallow = ShallowHalf(layers=self.layers[:first], vllm_config=vllm_config, prefix=prefix)
        with set_model_tag("deep_half"):
            self.deep = DeepHalf(layers=self.layers[first:], norm=self.norm, vllm_config=vllm_config, prefix=prefix)
        self._deep_ops = [layer.self_attn.attn.layer_name for layer in self.layers[first:]]
        score_in(self.layers[first - 1].self_attn.attn, self._deep_ops[0])

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embed_tokens(input_ids)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (rows, hidden), zero in the rows of withdrawn tokens."""
        assert intermediate_tensors is None  # pipeline parallelism is refused at start-up
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden, residual = self.shallow(positions, inputs_embeds)
        rows = self._enter_deep_half(hidden, residual)
        if rows is None:
            kept: Tensor = self.deep(positions, hidden, residual)
            return kept
        output = torch.zeros_like(hidden)  # of full size: the rows to sample from are numbered in the full batch
        if len(rows):
            output[rows] = self.deep(*take_rows(rows, positions, hidden, residual))
        return output

    def _enter_deep_half(self, hidden: Tensor, residual: Tensor) -> Tensor | None:
        """Lets the deep ops write KV at their own slots, and returns the rows to gather; None: all.

        Where the rows of an image are chosen by their scores, the merged ones are written into `hidden` and `residual`.
        """
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # a dummy run without attention
            return None
        for op in self._deep_ops:
            context.slot_mapping[op] = context.attn_metadata[op].deep_slots
        deep = context.attn_metadata[self._deep_ops[0]]
        rows: Tensor | None = deep.deep_rows
        if deep.deep_prompts:
            assert rows is not None  # not all tokens of the images stay
            choose(deep.deep_prompts, deep.deep_scores, rows, hidden, residual)
        return rows

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded


def _withdrawing(base: type[nn.Module]) -> type[nn.Module]:
    """The causal LM `base` with a `WithdrawingDecoder` in place of its decoder."""

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.model = WithdrawingDecoder(self.model, vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    return type(f"Withdrawing{base.__name__}", (base,), {"__init__": __init__, "__module__": __name__})


WithdrawingLlamaForCausalLM = _withdrawing(LlamaForCausalLM)
WithdrawingMistralForCausalLM = _withdrawing(MistralForCausalLM)
WithdrawingQwen2ForCausalLM = _withdrawing(Qwen2ForCausalLM)
WithdrawingQwen3ForCausalLM = _withdrawing(Qwen3ForCausalLM)
