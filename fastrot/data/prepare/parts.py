"""Parts: runs of 10,000 records that appear under OUT.parts/ whole or not at all.

A run that was killed goes on from its whole parts. A part depends on its own records only, so parts may be made
in any order, by anyone.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrot.config import UsageError
from fastrot.data.prepare.encode import Chunk, EncodedPicture, Result
from fastrot.data.prepare.options import WAYS, difference, plan_hash
from fastrot.data.prepare.ranks import CLAIM
from fastrot.data.sources.records import Source
from fastrot.disk import locked, replace_bytes

PART = 10_000  # records a part
CHUNK = 16  # records a task of a worker
PLAN, LOCK = "plan.json", "lock"
NEW = "new"  # so begin names of files in a folder of parts that are on their way to another place
# writes a part's file, whole or not at all: its path, its pictures, the most that may come
WritePart = Callable[[Path, Iterable[EncodedPicture], int], None]


@dataclass
class PartStats:
    """What is to be known of written pictures beside their bytes; grows by addition."""

    crcs: list[int] = field(default_factory=list)  # crc32 of each written picture's bytes
    records: list[int] = field(default_factory=list)  # number of each in the source
    rejects: list[tuple[int, str]] = field(default_factory=list)  # number in the source, reason
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    largest: list[int] = field(default_factory=lambda: [0, 0])  # height, width
    truncated: int = 0  # pictures that lacked pixels

    def kept(self, results: Iterable[Result]) -> Iterator[EncodedPicture]:
        """Hand the pictures on, count them, and keep the rejects."""
        for result in results:
            if not isinstance(result, EncodedPicture):
                self.rejects.append(result)
                continue
            h, w = result.height, result.width
            sums, squares = [*result.sums], [*result.squares]
            pixels = h * w, sums, squares, [h, w], int(result.truncated)
            self.add(PartStats([result.crc], [result.record], [], *pixels))
            yield result

    def add(self, more: "PartStats") -> None:
        self.crcs += more.crcs
        self.records += more.records
        self.rejects += more.rejects
        self.pixels += more.pixels
        self.truncated += more.truncated
        self.sums = [a + b for a, b in zip(self.sums, more.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, more.squares, strict=True)]
        self.largest = [max(a, b) for a, b in zip(self.largest, more.largest, strict=True)]

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of red, green, blue over all pixels, in 0..1. The only rounding is the last division and root."""
        n = self.pixels
        variance = [n * q - s * s for s, q in zip(self.sums, self.squares, strict=True)]
        std = [math.sqrt(v / (n * n)) / 255 for v in variance]  # ** 0.5 hangs on the processor
        return [s / (255 * n) for s in self.sums], std


@dataclass(frozen=True)
class Part:
    """A run of records, as one file and what is known of it. The `.json` comes last: with it the part is whole."""

    file: Path
    records: range
    plan: str  # hash of what decides its bytes: a rank of an earlier start may still write here

    @property
    def about(self) -> Path:
        return self.file.with_suffix(".json")

    def whole(self) -> bool:
        try:
            about = json.loads(self.about.read_bytes())
            size = self.file.stat().st_size if about["bytes"] else 0
            return (about["bytes"], about["plan"]) == (size, self.plan)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def stats(self) -> PartStats:
        stats = json.loads(self.about.read_bytes())["tally"]
        stats["rejects"] = [(record, reason) for record, reason in stats["rejects"]]
        return PartStats(**stats)

    def changed(self, what: str = "") -> UsageError:
        """The part counts as not made from now on; what to say of it, or of `what` lies beside its file."""
        self.about.unlink(missing_ok=True)
        return UsageError(
            f"{what}{self.file} has changed since it was written: run again, and that part is made anew"
        )

    def chunks(self, source: Source) -> Iterator[Chunk]:
        for first in range(self.records.start, self.records.stop, CHUNK):
            yield Chunk(first, source.part(first, min(first + CHUNK, self.records.stop)))

    def make(self, results: Iterable[Result], write: WritePart) -> None:
        stats = PartStats()
        pictures = stats.kept(results)
        first = next(pictures, None)
        if first is not None:  # a part of rejects alone has no file
            write(self.file, itertools.chain([first], pictures), len(self.records))
        size = self.file.stat().st_size if first else 0
        about = {"plan": self.plan, "bytes": size, "tally": dataclasses.asdict(stats)}
        replace_bytes(self.about, json.dumps(about).encode())


def parts_of(
    folder: Path, records: int, suffix: str, plan: dict[str, Any], part: int = PART
) -> list[Part]:
    """The parts, made or not, of so many records; a part's file is named by its first."""
    firsts, hashed = range(0, records, part), plan_hash({**plan, "part": part})
    runs = [range(first, min(first + part, records)) for first in firsts]
    return [Part(folder / f"{run.start:010d}{suffix}", run, hashed) for run in runs]


# ---- the folder of parts ----


@contextlib.contextmanager
def parts_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The folder of parts, which stays, held by this process alone, with nothing in it but whole parts of this plan."""
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another conversion writes into {folder}: wait for it, or choose another --out"
    with locked(folder, refusal):
        begun = begun_with(folder)
        differs = begun and difference(plan, begun)
        if differs and not overwrite:
            raise UsageError(f"{folder} was begun {differs}: remove that folder, {WAYS}")
        others = differs or not begun  # parts without a plan are rests of a removal, of any options
        _clear(folder, lambda file: _passing(file) or (others and _lasting(file)))
        replace_bytes(folder / PLAN, json.dumps(plan).encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # on a full disk they would be in the way
                # not .tmp: another rank may be about to give one its name
                _clear(folder, lambda file: file.name.startswith((NEW, CLAIM)))


def _clear(folder: Path, goes: Callable[[Path], Any]) -> None:
    """Remove files, and folders of a format that is one."""
    for file in filter(goes, folder.iterdir()):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _passing(file: Path) -> bool:
    """Whether it is of use to the start that wrote it alone."""
    return file.suffix == ".tmp" or file.name.startswith((NEW, CLAIM))


def _lasting(file: Path) -> bool:
    """Whether it is a part, or what makes parts a set."""
    return file.stem.isdigit() or file.name.startswith("set.")


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The plan of the parts in a folder; None where it holds none of ours."""
    try:
        return json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None


def remove_if_of(folder: Path, plan: dict[str, Any]) -> None:
    """Remove a folder of parts of this plan: a start that was killed at its very end left it."""
    if folder.exists():
        with contextlib.suppress(UsageError), parts_folder(folder, plan, False):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder of parts, its plan last: what is left of it if that is broken off tells whose it is."""
    if begun_with(folder) is None:
        return
    (folder / "set.json").unlink(missing_ok=True)
    _clear(folder, lambda file: _passing(file) or _lasting(file))
    for name in (LOCK, PLAN):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are files in it that are not ours
        folder.rmdir()
