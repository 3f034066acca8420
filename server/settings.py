"""The operator's settings, one frozen value made at start-up, and the environment, which only this module reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from foldserve.reducers import METHODS
from foldserve.reducers.method import AfterTower
from foldserve.reducers.reduction import InvalidReduction, Positions, Reduction
from foldserve.server.access import Access
from foldserve.server.auto import BOUNDS, AutoPolicy, GroupRules, parse_bounds
from foldserve.server.limits import Limits
from foldserve.server.options import option

CONFIG_KEY = "foldserve"
"""Our key in vLLM's `--additional-config`, which the API processes and the engine read."""


def parse_reduction(text: str) -> Reduction:
    """Parses a reduction from a command line: a ratio such as `0.5`, or a request's JSON object.

    Raises InvalidReduction for anything else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidReduction(
            f'a ratio such as 0.5 or JSON such as {{"ratio": 0.5}} is needed, not {text!r}'
        ) from error
    return Reduction.parse(value if isinstance(value, Mapping) else {"ratio": value})


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's own settings; their defaults leave plain vLLM's results unchanged. See also each field's help.

    Raises ValueError for a value out of its bounds.

    Attributes:
        withdraw_layer: K, the first decoder layer without vision tokens, at least 1; None builds the model without it.
        calibration: eta, samples and mean KL (nats) of a K that `foldserve calibrate` found; else None.
        auto: what `foldserve calibrate --auto` found; None where `ratio: "auto"` is refused.
        masks_padding_rows: never sample rows of the vocabulary that the tokenizer does not know.
    """

    default_reduction: Reduction = option(
        Reduction(),
        "JSON|RATIO",
        "for requests that say nothing: a ratio in [0, 1), or a request's `reduction` object (default: none)",
        parse=parse_reduction,
    )
    low_detail_ratio: float | None = option(
        None,
        "RATIO",
        'reduction ratio of images sent with "detail": "low" (default: 0.75; the base tile alone on models that lay '
        "images out in tiles)",
    )
    withdraw_layer: int | None = None
    calibration: Mapping[str, float | int] | None = None
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    positions: Positions | None = option(
        None,
        None,
        "rotary positions of the vision tokens that stay, for requests that do not say (default: that of the model's "
        "family)",
    )
    several_images: Literal["tiles", "base"] = option(
        "tiles",
        None,
        "tiles of an image in a prompt with several, for requests that do not say and models that lay images out in "
        "tiles: all of them, or the base tile alone, as LLaVA-OneVision was trained",
    )
    auto_bounds: tuple[float, float] = option(
        BOUNDS,
        "LEAST,MOST",
        'shares of an image\'s tokens that go where "ratio" is "auto", for requests that do not say (default: 0,0.75)',
        parse=parse_bounds,
    )
    auto_groups: GroupRules = option(
        GroupRules(),
        "JSON",
        'group of requests with "ratio": "auto" that name none, by the name of their key or model: '
        '{"keys": {"scanner": "ocr"}, "models": {}} (default: none)',
        parse=GroupRules.parse,
    )
    auto_under_load: bool = option(
        False,
        None,
        'lower the counts of "ratio": "auto" within the bounds while requests wait and the KV cache is full, for '
        "requests that do not say; what calibration promises does not hold then",
    )
    tower_graphs: bool = option(
        False,
        None,
        "on a GPU, replay a CUDA graph of vision tower, reduction and projector for images with the default reduction: "
        "fewer launches where few images come at a time (LLaVA-1.5 on one GPU; not tried on one yet)",
    )
    check_answers: int = option(
        500,
        "N",
        "score one in N reduced answers with all vision tokens, while nobody waits for an answer; 0: none",
    )
    auto: AutoPolicy | None = None
    masks_padding_rows: bool = True

    def __post_init__(self) -> None:
        if self.low_detail_ratio is not None and not 0 <= self.low_detail_ratio < 1:
            raise ValueError(f"the low-detail ratio must lie in [0, 1), not {self.low_detail_ratio}")
        default = METHODS[self.default_reduction.method]
        is_pruned = self.default_reduction.pruning is not None
        if self.several_images == "base" and (is_pruned or not isinstance(default, AfterTower)):
            raise ValueError(
                f"--several-images base does not go with a default method such as {self.default_reduction.method!r}: "
                "only one that works after the tower reduces a base tile"
            )
        if self.check_answers < 0:
            raise ValueError(f"--check-answers is a number of answers, or 0 for none, not {self.check_answers}")
        if self.withdraw_layer is not None and (type(self.withdraw_layer) is not int or self.withdraw_layer < 1):
            raise ValueError(f"--withdraw-layer must be an integer of at least 1, not {self.withdraw_layer!r}")
        if self.default_reduction.withdraw and self.withdraw_layer is None:
            raise ValueError("the default reduction withdraws, so give --withdraw-layer too")

    @classmethod
    def from_config(cls, additional_config: object) -> Settings:
        """Reads the settings that `to_config` wrote into vLLM's `additional_config`.

        Missing settings have their defaults, except `masks_padding_rows`: vLLM without foldserve's server samples as
        usual. Raises ValueError for a value out of its bounds, or an unknown setting.
        """
        found = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        config = {"masks_padding_rows": False, **(found or {})}
        if unknown := config.keys() - {known.name for known in fields(cls)}:
            raise ValueError(f"{CONFIG_KEY!r} in the additional config has no setting {', '.join(sorted(unknown))}")
        config["default_reduction"] = Reduction.parse(config.get("default_reduction") or {})
        config["limits"] = Limits.from_config(config.get("limits") or {})
        config["access"] = Access.from_config(config.get("access") or {})
        config["auto"] = AutoPolicy.from_config(config["auto"]) if config.get("auto") else None
        config["auto_bounds"] = tuple(config.get("auto_bounds") or BOUNDS)
        config["auto_groups"] = GroupRules.from_config(config.get("auto_groups") or {})
        return cls(**config)

    def to_config(self) -> dict[str, object]:
        """The JSON value under `CONFIG_KEY`."""
        return {
            "default_reduction": self.default_reduction.to_json(),
            "low_detail_ratio": self.low_detail_ratio,
            "several_images": self.several_images,
            "withdraw_layer": self.withdraw_layer,
            "calibration": self.calibration,
            "limits": self.limits.to_config(),
            "access": self.access.to_config(),
            "positions": self.positions,
            "auto": None if self.auto is None else self.auto.to_config(),
            "auto_bounds": list(self.auto_bounds),
            "auto_groups": {"keys": dict(self.auto_groups.keys), "models": dict(self.auto_groups.models)},
            "auto_under_load": self.auto_under_load,
            "tower_graphs": self.tower_graphs,
            "check_answers": self.check_answers,
            "masks_padding_rows": self.masks_padding_rows,
        }


