"""A source: pictures in a fixed order, wherever they come from. What reads one does not care."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fastrot.arrays import Keys, Numbers, Picture
from fastrot.config import UsageError
from fastrot.data.files import NO_PICTURE, SYSTEM_FILES, Verdict, picture_file, some
from fastrot.data.sampler import ShuffledSampler


class Listing(NamedTuple):
    """What of a source is to be listed, and how."""

    split: str | None = None  # train, val, ...
    labelled: bool = True  # False: all labels are -1
    by_name: bool = False  # a folder's or a list's files are known by their names: none is opened
    image_column: str | None = None  # of a table
    label_column: str | None = None
    loose: bool = False  # pictures beside class folders are taken too: their label is -1
    categories: str | None = None  # of boxes, with commas between
    folder: Path | None = None  # where the paths of a list begin


@dataclass(frozen=True, slots=True)
class Record:
    """A picture of a source."""

    path: str  # relative to the source's root, "/" between; odd bytes as surrogates (os.fsdecode)
    label: int  # -1 where there is none


class LeftOut(NamedTuple):
    """A file that is no record, although nothing is wrong with it."""

    path: str
    reason: str  # a short phrase
    mendable: bool = False  # see data/files.py

    def group(self) -> str:
        """Under what it is counted: `.heic (no reader)`, `in @eaDir`, `.txt`, `Thumbs.db`; there are few of these."""
        name = self.path.rpartition("/")[2]
        if self.reason.startswith("in "):
            return self.reason
        if name.lower() in SYSTEM_FILES:
            return name
        suffix = os.path.splitext(name)[1].lower()  # DICOM's names end with a long number
        kind = suffix if 1 < len(suffix) < 12 and not suffix[1:].isdigit() else "without a suffix"
        return kind if self.reason == NO_PICTURE.reason else f"{kind} ({self.reason})"


@dataclass(kw_only=True)
class Source:
    """Pictures in a fixed order, as encoded bytes or as pixels; and what became of all other files.

    `left_out` are files that claim to be no picture, or are not meant; `rejected` claim to be one and cannot be.
    """

    root: Path
    records: list[Record] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    left_out: list[LeftOut] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    notes: list[str] = field(default_factory=list)  # sentences for people: how it was read
    numbers: Numbers | None = None  # see `image_folder`; None: 0 ... n - 1
    keys: Keys | None = None  # None: `path_keys` of the records

    @property
    def seen(self) -> int:
        """Files: each is a record, rejected or left out."""
        return len(self.records) + len(self.rejected) + len(self.left_out)

    def take(self, path: str, label: int, verdict: Verdict) -> bool:
        """Account for one more file, by the verdict on it; whether it has become a record."""
        if verdict.kind == "picture":
            self.records.append(Record(path, label))
        elif verdict.kind == "left out":
            self.left_out.append(LeftOut(path, verdict.reason, verdict.mendable))
        else:
            self.rejected.append((path, verdict.reason))
        return verdict.kind == "picture"

    def account(self, labels: Numbers) -> dict[str, Any]:
        """What a manifest tells of the listing, where these are the labels of what was taken."""
        known = np.bincount(labels[labels >= 0], minlength=len(self.classes))
        return {
            "classes": list(self.classes),
            "class_counts": known.tolist(),
            "skipped": len(self.left_out),
            "left_out": dict(Counter(each.group() for each in self.left_out).most_common()),
            "mendable": sum(each.mendable for each in self.left_out),
            "notes": self.notes,
            "seen": self.seen,
        }

    def read(self, i: int) -> bytes | Picture:
        """Encoded bytes of record i, or its pixels. Raises OSError or BadPicture."""
        with picture_file(os.path.join(self.root, self.records[i].path)) as file:
            return file.read()

    def taken(self, rows: Numbers) -> "Source":
        """The same source with these of its records, in this order."""
        return replace(self, **self._of_records(rows))

    def _of_records(self, rows: Numbers) -> dict[str, Any]:
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

    def beside(self, records: Numbers) -> dict[str, dict[str, np.ndarray]]:
        """What else is known of these records, which became the rows of a prepared file, by names of files.

        {"boxes": {"count": [rows], "box": [boxes, 4]}} is written to FILE.boxes.npz, or FOLDER/boxes.npz. A
        source that knows something record by record selects it in `_of_records` too.
        """
        return {}

    def part(self, first: int, stop: int) -> "Source":
        """Records first ... stop - 1 and what reads them, for a worker process."""
        part = self.taken(np.arange(first, stop))
        return replace(
            part, classes=(), left_out=[], rejected=[], notes=[], numbers=None, keys=None
        )


@dataclass(kw_only=True)
class InMemory(Source):
    """Pictures that travel with their records."""

    pictures: Sequence[bytes | UInt8[np.ndarray, "_h _w 3"]]  # of different sizes

    def read(self, i: int) -> bytes | Picture:
        return self.pictures[i]

    def _of_records(self, rows: Numbers) -> dict[str, Any]:
        return {**super()._of_records(rows), "pictures": [self.pictures[i] for i in rows.tolist()]}


def no_split(split: str, root: Path, there: Iterable[str]) -> UsageError:
    """What is said of a split that is none of those in `there`."""
    listed = some(sorted(there), 10) or "none"
    return UsageError(f"--split {split} is none of {root}; there are: {listed}")


def unless_counted(numbers: list[int]) -> Numbers | None:
    """Numbers as an array; None where they are 0 ... n - 1."""
    array = np.array(numbers, np.int64)
    return None if (array == np.arange(len(array))).all() else array
