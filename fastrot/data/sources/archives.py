"""Pictures inside of tars and zips as a Source: nothing is unpacked.

A listing is that of the unpacked tree, of which `Members` is the picture: same records, same order, same
labels, same keys as `image_folder` gives where an archive was unpacked. A folder of archives is as if each had
been unpacked into a folder of its own name, without .tar or .zip. As unpacking would have it, the last of
several members of one name wins, and links are followed; those that lead out of the archives are rejected.
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

from fastrot.arrays import Numbers
from fastrot.data.files import (
    NO_PICTURE,
    PICTURE,
    SUFFIXES,
    BadPicture,
    Verdict,
    judged,
    judged_by_name,
    rejected,
    shown,
    sniff,
    without_waiting,
)
from fastrot.data.sources.members import LONGEST_NAME, Member
from fastrot.data.sources.records import LeftOut, Listing, Source
from fastrot.data.sources.tree import (
    COMPRESSED_TARS,
    Entry,
    Found,
    archives_in,
    join,
    seen_from,
    split_folder,
    tree_source,
)

PLACE = np.dtype(  # of a picture's bytes: `stored` of them from `offset` on in file number `file`
    [("file", "<i8"), ("offset", "<i8"), ("stored", "<i8"), ("length", "<i8"), ("crc", "<i8")]
)  # a deflated one has `length` when inflated; crc: -1 where none is known
_DEFLATED = 2**32  # is added to the crc of a deflated one
_OPEN = 32  # files that a thread holds open
_FOLLOWED = 40  # links on the way to one file, as the kernel has it


# ---- reading ----


class Archive(NamedTuple):
    """A file as it was when it was listed."""

    path: str
    size: int
    changed: int  # ns

    @classmethod
    def at(cls, path: str | Path) -> "Archive":
        found = os.stat(path)
        return cls(str(path), found.st_size, found.st_mtime_ns)

    def opened(self) -> int:
        """The file, opened. Raises OSError where it has changed or is gone."""
        try:
            file = without_waiting(self.path, os.O_RDONLY)
        except OSError as e:
            raise self.failed(e.strerror) from None
        found = os.fstat(file)
        if (found.st_size, found.st_mtime_ns) != self[1:]:
            os.close(file)
            raise self.failed("it has changed since it was listed")
        return file

    def failed(self, why: str | None) -> OSError:
        """An error of the machine: else each picture of the file would be rejected by itself."""
        return OSError(errno.EIO, f"{self.path}: {why}")


@dataclass(kw_only=True)
class InFiles(Source):
    """Pictures of which each file holds many. A part has only the files that its own are in."""

    files: list[Archive]
    places: np.ndarray  # of each record; "file" is the number of its file

    def _of_records(self, rows: Numbers) -> dict[str, Any]:
        return {**super()._of_records(rows), "places": self.places[rows]}

    def part(self, first: int, stop: int) -> Source:
        part = super().part(first, stop)
        assert isinstance(part, InFiles)
        used, part.places["file"] = np.unique(part.places["file"], return_inverse=True)
        part.files = [self.files[i] for i in used.tolist()]
        return part

    def bytes_at(self, file: int, offset: int, count: int) -> bytes:
        """What lies there. Each thread opens a file once. Raises OSError."""
        archive, held = self.files[file], vars(_held).setdefault("files", {})
        if archive not in held:
            if len(held) >= _OPEN:
                os.close(held.pop(next(iter(held))))
            held[archive] = archive.opened()
        data = os.pread(held[archive], count, offset)
        while len(data) < count:  # a single read gives 2 GB at most
            more = os.pread(held[archive], count - len(data), offset + len(data))
            if not more:
                raise archive.failed("it has been cut short since it was listed")
            data += more
        return data


_held = threading.local()


@dataclass(kw_only=True)
class Archives(InFiles):
    """Pictures inside of archives. `places` are PLACE."""

    def read(self, i: int) -> bytes:
        """Encoded bytes of record i. Raises BadPicture where a zip's are damaged."""
        file, offset, stored, length, crc = self.places[i].tolist()
        data = self.bytes_at(file, offset, stored)
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


