"""What other processes take of this run's cores, and what they leave it. Linux alone tells."""

import contextlib
import os
import re
from pathlib import Path

from fastrot.entry import cores, place, share_of_cores

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MATTERS = 0.1  # share of the cores: a system's own threads and services take less


class Neighbours:
    """The other processes, from here on."""

    def __init__(self):
        self._begun = _ticks()

    def take(self, threads: int) -> float:
        """Cores that they took, on the mean, from so many threads of this process.

        0.0: too few to matter, or enough are left for the threads, or the system does not tell.
        """
        ended = _ticks()
        if self._begun is None or ended is None:
            return 0.0
        here, others = (e - b for b, e in zip(self._begun, ended, strict=True))
        taken = cores() * others / max(here, 1)
        return taken if taken > MATTERS * cores() and threads > left(taken) else 0.0


def left(taken: float) -> float:
    """Cores that are left to this process where others take so many: of one machine's ranks each has its share."""
    return share_of_cores(place().local_world) * (1 - taken / cores())


def _ticks() -> tuple[int, int] | None:
    """So far, of the cores that this process may use: all ticks, and those of processes that are not of this run.

    None: the system does not tell; or a container's quota leaves this run fewer cores, whoever else takes them.
    """
    here = others = 0
    try:
        if _has_quota():
            return None
        mine = os.sched_getaffinity(0)
        for core, ticks in re.findall(r"^cpu(\d+) (.+)", (PROC / "stat").read_text(), re.M):
            user, nice, system, *idle_and_interrupted, stolen = map(int, ticks.split()[:8])
            if int(core) in mine:
                working = user + nice + system + stolen  # by another machine on the same processor
                here, others = here + working + sum(idle_and_interrupted), others + working
        return here, others - _of_this_run(mine)
    except (OSError, ValueError, AttributeError):
        return None


def _has_quota() -> bool:
    group = re.search(r"^0::/(.*)", (PROC / "self" / "cgroup").read_text(), re.M)
    limit = (
        GROUPS / (group[1] if group else "") / "cpu.max"
    )  # "200000 100000": 2 cores; "max 100000"
    return limit.exists() and not limit.read_text().startswith("max")


def _of_this_run(mine: set[int]) -> int:
    """Ticks of the processes of this run on these cores, and of their children that have ended."""
    # a launcher's ranks are its children, and share the cores
    root = os.getppid() if place().local_world > 1 else os.getpid()
    ticks, children = {}, {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            said = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            children.setdefault(int(said[1]), []).append(pid)
            if os.sched_getaffinity(pid) <= mine:
                ticks[pid] = sum(map(int, said[11:15]))
    family = [root]
    for pid in family:  # which grows
        family += children.get(pid, [])
    return sum(ticks.get(pid, 0) for pid in family)
