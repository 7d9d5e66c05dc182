"""What a run must survive: warnings, a second run on its folder, damaged checkpoints, a full disk, NaN.

In this process, at chosen moments; tests/test_kills.py kills whole processes at random ones.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked
from test_run import TINY, assert_same_bits, go, told

from fastrot import disk, dist, entry, train
from fastrot.config import RunError, UsageError, Whole
from fastrot.core import View
from fastrot.data import folder
from fastrot.data.loader import Loader
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare import convert
from fastrot.entry import Preempted, PreemptionSignal
from fastrot.methods.rotnet import RotNet
from fastrot.training import budget, checkpoint, journal, loop, session

pytestmark = pytest.mark.usefixtures("quick_runs")
STEPS = 20  # of TINY: epochs of 8 or 9 steps


def last(run):
    return run / "checkpoints" / "last.pt"


def assert_same_run(a, b) -> None:
    assert_same_bits(last(a), last(b))
    assert told(a) == told(b)


def children() -> list[int]:
    """Process numbers of this one's workers (not of what they start from)."""
    return [process.pid or 0 for process in multiprocessing.active_children()]


def warn(number: int) -> None:
    os.kill(os.getpid(), number)


# ---- warnings ----


@pytest.mark.parametrize(
    ("at", "number"),
    [(1, signal.SIGTERM), (7, signal.SIGUSR1), (8, signal.SIGTERM), (9, signal.SIGINT)],
)
def test_a_warned_run_saves_at_once_and_goes_on(
    straight, pictures, tmp_path, monkeypatch, capsys, at, number
):
    step = loop.train_step

    def warned(state, batch):
        if state.step == at - 1:
            warn(number)
            warn(number)  # a terminal tells all processes, and torchrun tells its own once more
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", warned)
    args = [*TINY, "--data", str(pictures), "--out", str(tmp_path)]
    before = signal.getsignal(number)
    status = entry.status(lambda: train.main(args))
    assert status == 128 + number
    assert signal.getsignal(number) == before
    name = "interrupted" if number == signal.SIGINT else number.name
    said = capsys.readouterr().out
    assert f"{name}: saved at step {at} of {STEPS} to {tmp_path}; the same" in " ".join(
        said.split()
    )
    assert checkpoint.load(last(tmp_path))["step"] == at
    monkeypatch.undo()
    go(pictures, tmp_path)
    assert f"resumed at step {at}" in capsys.readouterr().out
    assert_same_run(straight, tmp_path)


def test_what_a_shell_ignores_for_a_command_behind_an_ampersand_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with closing(entry.PreemptionSignal()) as preemption:
            warn(signal.SIGINT)
            assert preemption.got == 0
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("validation", [0, 1, 3], ids=["before-training", "first", "last"])
def test_a_run_warned_in_a_validation_goes_on_with_that_validation(
    straight, pictures, tmp_path, monkeypatch, capsys, validation
):
    score, seen = loop.validate, []

    def warned(*args):
        seen.append(1)
        if len(seen) == validation + 1:
            warn(signal.SIGUSR1)
        return score(*args)

    monkeypatch.setattr(loop, "validate", warned)
    # before the first step there is nothing to save: at once
    with pytest.raises(Preempted if validation else KeyboardInterrupt):
        go(pictures, tmp_path)
    assert len(seen) == validation + 1
    assert last(tmp_path).exists() == bool(validation)
    monkeypatch.undo()
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


def test_a_validation_behind_a_warning_is_told_once(straight, pictures, tmp_path, monkeypatch):
    """Preempted in it; started again, validated, and killed before that was saved."""

    class Killed(BaseException):
        pass

    def deadly(*args, **kwargs):
        raise Killed

    score = loop.validate
    go(pictures, tmp_path, "--max-steps", "6")
    monkeypatch.setattr(loop, "validate", lambda *args: (warn(signal.SIGTERM), score(*args)))
    with pytest.raises(Preempted):
        go(pictures, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "save", deadly)
    with pytest.raises(Killed):
        go(pictures, tmp_path)
    monkeypatch.undo()
    assert told(tmp_path)[-1] == {**told(tmp_path)[-1], "step": 8, "epoch": 0}
    assert "val_loss" in told(tmp_path)[-1]
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("sound", [0, 1, 3])
def test_ranks_ask_each_other_equally_often_whatever_is_skipped(sound, pictures, tmp_path):
    """A rank that asked less often than the others would leave them waiting for ever."""
    args = [*TINY, "--data", str(pictures), "--out", str(tmp_path), "--max-steps", "1"]
    kept = []

    class Few(Loader):
        """A loader of three batches, of which some cannot be read."""

        min_batches = 3  # type: ignore[assignment]

        def __init__(self, loader):
            self.loader, self.batch = loader, loader.batch

        def epoch(self, number, start=0):
            return itertools.islice(itertools.cycle(self.loader.epoch(number)), sound)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", lambda *all: kept.extend(all))
        train.main(args)
    s, asked = kept[0], []
    with nullcontext() if sound else pytest.raises(RunError, match="no picture to be judged on"):
        loop.validate(s.state, Few(s.val_loader), lambda: asked.append(1))
    assert len(asked) == 3


