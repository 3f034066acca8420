"""The chat request: OpenAI's fields as vLLM reads them, and how to reduce images and videos."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator, PrivateAttr, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from foldserve.reducers.reduction import FIELDS, Reduction
from foldserve.server.api import auto
from foldserve.server.api.auto import AutoRatio
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.image_cache import PendingImages
from foldserve.server.api.limits import forms
from foldserve.server.api.limits.body import media_of
from foldserve.server.api.limits.misplaced import URL_FIELDS
from foldserve.server.api.quality_guard import CheckedAnswer, is_greedy
from foldserve.server.api.usage import VisionTokens
from foldserve.server.auto import AutoChoice
from foldserve.server.engine.fair_queue import KEY
from foldserve.server.engine.family import Modality
from foldserve.server.engine.query import text_of

_SHARE_OR_AUTO = {"anyOf": [FIELDS["ratio"].values(), {"type": "string", "const": auto.AUTO}]}
_REDUCTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "How images and videos are reduced. Without `ratio` and `keep_tokens` nothing is removed, unless "
    "the method itself decides how much.",
    "properties": {name: field.schema() for name, field in {**FIELDS, **auto.AUTO_FIELDS}.items()}
    | {"ratio": _SHARE_OR_AUTO | {"description": FIELDS["ratio"].summary + '; "auto": as calibrated'}},
}
_RATIO_SCHEMA = _SHARE_OR_AUTO | {"description": "short for `reduction.ratio`"}
DETAILS = ("auto", "low", "high", "original")


RequestedReduction = Reduction | AutoRatio


def _parse_reduction(value: object) -> RequestedReduction | None:
    return None if value is None else auto.parse_requested_reduction(value)


def _parse_ratio(value: object) -> RequestedReduction | None:
    return None if value is None else auto.parse_requested_reduction({"ratio": value})


@lru_cache(maxsize=8)
def _by_detail(default: Reduction, low: Reduction) -> Mapping[str, Reduction]:
    return {"auto": default, "low": low, "high": Reduction(), "original": Reduction()}


@dataclass(slots=True)
class RequestProgress:
    """What is known of a request so far.

    Attributes:
        details: `detail` of each image and each video.
        image_names: of each image its URL, which may hold the image, or its uuid, if it has any.
        texts: of the message that each image and each video is in.
        arrived_s: by `time.perf_counter`.
        vision: cost of its images and videos, once they are planned.
        pending_images: its images, until it is known whether they reached the engine.
        is_answered: the engine has sent its last output.
        owner: name of its key.
        form: of the answer, once it is known that the engine can follow it.
        image_salt: divides the caches of images, see `cache_salts`.
        failure: why its outputs ended, in the client's words.
        auto: the choice for `ratio: "auto"`, of each image.
        body: as it was sent, until it is known whether the answer is to be checked.
        answer: to be checked.
    """

    details: dict[Modality, list[str]] = field(default_factory=dict)
    image_names: list[str | None] = field(default_factory=list)
    texts: dict[Modality, list[str]] = field(default_factory=dict)
    arrived_s: float = field(default_factory=time.perf_counter)
    vision: VisionTokens | None = None
    pending_images: PendingImages | None = None
    is_answered: bool = False
    owner: str | None = None
    form: StructuredOutputsParams | None = None
    image_salt: str | None = None
    failure: Exception | None = None
    auto: Sequence[AutoChoice] = ()
    body: Mapping[str, Any] | None = None
    answer: CheckedAnswer | None = None


class FoldChatRequest(ChatCompletionRequest):
    """vLLM's chat request, with `reduction` and its short form `reduction_ratio`."""

    field_names: ClassVar[set[str] | None] = None  # the base class has a cache of that name, which must not be shared

    reduction: Annotated[
        RequestedReduction | None, PlainValidator(_parse_reduction), WithJsonSchema(_REDUCTION_SCHEMA)
    ] = None
    reduction_ratio: Annotated[
        RequestedReduction | None, PlainValidator(_parse_ratio), WithJsonSchema(_RATIO_SCHEMA)
    ] = None

    # one, since pydantic is slow with private attributes
    _progress: RequestProgress = PrivateAttr(default_factory=RequestProgress)

    @model_validator(mode="wrap")
    @classmethod
    def _read_parts(cls, data: Any, handler: Any) -> Any:
        """Reads images and videos before validation turns message content into one-shot iterators."""
        media = _read_media(data) if isinstance(data, dict) else _MediaParts()
        request = handler(data)
        if request.reduction is not None and request.reduction_ratio is not None:
            raise InvalidRequest(
                "both `reduction` and `reduction_ratio` came: the latter is short for `reduction.ratio`, send one",
                "reduction_ratio",
            )
        progress = request._progress
        progress.details, progress.texts = media.details, media.texts
        progress.body = data if media.details else None
        if isinstance(request.requested_reduction, AutoRatio):
            progress.image_names = media.images
        return request

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters, with the key for the scheduler's turns, and the form that was built."""
        params = super().to_sampling_params(*args, **kwargs)
        if self._progress.owner is not None:
            params.extra_args = {KEY: self._progress.owner}
        if self._progress.form is not None:
            forms.put(self._progress.form, params)
        if (answer := self._progress.answer) is not None:
            params.logprobs = params.logprobs or 0
            answer.is_greedy = is_greedy(params)
        return params

    @property
    def progress(self) -> RequestProgress:
        return self._progress

    @property
    def has_media(self) -> bool:
        return bool(self._progress.details)

    @property
    def requested_reduction(self) -> RequestedReduction | None:
        return self.reduction if self.reduction is not None else self.reduction_ratio

    def reductions(
        self, default: Mapping[Modality, Reduction], low: Mapping[Modality, Reduction]
    ) -> dict[Modality, list[Reduction]]:
        """One per image and video, in prompt order: the explicit one, `low` for `detail: "low"`, or `default`."""
        explicit = self.requested_reduction
        assert not isinstance(explicit, AutoRatio)  # the planner turns it into reductions
        reductions: dict[Modality, list[Reduction]] = {}
        for modality, details in self._progress.details.items():
            by_detail = _by_detail(default[modality], low[modality])
            reductions[modality] = [by_detail[detail] if explicit is None else explicit for detail in details]
        return reductions