def parse_withdraw_layer(text: str) -> int | Literal["auto"]:
    """Parses a layer's number or `auto`; raises ValueError for anything else."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the number of a decoder layer or auto is needed, not {text!r}") from error


_REFUSED = {
    "VLLM_API_KEY": "keys come from the file of --api-keys",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "answers are never logged",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "a server without its engine ends",
}


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables that foldserve reads.

    Attributes:
        cache_dir: for calibrations of models from a hub.
        vllm_plugins: the names in `VLLM_PLUGINS`; None when unset, which to vLLM means all but endpoint plugins.
        sets_cpu_kv_cache: the user sized the CPU's KV cache by `VLLM_CPU_KVCACHE_SPACE`.
        cxx: the C++ compiler that torch's inductor uses on CPU.
        own_logging: the user has a logging configuration of their own, or wants none.
        wants_triton: `FOLDSERVE_TRITON=1` asks for Triton kernels on a GPU.
        refused: variables that would undo what the server promises, each with what to do instead.
    """

    cache_dir: Path
    vllm_plugins: tuple[str, ...] | None
    sets_cpu_kv_cache: bool
    cxx: str
    log_level: str | None = None
    own_logging: bool = False
    wants_triton: bool = False
    refused: tuple[str, ...] = ()

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Environment:
        """Raises ValueError if a variable of ours has an invalid value."""
        plugins = env.get("VLLM_PLUGINS")
        cache_home = env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache"
        return cls(
            cache_dir=Path(cache_home) / "foldserve",
            vllm_plugins=None if plugins is None else tuple(name for name in plugins.split(",") if name),
            sets_cpu_kv_cache=bool(env.get("VLLM_CPU_KVCACHE_SPACE")),
            cxx=env.get("CXX") or "g++",
            log_level=(env.get("VLLM_LOGGING_LEVEL") or "").upper() or None,
            own_logging=bool(env.get("VLLM_LOGGING_CONFIG_PATH")) or env.get("VLLM_CONFIGURE_LOGGING") == "0",
            wants_triton=_is_on("FOLDSERVE_TRITON", env),
            refused=tuple(f"{name}: {why}" for name, why in _REFUSED.items() if env.get(name) not in (None, "", "0")),
        )


_KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"


def http_variables(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Keeps idle connections longer than a load balancer's usual 60 s, so that none closes under a new request."""
    return {} if env.get(_KEEP_ALIVE) else {_KEEP_ALIVE: "75"}


_FEW_CORES = 4
_SAYS_WHICH_CORES = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
_SAYS_HOW_TO_WAIT = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SAYS_WHICH_ALLOCATOR = ("LD_PRELOAD", "GLIBC_TUNABLES")
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**40, "MALLOC_TRIM_THRESHOLD_": 2**40, "MALLOC_TOP_PAD_": 2**26}


def cpu_variables(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that make vLLM's processes faster on a CPU, unless the user has set related ones."""
    return _all_cores(env) | _kept_memory(env)


def _all_cores(env: Mapping[str, str]) -> dict[str, str]:
    """Lets all cores of a small machine compute.

    vLLM reserves one for its scheduler, which needs a twentieth of it. On two cores that costs half of the speed, see
    docs/explanation/log.md.
    """
    if len(os.sched_getaffinity(0)) > _FEW_CORES or any(env.get(name) for name in _SAYS_WHICH_CORES):
        return {}
    return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} | _short_wait(env)


def _short_wait(env: Mapping[str, str]) -> dict[str, str]:
    """Lets threads that wait for the next operation sleep soon, where they share their cores with the API process.

    libgomp's default is to spin 300,000 times, on a core that could send tokens and read requests. With 10,000, answers
    came sooner at concurrency 1 and as fast at 8, see docs/explanation/log.md.
    """
    if any(env.get(name) for name in _SAYS_HOW_TO_WAIT):
        return {}
    return {"GOMP_SPINCOUNT": "10000"}


def _kept_memory(env: Mapping[str, str]) -> dict[str, str]:
    """Makes glibc keep freed memory for the next tensor of that size.

    Otherwise it returns large blocks to the system, always or depending on what lies behind them. To touch a page for
    the first time costs more than to add to it: up to a third of a step, see docs/explanation/log.md. Child processes
    only.
    """
    if any(env.get(name) for name in (*_SAYS_WHICH_ALLOCATOR, *_KEEP_MEMORY)):
        return {}
    return {name: str(value) for name, value in _KEEP_MEMORY.items()}


def _is_on(name: str, env: Mapping[str, str]) -> bool:
    value = env.get(name) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} is 0 or 1, not {value!r}")
    return value == "1"
