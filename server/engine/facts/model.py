"""The served model, as foldserve sees it."""

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
    """The served model. `family` and all facts about images are None for a model that is not reduced."""

    name: str
    architecture: str
    decoder: str
    layers: int
    family: str | None
    unit: str  # "image"; "frame" for a model that takes no images
    image_tokens: int | None  # of the largest image
    images_per_call: int | None  # of the largest size, that the tower encodes at a time
    encoder_cache_rows: int | None  # embeddings that the encoder cache holds
    encoder_row_bytes: int | None  # of one embedding, with its position columns if the engine can keep positions
    keeps_positions: bool
    withdraw_layer: int | None  # K
    can_withdraw: bool  # the decoder supports `--withdraw-layer`


def model_facts(config: VllmConfig) -> ModelFacts:
    """Processes a dummy image of a model that is reduced."""
    model = config.model_config
    family, decoder = family_of(model), decoder_class(config)
    budget = None if family is None else encoder_budget(config)
    keeps_positions = family is not None and positions.position_limit(config) is not None
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
