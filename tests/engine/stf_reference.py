"""LLaVA-STF in plain PyTorch, on the authors' own checkpoint: nothing of the converter or of `reducers/stf.py`."""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from foldserve.reducers.folder import folder
from foldserve.reducers.item import ItemPlan
from foldserve.reducers.plan import VisionGeometry
from tests import stf_checkpoint
from tests.engine.withdrawal.reference import WithdrawingReference

_TOWER = "model.vision_tower.vision_tower.vision_model."
_FUSION, _OUTPUT = "model.mm_projector_crosslayer", "model.mm_projector"


class StfReference(WithdrawingReference):
    """Modifications to the reference: tower, projector and decoder of a checkpoint of `stf_checkpoint.write`.

    Args:
        source: the checkpoint.
        converted: the same one converted, for its tokenizer and image processor.
        kernel: k.
        experts: E.
        layer: first decoder layer without withdrawn tokens.
    """

    def __init__(self, source: Path, converted: Path, *, kernel: int = 2, experts: int = 1, layer: int = 1) -> None:
        self.processor = AutoProcessor.from_pretrained(converted)
        self.kernel, self.experts, self.layer = kernel, experts, layer
        self.weights: dict[str, Tensor] = torch.load(source / "pytorch_model.bin", weights_only=True)
        position_ids = self.weights.pop(f"{_TOWER}embeddings.position_ids")
        self.side = isqrt(position_ids.shape[1] - 1)
        self.geometry = VisionGeometry((self.side // kernel) ** 2 * experts, projector="stf")
        self.config = SimpleNamespace(image_token_index=stf_checkpoint.VOCABULARY)
        self.clip = self._clip()
        self.model = self._decoder(json.loads((source / "config.json").read_text()))

    def image_features(self, image: Image.Image, plan: ItemPlan) -> Tensor:
        """Projected vision tokens (plan.kept, hidden)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        states = self.clip(pixels, output_hidden_states=True).hidden_states
        fused = torch.cat([states[i][:, 1:] for i in stf_checkpoint.LAYERS], dim=-1)
        fused = self._linear(f"{_FUSION}.2", F.gelu(self._linear(f"{_FUSION}.0", fused)))
        tokens = self._linear(f"{_OUTPUT}.2", F.gelu(self._windows(fused)))
        return folder(tokens, plan.grids[0].folds).tokens[0] if plan.removed else tokens[0]

    def _windows(self, fused: Tensor) -> Tensor:
        """Space-to-depth and the linear layer after it, as one convolution for each expert's channels."""
        grid = fused.mT.reshape(1, -1, self.side, self.side)  # (1, C, side, side)
        weight, bias = self.weights[f"{_OUTPUT}.0.weight"], self.weights[f"{_OUTPUT}.0.bias"]
        weight = weight.view(len(weight), -1, self.kernel, self.kernel)
        each = [F.conv2d(share, weight, bias, stride=self.kernel) for share in grid.chunk(self.experts, dim=1)]
        return torch.stack(each, dim=-1).flatten(2, 4).mT  # (1, windows * E, 16 C)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _clip(self) -> Any:
        config = CLIPVisionConfig(**stf_checkpoint.tower_config(14 * self.side))
        tower = CLIPVisionModel(config).eval()
        weights = {n.removeprefix(_TOWER): x for n, x in self.weights.items() if n.startswith(_TOWER)}
        tower.load_state_dict(weights)
        return tower

    def _decoder(self, config: dict[str, Any]) -> Any:
        """The parts of a LLaVA that the base class uses; the head has the converter's 64 rows more, their mean."""
        taken = LlamaConfig(**{name: config[name] for name in config if name in LlamaConfig().to_dict()})
        llama = LlamaForCausalLM(taken).eval()
        ours = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
        weights = {name: x for name, x in self.weights.items() if name.startswith(ours)}
        llama.load_state_dict({name: x for name, x in weights.items() if not name.endswith("inv_freq")})
        head = weights["lm_head.weight"]
        head = torch.cat([head, head.mean(0, keepdim=True).expand(64, -1)])
        last = stf_checkpoint.VOCABULARY - 1
        return SimpleNamespace(
            model=SimpleNamespace(language_model=llama.model),
            lm_head=lambda hidden: F.linear(hidden, head),
            get_input_embeddings=lambda: lambda ids: llama.model.embed_tokens(ids.clamp(max=last)),
        )
