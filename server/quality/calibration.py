"""`foldserve calibrate`: finds the layer at which a model's vision tokens may be withdrawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from foldserve.server.quality.calibration_data import Sample
from foldserve.server.quality.calibration_file import Calibration, model_folder, model_hash
from foldserve.server.quality.calibration_search import first_layer_within, kl_divergence


class Probe(Protocol):
    """A model whose logits can be read; implemented by `KLProbe`."""

    model: str
    revision: str | None
    layers: int

    def start(self) -> None:
        """Loads the weights."""

    def logits(self, image: Image, question: str, candidates: range, answer_tokens: int) -> tuple[Tensor, Tensor]:
        """(tokens, vocab) of the answer's first tokens, and (len(candidates), tokens, vocab) if withdrawn at each K."""


def candidate_layers(layers: int, min_layer: int, first: int = 1) -> range:
    """The values of K to measure in a decoder of `layers` layers whose smallest K is `first`."""
    if not first <= min_layer < layers:
        raise ValueError(
            f"K runs from --min-layer to N-1, and with --min-layer {min_layer} there is none for the {layers} layers of"
            f" this model: give --min-layer from {first} to {layers - 1}"
        )
    return range(min_layer, layers)


def calibrate(
    probe: Probe, samples: Sequence[Sample], candidates: range, eta: float, answer_tokens: int = 1
) -> Calibration:
    """Loads the model and runs VTW's Algorithm 1, with a progress bar over the samples.

    Args:
        answer_tokens: number of answer tokens that the KL is averaged over. The paper takes 1, which says nothing about
            what a long answer still has to look at.

    Raises:
        ValueError: an unreadable image, or logits that are not finite.
    """
    from tqdm import tqdm  # comes with vLLM

    probe.start()
    identity = model_hash(model_folder(probe.model, probe.revision))  # by now downloaded
    bar = tqdm(samples, desc="foldserve calibrate", unit="sample")
    curves = [_curve(probe, sample, candidates, answer_tokens) for sample in bar]
    mean = torch.stack(curves).mean(0).tolist()
    kl = dict(zip(candidates, mean, strict=True))
    return Calibration(
        model=probe.model,
        model_hash=identity,
        layers=probe.layers,
        withdraw_layer=first_layer_within(kl, eta),
        eta=eta,
        samples=len(samples),
        answer_tokens=answer_tokens,
        kl=kl,
    )


def _curve(probe: Probe, sample: Sample, candidates: range, answer_tokens: int) -> Tensor:
    """(candidates,) KL in nats of one sample."""
    full, withdrawn = probe.logits(sample.open(), sample.question, candidates, answer_tokens)
    kl = kl_divergence(withdrawn, full).mean(-1)
    if not kl.isfinite().all():
        raise ValueError(f"the model's logits for {sample.image} are not finite: try --dtype float32 or bfloat16")
    return kl


def report(calibration: Calibration) -> str:
    """The curve and the layer found, as text for the terminal."""
    rows = [f"  K = {layer:3d}   {kl:.6f}" for layer, kl in calibration.kl.items()]
    tokens = (
        "first answer token" if calibration.answer_tokens == 1 else f"first {calibration.answer_tokens} answer tokens"
    )
    head = f"Mean KL(withdrawn || full) in nats of the {tokens}, over {calibration.samples} samples:"
    if calibration.withdraw_layer is None:
        end = f"No K has {calibration.eta:g} or less: there is no layer at which to withdraw."
    else:
        end = f"K = {calibration.withdraw_layer} is the first with {calibration.eta:g} or less."
    return "\n".join([head, *rows, end])
