"""Starts vLLM's own server with our plugins, our settings, and defaults that suit a CPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any, NoReturn

from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

from foldserve.server.api import preflight
from foldserve.server.api.announce import announce_when_ready
from foldserve.server.api.connection import HEAD_BYTES
from foldserve.server.api.lifecycle.arguments import SHARED, SharedState, prepare
from foldserve.server.engine import withdrawal
from foldserve.server.engine.refused_options import refuse_options
from foldserve.server.engine.worker import WORKERS, device
from foldserve.server.settings import CONFIG_KEY, Environment, Settings, cpu_variables, http_variables

# Groups that vLLM loads in full unless VLLM_PLUGINS is set. Endpoint plugins it loads only if VLLM_PLUGINS names them.
_LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_SCHEDULER = "foldserve.server.engine.scheduler.make_scheduler"
_SMALL_MODEL_NAME = "demo"
# The demo model never saw JSON: where the grammar allows white space, it writes nothing else until it is cut off.
_SMALL_MODEL_JSON: dict[str, Any] = {"backend": "xgrammar", "disable_any_whitespace": True}
_CPU_KV_CACHE_GIB = 4
_CPU_IMAGE_CACHE_GIB = 1


def say(message: str, options: Sequence[str] = ()) -> None:
    print("foldserve:", message, *options, file=sys.stderr, flush=True)


SettingsFor = Callable[[str, str | None], Settings]
"""A model's name or directory, its revision -> settings for it; raises ValueError to refuse."""

Say = Callable[[str, Sequence[str]], None]
"""Prints a message and the options that it ends with."""


def serve(argv: list[str], settings: Settings | SettingsFor, environment: Environment, small_model: Path) -> None:
    """Serves until stopped.

    Args:
        argv: arguments of `vllm serve`; without a model, the one in the directory `small_model` is served.
        settings: handed to the API processes and the engine in vLLM's additional config.

    Raises:
        SystemExit: arguments that vLLM's parser or we refuse.
        CannotStart: what `preflight` refuses.
    """
    prepare_process(environment)
    args = serve_args(argv, settings, environment, small_model)
    configure_logging_from_args(args)
    with preflight.exit_with_reason():
        preflight.check(args)
        with preflight.claimed_address(args):
            say(f"loading {args.model_tag or args.model}")
            announce_when_ready(args)
            ServeSubcommand().cmd(args)
    shared: SharedState = getattr(args, SHARED)
    if shared.engine_died.is_set():
        raise SystemExit("foldserve: the engine's process has died")


def prepare_process(environment: Environment) -> None:
    """Sets the variables that vLLM's processes read, and checks that our plugins can be loaded."""
    _check_plugins()
    os.environ["VLLM_PLUGINS"] = ",".join(plugins_to_load(environment))
    if current_platform.is_cpu():
        os.environ.update(cpu_variables())
    os.environ.update(http_variables())
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does


def _check_plugins() -> None:
    """Raises if a plugin can't be loaded: vLLM would only log that, and serve all its routes to everybody."""
    for plugin in distribution("foldserve").entry_points:
        if plugin.group.startswith("vllm."):
            plugin.load()


def plugins_to_load(environment: Environment) -> list[str]:
    """The value of `VLLM_PLUGINS`: what would be loaded without us, and our plugins."""
    ours = sorted(plugin.name for plugin in distribution("foldserve").entry_points if plugin.group.startswith("vllm."))
    theirs = environment.vllm_plugins
    if theirs is None:
        theirs = tuple(plugin.name for group in _LOADED_BY_DEFAULT for plugin in entry_points(group=group))
    return list(dict.fromkeys([*theirs, *ours]))


def serve_args(
    argv: list[str],
    settings: Settings | SettingsFor,
    environment: Environment,
    small_model: Path,
    *,
    parser_class: type[FlexibleArgumentParser] = FlexibleArgumentParser,
    say: Say = say,
    command: str = "serve",
    refused: Sequence[str] = (),
) -> Namespace:
    """vLLM's parsed arguments, with our defaults where the user left the choice.

    Args:
        parser_class: its `error` ends the command if an argument is refused.
        say: gets the defaults that were applied.
        command: the command of `foldserve`.
        refused: names of vLLM's options that mean nothing to the command.
    """
    parser = parser_class(prog="foldserve")
    options = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    options.prog, options.usage = f"foldserve {command}", f"foldserve {command} [MODEL] [options]"
    defaults = {name: options.get_default(name) for name in _OURS_TO_CHOOSE}
    options.set_defaults(**dict.fromkeys(_OURS_TO_CHOOSE), subparser="serve", h11_max_incomplete_event_size=HEAD_BYTES)
    args: Namespace = options.parse_args(argv)
    for name in refused:
        if getattr(args, name) != options.get_default(name):
            options.error(f"--{name.replace('_', '-')} has no meaning for foldserve {command}: leave it out")
    _complete(args, _choices(args, environment, small_model, say), defaults, say)
    if not isinstance(settings, Settings):
        settings = _settings_for(settings, args, options.error, say)
    _refuse_unsupported(args, environment, options.error)
    _set_engine_options(args, settings, options.error)
    prepare(args, settings.access, options.error)
    args.additional_config = {**args.additional_config, CONFIG_KEY: settings.to_config()}
    return args


