"""Settings and the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.access import Access
from foldserve.server.limits import Limits
from foldserve.server.settings import Environment, Settings, all_cores, parse_reduction


def test_defaults_reduce_nothing() -> None:
    assert Settings().to_config() == {
        "default_reduction": {},
        "low_detail_ratio": 0.75,
        "withdraw_layer": None,
        "calibration": None,
        "limits": Limits().to_config(),
        "access": Access().to_config(),
        "positions": "renumber",
    }


def test_config_is_json_from_which_the_reduction_can_be_parsed() -> None:
    calibration = {"eta": 0.003, "samples": 20, "kl": 0.0021}
    limits = Limits(max_images_per_request=3)
    access = Access(api_keys=Path("/keys.toml"), guard_metrics=True, max_queue=0, shutdown_timeout_s=5)
    settings = Settings(Reduction(method="folder_cls", ratio=0.5), 0.9, 16, calibration, limits, access, "keep")
    config = json.loads(json.dumps(settings.to_config()))
    assert Reduction.parse(config.pop("default_reduction")) == settings.default_reduction
    assert Limits.from_config(config.pop("limits")) == settings.limits
    assert Access.from_config(config.pop("access")) == settings.access
    assert config == {
        "low_detail_ratio": 0.9,
        "withdraw_layer": 16,
        "calibration": calibration,
        "positions": "keep",
    }


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


@pytest.mark.parametrize(
    ("cores", "env", "chosen"),
    [
        (2, {}, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}),
        (8, {}, {}),
        (2, {"OMP_NUM_THREADS": "1"}, {}),
        (2, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, {}),
        (2, {"VLLM_CPU_OMP_THREADS_BIND": "0"}, {}),
    ],
    ids=str,
)
def test_a_small_machine_computes_on_all_cores(
    cores: int, env: dict[str, str], chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert all_cores(env) == chosen


def test_environment_as_the_user_set_it() -> None:
    env = {"XDG_CACHE_HOME": "/cache", "VLLM_PLUGINS": "a,b", "VLLM_CPU_KVCACHE_SPACE": "2", "CXX": "clang++"}
    assert Environment.read(env) == Environment(Path("/cache/foldserve"), ("a", "b"), True, "clang++")
    assert Environment.read({"HOME": "/", "VLLM_PLUGINS": ""}).vllm_plugins == ()
    assert Environment.read({"HOME": "/", "FOLDSERVE_TRITON": "1"}).wants_triton
    with pytest.raises(ValueError, match="FOLDSERVE_TRITON is 0 or 1, not 'yes'"):
        Environment.read({"HOME": "/", "FOLDSERVE_TRITON": "yes"})
