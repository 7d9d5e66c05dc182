"""A source's pictures into one `.beton`, with what is to be known of them beside it.

    OUT.beton               pictures, labels, index = row number (see layout.py)
    OUT.beton.crc.npy       uint32 [rows]: crc32 of each record's bytes
    OUT.beton.keys.npy      uint64 [rows]: hash of each path
    OUT.beton.paths.jsonl   {"path", "number"} of each row: relative to the source's root; number in the source
    OUT.beton.rejects.jsonl {"path", "reason"} of each picture left out, where there are any
    OUT.beton.json          all else: classes, statistics, fingerprint, options, counts, versions

The .json has rows, classes, mean and std (of red, green, blue over all pixels before encoding, 0..1),
fingerprint, numbers (a list where the source's differ from the rows, else null), page, max_height, max_width,
counts, options and versions.

These files belong together: the .json's head_crc (header, fields and rows) and table_crc name the one .beton
that it describes; its own crc is its last key. All are written under other names before anything old is
touched; then one that is replaced goes first, and the .beton comes last. So a reader that finds a .beton finds
its whole set, the two crcs tell of one that was carried here alone, and a full disk harms nothing.

With --keep-parts the parts are not merged: OUT.beton.set/ holds them, and of the above `set.json` (with a list
`parts` of their names, rows, bytes and crcs instead of the two crcs), `set.crc.npy` and so on. That folder appears
by one rename, is read as one file with the same rows, and is merged by a later start without --keep-parts.

Every picture is decoded, shrunk where asked, and encoded anew, also a JPEG that could have been copied: one
encoder, one quality, no EXIF, no surprise. The file is packed from the parts' records in order, so its bytes
depend on neither workers nor parts.
"""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import UInt8

from fastrot.config import UsageError
from fastrot.data import conversion, prepare
from fastrot.data.beton import layout
from fastrot.data.conversion import There, Work
from fastrot.data.files import BadPicture
from fastrot.data.manifest import sealed, side, unsealed
from fastrot.data.ranks import ALONE, Ranks
from fastrot.disk import replace_bytes, sync_folder, write_atomically

ROWS_AT = layout.HEADER.itemsize + len(layout.NAMES) * layout.FIELD.itemsize  # 3,147
NEEDED = ("crc.npy", "keys.npy", "paths.jsonl")  # beside the records, besides the .json
BESIDE = (*NEEDED, "rejects.jsonl", "json")
LARGEST = 2**31  # bytes of a record: the largest page that the header can name
LONGEST = 65_500  # pixels a side that libjpeg takes


@dataclass(frozen=True, kw_only=True)
class BetonOptions(prepare.Options):
    """Convert pictures into one FFCV .beton file, resumable, with checksums beside it."""

    encoding: Literal["jpg", "raw"] = "jpg"  # how pictures are stored; raw: exact, and large
    quality: int = 90  # of the JPEG, 1 to 100
    keep_parts: bool = False  # no merging: leave the folder OUT.set, read by --data OUT.set

    def check(self) -> None:
        super().check()
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality got {self.quality}: it wants 1 to 100")
        if self.out.suffix != ".beton":
            raise UsageError(f"--out got {self.out}: its name must end in .beton")
        if self.out.is_dir():
            raise UsageError(f"--out got {self.out}, a folder: it wants a file's name")

    @property
    def parts(self) -> Path:
        """The folder in which parts are made."""
        return side(self.out, "parts")

    @property
    def set(self) -> Path:
        """The folder of whole parts that --keep-parts leaves."""
        return side(self.out, "set")


