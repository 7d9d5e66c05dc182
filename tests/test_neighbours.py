"""Whose the cores are: made-up readings of /proc, and a process that is busy on this machine."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastrot.speed import neighbours
from fastrot.speed.neighbours import Neighbours

ME, LAUNCHER = os.getpid(), os.getppid()


class Machine:
    """A /proc of four cores, the first two of them ours; ticks."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.masks = {0: {0, 1}}
        (root / "self").mkdir()
        (root / "self" / "cgroup").write_text("1:cpu:/x\n0::/a/b\n")
        (root / "a" / "b").mkdir(parents=True)
        monkeypatch.setattr(neighbours, "PROC", root)
        monkeypatch.setattr(neighbours, "GROUPS", root)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: self.masks.get(pid, {0, 1}))

    def cores(self, *busy_and_idle: tuple[int, int]) -> None:
        lines = ["cpu  9 9 9 9 9 9 9 9 0 0"]  # of all together
        for core, (busy, idle) in enumerate(busy_and_idle):
            kinds = [busy - 3, 1, 1, idle - 1, 1, 0, 0, 1, 0, 0]  # nice, system, disk, stolen: 1
            lines.append(" ".join(map(str, [f"cpu{core}", *kinds])))
        (self.root / "stat").write_text("\n".join([*lines, "intr 1 2 3"]))

    def process(self, pid: int, parent: int, own: int, of_ended: int = 0) -> None:
        (self.root / str(pid)).mkdir(exist_ok=True)
        ticks = [own - own // 3, own // 3, of_ended, 0]
        words = [pid, "(a (b) c)", "R", parent, *[7] * 9, *ticks, 20]
        (self.root / str(pid) / "stat").write_text(" ".join(map(str, words)))


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    made = Machine(tmp_path, monkeypatch)
    made.cores((100, 100), (100, 100), (100, 100), (100, 100))
    made.process(ME, LAUNCHER, 50)
    return made


def test_others_have_what_this_run_has_not_of_its_cores(machine):
    seen = Neighbours()
    machine.cores((1100, 100), (1100, 100), (9100, 100), (100, 9100))
    machine.process(ME, LAUNCHER, 950)
    assert seen.take(2) == pytest.approx(1.1)


def test_workers_are_of_this_run_while_they_work_and_when_they_have_ended(machine):
    machine.process(ME + 1, ME, 10)
    seen = Neighbours()
    machine.cores((1100, 100), (1100, 100))
    machine.process(ME, LAUNCHER, 550, of_ended=200)
    machine.process(ME + 1, ME, 310)
    machine.process(ME + 2, ME + 1, 400)
    assert seen.take(2) == pytest.approx(0.6)


@pytest.mark.parametrize(("ranks", "taken"), [("1", 1.5), ("2", 1.0)])
def test_ranks_of_a_run_are_no_neighbours_of_each_other(machine, monkeypatch, ranks, taken):
    for name, value in {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    machine.process(LAUNCHER, 1, 10)
    machine.process(ME + 1, LAUNCHER, 50)
    machine.process(ME + 2, LAUNCHER, 50)  # a rank that is bound to cores of its own
    machine.masks[ME + 2] = {2, 3}
    seen = Neighbours()
    machine.cores((1100, 100), (1100, 100))
    machine.process(ME, LAUNCHER, 550)
    machine.process(ME + 1, LAUNCHER, 550)
    machine.process(ME + 2, LAUNCHER, 1050)
    assert seen.take(2) == pytest.approx(taken)


@pytest.mark.parametrize(
    ("others", "threads", "taken"),
    [(150, 2, 0.0), (250, 2, 0.25), (900, 1, 0.0), (1100, 1, 1.1), (900, 2, 0.9)],
    ids=["services", "more-than-services", "one-is-left", "less-than-one", "two-are-wanted"],
)
def test_few_of_them_or_enough_cores_left_are_nothing_to_speak_of(machine, others, threads, taken):
    seen = Neighbours()
    machine.cores(*[(100 + others // 2, 1100 - others // 2)] * 2)
    assert seen.take(threads) == pytest.approx(taken)


def test_a_rank_is_left_its_share(machine, monkeypatch):
    assert neighbours.left(0.5) == 1.5
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert neighbours.left(0.5) == 0.75


def test_a_system_that_does_not_tell_is_believed_quiet(machine, monkeypatch):
    seen = Neighbours()
    (machine.root / "stat").write_text("cpu0 1 2\n")
    assert seen.take(2) == 0
    (machine.root / "stat").unlink()
    assert seen.take(2) == Neighbours().take(2) == 0
    machine.cores((1, 1))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Neighbours().take(2) == 0


@pytest.mark.parametrize(("limit", "taken"), [("max 100000", 1.0), ("150000 100000", 0.0)])
def test_a_container_with_a_quota_is_not_told_of_others(machine, limit, taken):
    (machine.root / "a" / "b" / "cpu.max").write_text(f"{limit}\n")
    seen = Neighbours()
    machine.cores((1100, 100), (100, 1100))
    assert seen.take(2) == taken


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone tells")
def test_a_busy_process_is_seen():
    mine = os.sched_getaffinity(0)
    busy = f"{sys.executable} -c 'import time\nwhile time.process_time() < 20: pass'"
    os.sched_setaffinity(0, [min(mine)])  # which it inherits
    try:
        started = subprocess.run(
            ["sh", "-c", f"{busy} >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True
        )
        try:
            taken = 0.0
            for _ in range(3):
                seen = Neighbours()
                time.sleep(0.5)
                taken = taken or seen.take(2)
        finally:
            os.kill(int(started.stdout), signal.SIGKILL)
    finally:
        os.sched_setaffinity(0, mine)
    assert 0 < taken <= 1
