"""`foldserve train-demo`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from foldserve.server.commands.arguments import Commands

_DESCRIPTION = """\
Trains the demo model from nothing, in about 80 minutes on two CPU cores or some minutes on a GPU.

DIR gets the training's state every few minutes, its log, and in the end the checkpoint in DIR/checkpoint. The same
command on the same DIR continues where it was stopped. docs/demo-model.md says what is trained on what.
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    train = commands.add_parser(
        "train-demo",
        help="train the demo model anew",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("directory", type=Path, metavar="DIR", help="where state, log and checkpoint go")
    train.add_argument("--seed", type=int, default=0, help="other scenes and weights for each (default: %(default)s)")
    train.add_argument("--vision-steps", type=_positive, metavar="N", help="updates of the vision tower alone")
    train.add_argument("--answer-steps", type=_positive, metavar="N", help="updates of the whole model")
    train.add_argument("--practice-steps", type=_positive, metavar="N", help="updates on mostly hard questions")
    train.add_argument("--withdrawal-steps", type=_positive, metavar="N", help="updates with images withdrawn")
    train.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    train.set_defaults(run=_run, fail=train.error)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from dataclasses import replace

    import torch

    from foldserve.server.quality.demo.export import export
    from foldserve.server.quality.demo.training import Recipe, Trainer

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
        args.fail(str(error))
    trainer.run()
    checkpoint = args.directory / "checkpoint"
    export(trainer.model, checkpoint)
    print(f"Wrote {checkpoint}. Serve it: foldserve serve {checkpoint}")
