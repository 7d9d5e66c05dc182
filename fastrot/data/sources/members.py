"""What lies where in a tar or a zip: headers are read, the bytes of pictures are not.

A listing is never short without a word, as tarfile's is behind a damaged header: what was cut or is damaged is
refused, with the place. Tars in a tar are entered, as folders of their names without .tar (ImageNet's
ILSVRC2012_img_train.tar). Compressed tars are refused: a picture in the middle of one cannot be reached.
"""

import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from fastrot.config import UsageError
from fastrot.data.files import BadPicture, hidden, one_line, shown, without_waiting
from fastrot.disk import named

BLOCK = 512  # bytes; a tar is made of these
LONGEST_NAME = 4096  # bytes; no system takes a longer path
MOST_ZEROS = 2**24  # behind the last member: tar fills up a block of 10 kB, or what was chosen
MOST_EXTENDED = 2**20  # bytes of an extended header
_AHEAD = 2 * BLOCK  # bytes read at once: a header, and where the member begins


class Member(NamedTuple):
    """A file, folder or link of an archive."""

    path: str  # as the archive has it; odd bytes as surrogates
    kind: Literal["file", "folder", "link", "hard link", "special"]
    offset: int = 0  # of its bytes in the archive
    stored: int = 0  # bytes there
    length: int = 0  # bytes of the file
    head: bytes = b""  # its first bytes
    target: str = ""  # of a link
    deflated: bool = False
    crc: int = -1  # crc32 of the file; -1: unknown
    fault: str = ""  # why it cannot be read


# ---- tars ----


def tar_members(path: Path, *, nested: bool = True) -> Iterator[Member]:
    """Members of a tar in their order; `nested`: tars in it are entered. Raises UsageError of a damaged one."""
    with named(path), open(path, "rb", opener=without_waiting) as opened:
        file = opened.fileno()
        stop = os.fstat(file).st_size
        yield from _Tar(file, str(path), 0, stop, "", nested).members()


