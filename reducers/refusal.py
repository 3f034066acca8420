"""The one error of this package: a reduction that cannot be done."""

from __future__ import annotations


class InvalidReduction(ValueError):
    """A reduction that cannot be done. The message says what came and what to do.

    Attributes:
        param: the field at fault, such as "ratio"; "" if it is the whole.
    """

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message, param)  # both, so that pickle can rebuild it
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])
