"""Settings and the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.access import Access
from foldserve.server.auto import AutoPolicy, GroupRules
from foldserve.server.limits import Limits
from foldserve.server.settings import Environment, Settings, cpu_variables, parse_reduction


def test_defaults_reduce_nothing() -> None:
    assert Settings().to_config() == {
        "default_reduction": {},
        "low_detail_ratio": None,
        "several_images": "tiles",
        "withdraw_layer": None,
        "calibration": None,
        "limits": Limits().to_config(),
        "access": Access().to_config(),
        "positions": None,
        "auto": None,
        "auto_bounds": [0.0, 0.75],
        "auto_groups": {"keys": {}, "models": {}},
        "auto_under_load": False,
        "tower_graphs": False,
        "check_answers": 500,
        "masks_padding_rows": True,
    }


def test_config_is_json_from_which_the_settings_can_be_read() -> None:
    calibration = {"eta": 0.003, "samples": 20, "kl": 0.0021}
    limits = Limits(max_images_per_request=3)
    access = Access(api_keys=Path("/keys.toml"), open_metrics=True, max_queue=0, shutdown_timeout_s=5)
    auto = AutoPolicy(Reduction(method="pool"), 0.05, (1, 4), {"ocr": 4})
    settings = Settings(
        Reduction(method="folder_cls", ratio=0.5),
        0.9,
        16,
        calibration,
        limits,
        access,
        "keep",
        auto=auto,
        auto_bounds=(0.25, 0.5),
        auto_groups=GroupRules({"key": "ocr"}),
        auto_under_load=True,
        tower_graphs=True,
        check_answers=7,
    )
    config = json.loads(json.dumps({"foldserve": settings.to_config(), "other": 1}))
    assert Settings.from_config(config) == settings


@pytest.mark.parametrize("config", [None, {}, {"other": {}}, {"foldserve": {}}, "hash"], ids=repr)
def test_without_foldserves_server_vllm_samples_as_it_does(config: object) -> None:
    assert Settings.from_config(config) == Settings(masks_padding_rows=False)


def test_a_setting_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="has no setting withdraw_layr"):
        Settings.from_config({"foldserve": {"withdraw_layr": 2}})


def test_a_base_tile_is_reduced_after_the_tower_only() -> None:
    assert Settings(Reduction("pool", ratio=0.75), several_images="base").several_images == "base"
    with pytest.raises(ValueError, match="only one that works after the tower"):
        Settings(Reduction("illava", ratio=0.5), several_images="base")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_low_detail_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"low-detail ratio must lie in \[0, 1\)"):
        Settings(low_detail_ratio=ratio)


def test_withdraw_layer_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Settings(withdraw_layer=0)


def test_withdrawing_by_default_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="--withdraw-layer"):
        Settings(Reduction(decoder="withdraw"))


@pytest.mark.parametrize(
    ("text", "reduction"),
    [
        ("0.5", Reduction(ratio=0.5)),
        ("0", Reduction()),
        ('{"keep_tokens": 64}', Reduction(keep_tokens=64)),
        ('{"method": "folder_cls", "ratio": 0.25}', Reduction(method="folder_cls", ratio=0.25)),
    ],
)
def test_parse_reduction(text: str, reduction: Reduction) -> None:
    assert parse_reduction(text) == reduction


@pytest.mark.parametrize(
    "text", ["", "half", "1", "NaN", '"0.5"', "true", "[]", '{"ratio": 0.5, "x": 1}', "{'ratio': 0.5}"]
)
def test_parse_reduction_refuses(text: str) -> None:
    with pytest.raises(InvalidReduction):
        parse_reduction(text)


def test_environment_of_an_empty_process() -> None:
    read = Environment.read({"HOME": "/home/someone"})
    assert read == Environment(Path("/home/someone/.cache/foldserve"), None, False, "g++")


ALL_CORES = ["VLLM_CPU_NUM_OF_RESERVED_CPU"]
SHORT_WAIT = ["GOMP_SPINCOUNT"]
KEPT_MEMORY = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"]


@pytest.mark.parametrize(
    ("cores", "env", "chosen"),
    [
        (2, {}, ALL_CORES + SHORT_WAIT + KEPT_MEMORY),
        (8, {}, KEPT_MEMORY),
        (2, {"OMP_NUM_THREADS": "1"}, KEPT_MEMORY),
        (2, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, KEPT_MEMORY),
        (2, {"VLLM_CPU_OMP_THREADS_BIND": "0"}, KEPT_MEMORY),
        (2, {"GOMP_SPINCOUNT": "300000"}, ALL_CORES + KEPT_MEMORY),
        (2, {"OMP_WAIT_POLICY": "active"}, ALL_CORES + KEPT_MEMORY),
        (2, {"LD_PRELOAD": "libtcmalloc.so"}, ALL_CORES + SHORT_WAIT),
        (2, {"MALLOC_TOP_PAD_": "0"}, ALL_CORES + SHORT_WAIT),
        (2, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, ALL_CORES + SHORT_WAIT),
    ],
    ids=str,
)
def test_what_a_cpu_needs_is_set_unless_the_user_says_something(
    cores: int, env: dict[str, str], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert list(cpu_variables(env)) == chosen


def test_serve_sets_it_before_vllm_starts_a_process(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where vLLM takes over, in a process whose environment says nothing."""
    code = """
import json, os, sys
os.sched_getaffinity = lambda pid: {0, 1}
from foldserve.server.api.launch import ServeSubcommand
from foldserve.server.cli import main
class Reached(BaseException): pass
def cmd(args):
    json.dump(dict(os.environ), open(sys.argv[2], "w"))
    raise Reached
ServeSubcommand.cmd = staticmethod(cmd)
try:
    main(["serve", sys.argv[1]])
except Reached:
    pass
"""
    said = {*ALL_CORES, *SHORT_WAIT, *KEPT_MEMORY, "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "OMP_WAIT_POLICY"}
    said |= {"LD_PRELOAD", "GLIBC_TUNABLES"}
    env = {name: value for name, value in os.environ.items() if name not in said}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    file = tmp_path / "environment.json"
    subprocess.run([sys.executable, "-c", code, str(tiny_llava), str(file)], env=env, capture_output=True, check=True)
    seen = json.loads(file.read_text())
    assert {name: seen.get(name) for name in cpu_variables({})} == cpu_variables({})


def test_threads_that_wait_are_told_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable as it is written: torch's OpenMP runtime prints what it read."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    env = os.environ | cpu_variables({}) | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr


def test_memory_that_was_freed_is_used_again() -> None:
    """By glibc, with the variables as they are written."""
    code = """
import ctypes, resource, torch
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: count small pages
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(2**24)  # 64 MB: above what glibc ever keeps by itself
for step in range(24):
    if step == 16:  # glibc finds a place of that size where several lie together
        before = pages()
    y = x + 1
    del y
print(pages() - before)
"""

    def new_pages(variables: dict[str, str]) -> int:
        env = {name: value for name, value in os.environ.items() if name not in KEPT_MEMORY} | variables
        return int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)

    kept = {name: value for name, value in cpu_variables({}).items() if name in KEPT_MEMORY}
    assert new_pages(kept) < new_pages({}) / 4


def test_environment_as_the_user_set_it() -> None:
    env = {"XDG_CACHE_HOME": "/cache", "VLLM_PLUGINS": "a,b", "VLLM_CPU_KVCACHE_SPACE": "2", "CXX": "clang++"}
    assert Environment.read(env) == Environment(Path("/cache/foldserve"), ("a", "b"), True, "clang++")
    assert Environment.read({"HOME": "/", "VLLM_PLUGINS": ""}).vllm_plugins == ()
    assert Environment.read({"HOME": "/", "FOLDSERVE_TRITON": "1"}).wants_triton
    with pytest.raises(ValueError, match="FOLDSERVE_TRITON is 0 or 1, not 'yes'"):
        Environment.read({"HOME": "/", "FOLDSERVE_TRITON": "yes"})
