"""An item's identity: the name under which every cache holds it, and all that other processes know of its reduction.

    identity = base ["@" full length] ["~" decoder method ":" kept]

`base` is vLLM's own hash, of the item and of the plan if tokens go before the decoder; an item of which nothing is
removed keeps vLLM's identity to the letter. What is cached under an identity (embeddings, KV blocks) belongs to one
reduction, since the reduction is part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WITHDRAW = "withdraw"
"""The decoder method that keeps nothing."""

_GRAMMAR = re.compile(r"(.*?)(?:@([0-9]+))?(?:~([a-z_]+):([0-9]+))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ItemIdentity:
    """What an identity says of an item.

    Attributes:
        base: the identity without the parts below. vLLM may put the name of an adapter before it.
        full_length: tokens that the encoder gives unreduced, where those that stay keep their positions, or None.
        decoder: the method that works at layer K, or None.
        kept: tokens that it keeps from there on; 0 with `WITHDRAW`, else at least 1.
    """

    base: str
    full_length: int | None = None
    decoder: str | None = None
    kept: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError if the base would be read as more than a base, or `kept` does not go with the method."""
        if _GRAMMAR.fullmatch(self.base).groups()[1:] != (None, None, None):  # type: ignore[union-attr]
            raise ValueError(
                f"{self.base!r} ends as identities of foldserve do (@NUMBER or ~NAME:NUMBER): give the item another "
                "uuid, or none"
            )
        if self.kept < 0 or (self.kept > 0) != (self.decoder not in (None, WITHDRAW)):
            raise ValueError(f"{self.decoder!r} cannot keep {self.kept} tokens: {WITHDRAW!r} keeps 0, others 1 or more")

    def __str__(self) -> str:
        length = "" if self.full_length is None else f"@{self.full_length}"
        return f"{self.base}{length}" + ("" if self.decoder is None else f"~{self.decoder}:{self.kept}")

    @classmethod
    def parse(cls, identity: str) -> ItemIdentity:
        """Inverse of `str`; takes any string."""
        base, length, decoder, kept = _GRAMMAR.fullmatch(identity).groups()  # type: ignore[union-attr]
        return cls(base, None if length is None else int(length), decoder, int(kept or 0))