def _choices(args: Namespace, environment: Environment, small_model: Path, say: Say) -> dict[str, object]:
    """Our defaults for options that the user may have left open, by the option's name."""
    choices: dict[str, object] = {}
    small = args.model_tag is None and args.model is None
    if small:
        choices |= {"model": str(small_model), "served_model_name": [_SMALL_MODEL_NAME]}
        say("no MODEL given: serving the small demo model, which knows drawn scenes of coloured shapes and numbers", ())
    if current_platform.is_cpu():
        choices |= _cpu_choices(args, environment, small)
    if small:
        choices["structured_outputs_config"] = StructuredOutputsConfig(**_SMALL_MODEL_JSON)
    return choices


def _refuse_unsupported(args: Namespace, environment: Environment, refuse: Callable[[str], NoReturn]) -> None:
    if CONFIG_KEY in args.additional_config:
        refuse(f"{CONFIG_KEY!r} in --additional-config is set by foldserve's own options: use those")
    try:
        refuse_options(
            encoder_graphs=args.compilation_config.cudagraph_mm_encoder,
            tower_adapters=args.enable_tower_connector_lora,
            video_pruning_rate=args.video_pruning_rate,
        )
    except ValueError as error:
        refuse(str(error))
    for variable in environment.refused:
        refuse(f"not taken from the environment: {variable}")


def _set_engine_options(args: Namespace, settings: Settings, refuse: Callable[[str], NoReturn]) -> None:
    """Sets our worker and scheduler, and what the settings mean for the engine."""
    if settings.withdraw_layer is not None:
        _add_withdrawal(args, settings.withdraw_layer, refuse)
    elif args.worker_cls == "auto" and args.pipeline_parallel_size == 1:
        args.worker_cls = WORKERS[device()]
    if args.scheduler_cls is None:
        args.scheduler_cls = _SCHEDULER
    if settings.limits.max_videos_per_request == 0:
        args.limit_mm_per_prompt = {"video": 0, **args.limit_mm_per_prompt}  # none is profiled


def _settings_for(choose: SettingsFor, args: Namespace, refuse: Callable[[str], NoReturn], say: Say) -> Settings:
    try:
        settings = choose(args.model_tag or args.model, args.revision)
    except ValueError as error:
        refuse(str(error))
    if settings.calibration is not None:
        say(f"--withdraw-layer {settings.withdraw_layer}, as calibrated", ())
    if settings.auto is not None:
        say(f"--auto: {settings.auto}", ())
    return settings


def _add_withdrawal(args: Namespace, layer: int, refuse: Callable[[str], NoReturn]) -> None:
    """Sets the engine arguments that withdrawal needs; refuses the user's own value for one of them."""
    try:
        withdrawal.apply_options(args, layer, device=device())
    except ValueError as error:
        refuse(str(error))


# Options whose vLLM default becomes None while parsing, to tell a user's choice from a default.
_OURS_TO_CHOOSE = (
    "dtype",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "mm_processor_cache_gb",
    "model",
    "served_model_name",
    "structured_outputs_config",
)


def _cpu_choices(args: Namespace, environment: Environment, small: bool) -> dict[str, object]:
    """Defaults for a CPU that other programs use too; vLLM's would take 92 % of the memory for the KV cache."""
    choices: dict[str, object] = {"mm_processor_cache_gb": _CPU_IMAGE_CACHE_GIB}
    if small:
        choices["dtype"] = "float32"  # nothing to gain from less at this size
    if small or shutil.which(environment.cxx) is None:
        choices["enforce_eager"] = True  # compiling costs a minute, and needs a C++ compiler
    if args.gpu_memory_utilization is None and not environment.sets_cpu_kv_cache:
        available = get_memory_node_info(get_visible_memory_node()[0]).available_memory
        choices["kv_cache_memory_bytes"] = min(_CPU_KV_CACHE_GIB * 2**30, available // 4)
    return choices


def _complete(args: Namespace, choices: dict[str, object], defaults: dict[str, object], say: Say) -> None:
    """Fills in what the user left open, from `choices`, else from vLLM's `defaults`, and says what was chosen."""
    chosen = {name: value for name, value in choices.items() if getattr(args, name) is None}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, chosen.get(name, default))
    if chosen:
        say("defaults applied:", [_as_option(name, value) for name, value in chosen.items()])


def _as_option(name: str, value: object) -> str:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return option
    if isinstance(value, StructuredOutputsConfig):
        return f"{option} '{json.dumps(_SMALL_MODEL_JSON)}'"
    return f"{option} {' '.join(value) if isinstance(value, list) else value}"
