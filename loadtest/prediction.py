"""What the arithmetic allows: FLOPs and KV bytes of a request, from the checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig


@dataclass(frozen=True, slots=True)
class Request:
    """Mean tokens of a request.

    Attributes:
        encoded, kept, withdrawn: vision tokens that the tower gives, that reach the decoder, that leave it at K.
        text: other tokens of the prompt.
        output: of the answer.
    """

    encoded: float
    kept: float
    withdrawn: float
    text: float
    output: float


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A LLaVA-like model: a ViT, an MLP projector and a Llama-like decoder.

    Attributes:
        hidden, mlp, layers, kv: of the decoder; `kv` is the width of its keys, and of its values.
        vision_hidden, vision_mlp, vision_layers: of the tower, up to the layer whose features are taken.
        withdraw_layer: K, or None.
        tile: tokens that attend to each other in the tower; None: all of an image.
    """

    hidden: int
    mlp: int
    layers: int
    kv: int
    vision_hidden: int
    vision_mlp: int
    vision_layers: int
    withdraw_layer: int | None = None
    tile: int | None = None

    def flops(self, request: Request) -> float:
        """Encoder, projector, prefill and decode steps of one request, without the output head."""
        n, dv = request.encoded, self.vision_hidden
        tower = self.vision_layers * (n * (8 * dv * dv + 4 * dv * self.vision_mlp) + 4 * n * (self.tile or n) * dv)
        projector = request.kept * 2 * (dv * self.hidden + self.hidden * self.hidden)
        shallow = request.text + request.kept
        return tower + projector + self._decoder(shallow, shallow - request.withdrawn, request.output)

    def kv_elements(self, request: Request) -> float:
        """Keys and values that a request holds halfway through its answer, in numbers."""
        shallow = request.text + request.kept + request.output / 2
        first, last = self._split()
        return 2 * self.kv * (first * shallow + last * (shallow - request.withdrawn))

    def _split(self) -> tuple[int, int]:
        """Layers before K, and from K on."""
        first = self.layers if self.withdraw_layer is None else self.withdraw_layer
        return first, self.layers - first

    def _decoder(self, shallow: float, deep: float, output: float) -> float:
        """Tokens that leave at K need of layer K-1 its attention only; where iLLaVA merges them, they go through it."""
        first, last = self._split()
        unread = (shallow - deep) * self.hidden * (2 * self.hidden + 6 * self.mlp)
        return first * self._layer(shallow, output) - unread + last * self._layer(deep, output)

    def _layer(self, prompt: float, output: float) -> float:
        """One decoder layer over a prompt and the tokens after it: each but the last of the answer is a step."""
        steps = max(output - 1, 0)
        s, d = prompt + steps, self.hidden
        linear = s * (4 * d * d + 4 * d * self.kv + 6 * d * self.mlp)
        return linear + 2 * s * s * d  # causal: half of 4 s^2 d


def read_shape(checkpoint: Path | str, withdraw_layer: int | None) -> ModelShape | None:
    """The shape of a checkpoint, a directory or a Hugging Face name; None where its config names other things.

    transformers reads it, since a config may leave out what its model type has by default: LLaVA-1.5's does.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        text, vision = config.get_text_config(), config.vision_config
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        layer = getattr(config, "vision_feature_layer", -1)
        return ModelShape(
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            layers=text.num_hidden_layers,
            kv=head * (getattr(text, "num_key_value_heads", None) or heads),
            vision_hidden=vision.hidden_size,
            vision_mlp=vision.intermediate_size,
            vision_layers=vision.num_hidden_layers + 1 + layer if layer < 0 else layer,
            withdraw_layer=withdraw_layer,
            tile=(vision.image_size // vision.patch_size) ** 2,
        )
    except (OSError, AttributeError, TypeError, ValueError):
        return None
