"""FLOPs and KV elements of a request, from the checkpoint's config: the speed-up that reduction can reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True, slots=True)
class MeanRequest:
    """Mean numbers of tokens per request.

    Attributes:
        encoded: vision tokens before reduction.
        kept: vision tokens that reach the decoder.
        withdrawn: those of them that leave it at layer K.
        text: other prompt tokens.
        output: answer tokens.
    """

    encoded: float
    kept: float
    withdrawn: float
    text: float
    output: float


@dataclass(frozen=True, slots=True)
class QwenTower:
    """The vision tower of a Qwen-VL model, which merges several patches into a token.

    Attributes:
        matrices: in the MLP of a layer: two, or three with a gate.
        patches: per token.
        windowed: number of layers with window attention.
        window: patches per window.
        mergers: number of them: one, and one per deepstack level.
        out: width of the decoder.
    """

    hidden: int
    mlp: int
    layers: int
    matrices: int
    patches: int
    windowed: int
    window: int
    mergers: int
    out: int

    def flops(self, tokens: float) -> float:
        """FLOPs for an image that has `tokens` tokens before reduction."""
        n, d, wide = tokens * self.patches, self.hidden, self.hidden * self.patches
        linear = self.layers * n * (8 * d * d + 2 * self.matrices * d * self.mlp)
        attention = 4 * n * d * ((self.layers - self.windowed) * n + self.windowed * min(self.window, n))
        return linear + attention + self.mergers * tokens * 2 * (wide * wide + wide * self.out)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A LLaVA-like model: a ViT, an MLP projector and a Llama-like decoder.

    Attributes:
        hidden, mlp, layers: of the decoder.
        kv: width of the decoder's keys, and of its values.
        vision_layers: up to the layer whose features are taken.
        withdraw_layer: K, or None.
        tile: tokens that attend to each other in the tower; None: all of an image.
        queries: width of the decoder's queries; None: `hidden`.
        qwen: replaces ViT and projector, whose attributes are then meaningless.
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
    queries: int | None = None
    qwen: QwenTower | None = None

    def flops(self, request: MeanRequest) -> float:
        """FLOPs of one request: tower, projector, prefill and decode steps, without the output head."""
        shallow = request.text + request.kept
        return self._vision(request) + self._decoder(shallow, shallow - request.withdrawn, request.output)

    def _vision(self, request: MeanRequest) -> float:
        if self.qwen is not None:
            return self.qwen.flops(request.encoded)
        n, dv = request.encoded, self.vision_hidden
        tower = self.vision_layers * (n * (8 * dv * dv + 4 * dv * self.vision_mlp) + 4 * n * (self.tile or n) * dv)
        return tower + request.kept * 2 * (dv * self.hidden + self.hidden * self.hidden)

    def kv_elements(self, request: MeanRequest) -> float:
        """Elements of keys and values that a request holds halfway through its answer."""
        shallow = request.text + request.kept + request.output / 2
        first, last = self._split()
        return 2 * self.kv * (first * shallow + last * (shallow - request.withdrawn))

    def _split(self) -> tuple[int, int]:
        """(layers before K, layers from K on)."""
        first = self.layers if self.withdraw_layer is None else self.withdraw_layer
        return first, self.layers - first

    def _decoder(self, shallow: float, deep: float, output: float) -> float:
        """FLOPs of the decoder. Tokens that leave at K count in layer K-1 for its attention only, iLLaVA's too."""
        first, last = self._split()
        unread = (shallow - deep) * self.hidden * (2 * (self.queries or self.hidden) + 6 * self.mlp)
        return first * self._layer(shallow, output) - unread + last * self._layer(deep, output)

    def _layer(self, prompt: float, output: float) -> float:
        """FLOPs of one decoder layer over a prompt and the decode steps after it, one less than output tokens."""
        steps = max(output - 1, 0)
        s, d, q = prompt + steps, self.hidden, self.queries or self.hidden
        linear = s * (4 * d * q + 4 * d * self.kv + 6 * d * self.mlp)
        return linear + 2 * s * s * q  # causal: half of 4 s^2 q


def read_shape(checkpoint: Path | str, withdraw_layer: int | None) -> ModelShape | None:
    """The shape of a checkpoint (a directory or Hugging Face name); None if the formulas don't fit its architecture.

    transformers reads the config, since it may leave out defaults of its model type, as LLaVA-1.5's does.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        text, vision = config.get_text_config(), config.vision_config
        if "linear_attention" in (getattr(text, "layer_types", None) or ()) or hasattr(config, "dino_config"):
            return None
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        layer = getattr(config, "vision_feature_layer", -1)
        decoder = ModelShape(
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            layers=text.num_hidden_layers,
            kv=head * (getattr(text, "num_key_value_heads", None) or heads),
            queries=None if head * heads == text.hidden_size else head * heads,
            vision_hidden=0,
            vision_mlp=0,
            vision_layers=0,
            withdraw_layer=withdraw_layer,
        )
        if hasattr(vision, "spatial_merge_size"):
            return replace(decoder, qwen=_qwen_tower(vision, text.hidden_size))
        return replace(
            decoder,
            vision_hidden=vision.hidden_size,
            vision_mlp=vision.intermediate_size,
            vision_layers=vision.num_hidden_layers + 1 + layer if layer < 0 else layer,
            tile=(vision.image_size // vision.patch_size) ** 2,
        )
    except (OSError, AttributeError, TypeError, ValueError):
        return None


def _qwen_tower(vision: PretrainedConfig, out: int) -> QwenTower:
    whole = getattr(vision, "fullatt_block_indexes", None)  # Qwen2.5-VL's, whose MLP has a gate
    hidden = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the decoder's
    return QwenTower(
        hidden=hidden,
        mlp=vision.intermediate_size if hasattr(vision, "intermediate_size") else hidden * vision.mlp_ratio,
        layers=vision.depth,
        matrices=2 if whole is None else 3,
        patches=vision.spatial_merge_size**2,
        windowed=0 if whole is None else vision.depth - len(whole),
        window=0 if whole is None else (vision.window_size // vision.patch_size) ** 2,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        out=out,
    )
