"""The report for people: problems, then the model, its memory, the engine, the machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from foldserve.server.api.doctor.report import DoctorReport
from foldserve.server.api.sizes import size
from foldserve.server.engine.plugin import ALLOW_VLLM, is_release_vllm

if TYPE_CHECKING:  # they import vLLM, which may be missing
    from foldserve.server.api.doctor.machine import Machine
    from foldserve.server.api.doctor.versions import Versions
    from foldserve.server.engine.facts.choices import EngineFacts
    from foldserve.server.engine.facts.kv import KvFacts
    from foldserve.server.engine.facts.model import ModelFacts

_WIDTH = 108
_NAMES = 18  # columns for names

_PLATFORMS = {"cpu": "CPU", "cuda": "CUDA", "none": "none that vLLM can run on"}

Rows = Sequence[tuple[str, str]]


def table(report: DoctorReport) -> str:
    sections: list[tuple[str, Rows]] = []
    if report.model is not None:
        sections.append(("model", _model(report.model, report)))
    if report.kv is not None:
        sections.append(("KV cache", _kv(report.kv, "image" if report.model is None else report.model.unit)))
    if report.engine is not None:
        sections.append(("engine", [*_engine(report.engine), *_added_options(report.options_added)]))
    sections.append(("machine", machine_rows(report.machine) if report.machine else ()))
    sections.append(("versions", version_rows(report.versions, report.machine)))
    lines = [_verdict(report), *_problems(report)]
    for title, rows in sections:
        if rows:
            lines += ["", title, *(line for row in rows for line in _row(*row))]
    return "\n".join(lines)


def _verdict(report: DoctorReport) -> str:
    stopping = sum(problem.stops for problem in report.problems)
    warnings = len(report.problems) - stopping
    if stopping:
        also = f", {_count(warnings, 'warning')}" if warnings else ""
        return f"foldserve serve would not start here: {_count(stopping, 'problem')}{also}"
    return "foldserve serve would start here" + (f", with {_count(warnings, 'warning')}" if warnings else "")


def _problems(report: DoctorReport) -> Iterator[str]:
    for problem in sorted(report.problems, key=lambda problem: not problem.stops):
        mark = "  problem  " if problem.stops else "  warning  "
        yield from textwrap.wrap(
            problem.text, _WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False
        )


def _row(name: str, value: str) -> list[str]:
    start = f"  {name:<{_NAMES}}"
    return textwrap.wrap(
        value, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _model(model: ModelFacts, report: DoctorReport) -> Rows:
    rows = [
        ("name", _short_path(model.name)),
        ("architecture", f"{model.architecture}, decoder {model.decoder} with {model.layers} layers"),
    ]
    if model.family is None:
        return [*rows, ("reduction", "none: foldserve does not reduce this architecture")]
    return [
        *rows,
        ("reduction", f"family {model.family}, largest {model.unit} {model.image_tokens} tokens"),
        ("methods", ", ".join(report.methods)),
        ("positions", "renumber or keep" if model.keeps_positions else "renumber only"),
        ("withdrawal", _withdrawal(model, report.decoder_methods)),
        ("a tower call", f"{_count(model.images_per_call or 0, model.unit)} of the largest size at most"),
        ("encoder cache", _encoder_cache(model.encoder_cache_rows or 0, model.encoder_row_bytes or 0)),
    ]


def _withdrawal(model: ModelFacts, methods: Sequence[str]) -> str:
    if model.withdraw_layer is not None:
        return f"from layer K = {model.withdraw_layer} of {model.layers} on: {', '.join(methods)}"
    if model.can_withdraw:
        return f"off; --withdraw-layer 1 to {model.layers - 1} adds {', '.join(methods)}"
    return "off; the decoder does not take --withdraw-layer"


def _encoder_cache(rows: int, row_bytes: int) -> str:
    return f"{size(rows * row_bytes)}: {rows} embeddings of {size(row_bytes)}"


def _kv(kv: KvFacts, unit: str) -> Rows:
    of = f"{kv.sequence_tokens} tokens: one largest {unit} and {kv.text_tokens} of text"
    rows = [("a token", size(kv.token_bytes)), ("a sequence", f"{size(kv.sequence_bytes)}, {of}")]
    if kv.withdrawn_bytes is not None:
        share = kv.withdrawn_bytes / kv.sequence_bytes
        rows.append(
            ("  withdrawn", f"{size(kv.withdrawn_bytes)}, {share:.0%} of it: no layer from K on holds the {unit}")
        )
    rows.append(("groups", f"{_groups(kv)}; blocks of {kv.block_tokens} tokens"))
    if kv.pool_bytes is not None:
        withdrawn = "" if kv.withdrawn_sequences is None else f", {kv.withdrawn_sequences} withdrawn"
        rows.append(("pool", f"{size(kv.pool_bytes)}: {kv.sequences} such sequences{withdrawn}"))
    else:
        rows.append(("pool", "what start-up finds free"))
    return rows


def _groups(kv: KvFacts) -> str:
    """Such as `2 of 4 shallow layers, 1 of 4 deep layers`."""
    parts = []
    for group, same in groupby(kv.groups):
        kind = "" if group.kind == "all" else f"{group.kind} "
        parts.append(f"{len(list(same))} of {group.layers} {kind}layers")
    return ", ".join(parts)


def _engine(engine: EngineFacts) -> Rows:
    return [
        ("model runner", f"{engine.runner} ({engine.runner_reason})"),
        ("attention", f"{engine.attention or 'not known'}, vision tower {engine.tower_attention or 'not known'}"),
        ("graphs", f"{engine.graphs}, compilation {engine.compilation}"),
        ("dtype", f"{engine.dtype}, KV cache {engine.kv_dtype}"),
        ("context", f"{engine.max_model_len} tokens"),
        ("in a step", f"{engine.max_num_seqs} sequences, {engine.max_num_batched_tokens} tokens"),
        (
            "scheduling",
            f"{_on_or_off('prefix caching', engine.prefix_caching)}, "
            f"{_on_or_off('chunked prefill', engine.chunked_prefill)}, "
            f"{_on_or_off('asynchronous', engine.async_scheduling)}",
        ),
        ("worker", engine.worker),
        ("scheduler", engine.scheduler),
    ]


def _added_options(options: Sequence[str]) -> Rows:
    return [("" if i else "options added", option) for i, option in enumerate(options)]


def machine_rows(machine: Machine) -> Rows:
    rows: list[tuple[str, str]] = [("platform", _PLATFORMS[machine.platform])]
    if machine.driver is not None:
        rows.append(("driver", machine.driver))
    for i, gpu in enumerate(machine.gpus):
        memory = f"{size(gpu.free_bytes)} of {size(gpu.total_bytes)} free" if gpu.total_bytes else "shared memory"
        rows.append((f"GPU {i}", f"{gpu.name}, compute capability {gpu.capability}, {memory}"))
    cores = _count(machine.cpu_count, "core")
    rows.append(("CPU", ", ".join([cores, *machine.instructions])))
    rows.append(("memory", f"{size(machine.ram_free_bytes)} of {size(machine.ram_total_bytes)} free"))
    if machine.shm_free_bytes is not None:
        rows.append(("/dev/shm", f"{size(machine.shm_free_bytes)} free"))
    return rows


def version_rows(versions: Versions, machine: Machine | None) -> Rows:
    cuda = triton = ""
    if machine is not None:
        cuda = f" for {f'CUDA {machine.cuda_build}' if machine.cuda_build else 'CPU'}"
        triton = "" if machine.triton_runs or versions.triton is None else " (does not run here)"
    return [
        ("foldserve", versions.foldserve),
        ("vLLM", _vllm(versions)),
        ("torch", f"{versions.torch or 'not installed'}{cuda}"),
        ("transformers", versions.transformers or "not installed"),
        ("Triton", f"{versions.triton or 'not installed'}{triton}"),
        ("Python", versions.python),
    ]


def _vllm(versions: Versions) -> str:
    if versions.vllm is None or versions.problem:
        return versions.vllm or "not installed"
    if is_release_vllm(versions.vllm):
        return f"{versions.vllm}, the one that this release is for"
    return f"{versions.vllm}, allowed by {ALLOW_VLLM}; this release is for {versions.needed_vllm}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _on_or_off(what: str, on: bool) -> str:
    return f"{what} {'on' if on else 'off'}"


def _short_path(name: str) -> str:
    room = _WIDTH - _NAMES - 2
    return name if len(name) <= room else f"...{name[3 - room :]}"
