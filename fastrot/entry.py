"""What all commands share at the door: errors for people in one sentence, the status, and said once.

0 done; 1 stopped, or pictures rejected; 2 wrong use; 130 interrupted; 128 + N: saved, then ended, by the
warning signal N. FASTROT_TRACEBACK=1 shows where an error came from. Standard library only.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from fastrot.config import PeerLost, RunError, UsageError

# by which a cluster says that it will kill soon, or somebody at a terminal that it is enough (Ctrl-C)
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, quota or size limit says

met_others = False  # whether this process has joined others: see `status`


def rank() -> int:
    """This process among those that a launcher started, before anything else is known."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Cores for one of so many processes on this machine: srun gives each its own, torchrun's share them all."""
    bound = "LOCAL_RANK" not in os.environ and cores() < (os.cpu_count() or 1)
    return max(1, cores() if bound else cores() // processes)


def status(main: Callable[[], int | None]) -> int:
    """Run a command's main function; the status to leave with."""
    try:
        code = main() or 0
    except (UsageError, RunError, OSError) as error:
        if os.environ.get("FASTROT_TRACEBACK") == "1":
            raise
        complain(describe(error), last=isinstance(error, PeerLost))
        code = 2 if isinstance(error, UsageError) else 1
    except Preempted as warned:  # who saved has said so
        code = 128 + warned.args[0]
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from what was saved")
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if (
        met_others
    ):  # threads of gloo and DDP may call a Python that is on its way out, which aborts it
        os._exit(code)
    return code


def describe(error: Exception) -> str:
    """One sentence for people."""
    if not isinstance(error, OSError):
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    what = f"{where}{error.strerror or error}"
    if error.errno in FULL:
        what += "; nothing written before is harmed: make space, and the same command goes on"
    return what


# ---- warnings: a cluster's signals before it kills ----


class Preempted(Exception):
    """A warning was answered, all is saved: its number, and a sentence."""


class PreemptionSignal:
    """Notes the warnings that reach this process from now on; only the main thread of a process can."""

    def __init__(self):
        self.got = 0  # number of the latest; 0: none yet
        able = threading.current_thread() is threading.main_thread()
        heard = [w for w in WARNINGS if signal.getsignal(w) is not signal.SIG_IGN]  # as behind &
        self._before = {w: signal.signal(w, self._note) for w in heard if able}

    def _note(self, number: int, frame: object) -> None:
        self.got = number

    def close(self) -> None:
        """As it was before."""
        for warning, before in self._before.items():
            signal.signal(warning, before)


@contextlib.contextmanager
def warnings_held_back() -> Iterator[None]:
    """No warning reaches processes that are started in here; this one hears of it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """What is printed in here, rank 0 alone prints: a parser's help and complaints."""
    out, err = (io.StringIO(), io.StringIO()) if rank() else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def complain(sentence: str, *, last: bool = False) -> None:
    """One sentence on stderr. Rank 0 speaks at once; another only if its launcher lets it live on.

    `last`: after all others, rank 0 too, since one of them knows the cause.
    """
    if rank() or last:
        time.sleep(8 if last else 5)  # rank 0 met the same, or torchrun ends this process
    if rank():
        sentence = f"rank {rank()}: {sentence}"
    print(f"fastrot: {printable(sentence)}", file=sys.stderr)


def printable(text: str) -> str:
    """Text that any terminal takes: odd bytes and control characters of file names as escapes."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_bytes(count: int | float) -> str:
    """`3.2 GB`: three digits."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.0f} bytes"


def in_time(seconds: int | float) -> str:
    """`2.5 hours`: three digits, in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Two aligned columns, as lines."""
    rows = list(rows)
    wide = max(len(name) for name, _ in rows)
    return [f"  {name:<{wide}}  {value}" for name, value in rows]
