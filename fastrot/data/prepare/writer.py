"""What a prepared format says of itself: how a picture is coded, how a part is written, how parts become a whole."""

import contextlib
import dataclasses
import json
import os
import platform
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastrot
from fastrot.config import UsageError
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.manifest import read_manifest, side
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import WAYS, Options, difference
from fastrot.data.prepare.parts import PART, Part, PartStats
from fastrot.data.sources.records import Source
from fastrot.disk import sync_folder, write_atomically

SKIPPED = "skipped.jsonl"


class Converted:
    """Whole parts, and what is known of their pictures together. Rows are the pictures that were written.

    records, numbers     int64 [rows]: each row's record in the source, and what the source calls it
    crcs, labels, keys   uint32, int64, uint64 [rows]: of the picture's bytes; of its path
    rejects              path and reason; those of the source first
    """

    def __init__(self, source: Source, plan: dict[str, Any], parts: list[Part], stats: PartStats):
        self.source, self.plan, self.parts = source, plan, parts
        self.crcs, rows = np.array(stats.crcs, np.uint32), np.array(stats.records, np.int64)
        self.records = rows
        self.numbers = rows if source.numbers is None else source.numbers[rows]
        self.labels = np.array([source.records[i].label for i in stats.records], np.int64)
        paths = (source.records[i].path for i in stats.records)
        self.keys = path_keys(paths) if source.keys is None else source.keys[rows]
        rejects = [(source.records[i].path, reason) for i, reason in stats.rejects]
        self.rejects = [*source.rejected, *rejects]
        self.stats = dataclasses.replace(stats, crcs=[], records=[], rejects=[])  # arrays now

    def write_beside(self, at: Callable[[str], Path]) -> dict[str, Any]:
        """Write paths.jsonl, rejects.jsonl and skipped.jsonl where there are any, and what the source lays beside them.

        `at`: where a file of such a name goes. Gives what the manifest says of the source's files: the crc32 of each.
        """
        rows = zip(self.records, self.numbers, strict=True)
        paths = ({"path": self.source.records[i].path, "number": int(n)} for i, n in rows)
        write_lines(at("paths.jsonl"), paths)
        if self.rejects:
            rejects = ({"path": path, "reason": reason} for path, reason in self.rejects)
            write_lines(at("rejects.jsonl"), rejects)
        if self.source.left_out:
            write_left_out(at(SKIPPED), self.source)
        crcs = {}
        for name, arrays in self.source.beside(self.records).items():
            file = at(f"{name}.npz")
            write_atomically(file, partial(np.savez, **arrays))
            crcs[f"{name}.npz"] = zlib.crc32(file.read_bytes())
        return {"beside": crcs} if crcs else {}

    def manifest(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """What is known of the prepared pictures; `body`: what it says of the file or files that hold them."""
        as_rows = np.array_equal(self.numbers, np.arange(len(self.numbers)))
        mean, std = self.stats.mean_and_std()
        limit = self.plan.get("limit")
        return {
            "format": name,
            "rows": len(self.records),
            **self.source.account(self.labels),
            "mean": mean,  # of red, green, blue, in 0..1, over all pixels before encoding
            "std": std,
            "fingerprint": order_fingerprint(self.keys, self.labels),
            "numbers": None if as_rows else self.numbers.tolist(),
            **body,
            "max_height": self.stats.largest[0],
            "max_width": self.stats.largest[1],
            "pixels": self.stats.pixels,
            "truncated": self.stats.truncated,
            "rejected": len(self.rejects),
            "beyond_limit": len(self.source.records) - len(self.source.records[:limit]),
            "options": self.plan,
            "versions": {
                "python": platform.python_version(),
                "fastrot": fastrot.__version__,
                **{package: version(package) for package in ("numpy", "simplejpeg")},
            },
        }


def write_left_out(path: Path, source: Source) -> None:
    """Name each file that the source has left out, with the reason."""
    write_lines(path, ({"path": each.path, "reason": each.reason} for each in source.left_out))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(
        path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    )


def save(path: Path, array: np.ndarray) -> None:
    """A `.npy`, whole or not at all."""
    write_atomically(path, lambda file: np.save(file, array))


def refuse_other(out: Path, plan: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises UsageError where what is there was made from another plan."""
    if differs := difference(plan, theirs):
        raise UsageError(f"{out} is there, made {differs}: {WAYS}")


class Existing(NamedTuple):
    """What an earlier start left."""

    manifest: dict[str, Any] | None = None  # of a finished file made from the same plan
    folder: Path | None = None  # of parts to take up again, where they are not at `parts_folder`
    part: int | None = None  # records a part in it


class FormatWriter(ABC):
    """A prepared format."""

    suffix: str  # of a part's file
    row_bytes: int  # what a picture takes beside its own bytes, for --estimate
    part: int = PART  # records a part

    def __init__(self, options: Options):
        self.options, self.out = options, options.out

    @property
    @abstractmethod
    def encode_spec(self) -> EncodeSpec:
        """What is done to every picture; travels to the workers."""

    @property
    def parts_folder(self) -> Path:
        """The folder in which parts are made."""
        return side(self.out, "parts")

    @abstractmethod
    def existing(self, plan: dict[str, Any], part: int) -> Existing:
        """What is there already; called with --overwrite too. Raises UsageError for what is not ours to replace."""

    @abstractmethod
    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        """A part's file, whole or not at all; `room` records at most."""

    @abstractmethod
    def write(self, converted: Converted) -> dict[str, Any]:
        """Make of whole parts what the options ask for; its manifest, with its `bytes`."""

    @abstractmethod
    def paths(self, manifest: dict[str, Any]) -> tuple[Path, Callable[[str], Path]]:
        """What a finished conversion made, and where a file of such a name (rejects.jsonl) lies beside it."""


class FolderWriter(FormatWriter):
    """A format that is a folder: it gets its name by one rename. One that is replaced is moved aside, and removed last."""

    named: str  # what the folder is, in words
    manifest_name: str

    def __init__(self, options: Options):
        super().__init__(options)
        self.out = Path(os.path.realpath(self.out))  # a link stays: what it points to is replaced

    @abstractmethod
    def ours(self, file: Path) -> bool:
        """Whether a file of the folder belongs to the format."""

    @abstractmethod
    def opened(self) -> dict[str, Any]:
        """The manifest of what is there. Raises UsageError where that is not whole."""

    @abstractmethod
    def write_files(self, folder: Path, converted: Converted) -> dict[str, Any]:
        """Write all files into a folder; the manifest."""

    def existing(self, plan: dict[str, Any], part: int) -> Existing:
        out = self.out
        with contextlib.suppress(OSError):
            out.rmdir()  # where it is empty
        if not out.exists():
            return Existing()
        beside = read_manifest(out / self.manifest_name).get("beside", {})
        foreign = sorted(f.name for f in out.iterdir() if not self.ours(f) and f.name not in beside)
        if foreign:
            raise UsageError(
                f"{out} holds {foreign[0]}, no file of {self.named}: remove it or choose another --out"
            )
        if self.options.overwrite:
            return Existing()
        try:
            manifest = self.opened()
            if lost := [name for name in beside if not (out / name).exists()]:
                raise UsageError(f"{lost[0]} is missing")
        except UsageError as error:
            raise UsageError(f"--out is there, but is not whole ({error}): {WAYS}") from None
        refuse_other(out, plan, manifest["options"])
        part_files.remove_if_of(self.parts_folder, {**plan, "part": part})
        return Existing(manifest)

    def write(self, converted: Converted) -> dict[str, Any]:
        folder = self.parts_folder
        new, old = folder / part_files.NEW, folder / f"{part_files.NEW}.old"
        new.mkdir()
        manifest = self.write_files(new, converted)
        # all of it is on the disk: from here on names change, which needs no space
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(new, self.out)
        sync_folder(self.out.parent)
        part_files.remove(folder)
        return manifest

    def paths(self, manifest: dict[str, Any]) -> tuple[Path, Callable[[str], Path]]:
        return self.options.out, self.out.joinpath