class _Tar:
    """A tar from byte `start` to `stop` of an open file. `name` stands for it in sentences, `folder` in paths."""

    def __init__(self, file: int, name: str, start: int, stop: int, folder: str, nested: bool):
        self.file, self.name, self.start, self.stop = file, name, start, stop
        self.folder, self.nested = folder, nested

    def members(self) -> Iterator[Member]:
        at, lasting, passing = self.start, {}, {}
        while at is not None:
            block = self._block(at)
            header = block[:BLOCK]
            if header == _EMPTY:
                at = self._behind_end(at)
                continue
            kind, size = self._kind_and_size(header, at)
            if kind in b"xXgLK":
                said = lasting if kind == b"g" else passing
                said.update(self._extended(kind, size, at))
                at += BLOCK + _padded(size)
                continue
            known, passing = {**lasting, **passing}, {}
            size = int(known.get("size", size))
            if kind in b"123456":
                size = 0  # what is said of links and folders takes no room
            first = self._behind_map(header, at) if kind == b"S" else at + BLOCK
            path = known.get("GNU.sparse.name") or known.get("path") or _name(header)
            head = block[BLOCK : BLOCK + size] if first == at + BLOCK else b""
            at = first + _padded(size)
            if at > self.stop:
                self._cut(first, path)
            if kind == b"V":  # the name of the whole
                continue
            yield from self._member(header, known, path, first, size, head)

    def _member(
        self, header: bytes, known: dict[str, str], path: str, first: int, size: int, head: bytes
    ) -> Iterator[Member]:
        """A header's member, or those of the tar that it is. `known`: what extended headers say of it."""
        kind, inside = header[156:157], f"{self.folder}/{path}" if self.folder else path
        if kind in b"5D" or (kind in b"\0" + b"0" and path.endswith("/")):
            yield Member(inside, "folder")
        elif kind in b"346":
            yield Member(inside, "special")
        elif kind in b"12":
            target = known.get("linkpath") or _until_zero(header[157:257])
            if kind == b"1" and self.folder:
                target = f"{self.folder}/{target}"
            yield Member(inside, "hard link" if kind == b"1" else "link", target=target)
        elif kind == b"M":
            fault = "it goes on from another volume"
            yield Member(inside, "file", first, size, size, fault=fault)
        elif kind == b"S" or any(key.startswith("GNU.sparse") for key in known):
            yield Member(inside, "file", first, size, size, fault="it is stored sparse")
        elif self.nested and path.lower().endswith(".tar") and not _in_hidden(path):
            name = f"{shown(path)} in {self.name}"
            yield from _Tar(self.file, name, first, first + size, inside[:-4], False).members()
        else:
            yield Member(inside, "file", first, size, size, head)

    def _block(self, at: int) -> bytes:
        """The block at byte `at`, and the next where there is one."""
        block = os.pread(self.file, max(0, min(_AHEAD, self.stop - at)), at)
        if len(block) < BLOCK:
            self._cut(at)
        return block

    def _kind_and_size(self, header: bytes, at: int) -> tuple[bytes, int]:
        """What a header announces, and how many bytes follow it, once its checksum is right."""
        said, size = _number(header[148:156]), _number(header[124:136])
        if size is None or (said != _checksum(header) and said != _signed(header)):
            self._damaged(at)
        return header[156:157], size

    def _extended(self, kind: bytes, size: int, at: int) -> dict[str, str]:
        """What an extended header says: GNU's of one name, or pax's in lines "LENGTH KEY=VALUE"."""
        if size > MOST_EXTENDED:
            self._damaged(at)
        if at + BLOCK + _padded(size) > self.stop:
            self._cut(at)
        words, found, place = os.pread(self.file, size, at + BLOCK), {}, 0
        if kind in b"LK":
            return {"path" if kind == b"L" else "linkpath": _until_zero(words)}
        while place < len(words) and words[place]:
            length = _LENGTH.match(words, place)
            behind = place + int(length[1]) if length else 0
            if length is None or not length.end() < behind <= len(words):
                self._damaged(at + BLOCK)
            key, _, value = words[length.end() : behind - 1].partition(b"=")
            if key == b"size" and not (value.isdigit() and len(value) < 20):
                self._damaged(at + BLOCK)
            found[os.fsdecode(key)] = os.fsdecode(value)
            place = behind
        return found

    def _behind_map(self, header: bytes, at: int) -> int:
        """Where the data of GNU's old sparse member begins: behind the blocks of its map."""
        goes_on = header[482]
        while goes_on:
            at += BLOCK
            goes_on = self._block(at)[504]
        return at + BLOCK

    def _behind_end(self, at: int) -> int | None:
        """Where another tar begins behind this one's empty blocks: tars that were joined are read on, as `tar -i`."""
        begins, header = at, b""
        while at < self.stop and not header:
            zeros = os.pread(self.file, min(2**16, self.stop - at), at)
            if not zeros:
                raise UsageError(f"{self.name} became shorter while it was listed: fetch it anew")
            behind = zeros.lstrip(b"\0")
            at += len(zeros) - len(behind)
            if behind:
                at -= (at - self.start) % BLOCK
                header = os.pread(self.file, min(BLOCK, self.stop - at), at)
        if at - begins <= MOST_ZEROS:
            if not header:
                return None
            if len(header) == BLOCK and _number(header[148:156]) == _checksum(header):
                return at
        raise UsageError(
            f"{self.name} has {at - begins:,} zero bytes from byte {begins - self.start:,} on: fetch it anew"
        )

    def _damaged(self, at: int) -> NoReturn:
        if at > self.start:
            raise UsageError(f"{self.name} is damaged at byte {at - self.start:,}: fetch it anew")
        head = os.pread(self.file, 8, at)
        known = (what for magic, what in _OTHERS.items() if head.startswith(magic))
        raise UsageError(f"{self.name} is {next(known, 'no tar: see what it is')}")

    def _cut(self, at: int, path: str | None = None) -> NoReturn:
        size = self.stop - self.start
        if not size:
            raise UsageError(f"{self.name} is an empty file: fetch it anew")
        if size < BLOCK:
            self._damaged(self.start)
        where = "without the two empty blocks that end a tar"
        if path is not None:
            where = f"inside of {shown(path)}, which begins at byte {at - self.start:,}"
        raise UsageError(f"{self.name} is cut short at byte {size:,}, {where}: fetch it anew")


_EMPTY = bytes(BLOCK)
_LENGTH = re.compile(rb"(\d{1,9}) ")
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*$")
_OTHERS = {  # how a file begins that is no tar, and what is said of it
    b"\x1f\x8b": "compressed (gzip): gunzip it first",
    b"BZh": "compressed (bzip2): bunzip2 it first",
    b"\xfd7zXZ\0": "compressed (xz): unxz it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unzstd it first",
    b"\x04\x22\x4d\x18": "compressed (lz4): unlz4 it first",
    b"PK": "no tar, but a zip: --source zip reads it",
}


def _number(field: bytes) -> int | None:
    """A header's number: octal, or base 256 where the first bit is set. None: it is none."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    octal = _OCTAL.match(field)
    return None if octal is None else int(octal[1] or b"0", 8)


def _checksum(header: bytes) -> int:
    """Of a header's bytes, those of the checksum itself taken as spaces."""
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _signed(header: bytes) -> int:
    """The checksum as some old systems made it, of signed bytes."""
    return sum(struct.unpack("148b8x356b", header)) + 8 * ord(" ")