def test_measuring_a_budget_ends_where_no_picture_can_be_read():
    class Empty(Loader):
        def __init__(self):
            pass

        def __len__(self):
            return 4

        def epoch(self, number, start=0):
            return (batch for batch in ())

    assert budget._seconds_each(Empty(), 5, 3, torch.device("cpu"), print) == 0


def test_a_run_killed_between_two_checkpoints_makes_both_again(pictures, tmp_path, monkeypatch):
    save = checkpoint.save

    class Killed(BaseException):
        pass

    def deadly(path, state, **more):
        if state["step"] == 8 and path.name == "last.pt":
            raise Killed
        save(path, state, **more)

    more = ["--keep-every", "4", "--keep-best", "--checkpoint-every", "100"]
    monkeypatch.setattr(checkpoint, "save", deadly)
    with pytest.raises(Killed):
        go(pictures, tmp_path, *more)
    monkeypatch.undo()
    folder = last(tmp_path).parent
    for name in ("step_8.pt", "best.pt"):  # written before last.pt, else they were never made
        (folder / name).unlink()
    go(pictures, tmp_path, *more)
    assert checkpoint.load(folder / "step_8.pt")["step"] == 8
    best = checkpoint.load(folder / "best.pt")
    assert best["progress"]["best"] == best["progress"]["val"]["accuracy"]


def test_ranks_that_read_different_checkpoints_are_refused(pictures, tmp_path, monkeypatch):
    """As where --out lies on each machine's own disk."""
    known = lambda mine: [mine] if isinstance(mine, set) else [(60, 60), mine]  # noqa: E731
    monkeypatch.setattr("fastrot.dist.everyones", known)
    with pytest.raises(UsageError, match=r"--out .* is not the same folder for all ranks"):
        go(pictures, tmp_path)


def test_workers_of_a_folder_do_not_die_of_a_warning(pictures, tmp_path, monkeypatch, capsys):
    """A cluster sends it to every process of a job."""
    step = loop.train_step

    def warned(state, batch):
        if state.step == 4:
            assert children()
            for process in (*children(), os.getpid()):  # the workers first
                subprocess.run(["kill", "-TERM", str(process)], check=True)
            time.sleep(0.3)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", warned)
    with pytest.raises(Preempted):
        go(pictures, tmp_path, "--workers", "2")
    assert checkpoint.load(last(tmp_path))["step"] == 5


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(pictures, tmp_path, monkeypatch):
    step = loop.train_step

    def deadly(state, batch):
        if state.step == 4:
            for process in children():
                os.kill(process, signal.SIGKILL)
            time.sleep(0.3)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", deadly)
    with pytest.raises(RunError, match="want of memory"):
        go(pictures, tmp_path)


# ---- what never comes ----


def stuck() -> None:
    """Python's main thread waits, and hears of signals between two naps."""
    while True:
        time.sleep(0.05)


def deaf() -> None:
    """Main waits in C, for a lock that it holds."""
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)


def of_data(wait: Callable[[], None]) -> Callable[[], None]:
    """The same, within a file that reads data."""
    room: dict[str, Any] = {"wait": wait}
    exec(compile("def read():\n    wait()", "/x/fastrot/data/folder.py", "exec"), room)
    return room["read"]


ENDS = {  # where main waits, whether after a step, signals and the seconds between them; status, what is said
    "opening": (
        stuck,
        False,
        [signal.SIGTERM],
        143,
        "SIGTERM: ended before the first step; the same command begins it",
    ),
    "opening-deaf": (
        deaf,
        False,
        [signal.SIGINT],
        130,
        "interrupted: ended before the first step; the same command begins it",
    ),
    "warned": (
        stuck,
        True,
        [signal.SIGUSR1, signal.SIGTERM],  # as SLURM: minutes before, and at the end
        143,
        "SIGTERM: ended unsaved; the same command goes on from what was saved",
    ),
    "data": (
        of_data(stuck),
        True,
        [signal.SIGTERM],
        143,
        "SIGTERM while waiting for data: ended unsaved; the same command",
    ),
    "deaf": (
        of_data(deaf),
        True,
        [signal.SIGTERM],
        143,
        "SIGTERM while waiting for data: ended unsaved; the same command",
    ),
}


