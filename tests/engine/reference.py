"""LLaVA with token reduction in plain PyTorch and transformers: all recomputed for every token, no cache, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Plan, Reduction, VisionGeometry, make_plan


class Reference:
    """Greedy decoding of a checkpoint on one prompt at a time, in fp32."""

    def __init__(self, path: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.config = self.model.config
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        self.geometry = VisionGeometry(side**2, (side, side), vision.num_hidden_layers - 1, class_token=True)

    def plan(self, reduction: dict[str, object]) -> Plan:
        return make_plan(Reduction.parse(reduction), self.geometry)

    @torch.no_grad()
    def image_features(self, image: Image.Image, plan: Plan) -> Tensor:
        """Projected vision tokens (plan.kept, hidden)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tower = self.model.model.vision_tower
        states = tower(pixels, output_hidden_states=True).hidden_states
        if plan.method == "folder_cls":
            features = self._folded_in_layer(states[-3], plan)
        else:
            features = states[-2][:, 1:]
            if plan.removed:
                features = folder(
                    features, plan.folds, scale="official" if "official" in plan.options else "none"
                ).tokens
        return self.model.model.multi_modal_projector(features)[0]

    def _folded_in_layer(self, hidden: Tensor, plan: Plan) -> Tensor:
        """The layer before the last one, with plain softmax attention and the merge before its MLP."""
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        layer = encoder.layers[len(encoder.layers) - 2]
        attention = layer.self_attn
        x = layer.layer_norm1(hidden)
        q, k, v = (
            p(x).unflatten(-1, (attention.num_heads, -1))
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * attention.scale).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        hidden = hidden + attention.out_proj(attended)
        tokens = folder_cls(hidden, k.mean(2), weights[:, :, 0].mean(1), plan.folds).tokens[:, 1:]
        return tokens + layer.mlp(layer.layer_norm2(tokens))

    def prompt_ids(self, prompt: str, plans: Sequence[Plan]) -> list[int]:
        """Token ids with plan.kept placeholders per image."""
        ids: list[int] = []
        remaining = iter(plans)
        for token in self.processor.tokenizer(prompt)["input_ids"]:
            is_image = token == self.config.image_token_index
            ids += [token] * (next(remaining).kept if is_image else 1)
        return ids

    @torch.no_grad()
    def generate(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]], tokens: int
    ) -> tuple[list[int], list[float]]:
        """Greedy token ids and their log-probabilities."""
        plans = [self.plan(reduction) for reduction in reductions]
        ids = torch.tensor(self.prompt_ids(prompt, plans))
        embeds = self.model.get_input_embeddings()(ids)
        if images:
            features = [self.image_features(image, plan) for image, plan in zip(images, plans, strict=True)]
            embeds[ids == self.config.image_token_index] = torch.cat(features)
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = self.model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
            distribution = self.model.lm_head(hidden[0, -1]).log_softmax(-1)
            best = int(distribution.argmax())
            out.append(best)
            logprobs.append(float(distribution[best]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([best]))])
        return out, logprobs
