"""Forms of answers (schemas, regular expressions, grammars) are built in a thread, and not again by vLLM.

What: vLLM's check of a request's parameters leaves out a form that `build` has been through.
Why: vLLM builds it to see whether it can, on the event loop: 0.4 s for 64 kB in which nobody else is served.
Upstream: `AsyncLLM.add_request` checks on the loop, in vLLM 0.32.
Remove when: vLLM checks forms elsewhere.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from foldserve.server.api.errors import InvalidRequest, translate

if TYPE_CHECKING:
    from foldserve.server.api.schema import FoldChatRequest

_FIELDS = ("response_format", "structured_outputs")
_THREADS = ThreadPoolExecutor(2, "form")


class _BuiltBefore(SamplingParams):
    """Parameters whose form is known to be one that can be built."""

    def _validate_structured_outputs(self, *args: Any) -> None:
        """Nothing is left to do; `_backend` of the form says what is to build it in the engine."""


def field(request: FoldChatRequest) -> str | None:
    """The field that asks for a form; None where none does."""
    return next((name for name in _FIELDS if getattr(request, name) is not None), None)


async def build(request: FoldChatRequest, engine: EngineClient) -> StructuredOutputsParams | None:
    """The form that a request asks for, for `put`; None where it asks for none.

    Raises:
        InvalidRequest: it can't be made.
    """
    if field(request) is None:
        return None
    most = engine.model_config.max_model_len  # only the form counts here: min_tokens may be as high
    params = request.to_sampling_params(most, {})
    config, tokenizer = engine.vllm_config.structured_outputs_config, engine.renderer.tokenizer
    loop = asyncio.get_running_loop()
    try:
        await loop.run_in_executor(
            _THREADS, params._validate_structured_outputs, engine.model_config, config, tokenizer
        )
    except (VLLMClientError, ValueError, TypeError) as error:
        raise explain(request, error) from None
    return params.structured_outputs


def put(form: StructuredOutputsParams, params: SamplingParams) -> None:
    """Gives parameters a form that `build` returned, so that it is not built again."""
    params.structured_outputs = form
    params.__class__ = _BuiltBefore


def explain(request: FoldChatRequest, error: Exception) -> Exception:
    """A refusal of vLLM's, for the form where nothing else is named."""
    name = field(request)
    if name is not None and getattr(error, "parameter", None) is None:
        return refusal(name)
    return translate(error)


def refusal(name: str) -> InvalidRequest:
    """What a client is told whose form can't be made, or not be followed."""
    return InvalidRequest(f"an answer in the form that {name} asks for can't be made: simplify it", name)
