"""Trains in four stages.

First the vision tower learns what every patch shows. Then the whole model learns to answer, to answer hard questions,
and to answer without the image in the last layers.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from foldserve.server.quality.demo.questions import REFERENTS
from foldserve.server.quality.demo.scene import IMAGE_PX, LABELS, PATCH_PX
from foldserve.server.quality.demo_weights import Geometry
from tools.demo_model import losses
from tools.demo_model.batch import MASKED, PREFIX_TOKENS, Batch, draw_batch, draw_patches
from tools.demo_model.model import DemoLlava
from tools.demo_model.muon import Muon
from tools.demo_model.tokenizer import special_ids

GEOMETRY = Geometry(
    image_size=IMAGE_PX,
    patch_size=PATCH_PX,
    hidden_size=160,
    num_layers=12,
    num_heads=5,
    vision_hidden=128,
    vision_layers=7,
    vision_heads=4,
)
# Random streams of the stages; held-out questions have stream 2.
_STREAMS = {"vision": 0, "answers": 1, "practice": 3, "withdrawal": 4}
_ALL = ("model", "patch", "phrase", "late", "claim")
_TRAINED = {
    "vision": ("model.vision", "patch"),
    "answers": ("model", "patch", "phrase"),
    "practice": _ALL,
    "withdrawal": _ALL,
}
STATE_FILE, LOG_FILE = "state.pt", "training.jsonl"


@dataclass(frozen=True)
class TrainingStage:
    """`steps` of `images` each. `rate` is AdamW's learning rate; Muon's is 20 times as high."""

    name: str
    steps: int
    images: int
    rate: float = 1e-3
    vision_rate: float = 1.0
    """Factor on `rate` for the vision tower."""
    mix: str = "even"
    """Key of `MIXES`."""
    warmup: int = 50
    steady: float = 0.5
    """Share of the stage after which the rate falls linearly to 0."""
    withdrawn: float = 0.0
    """Share of images that are withdrawn from some layer on."""

    def rate_at(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        left = (1 - step / self.steps) / (1 - self.steady) if self.steady < 1 else 1.0
        return self.rate * min(1.0, (step + 1) / self.warmup, left)


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on."""

    seed: int = 0
    vision: TrainingStage = TrainingStage("vision", steps=900, images=32)
    answers: TrainingStage = TrainingStage("answers", steps=600, images=16, vision_rate=0.1, steady=1.0)
    practice: TrainingStage = TrainingStage(
        "practice", steps=1200, images=16, vision_rate=0.1, mix="hard", warmup=10, steady=0.1
    )
    withdrawal: TrainingStage = TrainingStage(
        "withdrawal", 600, images=16, rate=5e-4, vision_rate=0.1, mix="long", warmup=10, steady=0.1, withdrawn=0.75
    )
    geometry: Geometry = field(default=GEOMETRY)
    text_tokens: int = 192
    phrase_layer: int = 5
    """Layer whose output must tell what a phrase refers to."""
    early_layer: int = 8
    """Layer whose output must tell answers, and from `practice` on counts and sides; the first to withdraw at."""
    claim_layer: int = 10
    """Layer whose output must tell, from `practice` on, whether a claim about two objects holds."""


_OF_PHRASES = ("cell", "shape", "color", "size", "count")
_LATER = ("count", "across", "along")


def _subset(classes: Mapping[str, int], names: tuple[str, ...]) -> dict[str, int]:
    return {name: classes[name] for name in names}


