"""Compiles forms of answers (schemas, regular expressions, grammars) in a thread, and lets vLLM skip them.

What: vLLM's check of a request's parameters leaves out a form that `FormCompiler` has compiled.
Why: vLLM compiles it to check it, on the event loop: 64 kB block all other requests for 0.4 s.
Upstream: `AsyncLLM.add_request` checks on the loop, in vLLM 0.32.
Remove when: vLLM checks forms elsewhere.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from foldserve.server.api.errors import InvalidRequest, translate

if TYPE_CHECKING:
    from foldserve.server.api.schema import FoldChatRequest

_FIELDS = ("response_format", "structured_outputs")


class _CompiledParams(SamplingParams):
    """Parameters whose form is known to compile."""

    def _validate_structured_outputs(self, *args: Any) -> None:
        """Does nothing; the form's `_backend` names what compiles it in the engine."""


def field(request: FoldChatRequest) -> str | None:
    """The field that asks for a form, or None."""
    return next((name for name in _FIELDS if getattr(request, name) is not None), None)


class FormCompiler:
    """Compiles forms for one engine, in threads of its own."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(2, "form")

    async def build(self, request: FoldChatRequest) -> StructuredOutputsParams | None:
        """Compiles the form that a request asks for, for `put`; None if it asks for none.

        Raises InvalidRequest if the form can't be compiled.
        """
        if field(request) is None:
            return None
        model_config, config = self._engine.model_config, self._engine.vllm_config.structured_outputs_config
        # only the form counts here: min_tokens may be as high as the model's length
        params = request.to_sampling_params(model_config.max_model_len, {})
        compile_form = partial(
            params._validate_structured_outputs, model_config, config, self._engine.renderer.tokenizer
        )
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, compile_form)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise explain(request, error) from None
        return params.structured_outputs


def put(form: StructuredOutputsParams, params: SamplingParams) -> None:
    """Gives parameters a form that `FormCompiler` returned, so that vLLM does not compile it again."""
    params.structured_outputs = form
    params.__class__ = _CompiledParams


def explain(request: FoldChatRequest, error: Exception) -> Exception:
    """Translates an error of vLLM; it is the form's if vLLM names no parameter."""
    name = field(request)
    if name is not None and getattr(error, "parameter", None) is None:
        return refusal(name)
    return translate(error)


def refusal(name: str) -> InvalidRequest:
    return InvalidRequest(f"an answer in the form that {name} asks for can't be made: simplify it", name)
