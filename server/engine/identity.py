"""An item's identity: its key in every cache, which also tells other processes about its reduction.

    identity = base ["@" full length] ["~" decoder method ":" kept]

`base` is vLLM's own hash of the item, and of the plan if tokens are removed before the decoder. Without reduction the
identity is exactly vLLM's. The reduction is part of the identity, so cached embeddings and KV blocks never mix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WITHDRAW = "withdraw"  # the decoder method that keeps nothing

_GRAMMAR = re.compile(r"(.*?)(?:@([0-9]+))?(?:~([a-z_]+):([0-9]+))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ItemIdentity:
    """The parts of an identity."""

    base: str  # vLLM may put the name of an adapter before it
    full_length: int | None = None  # tokens without reduction, if the kept ones keep their positions
    decoder: str | None = None  # the method at layer K
    kept: int = 0  # tokens that it keeps from K on; 0 for `WITHDRAW`, else at least 1

    def __post_init__(self) -> None:
        """Raises ValueError if `base` itself ends like an identity, or `kept` does not fit the method."""
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
        """Inverse of `str`; accepts any string."""
        base, length, decoder, kept = _GRAMMAR.fullmatch(identity).groups()  # type: ignore[union-attr]
        return cls(base, None if length is None else int(length), decoder, int(kept or 0))
