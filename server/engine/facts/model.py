"""What is served."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import ModelConfig, VllmConfig

from foldserve.server.engine import positions
from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Family
from foldserve.server.engine.withdrawal.config import DECODERS, decoder_class, withdraw_layer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is served.

    Attributes:
        family: of foldserve; None for a model that is not reduced, which has None in all that is said of images too.
        unit: what is counted, images or, of a model that takes none, frames of videos.
        image_tokens: of the largest image.
        images_per_call: of the largest size, that the vision tower takes at once, as start-up profiles.
        encoder_cache_rows: embeddings that the encoder cache holds.
        encoder_row_bytes: of one of them; columns with its position included, where it can keep one.
        withdraw_layer: K, or None without withdrawal.
        can_withdraw: the decoder takes `--withdraw-layer`.
    """

    name: str
    architecture: str
    decoder: str
    layers: int
    family: str | None
    unit: str
    image_tokens: int | None
    images_per_call: int | None
    encoder_cache_rows: int | None
    encoder_row_bytes: int | None
    keeps_positions: bool
    withdraw_layer: int | None
    can_withdraw: bool


def model_facts(config: VllmConfig) -> ModelFacts:
    """Processes a dummy image of a model that is reduced."""
    model = config.model_config
    family, decoder = family_of(model), decoder_class(config)
    budget = None if family is None else encoder_budget(config)
    keeps_positions = family is not None and positions.limit(config) is not None
    return ModelFacts(
        name=model.model,
        architecture=model.architecture,
        decoder=decoder,
        layers=model.get_total_num_hidden_layers(),
        family=None if family is None else type(family).__module__.rpartition(".")[2],
        unit="image" if family is None else family.unit,
        image_tokens=None if family is None else family.largest.tokens,
        images_per_call=None if budget is None else budget.images,
        encoder_cache_rows=None if budget is None else budget.cache_rows,
        encoder_row_bytes=None if family is None else _row_bytes(family, model, keeps_positions),
        keeps_positions=keeps_positions,
        withdraw_layer=withdraw_layer(config),
        can_withdraw=family is not None and decoder in DECODERS.values(),
    )


def _row_bytes(family: Family, model: ModelConfig, keeps_positions: bool) -> int:
    columns = family.row_width(model) + (positions.COLUMNS if keeps_positions else 0)
    return columns * model.dtype.itemsize
