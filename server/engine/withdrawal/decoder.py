"""The withdrawing decoder: vLLM's own decoder, run in parts with fewer rows in the later ones.

Of a token that is withdrawn at layer K, only its keys and values are needed in layer K-1. Nothing reads the rest of
that layer (output projection, norm, MLP; three quarters of its FLOPs in Llama), so rows leave after its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.sequence import IntermediateTensors

from foldserve.server.engine.withdrawal.attention import DeepAttention, ShallowAttention, adopt, score_in
from foldserve.server.engine.withdrawal.config import withdraw_layer
from foldserve.server.engine.withdrawal.graph import PartBuffers, no_graphs, replays_parts
from foldserve.server.engine.withdrawal.layout import bucket_of
from foldserve.server.engine.withdrawal.token_selection import merges_tokens, select_tokens


def _defer(module: nn.Module, passes: Callable[..., Any]) -> Any:
    """Make a built module pass its inputs through; its original forward becomes `later`.

    Only its class changes, for the reasons in `attention.py`, so weights and their names stay.
    """
    own: Any = type(module)
    module.__class__ = type(f"Deferred{own.__name__}", (own,), {"forward": passes, "later": own.forward})
    return module


_Layer = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(positions, hidden, residual) -> (hidden, residual)"""


def _with_deepstack(layer: _Layer, level: Tensor) -> _Layer:
    def added(positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, after = layer(positions, hidden, residual)
        return hidden + level, after

    return added


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden_states": 0, "deepstack": 0})
class ShallowPart(nn.Module):
    """Layers < K on all rows, the last of them only up to its attention, see `AfterAttention`.

    `positions` are (rows,), or (3, rows) with M-RoPE. `deepstack` is added to the outputs of the first layers of some
    models, all before K - 1: (rows, hidden) each. Returns the attention's output (rows, heads * head size) and the
    residual stream (rows, hidden).
    """

    def __init__(self, *, layers: nn.ModuleList, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, positions: Tensor, hidden_states: Tensor, deepstack: IntermediateTensors | None = None
    ) -> tuple[Tensor, Tensor]:
        residual: Any = None  # the first layer takes none
        for index, layer in enumerate(self.layers):
            hidden_states, residual = layer(positions, hidden_states, residual)
            if deepstack is not None and index < len(deepstack):
                hidden_states = hidden_states + deepstack[f"deepstack_input_embeds_{index}"]
        return hidden_states, residual


class ModuleNames(NamedTuple):
    """Module names in vLLM's decoders, most of which use Llama's."""

    embeddings: str = "embed_tokens"
    attention: str = "self_attn"
    output: str = "o_proj"  # the attention's last projection
    norm: str = "post_attention_layernorm"  # between attention and MLP
    mlp: str = "mlp"

    @classmethod
    def of(cls, decoder: Any) -> ModuleNames:
        return INTERNLM2 if hasattr(decoder, INTERNLM2.embeddings) else cls()


INTERNLM2 = ModuleNames("tok_embeddings", "attention", "wo", "ffn_norm", "feed_forward")


@support_torch_compile(dynamic_arg_dims={"attended": 0, "residual": 0})
class AfterAttention(nn.Module):
    """The part of layer K-1 after its attention, which the layer itself then skips."""

    def __init__(self, *, layer: Any, names: ModuleNames, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert getattr(layer, "ada_rms_norm_t_cond", None) is None  # of Mistral's audio models
        output = getattr(getattr(layer, names.attention), names.output)
        self.o_proj: Any = _defer(output, lambda self, attended: (attended, None))
        self.norm: Any = _defer(getattr(layer, names.norm), lambda self, hidden, residual: (hidden, residual))
        self.mlp: Any = _defer(getattr(layer, names.mlp), lambda self, hidden: hidden)

    def forward(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, _ = self.o_proj.later(attended)
        hidden_states, residual = self.norm.later(hidden_states, residual)
        return self.mlp.later(hidden_states), residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden_states": 0, "residual": 0})
class DeepPart(nn.Module):
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
    """Takes over the modules of a vLLM decoder (embeddings, `layers`, `norm`); weights keep their names.

    Three parts are compiled separately, since they see different numbers of rows; Python runs in between. Captured CUDA
    graphs of the first part replay in every step, those of the others only in steps with all rows.
    """

    def __init__(self, decoder: Any, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        first = withdraw_layer(vllm_config)
        assert first is not None
        names = ModuleNames.of(decoder)
        self._embeddings = names.embeddings
        setattr(self, names.embeddings, getattr(decoder, names.embeddings))
        self.layers, self.norm = decoder.layers, decoder.norm
        self.hf_to_vllm_mapper = decoder.hf_to_vllm_mapper
        self.make_empty_intermediate_tensors = decoder.make_empty_intermediate_tensors
        self.attention_ops = ops = [getattr(layer, names.attention).attn for layer in self.layers]
        for i, op in enumerate(ops):
            side = ShallowAttention if i < first else DeepAttention
            adopt(op, side, bucket_of(i, len(ops), first), vllm_config.model_config.max_model_len)
        parts: dict[str, Any] = {"vllm_config": vllm_config, "prefix": prefix}
        with set_model_tag("shallow_part"):
            self.shallow = ShallowPart(layers=self.layers[:first], **parts)
        with set_model_tag("after_attention"):
            self.after_attention = AfterAttention(layer=self.layers[first - 1], names=names, **parts)
        with set_model_tag("deep_part"):
            self.deep = DeepPart(layers=self.layers[first:], norm=self.norm, **parts)
        self._between = PartBuffers(vllm_config.compilation_config)
        self._deep_ops = [op.layer_name for op in ops[first:]]
        score_in(ops[first - 1], self._deep_ops[0])

    def whole_layers(self, deepstack: Sequence[Tensor] = ()) -> list[_Layer]:
        """The layers as vLLM made them; `deepstack`, (rows, hidden) each, is added to the output of the first ones."""
        cut = self.shallow.layers[-1]

        def rejoined(positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            whole: tuple[Tensor, Tensor] = self.after_attention(*cut(positions, hidden, residual))
            return whole

        layers = [rejoined if layer is cut else layer for layer in self.layers]
        return [*map(_with_deepstack, layers, deepstack), *layers[len(deepstack) :]]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = getattr(self, self._embeddings)(input_ids)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> Tensor:
        """(rows, hidden) final hidden states, 0 in rows of withdrawn tokens."""
        assert intermediate_tensors is None  # pipeline parallelism is refused at start-up
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
            if replays_parts():
                (inputs_embeds,) = self._between.hold(embeds=inputs_embeds)
        attended, residual = self.shallow(positions, inputs_embeds, deepstack_input_embeds)
        step = self._enter_deep_part()
        if step is None or step.deep_rows is None:
            return self._on_all_rows(positions, attended, residual)
        with no_graphs():
            return self._on_kept_rows(step, positions, attended, residual)

    def _on_all_rows(self, positions: Tensor, attended: Tensor, residual: Tensor) -> Tensor:
        if not replays_parts():
            eager: Tensor = self.deep(positions, *self.after_attention(attended, residual))
            return eager
        attended, residual = self._between.hold(attended=attended, residual=residual)
        hidden, residual = self.after_attention(attended, residual)
        hidden, residual = self._between.hold(hidden=hidden, residual=residual)
        replayed: Tensor = self.deep(positions, hidden, residual)
        return replayed

    def _on_kept_rows(self, step: Any, positions: Tensor, attended: Tensor, residual: Tensor) -> Tensor:
        rows = step.deep_rows
        output = torch.zeros_like(residual)  # full size, since sampling indexes rows of the full batch
        if not len(rows):
            return output
        hidden, merging = attended, merges_tokens(step.deep_prompts)
        if merging:  # merging needs the full output of layer K-1 for all rows
            hidden, residual = self.after_attention(hidden, residual)
        if step.deep_prompts:
            select_tokens(step.deep_prompts, step.deep_scores, rows, hidden, residual)
        positions, hidden, residual = positions[..., rows], hidden[rows], residual[rows]
        if not merging:
            hidden, residual = self.after_attention(hidden, residual)
        output[rows] = self.deep(positions, hidden, residual)
        return output

    def _enter_deep_part(self) -> Any:
        """Set the KV slots of the deep ops and return their metadata; None in a dummy run without attention."""
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):
            return None
        for op in self._deep_ops:
            context.slot_mapping[op] = context.attn_metadata[op].deep_slots
        return context.attn_metadata[self._deep_ops[0]]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
