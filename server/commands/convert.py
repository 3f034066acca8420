"""`foldserve convert`."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

from foldserve.server.commands.parser import declare
from foldserve.server.options import option, positional

_DESCRIPTION = """\
Writes a checkpoint of {kind} in the authors' layout in the one that `foldserve serve` reads. SRC and DIR are local
directories; DST is new. Needs memory for one file of 2 GB, and as much disk as the checkpoint.
"""


@dataclass(frozen=True, slots=True)
class StfOptions:
    source: Path = positional("SRC", "the authors' checkpoint")
    target: Path = positional("DST", "a directory that does not exist yet")
    vision_tower: Path | None = option(None, "DIR", "the CLIP model, where SRC does not hold the vision tower")
    layers: tuple[int, ...] = option(
        (23, 21, 18, 15, 12, 9, 6, 3),
        "N,N,...",
        "hidden states that are fused, deepest first",
        expected="numbers with commas between them",
    )
    experts: int = option(1, "E", "tokens per window")


@dataclass(frozen=True, slots=True)
class MmvpOptions:
    source: Path = positional("SRC", "the authors' checkpoint")
    dino: Path = positional("DINO", "the DINOv2 that it was trained with, as transformers has it")
    target: Path = positional("DST", "a directory that does not exist yet")
    vision_tower: Path | None = option(None, "DIR", "the CLIP model, where SRC does not hold the vision tower")


def add(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    stf = kinds.add_parser("stf", help="LLaVA-STF: vision tokens fused by a trained projector")
    declare(stf, StfOptions, _run_stf, _DESCRIPTION.format(kind="LLaVA-STF"))
    mmvp = kinds.add_parser("mmvp", help="MMVP's LLaVA: the tokens of CLIP and DINOv2 take turns")
    declare(mmvp, MmvpOptions, _run_mmvp, _DESCRIPTION.format(kind="MMVP's LLaVA"))


def _run_stf(options: StfOptions, rest: list[str]) -> None:
    from foldserve.server.convert import stf

    path = stf.convert(
        options.source,
        options.target,
        vision_tower=options.vision_tower,
        layers=options.layers,
        experts=options.experts,
    )
    _say(path)


def _run_mmvp(options: MmvpOptions, rest: list[str]) -> None:
    from foldserve.server.convert import mmvp

    _say(mmvp.convert(options.source, options.dino, options.target, vision_tower=options.vision_tower))


def _say(path: Path) -> None:
    print(f"Wrote {path}.\nServe it: foldserve serve {path}")
