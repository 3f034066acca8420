from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from foldserve.reducers import METHODS
from foldserve.server.api.errors import FoldserveError
from foldserve.server.api.routes import CHAT, MESSAGES, RESPONSES, replace_routes
from foldserve.server.api.schema import DETAILS
from tools.reference.markdown import code, prose, table

Schema = Mapping[str, Any]

_PAGE = """\
# API

`GET /openapi.json` has all of this for programs. A field that is wrong, or that would be ignored, is refused; nothing
is clamped.

## Endpoints

{endpoints}
## Fields of a reduction

`reduction` is an object of these fields, beside OpenAI's own in a body of `POST {chat}`, `{responses}` and
`{messages}`. `reduction_ratio` is short for `reduction.ratio`. A value out of its bounds is a 400 whose `param` names
the field, such as `reduction.ratio`.

{reduction}
`image_url.detail` and `video_url.detail` are read where a request says nothing of these: {details}. `high` and
`original` remove nothing, `low` is the server's `--low-detail-ratio`, `auto` its default.

## Fields of a chat

Those of `POST {chat}`; OpenAI's and vLLM's documents say what each means. Some are refused for what they would do here,
such as `mm_processor_kwargs` and `media_io_kwargs`: the message says why.

{fields}
## Fields of the other two APIs

`POST {responses}`:

{responses_fields}
`POST {messages}`:

{messages_fields}
## Errors

`{{"error": {{"message", "type", "param", "code"}}}}`, in Anthropic's form on `{messages}`. `type` is `server_error`
from 500 on and `invalid_request_error` below. `message` says what was wrong, what came and what to do. Codes about an
image are `invalid_video`, `refused_video_url` and `video_unavailable` of a video; HTTP that came too slowly is 408,
headers that are too large 431.

{errors}"""


def page() -> str:
    api = _app().openapi()
    bodies = {path: _body(api, path) for path in (CHAT, RESPONSES, MESSAGES)}
    reduction = bodies[CHAT]["reduction"]
    others = {name: schema for name, schema in bodies[CHAT].items() if not name.startswith("reduction")}
    return _PAGE.format(
        chat=CHAT,
        responses=RESPONSES,
        messages=MESSAGES,
        endpoints=table(["Endpoint", "What it does"], _endpoints(api)),
        reduction=_reduction_fields(reduction),
        details=", ".join(map(code, DETAILS)),
        fields=_fields(others),
        responses_fields=_fields(bodies[RESPONSES]),
        messages_fields=_fields(bodies[MESSAGES]),
        errors=table(["Status", "`code`", "When"], _errors()),
    )


def _app() -> FastAPI:
    """The server's application, without an engine."""
    app: FastAPI = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))
    replace_routes(app)
    return app


def _endpoints(api: Schema) -> Iterator[tuple[str, str]]:
    for path, methods in sorted(api["paths"].items()):
        for method, operation in methods.items():
            does = str(operation.get("description") or operation["summary"]).partition("\n\n")[0]
            yield code(f"{method.upper()} {path}"), prose(" ".join(does.split()))


def _body(api: Schema, path: str) -> Schema:
    """The properties of an endpoint's JSON."""
    schema: Schema = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    reference = schema.get("$ref")
    found: Schema = api["components"]["schemas"][reference.rpartition("/")[2]] if reference else schema
    properties: Schema = found["properties"]
    return properties


def _reduction_fields(reduction: Schema) -> str:
    rows = [_reduction_field(name, schema) for name, schema in reduction["properties"].items()]
    return table(["Field", "Values", "Default", "Methods", "Meaning"], rows)


def _reduction_field(name: str, schema: Schema) -> list[str]:
    takes = [method.name for method in METHODS.values() if name in (option.name for option in method.options)]
    takes += [method.name for method in METHODS.values() if name == "query" and method.takes_query]
    takes += [method.name for method in METHODS.values() if name == "decoder" and method.decoder_half]
    default = json.dumps(schema["default"]) if "default" in schema else ""
    return [code(name), _values(schema), code(default), ", ".join(map(code, takes)), prose(schema["description"])]


def _fields(properties: Schema) -> str:
    rows = [(code(name), _values(schema), code(_default(schema))) for name, schema in properties.items()]
    return table(["Field", "Values", "Default"], rows)


def _default(schema: Schema) -> str:
    return json.dumps(schema["default"]) if schema.get("default") is not None else ""


def _values(schema: Schema) -> str:
    """A JSON Schema in words: `number, at least 0, below 1`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(each) for each in schema["anyOf"] if each.get("type") != "null"))
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    if "enum" in schema:
        return ", ".join(code(json.dumps(each)) for each in schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array" and "items" in schema:
        items = _values(schema["items"])
        return ", ".join([f"array of ({items})" if ", " in items else f"array of {items}", *_bounds(schema)])
    return ", ".join([kind, *_bounds(schema)])


_WORDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
_INT64 = 2.0**63  # the bounds of any integer, which say nothing


def _bounds(schema: Schema) -> list[str]:
    return [text.format(f"{schema[key]:g}") for key, text in _WORDS.items() if abs(schema.get(key, _INT64)) < _INT64]


def _errors() -> Iterator[tuple[str, str, str]]:
    for error in sorted(_tree(FoldserveError), key=lambda error: (error.status, error.code)):
        when = (inspect.getdoc(error) or "").partition("\n")[0]
        yield f"{error.status.value} {error.status.phrase}", code(error.code), prose(when)


def _tree(error: type[FoldserveError]) -> Iterator[type[FoldserveError]]:
    """An error class and its subclasses, without those with a leading underscore, which are never raised."""
    if not error.__name__.startswith("_"):
        yield error
    for below in error.__subclasses__():
        yield from _tree(below)
