"""Next-token logits of a loaded model with vision tokens withdrawn at any layer.

The prompt runs through vLLM's own layers as one dense prefill, without scheduler and KV cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import supports_mrope
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from foldserve.server.engine import withdrawal
from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.worker import device
from foldserve.server.quality.engine.kl_walk import last_logits
from foldserve.server.quality.engine.offline import KV_CACHE_BYTES, OfflineModel, render_prompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt from vLLM's processor.

    Attributes:
        token_ids: with expanded placeholders.
        images: vLLM's processed items, one per image.
        ranges: half-open token ranges of the images.
    """

    token_ids: list[int]
    images: list[Any]
    ranges: list[tuple[int, int]]


class KLProbe(OfflineModel):
    """A model in this process; `start` loads it."""

    def __init__(self, model: str, argv: Sequence[str] = (), command: str = "calibrate") -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tensors and functions go to the model as they are
        defaults = {"max_model_len": -1, "max_num_seqs": 1, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        super().__init__(model, argv, command, defaults=defaults, fixed=_engine_options())
        self._args.additional_config = withdrawal.configure(self.first_layer, device=device())["additional_config"]

    def start(self) -> None:
        """Loads the weights. Raises ValueError if withdrawal does not support the options or the decoder."""
        self._llm = LLM.from_engine_args(self._args)

    def logits(self, image: Image, question: str, candidates: range, answer_tokens: int) -> tuple[Tensor, Tensor]:
        """Logits at the first `answer_tokens` tokens of the model's own greedy answer, which may be shorter.

        Args:
            candidates: values of K, each in 1..N-1.

        Returns:
            fp32 on the CPU: (tokens, vocab) with all vision tokens, (candidates, tokens, vocab) withdrawn at each K.
        """
        prompt = chat_prompt(self._llm, image, question)
        answer = _greedy_answer(self._llm, image, question, answer_tokens - 1) if answer_tokens > 1 else []
        return probe(self._llm, prompt, candidates, answer)


def _engine_options() -> dict[str, Any]:
    """Options of withdrawal at K = 1: with any K, vLLM checks that the model supports withdrawal."""
    options = withdrawal.configure(1, device=device(), async_scheduling=False)
    options.pop("additional_config")  # set by `KLProbe`, with the least K of the model
    return options | {"enforce_eager": True}


def _greedy_answer(llm: Any, image: Image, question: str, tokens: int) -> list[int]:
    """Token ids without the end-of-sequence token: logits after it don't matter."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    (output,) = llm.chat(_messages(image, question), sampling, use_tqdm=False)
    answer = output.outputs[0]
    return list(answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids)


def _messages(image: Image, question: str) -> list[Any]:
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def chat_prompt(llm: Any, image: Image, question: str) -> Prompt:
    """One user turn, the image before the question, in the model's chat template."""
    rendered = render_prompt(llm, _messages(image, question), skip_mm_cache=True)
    inclusive = [pair for place in rendered["mm_placeholders"]["image"] for pair in place.extract_embeds_range()]
    return Prompt(
        rendered["prompt_token_ids"],
        list(rendered["mm_kwargs"]["image"]),
        [(first, last + 1) for first, last in inclusive],
    )


def probe(llm: Any, prompt: Prompt, candidates: range, answer: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """`KLProbe.logits` for a prompt and all tokens of its answer but the last."""
    look = partial(_probe, prompt=prompt, candidates=candidates, answer=answer)
    results: list[tuple[Tensor, Tensor]] = llm.apply_model(look)  # one per tensor-parallel worker, all equal
    return results[0]


@torch.inference_mode()
def _probe(model: Any, prompt: Prompt, candidates: range, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    decoder = model.get_submodule(model.decoder_path)
    asked = len(prompt.token_ids)
    whole = replace(prompt, token_ids=[*prompt.token_ids, *answer])
    embeds = embed(model, whole)
    kept = torch.from_numpy(np.append(_kept_rows(prompt), np.arange(asked, len(embeds)))).to(embeds.device)

    def head(hidden: Tensor, residual: Tensor) -> Tensor:
        logits: Tensor = model.compute_logits(decoder.norm(hidden, residual)[0])
        return logits

    with dense(decoder.attention_ops):
        layers = decoder.whole_layers(take_deepstack(model, len(embeds)))
        places = rotary_positions(model, whole).to(embeds.device)
        full, withdrawn = last_logits(layers, head, embeds, kept, candidates, 1 + len(answer), places)
    return full.float().cpu(), withdrawn.float().cpu()


def embed(model: Any, prompt: Prompt) -> Tensor:
    """(n, hidden) input of the decoder; leaves deepstack levels in the model."""
    device = next(model.parameters()).device
    is_vision = torch.zeros(len(prompt.token_ids), dtype=torch.bool)
    for start, end in prompt.ranges:
        is_vision[start:end] = True
    images: list[Tensor] = []
    for _, _, kwargs in group_and_batch_mm_kwargs([("image", item) for item in prompt.images], device=device):
        images += model.embed_multimodal(**kwargs)
    token_ids = torch.tensor(prompt.token_ids, device=device)
    embeds: Tensor = model.embed_input_ids(token_ids, multimodal_embeddings=images, is_multimodal=is_vision.to(device))
    return embeds


def take_deepstack(model: Any, rows: int) -> list[Tensor]:
    """Removes the deepstack levels that `embed` left in the model; returns (rows, hidden) of each."""
    if not getattr(model, "use_deepstack", False):
        return []
    levels = [level.clone() for level in model._get_deepstack_input_embeds(rows).tensors.values()]
    model._clear_deepstack_input_embeds(rows)
    return levels


def rotary_positions(model: Any, prompt: Prompt) -> Tensor:
    """(n,), or (3, n) with M-RoPE."""
    if not supports_mrope(model):
        return torch.arange(len(prompt.token_ids))
    images = [
        MultiModalFeatureSpec(item, "image", "", PlaceholderRange(offset=start, length=end - start))
        for item, (start, end) in zip(prompt.images, prompt.ranges, strict=True)
    ]
    positions, _ = model.get_mrope_input_positions(prompt.token_ids, images)
    return positions


def _kept_rows(prompt: Prompt) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of the prompt that reach the layers from K on."""
    n = len(prompt.token_ids)
    step = BatchMaps([TokenMap(prompt.ranges, n)]).step(np.array([0]), np.array([n]))
    if step is None or step.rows is None:
        raise ValueError("the prompt has no vision token to withdraw: its chat template dropped the image")
    return step.rows


class DenseAttention(Attention):
    """Modifications: causal attention among the given rows, without KV cache and forward context."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """(rows, heads * head_size) each -> (rows, heads * head_size)."""
        q = query.view(-1, self.num_heads, self.head_size).transpose(0, 1)
        k, v = (x.view(-1, self.num_kv_heads, self.head_size).transpose(0, 1) for x in (key, value))
        attended = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=self.impl.scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(1)


@contextmanager
def dense(ops: Sequence[Attention], attention: type[DenseAttention] = DenseAttention) -> Iterator[None]:
    """Makes the attention ops dense while the context is open, by changing their class, as in `adopt`."""
    own = [type(op) for op in ops]
    try:
        for op in ops:
            op.__class__ = attention
        yield
    finally:
        for op, cls in zip(ops, own, strict=True):
            op.__class__ = cls
