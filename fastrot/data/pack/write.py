"""Writes packs; see layout.py for what lies where."""

import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

import fastrot
from fastrot.data.beton.manifest import sealed
from fastrot.data.pack import layout
from fastrot.data.pack.layout import BLOCK, BODY, META, WIDTH, Encoding
from fastrot.data.sources import order_fingerprint, path_keys
from fastrot.disk import replace_bytes, sync_folder, write_atomically


def write_pack(
    path: str | Path,
    pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    labels: Sequence[int] | None = None,
    *,
    encoding: Encoding = "ycc",
    paths: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """A pack of pictures in memory: for tests, benchmarks and notebooks. It replaces what stands there.

    `labels`: None: -1 each. `paths`: the rows' names, from which their keys are made.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    names = [f"{row:08d}" for row in range(len(pictures))] if paths is None else [*paths]
    known = np.full(len(pictures), -1) if labels is None else np.asarray(labels)
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32).reshape(-1, 2)
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    body = (layout.encode(np.ascontiguousarray(p), encoding).tobytes() for p in pictures)
    write_lines(new / "paths.jsonl", ({"path": n, "number": i} for i, n in enumerate(names)))
    facts = {
        "classes": [*classes],
        "mean": (pixels.mean(axis=0) / 255).tolist(),
        "std": (pixels.std(axis=0) / 255).tolist(),
        "numbers": None,
        "options": {"encoding": encoding},
    }
    write_arrays(new, encoding, sizes, body, known.astype(np.int64), path_keys(names), facts)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    sync_folder(path.parent)
    return path


def write_arrays(
    folder: Path,
    encoding: Encoding,
    sizes: Int32[np.ndarray, "n 2"],
    body: Iterable[bytes],
    labels: Int64[np.ndarray, " n"],
    keys: UInt64[np.ndarray, " n"],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write the arrays into a folder, and meta.json last; what that says: `facts`, and what follows from the arrays.

    `body`: the bytes of the pictures' tiles or pixels, in order, in pieces of any length.
    """
    first = layout.firsts(sizes, encoding)
    small = {"first.npy": first, "sizes.npy": sizes, "labels.npy": labels, "keys.npy": keys}
    checksums = {}
    shape = (int(first[-1]), WIDTH[encoding])
    checksums[BODY[encoding]] = write_array(folder / BODY[encoding], np.dtype("u1"), shape, body)
    for name, array in small.items():
        dtype, _ = layout.arrays(encoding)[name]
        data = array.astype(dtype, copy=False).tobytes()
        checksums[name] = write_array(folder / name, dtype, array.shape, [data])
    told = {
        "format": "pack",
        "version": layout.VERSION,
        "encoding": encoding,
        "rows": len(sizes),
        "length": shape[0],
        "fingerprint": order_fingerprint(keys, labels),
        **facts,
        "versions": {
            "python": platform.python_version(),
            "fastrot": fastrot.__version__,
            **{name: version(name) for name in ("numpy", "etcpak")},
        },
        "checksums": checksums,
    }
    replace_bytes(folder / META, sealed(told))
    return told


def write_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[bytes]
) -> list[int]:
    """A `.npy` of a known shape from its bytes in pieces, whole or not at all; the crc32 of each 64 MB of it."""
    crcs: list[int] = []

    def write(file: BinaryIO) -> None:
        crcs.clear()
        checked = _Checked(file, crcs)
        head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(checked, {**head, "shape": shape})
        begins = checked.written
        for piece in pieces:
            checked.write(piece)
        assert checked.written - begins == dtype.itemsize * int(np.prod(shape, dtype=object))

    write_atomically(path, write)
    return crcs


class _Checked:
    """A file that adds up the crc32 of each 64 MB as they are written."""

    def __init__(self, file: BinaryIO, crcs: list[int]):
        self.file, self.crcs, self.written = file, crcs, 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            inside = self.written % BLOCK
            if not inside:
                self.crcs.append(0)
            piece = view[: BLOCK - inside]
            self.crcs[-1] = zlib.crc32(piece, self.crcs[-1])
            self.file.write(piece)
            self.written += len(piece)
            view = view[len(piece) :]


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(
        path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    )
