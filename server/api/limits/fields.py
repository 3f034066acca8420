"""Bounds on a chat request's numbers and lists, once pydantic has read them."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RepetitionDetectionParams

from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.limits import Limits

if TYPE_CHECKING:
    from foldserve.server.api.schema import FoldChatRequest

_LARGEST_TOP_K = 2**31 - 1
_LARGEST_PATTERN = 1024
_GREEDY_BELOW = 1e-5  # vLLM takes a lower temperature for 0
_NAME = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")


def check_fields(request: FoldChatRequest, limits: Limits, context: int, tokens: Container[int]) -> None:
    """Refuses values that cost too much or are impossible.

    Args:
        context: tokens of prompt and answer together that the model takes.
        tokens: ids that the tokenizer knows.

    Raises:
        InvalidRequest, LimitExceeded: with the field as `param`.
    """
    values = vars(request)  # read as attributes, OpenAI's older names warn
    for name, least, most in _ranges(limits, context):
        _check_range(values[name], name, least, most)
    if values["top_p"] == 0:
        raise LimitExceeded("top_p must be above 0 and at most 1", "top_p")
    _check_repetition(values["repetition_detection"])
    _check_together(values)
    for name in ("stop", "bad_words"):
        _check_strings(values[name], name, limits)
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_tokens(values[name], name, tokens)
    for name in ("request_id", "session_id"):
        value = values[name]
        if value is not None and not _NAME.fullmatch(value):
            raise InvalidRequest(f"{name} must be 1 to 128 letters, digits or one of ._:/=+-", name)
    if values["truncate_prompt_tokens"] is not None and request.has_media:
        raise InvalidRequest("a prompt with images or videos can't be cut: leave this out", "truncate_prompt_tokens")


def _ranges(limits: Limits, context: int) -> tuple[tuple[str, float, float], ...]:
    """Fields with their least and their largest value."""
    return (
        ("n", 1, limits.max_choices),
        ("max_tokens", 1, context),
        ("max_completion_tokens", 1, context),
        ("min_tokens", 0, context),
        ("top_logprobs", 0, limits.max_top_logprobs),
        ("prompt_logprobs", 0, limits.max_top_logprobs),
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("top_k", -1, _LARGEST_TOP_K),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.01, 100),
        ("length_penalty", -10, 10),
        ("priority", -1000, 1000),
        ("stream_interval", 1, context),
        ("routed_experts_prompt_start", 0, context),
    )


def _check_together(values: Mapping[str, Any]) -> None:
    most = values["max_completion_tokens"] or values["max_tokens"]
    if most is not None and values["min_tokens"] > most:
        raise InvalidRequest(f"min_tokens must be at most {most}, the most tokens asked for", "min_tokens")
    temperature = values["temperature"]
    greedy = temperature is not None and temperature < _GREEDY_BELOW and not values["use_beam_search"]
    if greedy and (values["n"] or 1) > 1:
        raise InvalidRequest("n must be 1 at temperature 0: all answers would be the same", "n")


def _check_repetition(detection: RepetitionDetectionParams | None) -> None:
    """After each token, the engine looks for repetitions of every size that the request names."""
    for name in ("max_pattern_size", "min_pattern_size", "min_count") if detection else ():
        _check_range(getattr(detection, name), f"repetition_detection.{name}", 0, _LARGEST_PATTERN)


def _check_range(value: float | None, name: str, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise LimitExceeded(f"{name} must be at least {least} and at most {most}, not {value}", name)


def _check_strings(value: str | list[str] | None, name: str, limits: Limits) -> None:
    strings = [value] if isinstance(value, str) else value or []
    if not all(0 < len(text) <= limits.max_stop_chars for text in strings):
        raise LimitExceeded(f"each text in {name} must have 1 to {limits.max_stop_chars} characters", name)


def _check_tokens(value: Any, name: str, tokens: Container[int]) -> None:
    for token in value or ():
        try:
            known = int(token) in tokens
        except ValueError:
            known = False
        if not known:
            raise InvalidRequest(f"{name} holds {token!r:.30}, which is no token of this model's tokenizer", name)
    if isinstance(value, dict) and not all(-100 <= bias <= 100 for bias in value.values()):
        raise InvalidRequest("a bias must lie in [-100, 100]", name)
