"""Grammars of structured outputs are built once, off the event loop, and passed to the engine."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits import forms
from foldserve.server.api.schema import FoldChatRequest

ADDRESSES = {
    "type": "object",
    "properties": {f"key-{i}": {"type": "string", "format": "ipv6"} for i in range(900)},
    "required": [f"key-{i}" for i in range(900)],
}


@pytest.fixture(scope="module")
def engine(tiny_llava: Path) -> Any:
    model = EngineArgs(model=str(tiny_llava)).create_model_config()
    config = Namespace(structured_outputs_config=StructuredOutputsConfig(backend="xgrammar"))
    renderer = Namespace(tokenizer=AutoTokenizer.from_pretrained(tiny_llava))
    return Namespace(model_config=model, vllm_config=config, renderer=renderer)


def asking(**fields: object) -> FoldChatRequest:
    request: FoldChatRequest = FoldChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)
    return request


def schema(value: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


def verify(params: SamplingParams, engine: Any) -> None:
    config, tokenizer = engine.vllm_config.structured_outputs_config, engine.renderer.tokenizer
    params.verify(engine.model_config, None, config, tokenizer)


def test_others_are_served_while_a_form_is_built(engine: Any) -> None:
    async def rounds_beside() -> int:
        building = asyncio.create_task(forms.FormCompiler(engine).build(asking(**schema(ADDRESSES))))
        rounds = 0
        while not building.done():
            await asyncio.sleep(0.001)
            rounds += 1
        await building
        return rounds

    assert asyncio.run(rounds_beside()) > 20


@pytest.mark.parametrize(
    "fields",
    [schema(ADDRESSES), {"structured_outputs": {"regex": "a+"}}, {"response_format": {"type": "json_object"}}],
    ids=["schema", "regex", "object"],
)
def test_it_is_built_once(fields: dict[str, object], engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = asking(**fields)
    wanted = request.to_sampling_params(4, {})
    verify(wanted, engine)
    request.progress.form = asyncio.run(forms.FormCompiler(engine).build(request))
    monkeypatch.setattr("vllm.v1.structured_output.backend_xgrammar.validate_xgrammar_grammar", None)
    found = request.to_sampling_params(4, {})
    for params in (found, copy(found), deepcopy(found)):  # as for several answers
        verify(params, engine)
        assert params.structured_outputs == wanted.structured_outputs
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(found))
    assert type(sent) is SamplingParams
    assert sent == MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(wanted))


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 300, "max_tokens": 400},
        {"min_tokens": 300},
        {"max_completion_tokens": 1},
        {"n": 4, "temperature": 1, "seed": 7},
        {"logprobs": True, "top_logprobs": 5},
        {"stop": ["x"], "stop_token_ids": [2], "logit_bias": {"5": 1}},
        {"stream": True, "ignore_eos": True},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_other_fields_do_not_matter(fields: dict[str, object], engine: Any) -> None:
    form = asyncio.run(forms.FormCompiler(engine).build(asking(structured_outputs={"regex": "a+"}, **fields)))
    assert form is not None
    assert form.regex == "a+"


def test_without_a_form_nothing_is_built(engine: Any) -> None:
    request = asking()
    assert asyncio.run(forms.FormCompiler(engine).build(request)) is None
    assert type(request.to_sampling_params(4, {})) is SamplingParams


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(("}},
        {"structured_outputs": {"grammar": "root ::= ("}},
        {"structured_outputs": {"choice": []}},
        schema({"$ref": "#/nowhere"}),
    ],
    ids=["regex", "grammar", "choice", "schema"],
)
def test_what_can_not_be_built_is_refused(fields: dict[str, object], engine: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(forms.FormCompiler(engine).build(asking(**fields)))
    assert caught.value.param in fields
