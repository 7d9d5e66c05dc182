"""What a run sees of its own speed, for its verdict: the rates of its log lines, and single steps on a GPU.

It waits for nothing: a step behind a log line is timed by moments of the device's own clock, which are read at a later
line. Where the host is ahead, the device does that step right behind the one before: its own time. Where the device has
been done with all before it, since data came late or the host cannot issue work fast enough, that includes its waiting for
the host to issue the step. How long that takes is known then alone: a host that is ahead may stand at a full queue.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fastrot.entry import cores
from fastrot.machine import Moment
from fastrot.speed.bounds import Measured
from fastrot.speed.neighbours import Neighbours

WARM = 12  # steps of a start in which kernels are chosen and graphs captured
KEPT = 100  # single steps that are timed
ENOUGH = 10  # steps behind the first log line: of fewer nothing can be said


class StepTimer:
    """One start of a run. `around(k)` is entered for the start's k-th step, from 0: a profile, where there is one."""

    around: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __init__(self, device: torch.device):
        self.device = device
        self.steps = self.lines = 0  # so far
        self._begun = 0  # steps up to the first line: workers start, kernels are compiled
        self._rates: list[tuple[float, float]] = []  # seconds a picture, share that was waited
        # a step's seconds: to issue, 0 where the device was still busy before it; of the device
        self._single: list[tuple[float, float]] = []
        self._under_way: tuple[float, Moment, Moment] | None = None
        self._before: Moment | None = None  # the end of the step before one that is to be timed
        self._neighbours: Neighbours  # since the first rate

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of training."""
        before, self._before = self._before, None
        timed = contextlib.nullcontext() if before is None else self._timed(before)
        with self.around(self.steps), timed:
            yield
        self.steps += 1

    @contextlib.contextmanager
    def _timed(self, before: Moment) -> Iterator[None]:
        idle, begin, asked = before.reached(), Moment(self.device), time.perf_counter()
        yield
        issued = time.perf_counter() - asked if idle else 0.0
        self._under_way = issued, begin, Moment(self.device)

    def line(self) -> None:
        """At a log line."""
        if self._under_way is not None and self._under_way[-1].reached():
            issued, begin, end = self._under_way
            self._single.append((issued, end.since(begin)))
            self._under_way = None
        wanted = self.steps >= WARM and len(self._single) < KEPT
        if self.device.type == "cuda" and wanted and self._under_way is None:
            self._before = Moment(self.device)
        self._begun = self._begun or self.steps
        self.lines += 1

    def rate(self, images_per_s: float, wait_share: float) -> None:
        """What a log line says; of a GPU it is known when the next one is due."""
        if not self._rates:
            self._neighbours = Neighbours()
        self._rates.append((1 / images_per_s, wait_share))

    def enough(self) -> bool:
        """Whether a run was long enough to be judged: by ENOUGH steps behind its first log line."""
        return self.lines > 1 and self.steps - self._begun >= ENOUGH

    def measured(self, images: int) -> Measured:
        """A step of so many pictures, by the log lines but for the first.

        There must be a line; where it is the only one, it counts.
        """
        rates = self._rates[1:] or self._rates
        step = images * statistics.fmean(seconds for seconds, _ in rates)
        wait = images * statistics.fmean(seconds * share for seconds, share in rates)
        # beside a GPU as many as there are cores may decode: the verdict knows
        threads = torch.get_num_threads() if self.device.type == "cpu" else cores()
        m = Measured(step=step, wait=wait, others=self._neighbours.take(threads))
        if self.device.type != "cuda":
            return replace(m, busy=step - wait)
        if not self._single:
            return m
        issue, busy = map(statistics.median, zip(*self._single, strict=True))
        return replace(m, issue=issue, busy=busy)
