"""Files that appear whole or not at all: a temporary name beside the place, fsync, rename. Locks on folders."""

import contextlib
import fcntl
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastrot.config import UsageError

PATIENCE = 5.0  # seconds that a lock is waited for: its owner may be on its way out


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """What `write` puts into the file stands under `path` when it returns; if it raises, nothing has changed.

    The file can be read and sought while it is written. A killed process leaves at most `.NAME.*.tmp` behind.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with named(path), open(temporary, "x+b") as file:
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


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """What the system refuses in here names this file: a write to a full disk by itself names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder for this process alone; raises UsageError with `refusal` and the owner where another holds it.

    A POSIX record lock ends with the process that took it, and children do not inherit it: a worker that outlives its
    killed parent holds nothing, while the ranks that a killed launcher leaves behind do.
    """
    path, until = folder / "lock", time.monotonic() + PATIENCE
    while True:
        try:
            file = open(path, "a+b")  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            raise UsageError(f"{refusal} (it has ended just now)") from None
        with file:
            _take(file, until, refusal)
            if not _still_named(file, path):
                continue  # its owner removed it at the end: the next process would lock another
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.flush()
            yield
            return


def _take(file: BinaryIO, until: float, refusal: str) -> None:
    """Wait for the lock on an open file, in time.monotonic()'s seconds."""
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read(200).decode(errors="replace").strip() or "unknown"
                raise UsageError(f"{refusal} ({owner})") from None
            time.sleep(0.1)
        except OSError:
            return  # a file system without locks


def _still_named(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def allow_open_files(files: int) -> None:
    """A mapped file stays open, and many systems allow a process 1,024 at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
