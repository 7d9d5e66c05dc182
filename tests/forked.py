"""A command in a child of this process, which need not import anything: for what ends a process."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrot import entry


@dataclass
class Child:
    pid: int
    errors: Path
    code: int | None = None

    def said(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def until(self, words: str) -> None:
        """Wait until it says so."""
        end = time.monotonic() + 30
        while words not in self.said():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def until_there(self, file: Path) -> None:
        """Wait until it has made the file."""
        end = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def status(self) -> int:
        """Wait for its end, and not for ever."""
        end = time.monotonic() + 30
        while self.code is None:
            assert time.monotonic() < end, self.said()
            done, code = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(code)
            time.sleep(0.02)
        return self.code


@contextlib.contextmanager
def forked(main: Callable[[], int | None], errors: Path) -> Iterator[Child]:
    """`entry.status(main)` in a child, whose stderr is a file."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            sys.stderr = errors.open("w", buffering=1)
            code = entry.status(main)
        finally:
            os._exit(code)
    child = Child(pid, errors)
    try:
        yield child
    finally:
        if child.code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
