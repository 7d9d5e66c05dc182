"""Pictures inside of tars and zips as a Source: nothing is unpacked.

A listing is that of the unpacked tree, of which `Members` is the picture: same records, same order, same
labels, same keys as `image_folder` gives where an archive was unpacked. A folder of archives is as if each had
been unpacked into a folder of its own name, without .tar or .zip. As unpacking would have it, the last of
several members of one name wins, and links are followed; those that lead out of the archives are rejected.

Workers read by themselves: a part of an `Archives` carries the places of its own pictures, and each process
opens an archive once.
"""

import errno
import os
import threading
import zlib
from array import array
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fastrot.config import UsageError
from fastrot.data.files import (
    SUFFIXES,
    BadPicture,
    judged,
    shown,
    sniff,
    without_waiting,
)
from fastrot.data.sources.members import LONGEST_NAME, Member
from fastrot.data.sources.records import Listing, Opened, Source, not_empty
from fastrot.data.sources.tree import COMPRESSED_TARS, Entry, Found, archives_in, tree_source

PLACE = np.dtype(  # of a picture's bytes: `stored` of them from `offset` on in file number `file`
    [("file", "<i8"), ("offset", "<i8"), ("stored", "<i8"), ("length", "<i8"), ("crc", "<i8")]
)  # a deflated one has `length` when inflated; crc: -1 where none is known
_DEFLATED = 2**32  # is added to the crc of a deflated one
_OPEN = 32  # archives that a thread holds open
_FOLLOWED = 40  # links on the way to one file, as the kernel has it


# ---- reading ----


class Archive(NamedTuple):
    """A file as it was when it was listed."""

    path: str
    size: int
    changed: int  # ns

    @classmethod
    def at(cls, path: Path) -> "Archive":
        found = os.stat(path)
        return cls(str(path), found.st_size, found.st_mtime_ns)


@dataclass(kw_only=True)
class InFiles(Source):
    """Pictures of which each file holds many. A part has only the files that its own are in."""

    files: list[Archive]
    places: np.ndarray  # of each record; "file" is the number of its file

    def _of_records(self, rows: Int64[np.ndarray, " k"]) -> dict[str, Any]:
        return {**super()._of_records(rows), "places": self.places[rows]}

    def part(self, first: int, stop: int) -> Source:
        part = super().part(first, stop)
        assert isinstance(part, InFiles)
        used, part.places["file"] = np.unique(part.places["file"], return_inverse=True)
        part.files = [self.files[i] for i in used.tolist()]
        return part


@dataclass(kw_only=True)
class Archives(InFiles):
    """Pictures inside of archives. `places` are PLACE."""

    def read(self, i: int) -> bytes:
        """Encoded bytes of record i. Raises BadPicture where a zip's are damaged."""
        file, offset, stored, length, crc = self.places[i].tolist()
        data = _bytes(self.files[file], offset, stored)
        return data if crc < 0 else _checked(data, length, crc)


def _checked(data: bytes, length: int, crc: int) -> bytes:
    if crc >= _DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, length + 1)
        except zlib.error:
            raise BadPicture("its bytes in the zip are damaged: they cannot be inflated") from None
    if len(data) != length or zlib.crc32(data) != crc % _DEFLATED:
        raise BadPicture("its bytes in the zip are damaged: length or checksum is wrong")
    return data


_held = threading.local()  # archives by path, opened


def _bytes(archive: Archive, offset: int, count: int) -> bytes:
    file = _opened(archive)
    data = os.pread(file, count, offset)
    while len(data) < count:  # a single read gives 2 GB at most
        more = os.pread(file, count - len(data), offset + len(data))
        if not more:
            raise changed(archive)
        data += more
    return data


def _opened(archive: Archive) -> int:
    held = _held.__dict__.setdefault("files", {})
    if archive not in held:
        if len(held) >= _OPEN:
            os.close(held.pop(next(iter(held))))
        try:
            file = without_waiting(archive.path, os.O_RDONLY)
        except OSError as e:  # else each of its pictures would be rejected by itself
            raise OSError(errno.EIO, f"{archive.path}: {e.strerror}") from None
        found = os.fstat(file)
        if (found.st_size, found.st_mtime_ns) != archive[1:]:
            os.close(file)
            raise changed(archive)
        held[archive] = file
    return held[archive]


