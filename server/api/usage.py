"""`usage.vision_tokens`: what was really applied to a request's images, read off their plans and the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.inputs import EngineInput

from foldserve.reducers.item import ItemPlan
from foldserve.server.api.errors import FoldserveError, InvalidRequest
from foldserve.server.engine.withdrawal import Room, TokenMap, admit, prompt_items


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """Vision tokens of one request with images.

    Attributes:
        plans: one per image, in prompt order.
        withdrawn_each: tokens of each image that leave the decoder at layer K: all, or those that its method removes.
        withdraw_layer: K of the server, None without withdrawal.
    """

    plans: tuple[ItemPlan, ...]
    withdrawn_each: tuple[int, ...]
    withdraw_layer: int | None = None

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
    def method(self) -> str:
        """The method of all images, or `mixed`."""
        methods = {plan.method for plan in self.plans}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def decoder(self) -> str:
        """The method that works in the decoder, likewise."""
        methods = {plan.decoder for plan in self.plans}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def ratio(self) -> float:
        """Share of the encoded tokens that was removed before the decoder, as really applied."""
        return 1 - self.kept / self.encoded

    def to_json(self) -> dict[str, object]:
        """The body of `usage.vision_tokens`; `images` lists each image where they were reduced differently."""
        body = _entry(self.encoded, self.kept, self.withdrawn, self.method)
        if any(plan.keeps_positions for plan in self.plans):
            body["positions"] = "keep"
        if self.withdrawn:
            body |= {"withdraw_layer": self.withdraw_layer, "decoder": self.decoder}
        if len(set(self.plans)) > 1:
            each = zip(self.plans, self.withdrawn_each, strict=True)
            body["images"] = [_entry(plan.encoded, plan.kept, withdrawn, plan.method) for plan, withdrawn in each]
        return body

    def to_header(self) -> str:
        """The same for the response's headers, all images together: `encoded=144, kept=72, ...`."""
        return ", ".join(f"{name}={value}" for name, value in self.to_json().items() if name != "images")


def vision_tokens(
    plans: Sequence[ItemPlan], prompt: EngineInput, withdraw_layer: int | None, room: Room
) -> VisionTokens | None:
    """Counts of a rendered prompt; None for one without planned images.

    Args:
        room: that a prompt has in one step of the engine.

    Raises:
        InvalidRequest: the prompt does not go with what its images' plans want in the decoder.
        FoldserveError: the prompt holds another number of vision tokens than was planned: usage, KV blocks and encoder
            would drift apart unnoticed.
    """
    if not plans:
        return None
    fields: dict[str, Any] = dict(prompt)
    places = fields["mm_placeholders"]["image"]
    planned = [plan.kept for plan in plans]
    found = [place.get_num_embeds() for place in places]
    if found != planned:
        raise FoldserveError(f"the prompt holds {found} vision tokens where {planned} were planned")
    if all(plan.decoder == "none" for plan in plans):
        return VisionTokens(tuple(plans), (0,) * len(plans), withdraw_layer)
    try:
        token_map = admit(prompt_items(fields), len(fields["prompt_token_ids"]), room)
    except ValueError as error:
        raise InvalidRequest(str(error), "messages") from error
    return VisionTokens(tuple(plans), tuple(_withdrawn(token_map, places)), withdraw_layer)


def _withdrawn(tokens: TokenMap, places: Iterable[Any]) -> Iterable[int]:
    for place in places:
        yield tokens.withdrawn(place.offset + place.length) - tokens.withdrawn(place.offset)


def _entry(encoded: int, kept: int, withdrawn: int, method: str) -> dict[str, object]:
    ratio = round(1 - kept / encoded, 4)
    return {"encoded": encoded, "kept": kept, "withdrawn": withdrawn, "method": method, "ratio": ratio}
