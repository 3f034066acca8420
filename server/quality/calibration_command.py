"""`foldserve calibrate` from its arguments to the files it writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from foldserve.server.quality.calibration import calibrate, candidate_layers, report
from foldserve.server.quality.calibration_data import load_samples
from foldserve.server.quality.calibration_file import default_file
from foldserve.server.quality.calibration_options import CalibrationOptions
from foldserve.server.quality.calibration_plot import can_plot, plot

_SAMPLES = 20


def run(options: CalibrationOptions, cache_dir: Path, engine_options: Sequence[str]) -> int:
    """Calibrates and writes the file and the plot. Returns the exit status: 1 if no layer was found."""
    if options.plot is not None and not can_plot():
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    samples = load_samples(options.data, options.samples or _SAMPLES, options.question)
    output = options.output or default_file(options.model, cache_dir)
    _require_writable(output)
    picture = options.plot or output.with_suffix(".png")
    _require_writable(picture)
    if output == picture:
        raise ValueError(f"the calibration and its plot can't both be {output}")

    from foldserve.server.quality.engine.kl_probe import KLProbe  # vLLM, which takes seconds

    probe = KLProbe(options.model, engine_options)
    candidates = candidate_layers(probe.layers, options.min_layer, probe.first_layer)
    print(f"Looking at K = {candidates[0]}..{candidates[-1]} of {probe.layers} layers on {len(samples)} samples.")
    calibration = calibrate(probe, samples, candidates, options.eta, options.answer_tokens)

    calibration.write(output)
    print(f"{report(calibration)}\nWritten to {output}", end="")
    if can_plot():
        plot(calibration, picture)
        print(f" and {picture}.")
    else:
        print("; not drawn, since matplotlib is not installed.")
    if calibration.withdraw_layer is None:
        return 1
    place = "" if options.output is None else f" --calibration {output}"
    print(f"Serve with it: foldserve serve {options.model} --withdraw-layer auto{place}")
    return 0


def _require_writable(file: Path) -> None:
    """Raises ValueError before the work is done rather than after it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} can't be written: name another file with --output and --plot")
