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
that it describes. The .beton comes last; one that is replaced goes first. So a reader that finds a .beton
finds its whole set, and the two crcs tell of one that was carried here alone.

Every picture is decoded, shrunk where asked, and encoded anew, also a JPEG that could have been copied: one
encoder, one quality, no EXIF, no surprise. The file is packed from the parts' records in order, so its bytes
depend on neither workers nor parts.
"""

import contextlib
import json
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

import fastrot
from fastrot.config import Refused
from fastrot.data import prepare
from fastrot.data.beton import layout
from fastrot.data.pictures import BadPicture
from fastrot.data.sources import Source, order_fingerprint, path_keys
from fastrot.disk import replace_bytes, sync_folder, write_atomically

ROWS_AT = layout.HEADER.itemsize + len(layout.NAMES) * layout.FIELD.itemsize  # 3,147
LARGEST = 2**31  # bytes of a record: the largest page that the header can name


@dataclass(frozen=True, kw_only=True)
class BetonOptions(prepare.Options):
    """Convert pictures into one FFCV .beton file, resumable, with checksums beside it."""

    encoding: Literal["jpg", "raw"] = "jpg"  # how pictures are stored; raw: exact, and large
    quality: int = 90  # of the JPEG, 1 to 100

    def check(self) -> None:
        super().check()
        if not 1 <= self.quality <= 100:
            raise Refused(f"--quality got {self.quality}: it wants 1 to 100")
        if self.out.suffix != ".beton":
            raise Refused(f"--out got {self.out}: its name must end in .beton")
        if self.out.is_dir():
            raise Refused(f"--out got {self.out}, a folder: it wants a file's name")


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
        spool.close()


def write_part(coder: Coder, path: Path, pictures: Iterable[prepare.Encoded], room: int) -> None:
    """A .beton of its own from a part's pictures; `index` counts from 0 in it."""

    def write(file: BinaryIO) -> None:
        packer = Packer(file, room)
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
    packer = Packer(file, rows)
    for part in parts:
        crcs = part.tally().crcs
        records = read_part(part.file) if crcs else iter(())
        for crc, (row, record) in zip(crcs, records, strict=True):
            if zlib.crc32(record) != crc:
                part.facts.unlink()
                raise Refused(
                    f"{part.file} has changed since it was written: run again, and that part is made anew"
                )
            mode, width, height, _ = row["f0"].tolist()
            packer.add(record, mode=mode, height=height, width=width, label=int(row["f1"]))
    packer.finish()


# ---- the conversion ----


