"""What is served."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig

from foldserve.server.engine import positions
from foldserve.server.engine.encoder_budget import profiled_images
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.withdrawal.config import DECODERS, decoder_class, withdraw_layer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is served.

    Attributes:
        family: of foldserve; None for a model that is not reduced, which has None in `image_tokens` and
            `images_per_call` too.
        image_tokens: of the largest image.
        images_per_call: that the vision tower takes at once, as start-up profiles.
        withdraw_layer: K, or None without withdrawal.
        can_withdraw: the decoder takes `--withdraw-layer`.
    """

    name: str
    architecture: str
    decoder: str
    layers: int
    family: str | None
    image_tokens: int | None
    images_per_call: int | None
    keeps_positions: bool
    withdraw_layer: int | None
    can_withdraw: bool


def model_facts(config: VllmConfig) -> ModelFacts:
    """Processes a dummy image of a model that is reduced."""
    model = config.model_config
    family, decoder = family_of(model), decoder_class(config)
    return ModelFacts(
        name=model.model,
        architecture=model.architecture,
        decoder=decoder,
        layers=model.get_total_num_hidden_layers(),
        family=None if family is None else type(family).__module__.rpartition(".")[2],
        image_tokens=None if family is None else family.largest.tokens,
        images_per_call=None if family is None else profiled_images(config),
        keeps_positions=family is not None and positions.limit(config) is not None,
        withdraw_layer=withdraw_layer(config),
        can_withdraw=family is not None and decoder in DECODERS.values(),
    )