@pytest.mark.parametrize(("wait", "steps", "signals", "status", "told"), ENDS.values(), ids=ENDS)
def test_a_signal_ends_what_waits_for_what_never_comes(
    wait, steps, signals, status, told, tmp_path, monkeypatch
):
    monkeypatch.setattr(entry, "PATIENCE", 0.5)

    def main():
        with contextlib.closing(PreemptionSignal()) as preemption:
            preemption.alive(steps=steps)
            entry.say("begun")
            wait()

    with forked(main, tmp_path / "said") as child:
        child.until("begun")
        for number in signals:
            os.kill(child.pid, number)
            time.sleep(0.05)  # two at once come in the order of their numbers
        assert child.status() == status
        assert told in child.said()
        assert child.said().count("\n") == 2


@pytest.mark.parametrize("ctrl_c", [1, 2])
def test_a_warning_waits_for_a_run_that_saves_and_a_second_ctrl_c_does_not(
    ctrl_c, tmp_path, monkeypatch
):
    monkeypatch.setattr(entry, "PATIENCE", 1.5)

    def main():
        with contextlib.closing(PreemptionSignal()) as preemption:
            entry.say("begun")
            while not preemption.got:  # steps
                preemption.alive(steps=True)
                time.sleep(0.01)
            with preemption.unhurried():
                time.sleep(3)  # saves
            raise Preempted(preemption.got)

    with forked(main, tmp_path / "said") as child:
        child.until("begun")
        time.sleep(0.1)
        for _ in range(3):  # by a terminal and by torchrun, at nearly the same time
            os.kill(child.pid, signal.SIGINT)
        if ctrl_c == 2:
            time.sleep(1.2)
            os.kill(child.pid, signal.SIGINT)
        assert child.status() == 130
        assert ("interrupted: ended unsaved" in child.said()) == (ctrl_c == 2)