class Trainer:
    """One training run in a directory; starting again with the same directory continues it bit for bit."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, compile_blocks: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.device = recipe, folder, device
        geometry = recipe.geometry
        self.model = DemoLlava(geometry, special_ids().vocab_size)
        self.patch_heads = losses.ClassHeads(geometry.vision_hidden, LABELS)
        self.phrase_heads = losses.ClassHeads(geometry.hidden_size, _subset(REFERENTS, _OF_PHRASES))
        self.late_heads = losses.ClassHeads(geometry.hidden_size, _subset(REFERENTS, _LATER))
        self.claim_heads = losses.ClassHeads(geometry.hidden_size, _subset(REFERENTS, ("holds",)))
        heads = {"patch": self.patch_heads, "phrase": self.phrase_heads}
        heads |= {"late": self.late_heads, "claim": self.claim_heads}
        self.modules = nn.ModuleDict({"model": self.model, **heads})
        self.modules.to(device)
        if compile_blocks:
            for block in (*self.model.vision.layers, *self.model.decoder.layers):
                block.compile()
        self.stage, self.step = recipe.vision, 0
        self.optimizers = self._make_optimizers()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE_FILE).exists():
            self._load()

    def run(self, save_every_s: float = 180, log_every: int = 20) -> None:
        """Trains to the end of the recipe, with a progress bar, and saves the state regularly."""
        recipe = self.recipe
        stages = (recipe.vision, recipe.answers, recipe.practice, recipe.withdrawal)
        for stage in stages[[stage.name for stage in stages].index(self.stage.name) :]:
            if stage.name != self.stage.name:
                self.stage, self.step = stage, 0
                self.optimizers = self._make_optimizers()
            self._run_stage(save_every_s, log_every)
        self.save()

    def _run_stage(self, save_every_s: float, log_every: int) -> None:
        seen: dict[str, list[Tensor]] = defaultdict(list)
        started = saved = time.monotonic()
        bar = tqdm(total=self.stage.steps, initial=self.step, desc=self.stage.name, unit="step", mininterval=2)
        while self.step < self.stage.steps:
            for name, value in self.train_step().items():
                seen[name].append(value)
            bar.update()
            if self.step % log_every == 0 or self.step == self.stage.steps:
                means = {name: round(float(torch.stack(values).nanmean()), 4) for name, values in seen.items()}
                self._log({"seconds": round(time.monotonic() - started, 1)} | means)
                bar.set_postfix(loss=means["loss"])
                seen.clear()
            if time.monotonic() - saved > save_every_s:
                self.save()
                saved = time.monotonic()
        bar.close()

    def train_step(self) -> dict[str, Tensor]:
        """One update; returns the losses and accuracies. Its data depend on seed, stage and step only."""
        rng = np.random.default_rng((self.recipe.seed, _STREAMS[self.stage.name], self.step))
        rate = self.stage.rate_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        measure = self._patches if self.stage.name == "vision" else self._answers
        with self._autocast():
            loss, measured = measure(rng)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return measured

    def _patches(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, labels = (tensor.to(self.device) for tensor in draw_patches(rng, self.stage.images))
        loss, right = losses.patch_loss(self.patch_heads, self.model.vision(pixels), labels)
        return loss, {"loss": loss.detach()} | right

    def _answers(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, batch = self.recipe, self._draw(rng)
        features = self.model.vision(batch.pixels)
        patch, patch_right = losses.patch_loss(self.patch_heads, features, batch.labels)
        last = recipe.geometry.num_layers
        read = {recipe.phrase_layer, recipe.early_layer, recipe.claim_layer, last}
        hidden = forward(self.model, features, batch, read, self._seen_layers(rng))
        phrase, phrase_right = losses.referent_loss(
            self.phrase_heads, hidden[recipe.phrase_layer], batch.text.referents
        )
        logits = self.model.logits(hidden[last])
        answer = losses.answer_loss(logits, batch.text.targets)
        early = losses.answer_loss(self.model.logits(hidden[recipe.early_layer]), batch.text.targets)
        parts = {"loss": answer, "early": early, "phrase": phrase, "patch": patch}
        right = losses.answers_right(logits.detach(), batch) | phrase_right | patch_right
        total = answer + 0.3 * early + 0.3 * phrase + 0.2 * patch
        if "claim" in _TRAINED[self.stage.name]:
            for name, heads, layer in (
                ("late", self.late_heads, recipe.early_layer),
                ("claim", self.claim_heads, recipe.claim_layer),
            ):
                part, part_right = losses.referent_loss(heads, hidden[layer], batch.text.referents, name)
                total, parts[name], right = total + 0.3 * part, part, right | part_right
        return total, {name: part.detach() for name, part in parts.items()} | right

    def _draw(self, rng: np.random.Generator) -> Batch:
        return draw_batch(rng, self.stage.images, self.recipe.text_tokens, self.stage.mix).to(self.device)

    def _seen_layers(self, rng: np.random.Generator) -> Tensor | None:
        """(images,) number of layers in which the text sees its image; None: all layers for all images."""
        if not self.stage.withdrawn:
            return None
        layers = self.recipe.geometry.num_layers
        some = rng.integers(self.recipe.early_layer, layers, self.stage.images)
        withdrawn = rng.random(self.stage.images) < self.stage.withdrawn
        return torch.from_numpy(np.where(withdrawn, some, layers)).to(self.device)

    def _make_optimizers(self) -> tuple[Optimizer, ...]:
        """Muon for the matrices inside layers, AdamW for the other parameters that the stage trains."""
        trained = _TRAINED[self.stage.name]
        matrices: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
        others: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
        for name, param in self.modules.named_parameters():
            if not any(name.startswith(f"{part}.") for part in trained):
                continue
            factor = self.stage.vision_rate if name.startswith(("model.vision", "patch")) else 1.0
            if ".layers." in name and param.dim() == 2:
                matrices[tuple(param.shape), factor].append(param)
            else:
                others[param.dim() > 1, factor].append(param)
        muon = Muon([{"params": params, "factor": 20 * factor} for (_, factor), params in matrices.items()])
        adam = AdamW(
            [
                {"params": params, "factor": factor, "weight_decay": 0.05 if decays else 0.0}
                for (decays, factor), params in others.items()
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        return muon, adam

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def save(self) -> None:
        """Writes the state atomically."""
        state = {
            "seed": self.recipe.seed,
            "stage": self.stage.name,
            "step": self.step,
            "log_bytes": log.stat().st_size if (log := self.folder / LOG_FILE).exists() else 0,
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.folder / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE_FILE)

    def _load(self) -> None:
        state = torch.load(self.folder / STATE_FILE, map_location=self.device)
        if state["seed"] != self.recipe.seed:
            raise ValueError(
                f"{self.folder} holds a run with seed {state['seed']}, and {self.recipe.seed} was asked for: "
                "give that seed to continue it, or another directory"
            )
        self.stage, self.step = getattr(self.recipe, state["stage"]), state["step"]
        self.modules.load_state_dict(state["modules"])
        self.optimizers = self._make_optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["log_bytes"]:
            os.truncate(self.folder / LOG_FILE, state["log_bytes"])  # later steps are done, and logged, again

    def _log(self, entry: dict[str, float]) -> None:
        line = {"stage": self.stage.name, "step": self.step} | entry
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(
                json.dumps({k: v for k, v in line.items() if not (isinstance(v, float) and math.isnan(v))}) + "\n"
            )


def forward(
    model: DemoLlava, features: Tensor, batch: Batch, read: set[int], seen_layers: Tensor | None = None
) -> dict[int, Tensor]:
    """`DemoLlava.hidden_states` of the batch's text, with the vision tokens in the batch's order.

    `seen_layers`, (batch,), is the number of layers in which the text sees the image; None: all. This is withdrawal as
    in VTW, sec. 3.3: the text keeps its positions.
    """
    special = special_ids()
    prefix = torch.tensor([special.bos, special.user], device=features.device)
    shuffled = features.gather(1, batch.order[..., None].expand_as(features))
    before_text = PREFIX_TOKENS + features.shape[1]
    mask = batch.text.mask(before_text)
    masks = [mask] * model.geometry.num_layers
    if seen_layers is not None:
        blind = mask.clone()
        blind[..., PREFIX_TOKENS:before_text] = MASKED
        sees = seen_layers[:, None, None, None]
        masks = [torch.where(sees > layer, mask, blind) for layer in range(len(masks))]
    return model.hidden_states(prefix, shuffled, batch.text.ids, batch.positions(), masks, read)
