"""The chat request: OpenAI's fields as vLLM knows them, and how much to reduce its images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator, PrivateAttr, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from foldserve.reducers.reduction import FIELDS, Reduction
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.image_cache import OnItsWay
from foldserve.server.api.limits import forms
from foldserve.server.api.limits.body import is_image
from foldserve.server.api.usage import VisionTokens
from foldserve.server.engine.fair_queue import KEY

_REDUCTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "How the request's images are reduced. Without `ratio` and `keep_tokens` nothing is removed.",
    "properties": {name: field.schema() for name, field in FIELDS.items()},
}
_RATIO_SCHEMA = FIELDS["ratio"].values() | {"description": "short for `reduction.ratio`"}
DETAILS = ("auto", "low", "high", "original")


def _parse_reduction(value: object) -> Reduction | None:
    return None if value is None else Reduction.parse(value)


def _parse_ratio(value: object) -> Reduction | None:
    return None if value is None else Reduction.parse({"ratio": value})


@lru_cache(maxsize=8)
def _by_detail(default: Reduction, low: Reduction) -> Mapping[str, Reduction]:
    """What `image_url.detail` asks for."""
    return {"auto": default, "low": low, "high": Reduction(), "original": Reduction()}


@dataclass(slots=True)
class Progress:
    """What is known of a request while it is worked on.

    Attributes:
        details: `image_url.detail` of each image.
        arrived: by `time.perf_counter`.
        vision: what its images cost, once they are planned.
        on_its_way: to the engine, with images that it may hold later.
        answered: its last output has come from the engine.
        owner: name of the key that asks.
        form: of the answer, once it is known that it can be made.
        image_salt: divides the caches of images, see `cache_salts`.
        failure: why its outputs ended, as clients are to be told.
    """

    details: list[str] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    vision: VisionTokens | None = None
    on_its_way: OnItsWay | None = None
    answered: bool = False
    owner: str | None = None
    form: StructuredOutputsParams | None = None
    image_salt: str | None = None
    failure: Exception | None = None


class FoldChatRequest(ChatCompletionRequest):
    """vLLM's chat request with `reduction` and its short form `reduction_ratio`."""

    field_names: ClassVar[set[str] | None] = None  # a cache of the base class, which must not be shared with it

    reduction: Annotated[Reduction | None, PlainValidator(_parse_reduction), WithJsonSchema(_REDUCTION_SCHEMA)] = None
    reduction_ratio: Annotated[Reduction | None, PlainValidator(_parse_ratio), WithJsonSchema(_RATIO_SCHEMA)] = None

    _progress: Progress = PrivateAttr(default_factory=Progress)  # one: pydantic looks it up slowly

    @model_validator(mode="wrap")
    @classmethod
    def _read_details(cls, data: Any, handler: Any) -> Any:
        """Notes `image_url.detail` of each image before validation turns message content into one-shot iterators."""
        details = list(_image_details(data)) if isinstance(data, dict) else []
        request = handler(data)
        if request.reduction is not None and request.reduction_ratio is not None:
            raise InvalidRequest(
                "both `reduction` and `reduction_ratio` came: the latter is short for `reduction.ratio`, send one",
                "reduction_ratio",
            )
        request._progress.details = details
        return request

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's, with the key that asks, whom the scheduler gives a turn, and the form that was built."""
        params = super().to_sampling_params(*args, **kwargs)
        if self._progress.owner is not None:
            params.extra_args = {KEY: self._progress.owner}
        if self._progress.form is not None:
            forms.put(self._progress.form, params)
        return params

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def has_images(self) -> bool:
        return bool(self._progress.details)

    def image_reductions(self, default: Reduction, low: Reduction) -> list[Reduction]:
        """One reduction per image, in prompt order: the explicit one, or else what the image's `detail` says.

        Args:
            default: where nothing is said.
            low: with `detail: "low"`.
        """
        explicit = self.reduction if self.reduction is not None else self.reduction_ratio
        details = self._progress.details
        if explicit is not None:
            return [explicit] * len(details)
        by_detail = _by_detail(default, low)
        return [by_detail[detail] for detail in details]


def _image_details(body: Mapping[str, Any]) -> Iterator[str]:
    """The `detail` of every image part of a raw chat body; unknown shapes are left to validation."""
    messages = body.get("messages")
    for m, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for p, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict) and is_image(part):
                yield _detail(part, f"messages[{m}].content[{p}]")


def _detail(part: Mapping[str, Any], path: str) -> str:
    """What an image's `detail` says; "" or null, which pydantic would refuse, come from clients that always send it."""
    image = part.get("image_url")
    for holder in (part, image):
        if isinstance(holder, dict) and holder.get("detail") in (None, ""):
            holder.pop("detail", None)
    inner = image.get("detail") if isinstance(image, dict) else None
    outer = part.get("detail")  # as in `{"image_url": "http...", "detail": "low"}`, which vLLM takes too
    for detail, place in ((inner, "image_url.detail"), (outer, "detail")):
        if detail not in (None, *DETAILS):
            raise InvalidRequest(f"detail must be one of {', '.join(DETAILS)}; got {detail!r:.50}", f"{path}.{place}")
    if inner and outer and inner != outer:
        raise InvalidRequest("detail came twice: write it into `image_url` alone", f"{path}.detail")
    return str(inner or outer or "auto")