# ---- the tree that unpacking would give ----


_SPECIAL = -1  # a device or pipe, instead of a place's number


class LeadsOut(OSError):
    """A path that no unpacked archive holds."""


class Members:
    """Members of archives as the `Tree` that unpacking them would give."""

    def __init__(self):
        self.rejected: list[tuple[str, str]] = []  # what unpacking could not place, and why
        self._archives: list[Archive] = []
        # by names: a folder as another dict, a file as its place's number, a link as where it leads
        self._root: dict[str, Any] = {}
        self._top = ""  # the folder that is the root of all paths
        self._places = array("q")  # PLACE after PLACE
        self._verdicts: list[Verdict] = []  # of each place, under a picture's name
        self._by_bytes = bytearray()  # and whether that holds under any name

    def unpack(self, archive: Path, folder: str, members: Iterator[Member]) -> None:
        """Put an archive's members below a folder."""
        self._archives.append(Archive.at(archive))
        for member in members:
            path = _below(folder, member.path)
            if path is None:
                self.rejected.append((shown(member.path), "its name leads out of the archive"))
            elif reason := self.add(folder, path, member):
                self.rejected.append((shown(path or member.path), reason))

    def add(self, folder: str, path: str, member: Member) -> str | None:
        """Put a member at a path; why not, where that cannot be."""
        if len(path) > LONGEST_NAME:
            return f"its name has {len(path):,} characters: {LONGEST_NAME:,} is the most"
        if "\0" in path:
            return "its name has a zero byte"
        if member.kind == "folder":
            return "a file or link has its name" if self._folder(path) is None else None
        parent, _, name = path.rpartition("/")
        inside = self._folder(parent)
        if inside is None:
            return "it is in a file or link"
        if not name or isinstance(inside.get(name), dict):
            return "a folder has its name"
        if member.kind == "link":
            inside[name] = member.target
        elif member.kind == "special":
            inside[name] = _SPECIAL
        elif member.kind == "file":
            inside[name] = self._place(member)
        else:
            target = _below(folder, member.target) or ""
            there = self._root
            for each in target.split("/"):
                there = there.get(each) if isinstance(there, dict) else None
            if there is None or isinstance(there, dict):
                return f"it is a hard link to {shown(target or 'no file')}, which does not come before it"
            inside[name] = there
        return None

    def _folder(self, path: str) -> dict[str, Any] | None:
        """The folder of a path, made with all above it; None where a file or link is in the way."""
        inside = self._root
        for name in path.split("/") if path else ():
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                return None
        return inside

    def _place(self, member: Member) -> int:
        crc = member.crc + _DEFLATED if member.deflated else member.crc
        at = (len(self._archives) - 1, member.offset, member.stored, member.length, crc)
        self._places.extend(at)
        length = max(member.stored, member.length)
        verdict = rejected(member.fault) if member.fault else judged(True, member.head, length)
        picture = verdict == PICTURE or sniff(member.head) is not None
        self._verdicts.append(verdict)
        self._by_bytes.append(picture and not member.fault)
        return len(self._verdicts) - 1

    def enter(self, folder: str) -> None:
        """Make a folder the root of all paths."""
        self._top, top = folder, f"{folder}/"
        below = [each for each in self.rejected if each[0].startswith(top)]
        self.rejected = [(path.removeprefix(top), reason) for path, reason in below]

    def source(self, root: Path, how: Listing, found: Found, *, wrapped: bool = True) -> Archives:
        """A source that can read its pictures, and counts what lies beside the archives. `wrapped`: see `tree_source`."""
        source = tree_source(self, root, how, wrapped=wrapped)
        inside = source.root.relative_to(root).as_posix().removeprefix(".")
        self._top = join(self._top, inside)
        for path, reason in (*found.unreadable, *self.rejected):
            source.rejected.append((seen_from(inside, path), reason))
        for path in found.others:
            source.left_out.append(LeftOut(seen_from(inside, path), NO_PICTURE.reason))
        numbers = [self._file(record.path) for record in source.records]
        places = np.frombuffer(self._places, PLACE)[numbers]
        return Archives(**vars(source), files=self._archives, places=places)

    # as a Tree

    def place(self, path: str) -> Hashable:
        return id(self._node(path))

    def entries(self, path: str) -> list[Entry]:
        found = []
        for name, node in self._node(path).items():
            link = isinstance(node, str)
            folder = self.is_folder(join(path, name)) if link else isinstance(node, dict)
            found.append(Entry(name, link, folder, isinstance(node, int)))
        return sorted(found)

    def look(self, path: str, plain: bool) -> Verdict:
        named = path.lower().endswith(SUFFIXES)
        try:
            number = self._file(path)
        except LeadsOut:
            return rejected("it is a link that leads out of the archive")
        except OSError as e:
            kind = "rejected" if named else "left out"
            return Verdict(kind, f"it is a broken link ({e.strerror})")
        if number == _SPECIAL:
            return Verdict("left out", "no file")
        if named or self._by_bytes[number]:
            return judged_by_name(path, self._verdicts[number])
        if path.lower().endswith((".tar", ".zip", *COMPRESSED_TARS)):
            return rejected("it is an archive in an archive, which is not entered: unpack that")
        return judged_by_name(path, NO_PICTURE)

    def is_folder(self, path: str) -> bool:
        try:
            return isinstance(self._node(path), dict)
        except OSError:
            return False

    def _file(self, path: str) -> int:
        """The number of a file's place. Raises OSError."""
        node = self._node(path)
        if not isinstance(node, int):
            raise _error(errno.EISDIR)
        return node

    def _node(self, path: str) -> Any:
        """The folder, or number of the file, to which a path below the top leads. Raises OSError."""
        way: list[Any] = [self._root]
        ahead, followed = join(self._top, path).split("/")[::-1], 0
        while ahead:
            name, inside = ahead.pop(), way[-1]
            node = inside.get(name) if isinstance(inside, dict) else None
            if isinstance(node, (dict, int)):
                way.append(node)
            elif isinstance(node, str):
                followed += 1
                if followed > _FOLLOWED:
                    raise _error(errno.ELOOP)
                if node.startswith("/"):
                    raise LeadsOut
                ahead += node.split("/")[::-1]
            elif name == "..":
                way.pop()
                if not way:
                    raise LeadsOut
            elif name not in ("", "."):
                raise _error(errno.ENOENT if isinstance(inside, dict) else errno.ENOTDIR)
        return way[-1]


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _below(folder: str, path: str) -> str | None:
    """A member's path below a folder, without what unpacking leaves out; None: it leads out of it."""
    if path[:1] in ("", "/", ".") or "//" in path or "/." in path or path[-1] == "/":
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            return None
        path = "/".join(parts)
    return join(folder, path)


# ---- the layouts ----


def archives(
    suffix: str, members: Callable[[Path], Iterator[Member]], root: Path, how: Listing
) -> Source:
    """An archive, or those of a folder that end so, as `image_folder` lists what they unpack to.

    First bytes come with the headers: `by_name` changes nothing.
    """
    tree, found, split = Members(), archives_in(root, suffix), how.split
    for path, folder in found.archives:
        if split is None or _meet(folder, split):
            tree.unpack(path, folder, members(path))
    if split is not None:
        folder = split_folder(tree, root, join("", os.path.normpath(split)))
        tree.enter(folder)
        below = [path for path in found.others if path.startswith(f"{folder}/")]
        found = found._replace(others=[seen_from(folder, path) for path in below])
    return tree.source(root, how, found)


def _meet(folder: str, split: str) -> bool:
    """Whether one of two folders is in the other."""
    return all(a == b for a, b in zip(folder.split("/"), split.split("/"), strict=False) if a)
