"""Finds mistakes in how a server is started before anything is loaded, and reports each in one line."""

from __future__ import annotations

import logging
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from vllm.config.load import LoadConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMError
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.reasoning import ReasoningParserManager

from foldserve.server import guardian
from foldserve.server.api.logs.failure import reason, report_failure

_log = logging.getLogger(__name__)


class CannotStart(ValueError):
    """One line that says what is wrong, what came and what to do."""


def check(args: Namespace) -> None:
    """Checks the files and options that vLLM checks late, or in another process.

    Raises:
        CannotStart: a server started like this would end after it has loaded, or shortly before.
    """
    model = args.model_tag or args.model
    try:
        ServeSubcommand().validate(args)
        if not args.tool_parser_plugin and not args.reasoning_parser_plugin:  # these may bring more parsers
            validate_api_server_args(args)
            _check_reasoning_parser(args.reasoning_parser)
    except (KeyError, TypeError, ValueError, VLLMError) as error:
        raise CannotStart(str(error.args[0]).removeprefix("Error: ")) from error
    _check_folder(model, args)
    _check_weights(model, args)


def _check_reasoning_parser(name: str | None) -> None:
    known = ReasoningParserManager.list_registered()
    if name and name not in known:
        raise CannotStart(f"invalid reasoning parser: {name} (chose from {{ {','.join(known)} }})")


def _check_folder(model: str, args: Namespace) -> None:
    folder = Path(model)
    if not folder.exists() and _must_be_a_path(model):
        raise CannotStart(f"there is no directory {model}")
    has_config = any((folder / name).is_file() for name in ("config.json", "params.json"))
    if folder.is_dir() and not has_config and args.config_format == "auto" and args.hf_config_path is None:
        raise CannotStart(f"{model} holds no model: config.json is missing")


def _must_be_a_path(model: str) -> bool:
    """Whether this can't be a name on a hub, such as `llava-hf/llava-1.5-7b-hf`."""
    return "://" not in model and (model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1)


def _check_weights(model: str, args: Namespace) -> None:
    """Opens each file of weights, which compares its size with its header and reads nothing else."""
    if not Path(model).is_dir():
        return
    try:
        loader = get_model_loader(LoadConfig(load_format=args.load_format, ignore_patterns=args.ignore_patterns))
        if not isinstance(loader, DefaultModelLoader):
            return
        _, files, are_safetensors, _ = loader._prepare_weights(model, None, args.revision, True, None)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise CannotStart(f"the weights in {model} can't be loaded: {reason(error)}") from error
    for file in files if are_safetensors else ():
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise CannotStart(f"{file} is incomplete or damaged: {error}") from error


@contextmanager
def claimed_address(args: Namespace) -> Iterator[None]:
    """Holds the address that the server will listen on; raises CannotStart if it can't be bound.

    vLLM binds it at once but listens only after loading. Until then a second server may bind it too; with several API
    processes, which share it by SO_REUSEPORT, even later.
    """
    if args.headless or args.uds or args.port == 0:
        yield
        return
    host = "" if args.host in (None, "0.0.0.0") else args.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe, socket.socket(socket.AF_UNIX) as claim:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, args.port))
            probe.close()
            if sys.platform == "linux":
                claim.bind(f"\0foldserve {host}:{args.port}")  # no file: it is gone with the process
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise CannotStart(f"can't listen on {host or '0.0.0.0'}:{args.port}: {why}") from error
        yield


@contextmanager
def exit_with_reason() -> Iterator[None]:
    """Gives the guardian the reason why the server ended; for a mistake at start-up, without a traceback."""
    try:
        yield
    except CannotStart:
        raise
    except Exception as error:
        is_first = report_failure(error)
        is_mistake = isinstance(error, ValueError | OSError | VLLMError) and not guardian.is_listening()
        if not is_first or is_mistake:
            _log.debug("why the server ends", exc_info=True)
            raise SystemExit(1) from None
        raise