@dataclass(frozen=True, slots=True)
class Coder:
    """A picture's bytes in the file: JPEG (4:2:0, baseline) or its pixels."""

    encoding: Literal["jpg", "raw"] = "jpg"
    quality: int = 90

    @property
    def mode(self) -> int:
        return layout.JPG if self.encoding == "jpg" else layout.RAW

    def encode(self, picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
        if self.encoding == "raw":
            if picture.nbytes > LARGEST:
                raise BadPicture(f"{picture.nbytes:,} bytes raw: a record may have {LARGEST:,}")
            return picture.tobytes()
        if max(picture.shape[:2]) > LONGEST:
            height, width = picture.shape[:2]
            raise BadPicture(f"{width}x{height} pixels: a side of a JPEG may have {LONGEST:,}")
        import simplejpeg

        return simplejpeg.encode_jpeg(picture, quality=self.quality, colorsubsampling="420")

    def decode(self, data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8).reshape(height, width, 3)
        import simplejpeg

        return simplejpeg.decode_jpeg(data)


# ---- the file ----


class Packer:
    """Packs records into the pages of one open file, in the order given; the header comes last.

    A record larger than the page doubles the page: what lay inside one small page lies inside one large page.
    `room` is the number of rows to leave space for; fewer may come.
    """

    def __init__(self, file: BinaryIO, room: int):
        self.file, self.room = file, room
        self.rows, self.page = 0, layout.PAGE
        self._at = ROWS_AT + room * layout.ROW.itemsize
        beside = os.path.dirname(file.name)  # rows and table of millions of pictures go to disk
        self._rows = tempfile.SpooledTemporaryFile(2**20, dir=beside)  # noqa: SIM115 (closed in finish)
        self._table = tempfile.SpooledTemporaryFile(2**20, dir=beside)  # noqa: SIM115

    def add(self, record: bytes, *, mode: int, height: int, width: int, label: int) -> None:
        size = len(record)
        while self.page < size:
            self.page *= 2
        if self._at // self.page != (self._at + size - 1) // self.page:
            self._at = -(-self._at // self.page) * self.page
        self.file.seek(self._at)
        self.file.write(record)
        row = np.zeros(1, layout.ROW)  # zeros also where the struct has gaps
        row["f0"] = (mode, width, height, self._at)
        row["f1"], row["f2"] = label, self.rows
        self._rows.write(row.tobytes())
        self._table.write(np.array([(self.rows, self._at, size)], layout.TABLE).tobytes())
        self._at += size
        self.rows += 1

    def close(self) -> None:
        self._rows.close()
        self._table.close()

    def finish(self) -> None:
        assert 0 < self.rows <= self.room
        fields = np.zeros(len(layout.NAMES), layout.FIELD)
        for field, (name, kind) in zip(fields, layout.NAMES, strict=True):
            field["name"], field["type"] = name.encode(), kind
        header = np.zeros(1, layout.HEADER)
        header[0] = (layout.VERSION, len(fields), self.page, self.rows, self._at)
        self._move(self._table, self._at)
        self._move(self._rows, ROWS_AT)
        self.file.seek(layout.HEADER.itemsize)
        self.file.write(fields.tobytes())
        self.file.flush()
        self.file.seek(0)
        self.file.write(header.tobytes())

    def _move(self, spool: Any, at: int) -> None:
        spool.seek(0)
        self.file.seek(at)
        for block in _blocks(spool):
            self.file.write(block)


def write_part(coder: Coder, path: Path, pictures: Iterable[prepare.Encoded], room: int) -> None:
    """A .beton of its own from a part's pictures; `index` counts from 0 in it."""

    def write(file: BinaryIO) -> None:
        with contextlib.closing(Packer(file, room)) as packer:
            for p in pictures:
                packer.add(p.data, mode=coder.mode, height=p.height, width=p.width, label=p.label)
            packer.finish()

    write_atomically(path, write)


def read_part(path: Path) -> Iterator[tuple[np.void, bytes]]:
    """Row and record of every picture of a file that `Packer` wrote, in order."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(layout.HEADER.itemsize), layout.HEADER)[0]
        count = int(header["rows"])
        file.seek(ROWS_AT)
        rows = np.frombuffer(file.read(count * layout.ROW.itemsize), layout.ROW)
        file.seek(int(header["table"]))
        table = np.frombuffer(file.read(count * layout.TABLE.itemsize), layout.TABLE)
        for row, entry in zip(rows, table, strict=True):
            file.seek(int(entry["ptr"]))
            yield row, file.read(int(entry["size"]))


def merge(parts: list[prepare.Part], rows: int, file: BinaryIO) -> None:
    """Pack the records of all parts into one file, in order, each checked on the way."""
    with contextlib.closing(Packer(file, rows)) as packer:
        for part in parts:
            for row, record in _unchanged(part):
                mode, width, height, _ = row["f0"].tolist()
                packer.add(record, mode=mode, height=height, width=width, label=int(row["f1"]))
        packer.finish()


def _unchanged(part: prepare.Part) -> Iterator[tuple[np.void, bytes]]:
    """Row and record of every picture of a part, each checked. Raises UsageError, and the part counts as not made."""
    crcs = part.tally().crcs
    records = read_part(part.file) if crcs else iter(())
    try:
        for crc, (row, record) in zip(crcs, records, strict=True):
            if zlib.crc32(record) != crc:
                raise ValueError
            yield row, record
    except (ValueError, IndexError):  # or the part is cut, or its rows lead elsewhere
        part.facts.unlink()
        raise UsageError(
            f"{part.file} has changed since it was written: run again, and that part is made anew"
        ) from None


# ---- the conversion ----


def convert(
    options: BetonOptions, ranks: Ranks = ALONE, *, part: int = prepare.PART
) -> prepare.Summary | prepare.Estimate:
    """See `conversion.convert`."""
    return conversion.convert(BetonForm(options), ranks, part=part)


class BetonForm(conversion.Form):
    """One file, or with --keep-parts the folder of its parts."""

    suffix = ".beton"
    row_bytes = layout.ROW.itemsize + layout.TABLE.itemsize
    options: BetonOptions

    @property
    def recipe(self) -> prepare.Recipe:
        return prepare.Recipe(self._coder, self.options.short_side, self.options.max_side)

    @property
    def _coder(self) -> Coder:
        return Coder(self.options.encoding, self.options.quality)

    def write_part(self, path: Path, pictures: Iterable[prepare.Encoded], room: int) -> None:
        write_part(self._coder, path, pictures, room)

    def there(self, plan: dict[str, Any], part: int) -> There:
        options = self.options
        with contextlib.suppress(OSError):
            options.set.rmdir()  # where it is empty: of a start that was killed at its very end
        if options.set.exists() and prepare.begun_with(options.set) is None:
            raise UsageError(
                f"{options.set} is there, but is no set of ours: remove it or choose another --out"
            )
        if options.overwrite:
            return There()
        finished = _finished(options.out, plan)
        if finished is not None:
            _tidy(options, {**plan, "part": part})
            return There(finished)
        kept = _kept(options, plan)
        if kept is not None and not options.keep_parts:
            return There(None, options.set, (prepare.begun_with(options.set) or {})["part"])
        return There(kept)

    def publish(self, work: Work) -> dict[str, Any]:
        publish = _publish_set if self.options.keep_parts else _publish_file
        return publish(self.options, work)

    def told(self, facts: dict[str, Any]) -> dict[str, Any]:
        parts = "parts" in facts
        base = self.options.set / "set" if parts else self.options.out
        out = self.options.set if parts else self.options.out
        return {"out": out, "parts": parts, "rejected_at": side(base, "rejects.jsonl")}


def _tidy(options: BetonOptions, plan: dict[str, Any]) -> None:
    """Remove what a start that was killed at its very end left beside its finished file."""
    begun = prepare.begun_with(options.set) or {}
    if not options.keep_parts and {**begun, "part": plan["part"]} == plan:
        prepare.remove(options.set)
    if options.parts.exists():
        with contextlib.suppress(UsageError), prepare.parts_folder(options.parts, plan, False):
            prepare.remove(options.parts)


def _publish_file(options: BetonOptions, work: Work) -> dict[str, Any]:
    """Merge the parts and put OUT.beton and all beside it in their places; what its .json says."""
    out, new = options.out, options.parts / prepare.NEW
    write_atomically(new, lambda file: merge(work.parts, len(work.found.written), file))
    header, head_crc, table_crc = _checked(new)
    body = {
        "head_crc": head_crc,
        "table_crc": table_crc,
        "bytes": new.stat().st_size,
        "page": int(header["page"]),
    }
    facts = _write_beside(new, work, body)
    # all of it is on the disk: from here on names change, which needs no space
    out.unlink(missing_ok=True)
    for name in BESIDE:
        if side(new, name).exists():
            os.replace(side(new, name), side(out, name))
        else:
            side(out, name).unlink(missing_ok=True)
    sync_folder(out.parent)
    os.replace(new, out)
    sync_folder(out.parent)
    prepare.remove(options.set)
    prepare.remove(options.parts)
    return facts


def _publish_set(options: BetonOptions, work: Work) -> dict[str, Any]:
    """Add to the folder of parts what makes it a set, and give it its name; what its set.json says."""
    listed, page = [], 0
    for part in work.parts:
        if part.file.exists():
            header, head_crc, table_crc = _checked(part.file)
            listed.append(
                {
                    "file": part.file.name,
                    "rows": int(header["rows"]),
                    "bytes": part.file.stat().st_size,
                    "head_crc": head_crc,
                    "table_crc": table_crc,
                }
            )
            page = max(page, int(header["page"]))
    body = {"parts": listed, "bytes": sum(each["bytes"] for each in listed), "page": page}
    facts = _write_beside(options.parts / "set", work, body)
    # what it replaces goes first, as with a file
    options.out.unlink(missing_ok=True)
    for name in BESIDE:
        side(options.out, name).unlink(missing_ok=True)
    prepare.remove(options.set)
    os.rename(options.parts, options.set)
    sync_folder(options.out.parent)
    (options.set / prepare.LOCK).unlink(missing_ok=True)
    return facts


def _write_beside(base: Path, work: Work, body: dict[str, Any]) -> dict[str, Any]:
    """Write all that lies beside the records, the .json last; what that says. `body`: of the records' file or files."""
    facts = conversion.facts_of("beton", work, body, BetonForm.packages)
    keys = conversion.keys_of(work)
    write_atomically(side(base, "crc.npy"), lambda file: np.save(file, work.found.crcs))
    write_atomically(side(base, "keys.npy"), lambda file: np.save(file, keys))
    conversion.write_paths(side(base, "paths.jsonl"), work)
    conversion.write_rejects(side(base, "rejects.jsonl"), work)
    replace_bytes(side(base, "json"), sealed(facts))
    return facts


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """What the .json of a finished file says, None where there is none; another plan's is refused."""
    if not out.exists():
        return None
    try:
        facts = unsealed(side(out, "json").read_bytes())
        _, head_crc, table_crc = _checked(out)
        whole = (facts["head_crc"], facts["table_crc"]) == (head_crc, table_crc)
        whole = whole and all(side(out, name).exists() for name in NEEDED)
        theirs = facts["options"]
    except (OSError, ValueError, KeyError, IndexError):
        whole, facts, theirs = False, {}, {}
    ways = "add --overwrite or choose another --out"
    if not whole:
        raise UsageError(f"{out} is there, but is no whole file of ours: {ways}")
    if differs := prepare.difference(plan, theirs):
        raise UsageError(f"{out} is there, made {differs}: {ways}")
    return facts


def _kept(options: BetonOptions, plan: dict[str, Any]) -> dict[str, Any] | None:
    """What the .json of a finished set says, None where there is none; another plan's is refused.

    One that lacks something becomes the folder of parts again, so that it is mended there.
    """
    at, ways = options.set, "add --overwrite or choose another --out"
    if not at.exists():
        return None
    begun = prepare.begun_with(at) or {}
    if differs := prepare.difference(plan, {k: v for k, v in begun.items() if k != "part"}):
        raise UsageError(f"{at} is there, made {differs}: {ways}")
    facts: dict[str, Any] = {"parts": []}
    with contextlib.suppress(OSError, ValueError):
        facts = unsealed((at / "set.json").read_bytes())
    changed = [at / each["file"] for each in facts["parts"] if not _as_listed(at, each)]
    whole = not changed and facts["parts"]
    if whole and all(side(at / "set", name).exists() for name in NEEDED):
        (at / prepare.LOCK).unlink(missing_ok=True)  # of a start that was killed at its very end
        return facts
    if options.parts.exists() and {*os.listdir(options.parts)} <= {prepare.PLAN, prepare.LOCK}:
        prepare.remove(options.parts)  # of a merge that was broken off
    if options.parts.exists():
        raise UsageError(
            f"{at} lacks something, and {options.parts} is there too: remove one of them"
        )
    for file in changed:
        file.with_suffix(".json").unlink(missing_ok=True)
    os.rename(at, options.parts)
    return None


def _as_listed(folder: Path, part: dict[str, Any]) -> bool:
    """Whether a part of a set is what set.json says; its records are not read."""
    if not (folder / part["file"]).with_suffix(".json").exists():
        return False  # a merge found a record changed
    try:
        header, head_crc, table_crc = _checked(folder / part["file"])
    except (OSError, ValueError, IndexError):
        return False
    found = (int(header["rows"]), head_crc, table_crc)
    return found == (part["rows"], part["head_crc"], part["table_crc"])


def _checked(path: Path) -> tuple[np.void, int, int]:
    """Header, crc32 of header, fields and rows, crc32 of the table."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(layout.HEADER.itemsize), layout.HEADER)[0]
        head = _crc(file, 0, ROWS_AT + int(header["rows"]) * layout.ROW.itemsize)
        return header, head, _crc(file, int(header["table"]), path.stat().st_size)


def _crc(file: BinaryIO, start: int, stop: int) -> int:
    crc = 0
    file.seek(start)
    while left := stop - file.tell():
        block = file.read(min(left, 2**20))
        if not block:
            raise ValueError("the file ends too early")
        crc = zlib.crc32(block, crc)
    return crc


def _blocks(file: Any, size: int = 2**20) -> Iterator[bytes]:
    while block := file.read(size):
        yield block
