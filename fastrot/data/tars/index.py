"""The index of a folder of shards: shards.json, rows.npy and keys.npy, read and compared with each other."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from fastrot.config import UsageError
from fastrot.data.keys import order_fingerprint
from fastrot.data.manifest import unsealed
from fastrot.data.tars import layout

AGAIN = "copy it again, or prepare the pictures again with dataprep/to_dali.py"


class Index(NamedTuple):
    manifest: dict[str, Any]  # what shards.json says
    rows: np.ndarray  # layout.ROW [n]
    keys: UInt64[np.ndarray, " n"]


def read_index(folder: Path) -> Index:
    """Raises UsageError where a file is missing or damaged, or they are not of one conversion."""
    rows: np.ndarray
    keys: np.ndarray
    try:
        manifest = unsealed((folder / layout.MANIFEST).read_bytes())
        rows, keys = (
            np.load(folder / name, allow_pickle=False) for name in (layout.ROWS, layout.KEYS)
        )
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}): {AGAIN}") from None
    except (ValueError, EOFError):
        manifest, rows, keys = {"version": layout.VERSION}, np.zeros(0), np.zeros(0)
    if (version := manifest.get("version")) != layout.VERSION:
        raise UsageError(f"{folder} is of version {version}, not {layout.VERSION}: {AGAIN}")
    whole = (rows.dtype, keys.dtype) == (layout.ROW, "u8") and rows.shape == keys.shape
    whole = whole and zlib.crc32(rows.tobytes()) == manifest["rows_crc"]
    if not whole or order_fingerprint(keys, rows["label"]) != manifest["fingerprint"]:
        raise UsageError(f"{folder / layout.MANIFEST}, or an .npy beside it, is damaged: {AGAIN}")
    return Index(manifest, rows, keys)
