"""What all commands share at the door: errors for people in one sentence, the status, and said once.

0 done; 1 stopped, or pictures rejected; 2 wrong use; 128 + N: ended by the signal N, saved before where a run
had something to save. FASTROT_TRACEBACK=1 shows where an error came from. Standard library only.
"""

import contextlib
import errno
import io
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fastrot import door
from fastrot.config import PeerLost, RunError, UsageError

# by which a cluster says that it will kill soon, or somebody at a terminal that it is enough (Ctrl-C)
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, quota or size limit says

ALONE = (
    "unset RANK, WORLD_SIZE and SLURM_STEP_ID to run alone, "
    "or start all processes with torchrun or srun"
)

met_others = False  # whether this process has joined others: see `status`

# times that a thread of OpenMP looks for work before it sleeps. libgomp's own 300,000 keep a core from the thread that is
# waited for where other processes compute too, and 0 costs a quiet machine a fifth: benchmarks/reports/neighbours.md
SPINS = 2000


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that a launcher started."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on this machine: which GPU
    local_world: int = 1


def place() -> Place:
    """Of this process; one alone needs no launcher. Raises UsageError for variables that make no sense."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        known = (number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK", 0))
        here = Place(*known, number("LOCAL_WORLD_SIZE", 1))
    elif "SLURM_STEP_ID" in env and number("SLURM_STEP_NUM_TASKS", 1) > 1:
        # the step's: in a shell within an allocation the job's own still count all tasks
        told = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        tasks = [int(n) for n, nodes in told for _ in range(int(nodes or 1))]  # 2(x3),1
        world, node = number("SLURM_STEP_NUM_TASKS"), number("SLURM_NODEID", 0)
        local_world = tasks[node] if node < len(tasks) else world
        here = Place(number("SLURM_PROCID"), world, number("SLURM_LOCALID", 0), local_world)
    elif "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"set RANK and WORLD_SIZE both, or neither: {ALONE}")
    else:
        return Place()
    if here.rank >= here.world:
        raise UsageError(f"rank {here.rank} of {here.world}: ranks count from 0; {ALONE}")
    return here


def number(name: str, default: int | None = None) -> int:
    """A whole number out of the environment. Raises UsageError."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{name}={text} should be a whole number: {ALONE}")
    return int(text)


