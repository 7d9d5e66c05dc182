"""A command in children of this process, which need not import anything: what ends a process, and ranks of one run."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
def forked(
    main: Callable[[], int | None], errors: Path, env: Mapping[str, object] | None = None
) -> Iterator[Child]:
    """`entry.status(main)` in a child, whose stderr is a file; `env`: more of its environment."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.environ.update({name: str(value) for name, value in (env or {}).items()})
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


def two_ranks(main: Callable[[], int | None], folder: Path) -> None:
    """`entry.status(main)` in two children that are the ranks of one run, both to end with 0.

    They find each other as those that torchrun starts, without the seconds in which each of those imports torch.
    """
    importlib.import_module("torch._dynamo")  # which each of them would
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    same |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.ExitStack() as both:
        children = [
            both.enter_context(
                forked(main, folder / f"rank{n}.txt", same | {"RANK": n, "LOCAL_RANK": n})
            )
            for n in range(2)
        ]
        for child in children:
            assert child.status() == 0, child.said()
