"""What clients are told where a library refuses: its own text may name classes, options and addresses of the server."""

from __future__ import annotations

from collections.abc import Mapping

_BY_TYPE = {
    "missing": "is missing",
    "extra_forbidden": "is not a known field",
    "none_required": "must be null",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have {min_length} characters or more",
    "string_too_long": "must have {max_length} characters at most",
    "too_short": "must have {min_length} entries or more",
    "too_long": "must have {max_length} entries at most",
}
_BY_KIND = {  # first word of pydantic's name of an error
    "string": "must be a text",
    "int": "must be an integer",
    "float": "must be a number",
    "bool": "must be true or false",
    "list": "must be a list",
    "tuple": "must be a list",
    "iterable": "must be a list",
    "dict": "must be an object",
    "mapping": "must be an object",
    "model": "must be an object",
    "dataclass": "must be an object",
}
_BY_FIELD = {
    "bad_words": "must be words that the tokenizer can write",
    "cache_salt": "must be 1 to 128 letters, digits or one of ._~-",
    "logprob_token_ids": "needs `logprobs`: true, and no beam search",
    "max_completion_tokens": "is more than the model's context holds beside the prompt",
    "max_tokens": "is more than the model's context holds beside the prompt",
    "messages": "are more than the model's context holds, or can't be read by the model's chat template",
    "prompt_logprobs": "must be an integer of at least 0, and can't be had with `stream`: true",
    "response_format": "must say `json_schema` where its type is json_schema",
    "stream_options": "can only be sent with `stream`: true",
    "thinking_token_budget": "can't be set on this server",
    "tool_choice": 'must be "none", "auto", "required" or the name of a function, which `tools` holds',
    "tools": "must not be empty",
    "top_logprobs": "must be an integer of at least 0, and needs `logprobs`: true",
}
_OTHERWISE = "has a value that is not allowed, or not allowed together with the other fields"


def describe_pydantic_error(error: Mapping[str, object]) -> str:
    """The predicate of a sentence about a field, for an error of pydantic."""
    kind, context = str(error.get("type")), error.get("ctx")
    template = _BY_TYPE.get(kind) or _BY_KIND.get(kind.partition("_")[0], _OTHERWISE)
    return template.format_map(context if isinstance(context, dict) else {})


def describe_refused_field(param: str | None) -> str:
    """A whole sentence about a field that vLLM refused; None if vLLM did not name it."""
    if param is None:
        return "the request asks for what this server can't do, or its fields don't go together"
    return f"{param} {_BY_FIELD.get(param.partition('.')[0], _OTHERWISE)}"
