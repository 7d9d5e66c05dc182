"""The `.json` beside prepared pictures: what is known of them as a whole, sealed by its own crc32.

`crc`, its last key, is of all bytes before that key. A file of before the seal ends with `versions`, and is read too.
"""

import functools
import json
import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

UNKNOWN = "path unknown"

Triple = tuple[float, ...]
_SEAL = b',\n "crc": '


def sealed(facts: dict[str, Any]) -> bytes:
    """The document, with its crc as the last key."""
    body = json.dumps(facts, indent=1).encode().removesuffix(b"\n}")
    return body + _SEAL + b"%d\n}" % zlib.crc32(body)


def unsealed(document: bytes) -> dict[str, Any]:
    """What the document says. Raises ValueError where a byte has changed since it was sealed."""
    facts = json.loads(document)
    body, seal, _ = document.rpartition(_SEAL)
    if seal:
        changed = document != body + _SEAL + b"%d\n}" % zlib.crc32(body)
    else:
        changed = not isinstance(facts, dict) or [*facts][-1:] != ["versions"]
    if changed:
        raise ValueError("its checksum does not agree")
    facts.pop("crc", None)
    return facts


def known(facts: dict[str, Any]) -> tuple[Triple | None, Triple | None, np.ndarray | None]:
    """mean, std and numbers of `core.Data`, where the document has them."""
    triples = (facts.get(name) for name in ("mean", "std"))
    mean, std = (None if each is None else tuple(map(float, each)) for each in triples)
    numbers = facts.get("numbers")
    return mean, std, None if numbers is None else np.array(numbers, np.int64)


def read_manifest(document: Path) -> dict[str, Any]:
    """What it says; empty where it is missing or damaged. `beside`: files that the source laid there, and their crc32."""
    try:
        return unsealed(document.read_bytes())
    except (OSError, ValueError):
        return {}


def side(base: Path, name: str) -> Path:
    """The file `name` of the set that lies beside `base`."""
    return base.with_name(f"{base.name}.{name}")


class Paths:
    """paths.jsonl: where each row's picture came from. It is read only to name one."""

    def __init__(self, file: Path):
        self.file = file

    def of(self, row: int) -> str:
        """The path of a row; UNKNOWN where the file does not tell."""
        try:
            lines, ends = self._lines
            start = ends[row - 1] + 1 if row else 0
            return json.loads(lines[start : ends[row]].tobytes())["path"]
        except (OSError, IndexError, ValueError, KeyError, TypeError):
            return UNKNOWN

    @functools.cached_property
    def _lines(self) -> tuple[UInt8[np.ndarray, " n"], Int64[np.ndarray, " rows"]]:
        """The file, and where its lines end."""
        with open(self.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lines = np.frombuffer(mapped, np.uint8)
        return lines, np.flatnonzero(lines == ord("\n"))
