"""`python -m tools.demo_model DIR`: trains the demo model anew."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tools.demo_model.export import export
from tools.demo_model.training import Recipe, Trainer

_DESCRIPTION = """\
Trains the demo model from nothing, in about 80 minutes on two CPU cores or some minutes on a GPU.

DIR gets the training's state every few minutes, its log, and in the end the checkpoint in DIR/checkpoint. The same
command on the same DIR continues where it was stopped. docs/explanation/demo-model.md says what is trained on what.
"""


def main(argv: Sequence[str] | None = None) -> None:
    train = argparse.ArgumentParser(
        "python -m tools.demo_model", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument("directory", type=Path, metavar="DIR", help="where state, log and checkpoint go")
    train.add_argument("--seed", type=int, default=0, help="other scenes and weights for each (default: %(default)s)")
    train.add_argument("--vision-steps", type=_positive, metavar="N", help="updates of the vision tower alone")
    train.add_argument("--answer-steps", type=_positive, metavar="N", help="updates of the whole model")
    train.add_argument("--practice-steps", type=_positive, metavar="N", help="updates on mostly hard questions")
    train.add_argument("--withdrawal-steps", type=_positive, metavar="N", help="updates with images withdrawn")
    train.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    args = train.parse_args(argv)
    recipe = Recipe(seed=args.seed)
    for name, steps in (
        ("vision", args.vision_steps),
        ("answers", args.answer_steps),
        ("practice", args.practice_steps),
        ("withdrawal", args.withdrawal_steps),
    ):
        if steps:
            recipe = replace(recipe, **{name: replace(getattr(recipe, name), steps=steps)})
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compiles = device.type == "cuda" or shutil.which("g++") is not None  # half the time per step, after a minute
    try:
        trainer = Trainer(recipe, args.directory, device, compiles)
    except ValueError as error:
        train.error(str(error))
    trainer.run()
    checkpoint = args.directory / "checkpoint"
    export(trainer.model, checkpoint)
    print(f"Wrote {checkpoint}. Serve it: foldserve serve {checkpoint}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    main()