def changed(archive: Archive) -> OSError:
    return OSError(errno.EIO, f"{archive.path} has changed since it was listed")


# ---- the tree that unpacking would give ----


_SPECIAL = -1  # a device or pipe, instead of a place's number
_Inside = dict[
    str, int | str | None
]  # what a folder holds, by name: a place's number, where a link leads, None: a folder


class LeadsOut(OSError):
    """A path that no unpacked archive holds."""


class Members:
    """Members of archives as the `Tree` that unpacking them would give."""

    def __init__(self):
        self.archives: list[Archive] = []
        self.rejected: list[tuple[str, str]] = []  # what unpacking could not place, and why
        self._top = ""  # the folder that is the root
        self._inside: dict[str, _Inside] = {"": {}}  # by the folder's path, without links in it
        self._places = array("q")  # PLACE after PLACE
        self._named: list[tuple[str, str]] = []  # of each place: what it is under a picture's name
        self._sniffed = bytearray()  # and whether that holds under any name

    def add(self, folder: str, member: Member) -> str | None:
        """Put a member of the latest archive below a folder; its path, None where that cannot be."""
        path = _below(folder, member.path)
        reason = "its name leads out of the archive"
        if path is not None:
            reason = self._add(folder, path, member)
            if reason is None:
                return path
        self.rejected.append((shown(path or member.path), reason))
        return None

    def _add(self, folder: str, path: str, member: Member) -> str | None:
        """Put a member at a path; why not, where that cannot be."""
        if len(path) > LONGEST_NAME:
            return (
                f"its name has {len(path):,} characters: no system takes more than {LONGEST_NAME:,}"
            )
        if "\0" in path:
            return "its name has a zero byte"
        if member.kind == "folder":
            return "a file or link has its name" if self._folder(path) is None else None
        parent, _, name = path.rpartition("/")
        inside = self._folder(parent)
        if inside is None:
            return "it is in a file or link"
        if not name or inside.get(name, "") is None:
            return "a folder has its name"
        if member.kind == "link":
            inside[name] = member.target
        elif member.kind == "special":
            inside[name] = _SPECIAL
        elif member.kind == "file":
            inside[name] = self._place(member)
        else:
            target = _below(folder, member.target) or ""
            parent, _, other = target.rpartition("/")
            there = self._inside.get(parent, {}).get(other)
            if there is None:
                return f"it is a hard link to {shown(target or 'no file')}, which does not come before it"
            inside[name] = there
        return None

    def _folder(self, path: str) -> _Inside | None:
        """The folder of a path, made with all above it; None where a file or link is in the way."""
        missing = []
        while path not in self._inside:
            path, _, name = path.rpartition("/")
            missing.append(name)
        inside = self._inside[path]
        for name in reversed(missing):
            if name in inside:
                return None
            inside[name] = None
            path = _join(path, name)
            inside = self._inside[path] = {}
        return inside

    def _place(self, member: Member) -> int:
        crc = member.crc + _DEFLATED if member.deflated else member.crc
        at = (len(self.archives) - 1, member.offset, member.stored, member.length, crc)
        self._places.extend(at)
        named = "reject", member.fault
        if not member.fault:
            named = judged(True, member.head, max(member.stored, member.length))
        picture = named[0] == "picture" or sniff(member.head) is not None
        self._named.append(named)
        self._sniffed.append(picture and not member.fault)
        return len(self._named) - 1

    def enter(self, split: str, root: Path) -> None:
        """Make a folder the root of all paths. Raises UsageError where there is none; `root` is for the sentence."""
        there = ", ".join(sorted(k for k, v in self._inside[""].items() if v is None)) or "none"
        self._top = _below("", split) or ""
        if not self._is_folder(""):
            raise UsageError(
                f"--split {split} got no folder of that name in {root}; there are: {there}"
            )
        top = f"{self._top}/"
        below = [each for each in self.rejected if each[0].startswith(top)]
        self.rejected = [(path.removeprefix(top), reason) for path, reason in below]

    def place_of(self, path: str) -> int:
        """The number of a file's place. Raises OSError."""
        parent, _, name = self._real(path).rpartition("/")
        number = self._inside[parent].get(name)
        if not isinstance(number, int):
            raise _not_there(errno.EISDIR)
        return number

    def places(self, numbers: list[int]) -> np.ndarray:
        return np.frombuffer(self._places, PLACE)[numbers]

    # as a Tree

    def place(self, path: str) -> Hashable:
        return self._real(path)

    def entries(self, path: str) -> list[Entry]:
        found = []
        for name, what in self._inside[self._real(path)].items():
            link = isinstance(what, str)
            folder = self._is_folder(_join(path, name)) if link else what is None
            found.append(Entry(name, link, folder, isinstance(what, int)))
        return sorted(found)

    def look(self, path: str, *, by_name: bool, plain: bool) -> tuple[str, str]:
        named = path.lower().endswith(SUFFIXES)
        try:
            number = self.place_of(path)
        except LeadsOut:
            return "reject", "it is a link that leads out of the archive"
        except OSError as e:
            return ("reject", f"it is a broken link ({e.strerror})") if named else ("skip", "")
        if number == _SPECIAL:
            return "skip", ""
        if named or self._sniffed[number]:
            return self._named[number]
        if path.lower().endswith((".tar", ".zip", *COMPRESSED_TARS)):
            return "reject", "it is an archive in an archive, which is not entered: unpack that"
        return "skip", ""

    def _is_folder(self, path: str) -> bool:
        try:
            return self._real(path) in self._inside
        except OSError:
            return False

    def _real(self, path: str) -> str:
        """A path below the top without links, from the root of all. Raises OSError."""
        path = _join(self._top, path)
        parent, _, name = path.rpartition("/")
        if path in self._inside or isinstance(self._inside.get(parent, {}).get(name), int):
            return path
        done, ahead, followed = "", path.split("/")[::-1], 0
        while ahead:
            name = ahead.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if not done:
                    raise LeadsOut
                done = done.rpartition("/")[0]
                continue
            inside = self._inside.get(done)
            if inside is None:
                raise _not_there(errno.ENOTDIR)
            if name not in inside:
                raise _not_there(errno.ENOENT)
            target = inside[name]
            if not isinstance(target, str):
                done = _join(done, name)
                continue
            followed += 1
            if followed > _FOLLOWED:
                raise _not_there(errno.ELOOP)
            if target.startswith("/"):
                raise LeadsOut
            ahead += target.split("/")[::-1]
        return done


