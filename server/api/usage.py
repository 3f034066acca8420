"""`usage.vision_tokens`: what was really applied to a request's images, read off their plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foldserve.reducers.plan import Plan


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """Vision tokens of one request.

    Args:
        plans: one per image, in prompt order.
        withdraw_layer: K of the server, None without withdrawal.
    """

    plans: tuple[Plan, ...]
    withdraw_layer: int | None = None

    @property
    def encoded(self) -> int:
        return sum(plan.encoded for plan in self.plans)

    @property
    def kept(self) -> int:
        return sum(plan.kept for plan in self.plans)

    @property
    def withdrawn(self) -> int:
        return sum(plan.kept for plan in self.plans if plan.withdraw)

    @property
    def method(self) -> str:
        """The method of all images, or `mixed`."""
        methods = {plan.method for plan in self.plans}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def ratio(self) -> float:
        """Share of the encoded tokens that was removed before the decoder, as really applied."""
        return 1 - self.kept / self.encoded

    def to_json(self) -> dict[str, object]:
        """The body of `usage.vision_tokens`; `images` lists each image where they were reduced differently."""
        body = _entry(self.encoded, self.kept, self.withdrawn, self.method)
        if self.withdrawn:
            body["withdraw_layer"] = self.withdraw_layer
        if len(set(self.plans)) > 1:
            body["images"] = [_entry(p.encoded, p.kept, p.kept * p.withdraw, p.method) for p in self.plans]
        return body


def vision_tokens(plans: Sequence[Plan], withdraw_layer: int | None) -> VisionTokens | None:
    """None for a request without images."""
    return VisionTokens(tuple(plans), withdraw_layer) if plans else None


def _entry(encoded: int, kept: int, withdrawn: int, method: str) -> dict[str, object]:
    ratio = round(1 - kept / encoded, 4)
    return {"encoded": encoded, "kept": kept, "withdrawn": withdrawn, "method": method, "ratio": ratio}
