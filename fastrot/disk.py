"""Files that appear whole or not at all: a temporary name beside the place, fsync, rename."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """What `write` puts into the file stands under `path` when it returns; if it raises, nothing has changed.

    The file can be read and sought while it is written. A killed process leaves at most `.NAME.*.tmp` behind.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_bytes(path: str | Path, data: bytes) -> None:
    """`data` as the whole of the file `path`."""
    write_atomically(path, lambda file: file.write(data))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power cut; a file system that cannot do so says so, which is no loss."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
