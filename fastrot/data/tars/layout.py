"""Bytes of a tar shard, its DALI index, and what lies beside the shards of a folder; README.md names the files."""

import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from fastrot.config import UsageError
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import unsealed

BLOCK = 512  # bytes: headers and contents begin at multiples
RECORD = 20 * BLOCK  # a tar's length is a multiple, as GNU tar and tarfile write it
MANIFEST, ROWS, KEYS = "shards.json", "rows.npy", "keys.npy"
PATHS = "paths.jsonl"
BESIDE = {MANIFEST, ROWS, KEYS, PATHS, "rejects.jsonl", "skipped.jsonl"}
ROW = np.dtype(
    [
        ("first", "<i8"),  # byte of the shard, where the picture begins
        ("bytes", "<i8"),
        ("label", "<i8"),  # -1 where there is none
        ("height", "<i4"),  # after EXIF orientation
        ("width", "<i4"),
        ("crc", "<u4"),  # crc32 of the picture's bytes
        ("shard", "<u4"),
    ]
)
ENDINGS = {"jpeg": "jpg", "tiff": "tif", "jpeg2000": "jp2", "heif": "heic"}  # others are their own
INDEX_VERSION = "v1.2"  # of the .idx files
VERSION = 1  # of all that lies beside them
AGAIN = "copy it again, or prepare the pictures again with fastrot shards"


def header(name: str, size: int) -> bytes:
    """The header block of a plain file; the same for the same name and size, always."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int, to: int = BLOCK) -> bytes:
    return bytes(-size % to)


def length_in(block: bytes) -> int | None:
    """The length of the file that a header block names; None: it is no header of a plain file."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return member.size if member.isreg() else None


class Index(NamedTuple):
    manifest: dict[str, Any]  # what shards.json says
    rows: np.ndarray  # ROW [n]
    keys: UInt64[np.ndarray, " n"]


def read_index(folder: Path) -> Index:
    """Raises UsageError where a file is missing or damaged, or they are not of one conversion."""
    rows: np.ndarray
    keys: np.ndarray
    try:
        manifest = unsealed((folder / MANIFEST).read_bytes())
        rows, keys = (np.load(folder / name, allow_pickle=False) for name in (ROWS, KEYS))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}): {AGAIN}") from None
    except (ValueError, EOFError):
        manifest, rows, keys = {"version": VERSION}, np.zeros(0), np.zeros(0)
    if (version := manifest.get("version")) != VERSION:
        raise UsageError(f"{folder} is of version {version}, not {VERSION}: {AGAIN}")
    whole = (rows.dtype, keys.dtype) == (ROW, "u8") and rows.shape == keys.shape
    whole = whole and zlib.crc32(rows.tobytes()) == manifest["rows_crc"]
    if not whole or order_fingerprint(keys, rows["label"]) != manifest["fingerprint"]:
        raise UsageError(f"{folder / MANIFEST}, or an .npy beside it, is damaged: {AGAIN}")
    return Index(manifest, rows, keys)
