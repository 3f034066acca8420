"""The vLLM endpoint plugin: replaces the chat route, adds `/v1/reducers`, refuses routes that ignore a reduction."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from copy import copy

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tasks import SupportedTask

from foldserve.server.access import Access
from foldserve.server.api import metrics as metrics  # registers the metrics before the first scrape
from foldserve.server.api import startup
from foldserve.server.api.auth.guard import AuthGuard
from foldserve.server.api.auth.keyring import Keyring
from foldserve.server.api.image_cache import mirror_engine_cache
from foldserve.server.api.lifecycle.arguments import SHARED, SharedState
from foldserve.server.api.lifecycle.hook import LifespanHook
from foldserve.server.api.lifecycle.state import Lifecycle
from foldserve.server.api.limits.checks import chat_checks, items_taken
from foldserve.server.api.limits.route import UnreadBodies
from foldserve.server.api.logs.middleware import RequestLog
from foldserve.server.api.media.guard import media_guard
from foldserve.server.api.planner import Planner
from foldserve.server.api.routes import replace_routes
from foldserve.server.api.serving import FoldServingChat
from foldserve.server.engine import positions
from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.kv_cost import kv_cost
from foldserve.server.engine.withdrawal import step_capacity
from foldserve.server.limits import Limits
from foldserve.server.settings import Settings


class FoldserveEndpoint:
    """See `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "foldserve_api"
    # None: never left out, since vLLM would then serve its own routes, unguarded
    required_tasks: tuple[SupportedTask, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        replace_routes(app)
        app.add_middleware(LifespanHook)
        app.add_middleware(RequestLog)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        if engine_client is None or "generate" not in await engine_client.get_supported_tasks():
            raise RuntimeError("foldserve serves models that generate text: leave its plugins out to serve this one")
        settings = Settings.from_config(args.additional_config)
        family, taken = family_of(engine_client.model_config), items_taken(engine_client.model_config)
        limits = settings.limits.lowered_to(
            images=taken["image"],
            videos=taken["video"],
            frames=None if family is None else family.most_frames(settings.default_reduction),
        )
        _init_access(engine_client, state, args, settings.access)
        state.foldserve_turn = asyncio.Lock()
        state.foldserve_playground = settings.access.playground
        state.foldserve_counts_drops = asyncio.create_task(metrics.count_dropped_lines())
        state.foldserve_long_bodies = ThreadPoolExecutor(2, "long-body")
        state.foldserve_unread = UnreadBodies(limits.max_unread_bytes)
        state.foldserve_chat = _make_chat(engine_client, state, args, settings, limits)
        state.foldserve_checks = asyncio.create_task(state.foldserve_chat.quality_guard.run())
        startup.report(state.foldserve_chat, limits, settings.access)


def _make_chat(
    engine_client: EngineClient, state: State, args: Namespace, settings: Settings, limits: Limits
) -> FoldServingChat:
    """Our chat handler, with the arguments that vLLM gives its own."""
    family, renderer = family_of(engine_client.model_config), _renderer(state.online_renderer)
    return FoldServingChat(
        engine_client,
        state.openai_serving_models,
        args.response_role,
        planner=Planner(
            family,
            settings,
            step_capacity(engine_client.vllm_config),
            positions.position_limit(engine_client.vllm_config),
            None if family is None else encoder_budget(engine_client.vllm_config),
        ),
        kv_cost=kv_cost(engine_client.vllm_config, settings.withdraw_layer),
        checks=chat_checks(engine_client, limits),
        media=media_guard(engine_client.model_config, limits, engine_client.renderer._mm_executor),
        cache_mirror=mirror_engine_cache(engine_client.renderer),
        lifecycle=state.foldserve_lifecycle,
        online_renderer=renderer,
        request_logger=renderer.request_logger,
        chat_template=renderer.chat_template,
        chat_template_content_format=renderer.chat_template_content_format,
        default_chat_template_kwargs=renderer.default_chat_template_kwargs,
        trust_request_chat_template=args.trust_request_chat_template,
        return_tokens_as_token_ids=args.return_tokens_as_token_ids,
        enable_auto_tools=args.enable_auto_tool_choice,
        exclude_tools_when_tool_choice_none=args.exclude_tools_when_tool_choice_none,
        tool_parser=args.tool_call_parser,
        tool_strict_level=args.tool_strict_level,
        reasoning_parser=args.structured_outputs_config.reasoning_parser,
        enable_prompt_tokens_details=args.enable_prompt_tokens_details,
        enable_force_include_usage=args.enable_force_include_usage,
        enable_log_outputs=args.enable_log_outputs,
        enable_log_deltas=args.enable_log_deltas,
        enable_per_request_metrics=args.enable_per_request_metrics,
    )


def _init_access(engine_client: EngineClient, state: State, args: Namespace, access: Access) -> None:
    """Guard and life cycle; under plain `vllm serve` they share their state with no other process."""
    shared: SharedState = getattr(args, SHARED, None) or SharedState()
    vllm = engine_client.vllm_config
    capacity = vllm.scheduler_config.max_num_seqs * vllm.parallel_config.data_parallel_size + access.max_queue
    state.foldserve_guard = AuthGuard(
        Keyring(access.api_keys) if access.api_keys else None,
        shared.counters,
        capacity,
        access.key_concurrent or max(1, capacity // 2),
        open_scopes=("metrics",) if access.open_metrics else (),
    )
    state.foldserve_lifecycle = Lifecycle(engine_client, access, shared)


def _renderer(theirs: OnlineRenderer) -> OnlineRenderer:
    """A copy of vLLM's renderer that may pass processor kwargs; all other routes keep refusing them."""
    ours = copy(theirs)
    ours.trust_request_mm_kwargs = True
    return ours
