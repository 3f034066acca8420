"""Checks the input before the run, so that a mistake in it shows before anything is computed."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from pathlib import Path

import numpy as np

from foldserve.server.api.batch.lines import read_lines

NO_ID = 0  # for a line whose `custom_id` can't be read


def id_digest(custom_id: str | None) -> int:
    """64 bits of an id: the digests of 10^6 ids take less memory than one image."""
    if custom_id is None:
        return NO_ID
    return int.from_bytes(blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Survey:
    """The numbers and ids of a batch file's lines, in 16 bytes per line; `longest` is in bytes.

    Raises ValueError if a `custom_id` comes twice, and OSError if the file can't be read.
    """

    def __init__(self, path: Path, longest: int) -> None:
        self._path, self._longest = path, longest
        numbers, digests = array("Q"), array("Q")
        with path.open("rb") as file:
            for line in read_lines(file, longest):
                numbers.append(line.number)
                digests.append(id_digest(line.custom_id))
        self._numbers = np.frombuffer(numbers, np.uint64)
        self._digests = np.frombuffer(digests, np.uint64)
        self._refuse_duplicates()

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def last(self) -> int:
        return int(self._numbers[-1]) if len(self) else 0

    def has(self, number: int, custom_id: str | None) -> bool:
        """Whether line `number` has this id."""
        at = int(np.searchsorted(self._numbers, np.uint64(number)))
        return at < len(self) and int(self._numbers[at]) == number and int(self._digests[at]) == id_digest(custom_id)

    def _refuse_duplicates(self) -> None:
        values, counts = np.unique(self._digests, return_counts=True)
        several = {int(value) for value in values[(counts > 1) & (values != NO_ID)]}
        if several:
            self._refuse_equal_ids(several)

    def _refuse_equal_ids(self, digests: set[int]) -> None:
        """Reads the file again, since different ids may have the same digest."""
        first: dict[str, int] = {}
        with self._path.open("rb") as file:
            for line in read_lines(file, self._longest):
                custom_id = line.custom_id
                if custom_id is None or id_digest(custom_id) not in digests:
                    continue
                if custom_id in first:
                    raise ValueError(
                        f"{self._path}: lines {first[custom_id]} and {line.number} have the same custom_id "
                        f"{custom_id!r:.100}: answers are told apart by it, so each must be there once"
                    )
                first[custom_id] = line.number