def _not_there(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _below(folder: str, path: str) -> str | None:
    """A member's path below a folder, without what unpacking leaves out; None: it leads out of it."""
    if path[:1] in ("", "/", ".") or "//" in path or "/." in path or path[-1] == "/":
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            return None
        path = "/".join(parts)
    return _join(folder, path)


# ---- the layouts ----


def archives(suffix: str, members: Callable[[Path], Iterator[Member]]) -> Opened:
    """What opens an archive, or those of a folder that end so, as `image_folder` lists what they unpack to.

    First bytes come with the headers: `by_name` changes nothing.
    """

    def opened(root: Path, how: Listing) -> Source:
        tree, found, split = Members(), archives_in(root, suffix), how.split
        for path, folder in found.archives:
            if split is None or _meet(folder, split):
                tree.archives.append(Archive.at(path))
                for member in members(path):
                    tree.add(folder, member)
        if split is not None:
            tree.enter(split, root)
            others = [path for path in found.others if path.startswith(f"{split}/")]
            found = found._replace(others=others)
        return not_empty(with_places(tree, root, how, found), root)

    return opened


def _meet(folder: str, split: str) -> bool:
    """Whether one of two folders is in the other."""
    return all(a == b for a, b in zip(folder.split("/"), split.split("/"), strict=False) if a)


def with_places(tree: Members, root: Path, how: Listing, found: Found) -> Archives:
    """A tree's source that can read its pictures, and counts what lies beside the archives."""
    source = tree_source(tree, root, how)
    source.rejected += [*found.unreadable, *tree.rejected]
    source.seen += len(found.unreadable) + len(tree.rejected) + len(found.others)
    source.skipped += len(found.others)
    numbers = [tree.place_of(record.path) for record in source.records]
    return Archives(**vars(source), files=tree.archives, places=tree.places(numbers))