@pytest.mark.parametrize("broken", ["closed", "full"])
def test_a_signal_ends_a_process_whose_stderr_nobody_reads(broken, tmp_path):
    note = tmp_path / "begun"

    def main():
        read, write = os.pipe()
        if broken == "closed":
            os.close(read)
        else:
            os.set_blocking(write, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(write, bytes(4096))
            os.set_blocking(write, True)
        sys.stderr = open(write, "w")  # noqa: SIM115
        note.touch()
        deaf()

    with forked(main, tmp_path / "said") as child:
        child.until_there(note)
        os.kill(child.pid, signal.SIGINT)
        assert child.status() == 130


def test_sigusr1_alone_ends_no_run_that_waits(tmp_path, monkeypatch):
    """The cluster gave it minutes."""
    monkeypatch.setattr(entry, "PATIENCE", 0.1)

    def main():
        with contextlib.closing(PreemptionSignal()) as preemption:
            preemption.alive(steps=True)
            warn(signal.SIGUSR1)
            time.sleep(1)  # data stalls
            raise Preempted(preemption.got)

    with forked(main, tmp_path / "said") as child:
        assert child.status() == 138
    assert child.said() == ""


def test_how_long_steps_take_is_told_by_steps_and_hurries_no_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(entry.time, "monotonic", lambda: now[0])
    with closing(PreemptionSignal(())) as preemption:
        for seconds, steps in [(0, True), (30, True), (900, False), (900, True), (40, True)]:
            now[0] += seconds
            preemption.alive(steps=steps)
        assert preemption._patience() == 80
        with preemption.unhurried():
            now[0] += 900
            assert preemption._patience() == math.inf
        preemption.alive(steps=True)
        assert preemption._patience() == 80


def test_each_checkpoint_takes_its_time(pictures, tmp_path, monkeypatch):
    save, patience = checkpoint.save, []

    def noting(*args, **more):
        patience.append(signals[0]._patience())
        return save(*args, **more)

    signals, begin = [], PreemptionSignal.__init__
    monkeypatch.setattr(
        PreemptionSignal, "__init__", lambda self: (signals.append(self), begin(self))[1]
    )
    monkeypatch.setattr(checkpoint, "save", noting)
    go(pictures, tmp_path, "--max-steps", "9")
    assert len(patience) >= 2
    assert set(patience) == {math.inf}
    assert signals[0]._patience() < math.inf


def test_a_validation_is_alive_with_each_batch(pictures, tmp_path, monkeypatch):
    """Between two questions to all ranks many may go by."""
    validate, seen = loop.validate, []

    def noting(state, loader, asked, alive):
        with pytest.MonkeyPatch.context() as two:
            two.setattr(dist, "world", lambda: 2)
            two.setattr(dist, "broadcast_", lambda tensors: None)
            two.setattr(dist, "everyones", lambda mine: [mine])
            two.setattr(dist, "sum_over_ranks", lambda mine: mine)
            asked = functools.partial(seen.append, "asked")
            return validate(state, loader, asked, lambda: (alive(), seen.append("alive")))

    monkeypatch.setattr(loop, "validate", noting)
    more = ["--hold-out", "0.5", "--batch", "4", "--workers", "0"]
    go(pictures, tmp_path, "--max-steps", "1", *more)
    assert seen.count("asked") == 2  # once in each of two validations
    assert seen.count("alive") >= 4


def test_a_fold_begins_without_a_step(pictures, tmp_path, monkeypatch):
    built, steps = session._built, []

    def noting(*args):
        steps.append(signals[0]._steps)
        return built(*args)

    signals, begin = [], PreemptionSignal.__init__
    monkeypatch.setattr(
        PreemptionSignal, "__init__", lambda self: (signals.append(self), begin(self))[1]
    )
    monkeypatch.setattr(session, "_built", noting)
    go(pictures, tmp_path, "--folds", "2", "--max-steps", "1")
    assert steps == [False, False]


def test_a_closed_preemption_signal_leaves_no_thread_though_a_worker_holds_its_socket():
    before = set(threading.enumerate())
    preemption = PreemptionSignal()
    [watcher] = set(threading.enumerate()) - before
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        preemption.close()
        watcher.join(5)
        assert not watcher.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_no_socket_leaves_the_handlers_as_they_were(monkeypatch):
    def full():
        raise OSError("too many open files")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(entry.socket, "socketpair", full)
    with pytest.raises(OSError, match="too many"):
        PreemptionSignal()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("command", ["look", "convert"])
def test_ctrl_c_says_what_is_true_of_the_command(command, pictures, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **more):
        warn(signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(convert, "convert", interrupted)
    options = PackOptions(source="imagefolder", root=pictures, out=tmp_path / "x.pack")
    main = interrupted if command == "look" else lambda: convert.run(options)
    assert entry.status(main) == 130
    goes_on = {"look": "", "convert": ": the same command goes on"}[command]
    assert capsys.readouterr().err == f"fastrot: interrupted{goes_on}\n"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for its workers in /proc")
def test_data_that_does_not_come_ends_by_a_warning_and_leaves_no_worker(
    pictures, tmp_path, monkeypatch
):
    note = tmp_path / "worker"

    def sticks(decode, request, out, places):
        if 30 in request.rows[0][:, 0]:
            disk.replace_bytes(note, str(os.getpid()).encode())
            stuck()
        return []

    monkeypatch.setattr(folder, "fill_decoded", sticks)
    monkeypatch.setattr(entry, "PATIENCE", 0.5)
    data = folder.Folder(pictures)

    def main():
        with contextlib.closing(PreemptionSignal()) as preemption:
            loader = Loader(data, View(crops=(Whole(size=8),)), batch=4, workers=2)
            for _ in loader.epoch(0):
                preemption.alive(steps=True)

    with forked(main, tmp_path / "said") as child:
        child.until_there(note)
        os.kill(child.pid, signal.SIGTERM)
        assert child.status() == 143
        assert "SIGTERM while waiting for data: ended unsaved; the same comman" in child.said()
        end = time.monotonic() + 30
        while Path(f"/proc/{note.read_text()}").exists():
            assert time.monotonic() < end, "a worker is left behind"
            time.sleep(0.05)


# ---- one run a folder ----

HOLD = """
import os, sys, time
from pathlib import Path
from fastrot.disk import locked
with locked(Path(sys.argv[1]), "taken"):
    child = os.fork()  # as a loader starts its workers
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder):
    """Another process that holds the folder, and the number of a child of its."""
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        yield owner
    finally:
        owner.kill()
        owner.wait()
        os.kill(child, signal.SIGKILL)


def test_a_second_run_on_a_folder_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "PATIENCE", 0.2)
    with holder(tmp_path) as owner:
        with pytest.raises(UsageError, match=f"another run writes into .*process {owner.pid} on"):
            go(pictures, tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
        owner.kill()  # its child lives on, and holds nothing
        owner.wait()
        assert go(pictures, tmp_path, "--max-steps", "1") == 0


def test_a_run_copied_elsewhere_goes_on_there(straight, pictures, tmp_path, capsys):
    go(pictures, tmp_path / "begun", "--max-steps", "7")
    shutil.copytree(tmp_path / "begun", tmp_path / "copy")
    capsys.readouterr()
    go(pictures, tmp_path / "copy")
    assert "resumed at step 7" in capsys.readouterr().out
    assert_same_run(straight, tmp_path / "copy")
    assert checkpoint.load(last(tmp_path / "begun"))["step"] == 7


# ---- damaged checkpoints ----


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def of_another_version(data: bytes) -> bytes:
    import io

    state = torch.load(io.BytesIO(data), weights_only=True)
    out = io.BytesIO()
    torch.save({**state, "version": 99}, out)
    return out.getvalue()


@pytest.mark.parametrize("damage", [cut, flipped, of_another_version])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(
    straight, pictures, tmp_path, damage
):
    go(pictures, tmp_path, "--max-steps", "10")
    previous = tmp_path / "checkpoints" / "previous.pt"
    assert checkpoint.load(previous)["step"] < 10
    data = last(tmp_path).read_bytes()
    last(tmp_path).write_bytes(damage(data))
    with pytest.raises(UsageError, match=r"last\.pt .*; move .*/previous\.pt in its place") as said:
        go(pictures, tmp_path)
    assert "\n" not in str(said.value)
    previous.rename(last(tmp_path))
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


def test_the_one_before_is_taken_where_the_last_was_removed(straight, pictures, tmp_path, capsys):
    go(pictures, tmp_path, "--max-steps", "10")
    last(tmp_path).unlink()
    capsys.readouterr()
    go(pictures, tmp_path)
    assert "resumed at step 8" in capsys.readouterr().out
    assert_same_run(straight, tmp_path)


def test_any_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"net": {"w": torch.arange(300.0)}, "step": 7, "config": {"lr": 0.1}})
    version = checkpoint.VERSION
    data, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for at in draw.integers(len(data), size=150):
        path.write_bytes(
            data[:at] + bytes([data[at] ^ (1 << int(draw.integers(8)))]) + data[at + 1 :]
        )
        try:
            state = checkpoint.load(path)
        except UsageError:
            refused += 1
            continue
        assert torch.equal(state["net"]["w"], torch.arange(300.0)), at
        assert (state["step"], state["config"], state["version"]) == (7, {"lr": 0.1}, version), at
    assert refused > 30


# ---- a full disk ----


@contextmanager
def files_up_to(size: int):
    """No file of this process may grow beyond `size` bytes: the nearest that any machine has to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_a_checkpoint_harms_nothing(straight, pictures, tmp_path, capsys):
    go(pictures, tmp_path, "--max-steps", "6")
    whole = last(tmp_path).read_bytes()
    args = [*TINY, "--data", str(pictures), "--out", str(tmp_path)]
    capsys.readouterr()
    with files_up_to(len(whole) // 2):
        assert entry.status(lambda: train.main(args)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checkpoints/last.pt: File too large; nothing written before is harmed" in said
    assert last(tmp_path).read_bytes() == whole
    assert {p.name for p in last(tmp_path).parent.iterdir()} == {"last.pt", "previous.pt"}
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


def test_a_full_disk_in_a_log_line_harms_nothing(straight, pictures, tmp_path, capsys, monkeypatch):
    write = journal.Journal.write
    go(pictures, tmp_path, "--max-steps", "6")

    def squeezed(self, line):
        if line["step"] == 12:
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
        write(self, line)

    monkeypatch.setattr(journal.Journal, "write", squeezed)
    args = [*TINY, "--data", str(pictures), "--out", str(tmp_path)]
    capsys.readouterr()
    with files_up_to(resource.RLIM_INFINITY):  # and as before behind it
        assert entry.status(lambda: train.main(args)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "metrics.jsonl: File too large; nothing written before is harmed: make space" in said
    assert not (tmp_path / "metrics.jsonl").read_text().endswith("\n")  # a torn line
    monkeypatch.undo()
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file) -> None:
    while True:
        file.write(bytes(4096))


@pytest.mark.soak
def test_a_disk_that_fills_up_ends_the_run_with_a_sentence(pictures, small_disk, tmp_path):
    """A real one, with TensorBoard's own thread writing too; then there is space again."""
    out = small_disk / "run"
    args = [sys.executable, "fastrot/train.py", *TINY, "--tensorboard", "--data", str(pictures)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.run(
            [*args, "--out", str(out)], capture_output=True, text=True, timeout=600, env=env
        )

    begun = subprocess.run([*args, "--out", str(out), "--max-steps", "7"], env=env, timeout=600)
    assert begun.returncode == 0
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        fill(file)
    failed = start()
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert "Traceback" not in failed.stderr, failed.stderr
    assert checkpoint.load(last(out))["step"] == 7
    filler.unlink()
    done = start()
    assert done.returncode == 0, done.stderr
    assert "resumed at step 7" in done.stdout
    assert checkpoint.load(last(out))["step"] == STEPS


# ---- what is not finite, what differs ----


def test_a_net_gone_bad_leaves_a_checkpoint_that_loads(straight, pictures, tmp_path, monkeypatch):
    views = RotNet.views

    def poisoned(self, batch):
        pixels = views(self, batch)
        return pixels * math.nan if batch.epoch_step[1] == 12 else pixels

    monkeypatch.setattr(RotNet, "views", poisoned)
    with pytest.raises(
        RunError, match=r"not finite at step 15; the last good checkpoint is .*last\.pt"
    ):
        go(pictures, tmp_path)
    assert checkpoint.load(last(tmp_path))["step"] == 12  # no step was saved behind the bad one
    monkeypatch.undo()
    go(pictures, tmp_path)
    assert_same_run(straight, tmp_path)


def test_other_threads_and_machines_are_told_in_one_line(pictures, tmp_path, monkeypatch, capsys):
    go(pictures, tmp_path, "--max-steps", "3")
    capsys.readouterr()
    threads = torch.get_num_threads()
    monkeypatch.setattr("fastrot.machine.device_name", lambda device: "another machine")
    try:
        torch.set_num_threads(threads + 1)
        go(pictures, tmp_path, "--max-steps", "5")
    finally:
        torch.set_num_threads(threads)
    [line] = [li for li in capsys.readouterr().out.splitlines() if "bits may differ" in li]
    assert f"threads were {threads}, now {threads + 1}" in line
    assert "now another machine" in line


def test_each_knob_that_disagrees_is_named_with_both_ways_out(straight, pictures):
    args = ["--seed", "3", "--lr", "0.5", "--optim.momentum", "0.5", "--backbone.stride", "4"]
    with pytest.raises(UsageError) as said:
        go(pictures, straight, *args)
    for words in (
        "--seed was 0, now 3",
        "--lr was 0.03, now 0.5",
        "--optim.momentum was 0.9, now 0.5",
        "--backbone.stride was 2, now 4",
        "--out NEW",
        f"--start-from {straight}",
    ):
        assert words in str(said.value)


def test_free_knobs_may_differ_and_the_bits_stay(straight, pictures, tmp_path):
    go(pictures, tmp_path, "--max-steps", "5")
    more = ["--workers", "0", "--checkpoint-every", "3", "--on-bad-record", "skip"]
    go(pictures, tmp_path, *more, "--keep-every", "9")
    mine, other = (checkpoint.load(last(run)) for run in (straight, tmp_path))
    for name, value in mine["net"].items():
        assert torch.equal(value, other["net"][name]), name
    assert told(straight) == told(tmp_path)


# ---- pictures that cannot be read ----


def test_a_damaged_picture_is_named_or_skipped_and_counted(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    go(root, tmp_path / "run", "--max-steps", "1")  # its sizes are known from here on
    for name in ("class0/006.jpg", "class1/010.jpg"):
        file = root / name
        stamp, data = file.stat(), file.read_bytes()
        file.write_bytes(data[:300] + bytes(len(data) - 300))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(
        RunError, match=r"row \d+, 'class\d/0..\.jpg', cannot be read.*--on-bad-record"
    ):
        go(root, tmp_path / "run")
    go(root, tmp_path / "run", "--on-bad-record", "skip")
    assert "damaged records skipped" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    skipped = "\n".join(summary["skipped_records"])
    assert len(summary["skipped_records"]) == 2
    assert "class0/006.jpg" in skipped
    assert "class1/010.jpg" in skipped
