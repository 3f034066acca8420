"""The table of a server that is about to listen."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from foldserve.server.access import Access
from foldserve.server.api import startup
from foldserve.server.api.logs.config import STARTUP
from foldserve.server.api.planner import Planner
from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.kv_cost import kv_cost
from foldserve.server.engine.plugin import ALLOW_VLLM, vllm_version
from foldserve.server.engine.withdrawal import StepCapacity
from foldserve.server.limits import Limits
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.settings import Settings


@pytest.fixture(scope="module")
def config() -> Any:
    return EngineArgs(str(CHECKPOINT), dtype="float32", enforce_eager=True).create_engine_config()


def facts(config: Any, *, is_reduced: bool = True, withdraw_layer: int | None = None) -> dict[str, str]:
    chat: Any = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=config, model_config=config.model_config),
        models=SimpleNamespace(base_model_paths=[SimpleNamespace(name="demo")]),
        planner=Planner(
            family=family_of(config.model_config) if is_reduced else None,
            settings=Settings(withdraw_layer=withdraw_layer),
            step_capacity=StepCapacity(1000, "all"),
            encoder=encoder_budget(config) if is_reduced else None,
        ),
        kv_cost=kv_cost(config, withdraw_layer),
        checks=SimpleNamespace(takes={"image"}),
    )
    return startup.facts(chat, Limits(), Access())


def test_the_engine(config: Any) -> None:
    images = config.scheduler_config.max_num_batched_tokens // 144
    shown = facts(config)
    assert shown["engine"] == f"model runner v1, graphs NONE, up to {images} images of the largest size a tower call"
    assert shown["KV cache"] == "3.05 MiB for a sequence of one largest image and 64 tokens of text"


def test_withdrawal_and_what_it_saves(config: Any) -> None:
    shown = facts(config, withdraw_layer=8)
    assert shown["KV cache"].startswith("3.05 MiB (2.34 MiB withdrawn) for a sequence")
    assert shown["withdrawal"].startswith("from decoder layer K = 8 of 12 on")


def test_a_model_that_is_not_reduced(config: Any) -> None:
    shown = facts(config, is_reduced=False)
    assert shown["engine"] == "model runner v1, graphs NONE"
    assert "KV cache" not in shown


def test_the_log_says_that_the_vllm_is_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat: Any = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=0)))
    )
    monkeypatch.setattr(startup, "facts", lambda *_: {})
    for found, said in ((vllm_version(), ""), ("0.99.0+cpu", f", allowed by {ALLOW_VLLM}; this release is for ")):
        monkeypatch.setattr(startup, "version", {"vllm": found, "foldserve": "1"}.__getitem__)
        with caplog.at_level(logging.INFO, logger=STARTUP):
            startup.report(chat, Limits(), Access())
        assert caplog.messages.pop().removeprefix(f"version 1 on vLLM {found}") == said + vllm_version() * bool(said)
