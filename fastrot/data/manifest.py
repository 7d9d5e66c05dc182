"""The `.json` beside prepared pictures: what is known of them as a whole, sealed by its own crc32.

`crc` is its last key: the crc32 of all bytes before that key. A file of before the seal ends with `versions`,
and is read as it is.
"""

import json
import zlib
from pathlib import Path
from typing import Any

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


def side(base: Path, name: str) -> Path:
    """The file `name` of the set that lies beside `base`."""
    return base.with_name(f"{base.name}.{name}")