@dataclass(frozen=True, slots=True)
class _MediaParts:
    """Images and videos of a raw chat body; see `RequestProgress`."""

    details: dict[Modality, list[str]] = field(default_factory=dict)
    texts: dict[Modality, list[str]] = field(default_factory=dict)
    images: list[str | None] = field(default_factory=list)


def _read_media(body: Mapping[str, Any]) -> _MediaParts:
    """Leaves unknown shapes to validation."""
    media = _MediaParts()
    messages = body.get("messages")
    for m, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        parts = [part if isinstance(part, dict) else {} for part in (content if isinstance(content, list) else ())]
        text = text_of(parts)
        for p, part in enumerate(parts):
            if (modality := media_of(part)) is not None:
                detail = _detail(part, URL_FIELDS[modality], f"messages[{m}].content[{p}]")
                media.details.setdefault(modality, []).append(detail)
                media.texts.setdefault(modality, []).append(text)
                if modality == "image":
                    media.images.append(_name(part))
    return media


def _name(part: Mapping[str, Any]) -> str | None:
    source = part.get(URL_FIELDS["image"])
    url = source.get("url") if isinstance(source, dict) else source
    return next((name for name in (url, part.get("uuid")) if isinstance(name, str)), None)


def _detail(part: Mapping[str, Any], field: str, path: str) -> str:
    """An item's `detail`; drops "" and null, which pydantic would refuse but some clients always send."""
    source = part.get(field)
    for holder in (part, source):
        if isinstance(holder, dict) and holder.get("detail") in (None, ""):
            holder.pop("detail", None)
    inner = source.get("detail") if isinstance(source, dict) else None
    outer = part.get("detail")  # as in `{"image_url": "http...", "detail": "low"}`, which vLLM takes too
    for detail, place in ((inner, f"{field}.detail"), (outer, "detail")):
        if detail not in (None, *DETAILS):
            raise InvalidRequest(f"detail must be one of {', '.join(DETAILS)}; got {detail!r:.50}", f"{path}.{place}")
    if inner and outer and inner != outer:
        raise InvalidRequest(f"detail came twice: write it into `{field}` alone", f"{path}.detail")
    return str(inner or outer or "auto")
