"""The vLLM endpoint plugin: replaces the chat route, adds `/v1/reducers`, refuses what would ignore a reduction."""

from __future__ import annotations

from argparse import Namespace

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tasks import SupportedTask

from foldserve.server.api import metrics as metrics  # registers the metrics before the first scrape
from foldserve.server.api.planner import Planner
from foldserve.server.api.routes import refuse_other_routes, router
from foldserve.server.api.schema import Defaults
from foldserve.server.api.serving import FoldServingChat
from foldserve.server.engine.geometry import vision_geometry
from foldserve.server.engine.kv_cost import kv_cost
from foldserve.server.engine.withdrawal import step_room
from foldserve.server.settings import CONFIG_KEY


class FoldserveEndpoint:
    """See `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "foldserve_api"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        refuse_other_routes(app)
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        assert engine_client is not None, "required_tasks asks for an engine"
        config = args.additional_config or {}
        withdraw_layer = config.get(CONFIG_KEY, {}).get("withdraw_layer")
        state.foldserve_chat = FoldServingChat(
            engine_client,
            state.openai_serving_models,
            args.response_role,
            planner=Planner(
                vision_geometry(engine_client.model_config.hf_config),
                Defaults.from_config(config),
                withdraw_layer,
                step_room(engine_client.vllm_config),
            ),
            kv_cost=kv_cost(engine_client.vllm_config, withdraw_layer),
            online_renderer=_renderer(engine_client, state, args),
            request_logger=state.openai_serving_chat.request_logger,
            chat_template=load_chat_template(args.chat_template),
            chat_template_content_format=args.chat_template_content_format,
            default_chat_template_kwargs=resolve_default_chat_template_kwargs(args),
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


def _renderer(engine_client: EngineClient, state: State, args: Namespace) -> OnlineRenderer:
    """A renderer of our own: it alone may pass processor kwargs, every other route keeps refusing them."""
    return OnlineRenderer(
        model_config=engine_client.model_config,
        renderer=engine_client.renderer,
        request_logger=state.openai_serving_chat.request_logger,
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        trust_request_chat_template=args.trust_request_chat_template,
        trust_request_mm_kwargs=True,
        enable_auto_tools=args.enable_auto_tool_choice,
        exclude_tools_when_tool_choice_none=args.exclude_tools_when_tool_choice_none,
        tool_parser=args.tool_call_parser,
        tool_strict_level=args.tool_strict_level,
        reasoning_parser=args.structured_outputs_config.reasoning_parser,
        default_chat_template_kwargs=resolve_default_chat_template_kwargs(args),
        log_error_stack=args.log_error_stack,
    )
