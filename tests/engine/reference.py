"""LLaVA with token reduction in plain PyTorch and transformers: all recomputed for every token, no cache, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPVisionConfig, LlavaForConditionalGeneration

from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan, Reduction, VisionGeometry
from tests.engine.plain_tower import PlainTower
from tests.reducers.naive import naive_mmtok, naive_pixelprune

KEYWORDS = {
    "": [],
    "What is the color of the car on the left?": ["color", "of", "car", "on", "left"],
    "Where is it?": ["Where", "is", "it?"],
}
"""Queries, and what MMTok looks for."""


class Reference:
    """Greedy decoding of a checkpoint on one prompt at a time, in fp32."""

    model_class: Any = LlavaForConditionalGeneration
    tower_name = "vision_tower"

    def __init__(self, path: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = self.model_class.from_pretrained(path, dtype=torch.float32).eval()
        self.config = self.model.config
        vision = self.config.vision_config
        side, class_token = vision.image_size // vision.patch_size, isinstance(vision, CLIPVisionConfig)
        layers = vision.num_hidden_layers + 1 + self.config.vision_feature_layer
        self.geometry = VisionGeometry(side**2, (side, side), layers, class_token, takes_cells=True, shows_tower=True)
        self.tower = PlainTower(getattr(self.model.model, self.tower_name), layers, class_token=class_token)

    def plan(self, reduction: dict[str, object]) -> ItemPlan:
        return plan_item(Reduction.parse(reduction), Layout.single(self.geometry))

    def plans(self, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]]) -> list[ItemPlan]:
        """The plan of each image, whose sizes may differ."""
        return [self.plan_of(image, reduction) for image, reduction in zip(images, reductions, strict=True)]

    def plan_of(self, image: Image.Image, reduction: dict[str, object]) -> ItemPlan:
        """The plan; where pixels decide it, cells of the image as it is resized are compared one by one."""
        if not str(reduction.get("method")).startswith("pixelprune"):
            return self.plan(reduction)
        process, patch = self.processor.image_processor, self.config.vision_config.patch_size
        raw = process(image, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
        rows = [row.split(patch, dim=2) for row in raw.int().split(patch, dim=1)]
        cells = [[cell.flatten().tolist() for cell in row] for row in rows]
        anchored = reduction.get("predictor") != "sliding"
        stays = torch.zeros(self.geometry.tokens, dtype=torch.bool)
        stays[naive_pixelprune(cells, int(str(reduction.get("tau", 0))), anchored=anchored)] = True
        cells_kept = None if stays.all() else Cells.of(stays)
        return plan_item(Reduction.parse(reduction), Layout.single(self.geometry), cells_kept)

    @torch.no_grad()
    def image_features(self, image: Image.Image, plan: ItemPlan) -> Tensor:
        """Projected vision tokens (plan.kept, hidden)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.method == "random" else plan
        entering = None if plan.cells is None else plan.cells.places()
        projector = self.model.model.multi_modal_projector
        return self.tower.features(pixels, seeded.grids[0], projector, entering)[0]

    def covering(self, image: Image.Image, plan: ItemPlan, words: Sequence[str]) -> Tensor:
        """The same of MMTok, by what is to be looked for."""
        projected, stay = self.covered(image, plan, words)
        return projected[stay]

    def covered(self, image: Image.Image, plan: ItemPlan, words: Sequence[str]) -> tuple[Tensor, list[int]]:
        """All tokens that enter the tower, projected, and those of them that stay."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        entering = None if plan.cells is None else plan.cells.places()
        features = self.tower.features(pixels, Plan("none", self.geometry.tokens), entering=entering)
        projected: Tensor = self.model.model.multi_modal_projector(features)[0]
        return projected, naive_mmtok(projected, features[0], self.embedded(words), plan.kept, 0.02)

    def members(self, image: Image.Image, reduction: dict[str, object]) -> list[list[int]]:
        """Of each token that stays, in order, the patches that are in it."""
        (plan,) = self.plans([image], [reduction])
        entering = None if plan.cells is None else plan.cells.places()
        if plan.grids[0].method == "mmtok":
            _, stay = self.covered(image, plan, KEYWORDS[str(reduction.get("query", ""))])
            return [[i if entering is None else int(entering[i])] for i in stay]
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())).grids[0]
        return self.tower.members(pixels, seeded, self.model.model.multi_modal_projector, entering)

    def embedded(self, words: Sequence[str]) -> Tensor:
        """The decoder's embeddings of their tokens."""
        tokenizer = self.processor.tokenizer
        ids = [token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"]]
        embeds: Tensor = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))
        return embeds

    def prompt_ids(self, prompt: str, plans: Sequence[ItemPlan]) -> list[int]:
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
        plans = self.plans(images, reductions)
        ids = torch.tensor(self.prompt_ids(prompt, plans))
        embeds = self.model.get_input_embeddings()(ids)
        if images:
            features = [
                self.covering(image, plan, KEYWORDS[str(asked.get("query", ""))])
                if plan.grids[0].method == "mmtok"
                else self.image_features(image, plan)
                for image, plan, asked in zip(images, plans, reductions, strict=True)
            ]
            embeds[ids == self.config.image_token_index] = torch.cat(features)
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = self.model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
            best, logprob = self.pick(self.model.lm_head(hidden[0, -1]).log_softmax(-1))
            out.append(best)
            logprobs.append(logprob)
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([best]))])
        return out, logprobs

    def pick(self, distribution: Tensor) -> tuple[int, float]:
        """The next token and its log-probability, of those of all tokens."""
        best = int(distribution.argmax())
        return best, float(distribution[best])
