"""A source's pictures into tar shards, ordinary WebDataset, with indices for DALI and for ourselves; see README.md."""

import contextlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from fastrot.arrays import Picture
from fastrot.config import UsageError
from fastrot.data.beton.write import Coder as BetonCoder
from fastrot.data.files import HEAD, sniff
from fastrot.data.manifest import sealed
from fastrot.data.prepare.encode import EncodedPicture, EncodeSpec
from fastrot.data.prepare.options import Options
from fastrot.data.prepare.parts import PART, Part
from fastrot.data.prepare.writer import Converted, FolderWriter, save
from fastrot.data.tars import layout
from fastrot.data.tars.layout import read_index
from fastrot.disk import replace_bytes, write_atomically

QUALITY = 90  # of the JPEGs where only a size is given


@dataclass(frozen=True, kw_only=True)
class TarsOptions(Options):
    """Convert pictures into WebDataset tar shards, with an index for DALI; resumable, with checksums beside them."""

    quality: int | None = None  # 1 to 100: make JPEGs; default: the original bytes, or 90 if shrunk
    shard: int = PART  # pictures a shard, at most

    def check(self) -> None:
        super().check()
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(f"--quality got {self.quality}: it wants 1 to 100")
        if self.shard < 1:
            raise UsageError(f"--shard got {self.shard}: it wants at least 1")
        if self.out.suffix == ".tar" or self.out.is_file():
            raise UsageError(f"--out got {self.out}, a file's name: it wants a folder")

    def writer(self) -> "TarsWriter":
        return TarsWriter(self)


@dataclass(frozen=True, slots=True)
class Coder:
    """A picture's bytes in a shard: a JPEG; without a quality, for want of a file's bytes, a PNG."""

    quality: int | None

    def encode(self, picture: Picture) -> bytes:
        if self.quality is not None:
            return BetonCoder("jpg", self.quality).encode(picture)
        return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()

    def decode(self, data: bytes, height: int, width: int) -> Picture:
        from fastrot.data import pictures

        return pictures.decode(data)


class TarsWriter(FolderWriter):
    """A folder of shards."""

    suffix = ".tar"
    # two headers, a label, half a block
    row_bytes = 7 * layout.BLOCK // 2 + layout.ROW.itemsize + 8
    named = "shards of ours"
    manifest_name = layout.MANIFEST
    options: TarsOptions

    def __init__(self, options: TarsOptions):
        super().__init__(options)
        self.part = options.shard

    @property
    def encode_spec(self) -> EncodeSpec:
        o, quality = self.options, self.options.quality
        if quality is None and (o.short_side is not None or o.max_side is not None):
            quality = QUALITY
        sizes, kept = (o.short_side, o.max_side), quality is None
        return EncodeSpec(Coder(quality), *sizes, o.allow_truncated, keep_bytes=kept)

    def write_part(self, path: Path, pictures: Iterable[EncodedPicture], room: int) -> None:
        """The shard, and beside it its rows (.npy) and DALI's index (.idx)."""
        rows: list[tuple] = []
        lines: list[str] = []

        def write(file: BinaryIO) -> None:
            for picture in pictures:
                key, kind = f"{picture.record:09d}", str(sniff(picture.data[:HEAD]))
                ending = layout.ENDINGS.get(kind, kind)
                image = _add(file, f"{key}.{ending}", picture.data)
                label = _add(file, f"{key}.cls", b"%d" % picture.label)
                lines.append(f"{ending} {image} cls {label}\n")
                where = int(image.split()[0]), len(picture.data)
                what = picture.label, picture.height, picture.width, picture.crc
                rows.append((*where, *what, 0))
            file.write(bytes(2 * layout.BLOCK))
            file.write(layout.padding(file.tell(), layout.RECORD))

        write_atomically(path, write)
        index = f"{layout.INDEX_VERSION} {len(lines)}\n{''.join(lines)}"
        replace_bytes(path.with_suffix(".idx"), index.encode())
        save(path.with_suffix(".npy"), np.array(rows, layout.ROW))

    def ours(self, file: Path) -> bool:
        shard = file.stem.isdigit() and file.suffix in (".tar", ".idx")
        return shard or file.name in layout.BESIDE

    def opened(self) -> dict[str, Any]:
        manifest = read_index(self.out).manifest
        for shard in manifest["shards"]:
            file = self.out / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                raise UsageError(f"{file} is missing or cut short")
        return manifest

    def write_files(self, folder: Path, converted: Converted) -> dict[str, Any]:
        shards, each = [], []
        for number, part in enumerate(part for part in converted.parts if part.file.exists()):
            each.append(_rows_of(part, number))
            name, size = f"{number:05d}.tar", part.file.stat().st_size
            shards.append({"file": name, "rows": len(each[-1]), "bytes": size})
            for file in (part.file, part.file.with_suffix(".idx")):
                _name_too(file, (folder / name).with_suffix(file.suffix))
        rows = np.concatenate(each)
        save(folder / layout.ROWS, rows)
        save(folder / layout.KEYS, converted.keys)
        body = {
            "version": layout.VERSION,
            "shards": shards,
            "rows_crc": zlib.crc32(rows.tobytes()),
            "bytes": sum(shard["bytes"] for shard in shards),
            **converted.write_beside(folder.joinpath),
        }
        manifest = converted.manifest("tars", body)
        replace_bytes(folder / layout.MANIFEST, sealed(manifest))
        return manifest


def _add(file: BinaryIO, name: str, data: bytes) -> str:
    """One member of a tar; where it lies, as DALI's index says it."""
    file.write(layout.header(name, len(data)))
    at = file.tell()
    file.write(data)
    file.write(layout.padding(len(data)))
    return f"{at} {len(data)} {name}"


def _rows_of(part: Part, shard: int) -> np.ndarray:
    """The rows of a whole part. Raises UsageError where these are not those of its shard, and it counts as not made."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        rows = np.load(part.file.with_suffix(".npy"), allow_pickle=False)
        same = rows.dtype == layout.ROW and rows["crc"].tolist() == part.stats().crcs
        if same and part.file.with_suffix(".idx").exists():
            rows["shard"] = shard
            return rows
    raise part.changed("what lies beside ")


def _name_too(file: Path, name: Path) -> None:
    """A second name for a file; the only one, where the file system knows no second names."""
    try:
        os.link(file, name)
    except OSError:
        os.rename(file, name)
