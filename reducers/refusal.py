"""The only error type of this package."""

from __future__ import annotations


class InvalidReduction(ValueError):
    """A reduction that cannot be done. The message says what came and what to do.

    Attributes:
        param: the invalid field, such as "ratio"; "" if no single field is at fault.
    """

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message, param)  # both, so that pickle can rebuild it
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])