def _padded(size: int) -> int:
    """Bytes with those that fill up the last block."""
    return -(-size // BLOCK) * BLOCK


def _in_hidden(path: str) -> bool:
    return any(hidden(name) for name in path.split("/") if name not in (".", ".."))


def _until_zero(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0", 1)[0])


def _name(header: bytes) -> str:
    name = _until_zero(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own headers have other things there
        return f"{_until_zero(header[345:500])}/{name}"
    return name


# ---- zips ----


def zip_members(path: Path) -> Iterator[Member]:
    """Members of a zip in the order of their places. Raises UsageError where its table of contents is damaged."""
    with named(path), open(path, "rb", opener=without_waiting) as opened:
        file = opened.fileno()
        size = os.fstat(file).st_size
        infos = _table(path, os.pread(file, 2**17, max(0, size - 2**17)))
        backslashes = bool(infos) and all(_WINDOWS.search(info.filename) for info in infos)
        for info in infos:
            if backslashes or info.create_system != _UNIX:  # on Unix a name may hold one
                info.filename = info.filename.replace("\\", "/")
            yield _zip_member(file, size, info)


def _table(path: Path, tail: bytes) -> list[zipfile.ZipInfo]:
    """What the table of contents holds. `tail`: the last bytes, which say how many members there are."""

    def damaged(why: object) -> UsageError:
        return UsageError(f"{path} is no zip, or was cut short ({one_line(why)}): fetch it anew")

    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except Exception as e:  # a damaged table raises nearly every type there is
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        raise damaged(e) from None
    large, end = tail.rfind(b"PK\6\6"), tail.rfind(b"PK\5\6")  # of zip64, and of all
    (announced,) = struct.unpack_from("<H", tail, end + 10)
    if announced == 2**16 - 1 and 0 <= large <= end - 56:
        (announced,) = struct.unpack_from("<Q", tail, large + 32)
    # a damaged table swallows some; before zip64 the count went round
    if announced not in (len(infos), len(infos) % 2**16):
        raise damaged(f"it names {len(infos):,} members and announces {announced:,}")
    if infos and infos[0].header_offset:
        # a zip whose end is lost, with another zip in it, would be taken for that one
        raise damaged("its first member is not at its beginning")
    return infos


_WINDOWS = re.compile(r"^[^/]*\\[^/]*$")  # a name with the separators of Windows alone
_LOCAL = struct.Struct("<4s22xHH")  # before a member: "PK34", lengths of its name and extra field
_UNIX, _UTF8, _ENCRYPTED = 3, 0x800, 0x1 | 0x40 | 0x2000


def _zip_member(file: int, size: int, info: zipfile.ZipInfo) -> Member:
    path, stored, length = info.filename, info.compress_size, info.file_size
    if info.create_system == _UNIX and not info.flag_bits & _UTF8:
        path = os.fsdecode(path.encode("cp437"))  # bytes that Unix wrote without saying how
    if path.endswith("/"):
        return Member(path, "folder")
    link = info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16)
    try:
        first, head = _beginning(file, size, info)
        if link and length > len(head):
            raise BadPicture("it is a link with a name that no system takes")
    except BadPicture as e:
        return Member(path, "file", 0, stored, length, fault=str(e))
    if link:
        return Member(path, "link", target=os.fsdecode(head[:length]))
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return Member(path, "file", first, stored, length, head, deflated=deflated, crc=info.CRC)


def _beginning(file: int, size: int, info: zipfile.ZipInfo) -> tuple[int, bytes]:
    """Where a member's bytes begin, and the first of what they hold. Raises BadPicture."""
    if info.flag_bits & _ENCRYPTED:
        raise BadPicture("it is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadPicture(f"it is compressed by method {info.compress_type}, not deflate")
    block, stored = os.pread(file, _AHEAD, info.header_offset), info.compress_size
    if len(block) < _LOCAL.size or not block.startswith(b"PK\3\4"):
        raise BadPicture("something else is in its place in the zip")
    _, name, extra = _LOCAL.unpack_from(block)
    first = info.header_offset + _LOCAL.size + name + extra
    if first + stored > size:
        raise BadPicture("it reaches beyond the end of the zip")
    raw = block[first - info.header_offset :][:stored]
    if len(raw) < min(stored, BLOCK):
        raw = os.pread(file, min(stored, BLOCK), first)
    if info.compress_type == zipfile.ZIP_STORED:
        if stored != info.file_size:
            raise BadPicture("its two lengths differ")
        return first, raw
    try:
        head = zlib.decompressobj(-15).decompress(raw, BLOCK)
        if len(head) < BLOCK and len(raw) < stored:  # behind a large table, or empty blocks
            raw = os.pread(file, min(stored, 2**16), first)
            head = zlib.decompressobj(-15).decompress(raw, BLOCK)
    except zlib.error:
        raise BadPicture("it cannot be inflated") from None
    return first, head