def rank() -> int:
    """This process among those that a launcher started; 0 where that cannot be told."""
    try:
        return place().rank
    except UsageError:
        return 0


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Cores for one of so many processes on this machine: srun gives each its own, torchrun's share them all."""
    bound = "LOCAL_RANK" not in os.environ and cores() < (os.cpu_count() or 1)
    return max(1, cores() if bound else cores() // processes)


def spin_briefly() -> None:
    """Where the user has not said how threads of OpenMP wait; libgomp reads it as torch is imported, which is to come."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def status(main: Callable[[], int | None]) -> int:
    """Run a command's main function; the status to leave with."""
    spin_briefly()
    with contextlib.closing(PreemptionSignal((signal.SIGINT,), "")):
        code = _status(main)
        sys.stdout.flush()
        sys.stderr.flush()
        if met_others:
            # threads of gloo and DDP may call a Python that is on its way out, which aborts it
            os._exit(code)
    return code


def _status(main: Callable[[], int | None]) -> int:
    try:
        door.open_up()
        return main() or 0
    except (UsageError, RunError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and door.unread():
            return 128 + signal.SIGPIPE
        if os.environ.get("FASTROT_TRACEBACK") == "1":
            raise
        complain(describe(error), last=isinstance(error, PeerLost))
        return 2 if isinstance(error, UsageError) else 1
    except Preempted as warned:  # who saved has said so
        return 128 + warned.args[0]
    except KeyboardInterrupt as stop:
        got, words = stop.args or (signal.SIGINT, "")
        complain(": ".join(filter(None, [named(got), words])))
        return 128 + got


def describe(error: Exception) -> str:
    """One sentence for people."""
    if isinstance(error, ImportError):
        return door.missing(error)
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


PATIENCE = 20  # seconds without a step until SIGTERM or Ctrl-C ends all; clusters kill after 30
BEFORE_STEPS = "ended before the first step; the same command begins it"
UNSAVED = "ended unsaved; the same command goes on from what was saved"
WAITS = {"/fastrot/dist.py": "other processes", "/fastrot/data/": "data"}  # by the code that waits


class PreemptionSignal:
    """Notes the warnings that reach this process from now on; only the main thread of a process can.

    A loop answers them between its steps. Before its first step nothing could be saved: they raise KeyboardInterrupt.
    Where main does not come to either, as it waits in C or for what never comes, a thread ends the process; a second
    Ctrl-C does too. SIGUSR1 comes minutes before the end, and SIGTERM after it: once there are steps it hurries nothing.
    """

    def __init__(self, warnings: Iterable[int] = WARNINGS, before_steps: str = BEFORE_STEPS):
        """`before_steps`: what to say where there was none."""
        self.got, self._words = 0, before_steps  # number of the latest; 0: none yet
        self.answered = False  # it is being saved: nothing hurries that
        self._writing = False
        self._steps, self._alive, self._longest = False, 0.0, 0.0
        able = threading.current_thread() is threading.main_thread()
        heard = [
            w for w in warnings if able and signal.getsignal(w) is not signal.SIG_IGN
        ]  # as behind &
        self._before = {}
        if heard:
            told, self._tell = socket.socketpair()  # by which C tells the thread while main is busy
            self._tell.setblocking(False)
            self._before = {w: signal.signal(w, self._note) for w in heard}
            self._told_before = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(told,), daemon=True).start()

    def alive(self, *, steps: bool) -> None:
        """Called between batches; `steps`: there is something to save, which the caller does if warned."""
        now = time.monotonic()
        if self._steps and steps:
            self._longest = max(self._longest, now - self._alive)
        self._steps, self._alive = steps, now

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """A checkpoint is written in here, by one thread at a time, and takes its time."""
        self._writing = True
        try:
            yield
        finally:
            self._alive, self._writing = time.monotonic(), False

    def close(self) -> None:
        """As it was before."""
        for warning, before in self._before.items():
            signal.signal(warning, before)
        if self._before:
            signal.set_wakeup_fd(self._told_before)
            self._tell.shutdown(socket.SHUT_RDWR)  # closed alone, it stays open in a forked worker
            self._tell.close()
            self._before = {}

    def _note(self, number: int, frame: object) -> None:
        first, self.got = not self.got, number
        if first and not self._steps:
            raise KeyboardInterrupt(number, self._words)

    def _watch(self, told: socket.socket) -> None:
        number, since = 0, 0.0
        while True:
            told.settimeout(0.2 if number else None)
            try:
                numbers = told.recv(64)
            except TimeoutError:
                numbers = b"\0"
            if not numbers or not self._before:  # closed
                return told.close()
            now = time.monotonic()
            # torchrun passes a Ctrl-C on that has reached all: it comes twice within a second
            if number and now > since + 1 and signal.SIGINT in numbers:
                self._end(number)
            early = {signal.SIGUSR1} if self._steps else set()
            if not number and (came := [n for n in numbers if n in self._before.keys() - early]):
                number, since = came[0], now
            if number and now > max(since, self._alive) + self._patience():
                self._end(number)

    def _patience(self) -> int | float:
        if self.answered or self._writing:
            return float("inf")
        if self._steps:
            return max(PATIENCE, 2 * self._longest)
        return 10 if self.got else 1  # main has heard, and tidies up; or it hears nothing

    def _end(self, number: int) -> None:
        """Of this process, whose main thread may hear nothing; says what that waits for."""
        try:
            frame, what = sys._current_frames().get(threading.main_thread().ident or 0), ""
            while frame is not None and not what:
                file = frame.f_code.co_filename
                what = next((f" while waiting for {WAITS[p]}" for p in WAITS if p in file), "")
                frame = frame.f_back
            words = UNSAVED if self._steps else self._words
            sentence = ": ".join(filter(None, [named(number) + what, words]))
            said = threading.Thread(target=say, args=[sentence], daemon=True)
            said.start()  # by another: stderr may be a pipe that nobody reads, or that is closed
            said.join(2)
        finally:
            os._exit(128 + number)


def named(number: int) -> str:
    """`SIGTERM`; Ctrl-C in a word."""
    return "interrupted" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def warnings_held_back() -> Iterator[None]:
    """No warning reaches processes that are started in here; this one hears of it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- processes that work for this one ----


def check_locks(workers: int) -> None:
    """Raises RunError where there is no room for the locks that this process and so many workers share."""
    locks = []
    try:
        for _ in range(16 + 4 * workers):
            locks.append(multiprocessing.Lock())
    except OSError as error:
        raise RunError(
            f"/dev/shm, where processes keep their locks, cannot be used ({error.strerror}): "
            "give the container --shm-size 64m, or use --workers 0"
        ) from None


def end_with_parent() -> None:
    """In a thread of a worker: a killed parent ends nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


# ---- what is said ----


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
    say(sentence)


def say(sentence: str) -> None:
    """One sentence on stderr."""
    if rank():
        sentence = f"rank {rank()}: {sentence}"
    print(f"fastrot: {printable(sentence)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text that any terminal takes: odd bytes and control characters of file names as escapes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
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
