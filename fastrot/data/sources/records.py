"""A source: pictures in a fixed order, wherever they come from. What reads one does not care.

Every file is accounted for: len(records) + len(rejected) + skipped == seen. `skipped` are files that claim to be
no picture, `rejected` those that claim to be one and cannot be.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from fastrot.config import UsageError
from fastrot.data.files import shown, without_waiting
from fastrot.data.sampler import ShuffledSampler

MOST_LABELS = 2**20  # a number in a text list that counts further is no label


class Listing(NamedTuple):
    """What of a source is to be listed, and how."""

    split: str | None = None  # train, val, ...
    labelled: bool = True  # False: all labels are -1
    by_name: bool = False  # a folder's or a list's files are known by their names: none is opened


@dataclass(frozen=True, slots=True)
class Record:
    """A picture of a source."""

    path: str  # relative to the source's root, "/" between; odd bytes as surrogates (os.fsdecode)
    label: int  # -1 where there is none


@dataclass(kw_only=True)
class Source:
    """Pictures in a fixed order, as encoded bytes or as pixels. Goes to worker processes by pickle."""

    root: Path
    records: list[Record]
    classes: tuple[str, ...]
    seen: int  # files
    skipped: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    numbers: Int64[np.ndarray, " n"] | None = None  # see `image_folder`; None: 0 ... n - 1
    keys: UInt64[np.ndarray, " n"] | None = None  # None: `path_keys` of the records

    def read(self, i: int) -> bytes | UInt8[np.ndarray, "h w 3"]:
        """Encoded bytes of record i, or its pixels."""
        path = os.path.join(self.root, self.records[i].path)
        with open(path, "rb", opener=without_waiting) as file:
            return file.read()

    def taken(self, rows: Int64[np.ndarray, " k"]) -> "Source":
        """The same source with these of its records, in this order."""
        return replace(self, **self._of_records(rows))

    def _of_records(self, rows: Int64[np.ndarray, " k"]) -> dict[str, Any]:
        """What it knows record by record, of these."""
        return {
            "records": [self.records[i] for i in rows.tolist()],
            "numbers": rows if self.numbers is None else self.numbers[rows],
            "keys": None if self.keys is None else self.keys[rows],
        }

    def shuffled(self, seed: int) -> "Source":
        """The same pictures in a random order, which `seed` and their number alone decide."""
        places = np.arange(len(self.records))
        return self.taken(ShuffledSampler(len(places), seed=seed, epoch=0)[places])

    def beside(self, records: Int64[np.ndarray, " rows"]) -> dict[str, dict[str, np.ndarray]]:
        """What else is known of these records, which became the rows of a prepared file, by names of files.

        {"boxes": {"count": [rows], "box": [boxes, 4]}} is written to FILE.boxes.npz, or FOLDER/boxes.npz. A
        source that knows something record by record selects it in `_of_records` too.
        """
        return {}

    def part(self, first: int, stop: int) -> "Source":
        """Records first ... stop - 1 and what reads them, for a worker process."""
        part = self.taken(np.arange(first, stop))
        return replace(part, classes=(), seen=0, skipped=0, rejected=[], numbers=None, keys=None)


@dataclass(kw_only=True)
class InMemory(Source):
    """Pictures that travel with their records."""

    pictures: Sequence[bytes | UInt8[np.ndarray, "_h _w 3"]]

    def read(self, i: int) -> bytes | UInt8[np.ndarray, "h w 3"]:
        return self.pictures[i]

    def _of_records(self, rows: Int64[np.ndarray, " k"]) -> dict[str, Any]:
        return {**super()._of_records(rows), "pictures": [self.pictures[i] for i in rows.tolist()]}


Opened: TypeAlias = Callable[[Path, Listing], Source]  # what a line of the table holds


def unless_counted(numbers: list[int]) -> Int64[np.ndarray, " n"] | None:
    """Numbers as an array; None where they are 0 ... n - 1."""
    array = np.array(numbers, np.int64)
    return None if (array == np.arange(len(array))).all() else array


def not_empty(source: Source, root: Path) -> Source:
    if source.records:
        return source
    if not source.seen:
        raise UsageError(f"{root} is empty: give a path with pictures in it")
    first = source.rejected[:1]
    why = "".join(f" ({shown(path) or 'the root'}: {reason})" for path, reason in first)
    raise UsageError(
        f"{root} has {source.seen} file(s) and no picture among them{why}: look at the path, or at the files"
    )


def numbered(root: Path, labels: list[int], name: Callable[[int], str]) -> tuple[str, ...]:
    """Class names where there are numbers alone: these. `name(i)`: the picture of label i, for people."""
    highest = max(labels, default=-1)
    if highest >= MOST_LABELS:
        raise UsageError(
            f"{root} has the label {highest} ({shown(name(labels.index(highest)))}): a label is below "
            f"{MOST_LABELS:,}; --label-from none ignores all labels"
        )
    return tuple(map(str, range(highest + 1)))