def convert(
    options: BetonOptions, *, part: int = prepare.PART
) -> prepare.Summary | prepare.Estimate:
    """Open the source and write what the options ask for. `part`: records a part, for tests."""
    options.check()
    source = prepare.open_source_of(options)
    coder = Coder(options.encoding, options.quality)
    recipe = prepare.Recipe(coder, options.short_side, options.max_side)
    count = len(source.records[: options.limit])
    if options.estimate:
        extra = layout.ROW.itemsize + layout.TABLE.itemsize
        return prepare.estimate(source, count, recipe, options.processes, extra)

    start, cpu = time.perf_counter(), prepare.cpu_seconds()
    out, parts_at = options.out, side(options.out, "parts")
    plan = prepare.plan_of(options, source)
    finished = _finished(out, plan) if not options.overwrite else None
    if finished is not None:
        if parts_at.exists():  # left by a run that was killed at its very end
            with contextlib.suppress(Refused), prepare.parts_folder(parts_at, plan, True):
                pass
        return _summary(options, source, finished, already=True)

    facts = None
    with prepare.parts_folder(parts_at, {**plan, "part": part}, options.overwrite):
        parts = prepare.parts_of(parts_at, count, ".beton", part)
        missing = [p for p in parts if not p.whole()]
        left = sum(len(p.records) for p in missing)
        with prepare.progress_bar(count, before=count - left) as tick:
            prepare.make_parts(
                missing,
                source,
                recipe,
                partial(write_part, coder),
                min(options.processes, -(-left // prepare.CHUNK)),
                tick,
            )
        found = _gather(parts, source)
        if len(found.written):
            facts = _publish(options, source, plan, parts, found)
    if facts is None:
        path, reason = found.rejects[0]
        raise Refused(
            f"no picture of {len(found.rejects):,} could be used; the first, {path}: {reason}"
        )
    return _summary(
        options,
        source,
        facts,
        converted=left,
        resumed=count - left,
        seconds=time.perf_counter() - start,
        cpu_seconds=prepare.cpu_seconds() - cpu,
    )


class _Found(NamedTuple):
    """What the parts hold, together."""

    total: prepare.Tally  # statistics alone
    crcs: UInt32[np.ndarray, " n"]
    written: Int64[np.ndarray, " n"]  # numbers of records in the source
    rejects: list[tuple[str, str]]  # path, reason; those of the source first


def _gather(parts: list[prepare.Part], source: Source) -> _Found:
    total, crcs, written, rejects = prepare.Tally(), [], [], list(source.rejected)
    for tally in (part.tally() for part in parts):
        total.add(tally)
        crcs.append(np.array(tally.crcs, np.uint32))
        written.append(np.array(tally.records, np.int64))
        rejects += [(source.records[i].path, reason) for i, reason in tally.rejects]
    return _Found(total, np.concatenate(crcs), np.concatenate(written), rejects)


def _publish(
    options: BetonOptions,
    source: Source,
    plan: dict[str, Any],
    parts: list[prepare.Part],
    found: _Found,
) -> dict[str, Any]:
    """Merge the parts and put the set in its place, the .beton last; what its .json says."""
    out = options.out
    total, crcs, written, rejects = found
    merged = parts[0].folder / "merged"
    write_atomically(merged, lambda file: merge(parts, len(written), file))

    header, head_crc, table_crc = _checked(merged)
    labels = np.array([source.records[i].label for i in written], np.int64)
    keys = path_keys([source.records[i].path for i in written])
    numbers = written if source.numbers is None else source.numbers[written]
    counted = np.array_equal(numbers, np.arange(len(numbers)))
    mean, std = total.mean_and_std()
    facts = {
        "format": "beton",
        "rows": len(written),
        "classes": list(source.classes),
        "mean": mean,  # of red, green, blue, in 0..1, over all pixels before encoding
        "std": std,
        "fingerprint": order_fingerprint(keys, labels),
        "numbers": None if counted else numbers.tolist(),  # torchvision's, where they differ
        "head_crc": head_crc,
        "table_crc": table_crc,
        "bytes": merged.stat().st_size,
        "page": int(header["page"]),
        "max_height": total.largest[0],
        "max_width": total.largest[1],
        "pixels": total.pixels,
        "rejected": len(rejects),
        "skipped": source.skipped,
        "beyond_limit": len(source.records) - len(source.records[: options.limit]),
        "seen": source.seen,
        "options": plan,
        "versions": {
            "python": platform.python_version(),
            "fastrot": fastrot.__version__,
            **{name: version(name) for name in ("numpy", "simplejpeg")},
        },
    }
    paths = (
        {"path": source.records[i].path, "number": int(number)}
        for i, number in zip(written, numbers, strict=True)
    )
    out.unlink(missing_ok=True)  # while its set is replaced there is no .beton at all
    write_atomically(side(out, "crc.npy"), lambda file: np.save(file, crcs))
    write_atomically(side(out, "keys.npy"), lambda file: np.save(file, keys))
    _write_lines(side(out, "paths.jsonl"), paths)
    if rejects:
        _write_lines(
            side(out, "rejects.jsonl"), ({"path": path, "reason": why} for path, why in rejects)
        )
    else:
        side(out, "rejects.jsonl").unlink(missing_ok=True)
    replace_bytes(side(out, "json"), json.dumps(facts, indent=1).encode())
    os.replace(merged, out)
    sync_folder(out.parent)
    return facts


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """What the .json of a finished file says, None where there is none; another plan's is refused."""
    if not out.exists():
        return None
    try:
        facts = json.loads(side(out, "json").read_bytes())
        _, head_crc, table_crc = _checked(out)
        whole = (facts["head_crc"], facts["table_crc"]) == (head_crc, table_crc)
        theirs = facts["options"]
    except (OSError, ValueError, KeyError, IndexError):
        whole, facts, theirs = False, {}, {}
    ways = "add --overwrite or choose another --out"
    if not whole:
        raise Refused(f"{out} is there, but is no whole file of ours: {ways}")
    if differs := prepare.difference(plan, theirs):
        raise Refused(f"{out} is there, made {differs}: {ways}")
    return facts


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


def _summary(options: BetonOptions, source: Source, facts: dict[str, Any], **how) -> Any:
    rejects = []
    if facts["rejected"]:
        with open(side(options.out, "rejects.jsonl"), "rb") as file:
            rejects = [(line["path"], line["reason"]) for line in map(json.loads, file)]
    return prepare.Summary(
        out=options.out,
        written=facts["rows"],
        rejects=rejects,
        skipped=facts["skipped"],
        beyond_limit=facts["beyond_limit"],
        seen=facts["seen"],
        bytes=facts["bytes"],
        **how,
    )


def side(out: Path, name: str) -> Path:
    """The file `name` of the set beside OUT."""
    return out.with_name(f"{out.name}.{name}")


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(
        path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    )


def _blocks(file: Any, size: int = 2**20) -> Iterator[bytes]:
    while block := file.read(size):
        yield block
