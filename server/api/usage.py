"""`usage.vision_tokens`: what was really applied to images and videos, read from their plans and the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.inputs import EngineInput

from foldserve.reducers.item import ItemPlan
from foldserve.server.api.errors import FoldserveError, InvalidRequest
from foldserve.server.auto import AutoChoice
from foldserve.server.engine.family import Modality
from foldserve.server.engine.withdrawal import StepCapacity, TokenMap, admit, prompt_items


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """Vision tokens of one request with images or videos.

    Attributes:
        plans: one per image and video, in prompt order.
        modalities: of each plan.
        withdrawn_each: tokens of each that leave the decoder at layer K: all, or those that its method removes.
        withdraw_layer: K of the server; None without withdrawal.
        auto: the choice for `ratio: "auto"`; None where the ratio was given.
    """

    plans: tuple[ItemPlan, ...]
    modalities: tuple[Modality, ...]
    withdrawn_each: tuple[int, ...]
    withdraw_layer: int | None = None
    auto: AutoChoice | None = None

    @property
    def encoded(self) -> int:
        return sum(plan.encoded for plan in self.plans)

    @property
    def kept(self) -> int:
        return sum(plan.kept for plan in self.plans)

    @property
    def withdrawn(self) -> int:
        return sum(self.withdrawn_each)

    @property
    def is_reduced(self) -> bool:
        """Whether some tokens do not reach every layer of the decoder."""
        return self.kept < self.encoded or self.withdrawn > 0

    @property
    def method(self) -> str:
        """The method of all items, or `mixed`."""
        methods = {plan.method for plan in self.plans}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def decoder(self) -> str:
        """The method in the decoder of all items, or `mixed`."""
        methods = {plan.decoder for plan in self.plans}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def ratio(self) -> float:
        """Share of the encoded tokens that was removed before the decoder, as really applied."""
        return 1 - self.kept / self.encoded

    def to_json(self) -> dict[str, object]:
        """The body of `usage.vision_tokens`.

        `images` lists each image if they were reduced differently. With videos, `images` and `videos` list all.
        """
        body = _entry(self.encoded, self.kept, self.withdrawn, self.method)
        if any(plan.keeps_positions for plan in self.plans):
            body["positions"] = "keep"
        if self.auto is not None:
            body |= self.auto.to_json()
        if self.withdrawn:
            body |= {"withdraw_layer": self.withdraw_layer, "decoder": self.decoder}
        if len(set(self.plans)) > 1 or "video" in self.modalities:
            for modality in dict.fromkeys(self.modalities):
                each = zip(self.each, self.modalities, strict=True)
                body[f"{modality}s"] = [entry for entry, own in each if own == modality]
        return body

    @property
    def each(self) -> list[dict[str, object]]:
        counts = zip(self.plans, self.withdrawn_each, strict=True)
        return [_entry(plan.encoded, plan.kept, withdrawn, plan.method) for plan, withdrawn in counts]

    def to_header(self) -> str:
        """`to_json` without its lists, for a response header: `encoded=144, kept=72, ...`."""
        return ", ".join(f"{name}={value}" for name, value in self.to_json().items() if not isinstance(value, list))


def vision_tokens(
    planned: Mapping[Modality, Sequence[ItemPlan]],
    prompt: EngineInput,
    withdraw_layer: int | None,
    capacity: StepCapacity,
    auto: AutoChoice | None = None,
) -> VisionTokens | None:
    """Counts the tokens of a rendered prompt; None if it has no planned images or videos.

    Args:
        planned: by modality, each in prompt order.
        capacity: for a prompt in one step of the engine.
        auto: the choice for `ratio: "auto"`.

    Raises:
        InvalidRequest: the plans can't be followed in the decoder for this prompt.
        FoldserveError: the prompt has another number of vision tokens than planned; usage, KV blocks and encoder would
            drift apart unnoticed.
    """
    if not planned:
        return None
    fields: dict[str, Any] = dict(prompt)
    items = [
        (place, plan, modality)
        for modality, of_modality in planned.items()
        for place, plan in zip(fields["mm_placeholders"][modality], of_modality, strict=True)
    ]
    places, plans, modalities = zip(*sorted(items, key=lambda item: item[0].offset), strict=True)
    expected = [plan.kept for plan in plans]
    found = [place.get_num_embeds() for place in places]
    if found != expected:
        raise FoldserveError(f"the prompt holds {found} vision tokens where {expected} were planned")
    if all(plan.decoder == "none" for plan in plans):
        return VisionTokens(plans, modalities, (0,) * len(plans), withdraw_layer, auto)
    try:
        token_map = admit(prompt_items(fields), len(fields["prompt_token_ids"]), capacity)
    except ValueError as error:
        raise InvalidRequest(str(error), "messages") from error
    return VisionTokens(plans, modalities, tuple(_withdrawn(token_map, places)), withdraw_layer)


def _withdrawn(tokens: TokenMap, places: Iterable[Any]) -> Iterable[int]:
    for place in places:
        yield tokens.withdrawn(place.offset + place.length) - tokens.withdrawn(place.offset)


def _entry(encoded: int, kept: int, withdrawn: int, method: str) -> dict[str, object]:
    ratio = round(1 - kept / encoded, 4)
    return {"encoded": encoded, "kept": kept, "withdrawn": withdrawn, "method": method, "ratio": ratio}
