"""What a run sees of its own speed, for its verdict: the rates of its log lines, and single steps on a GPU.

It waits for nothing: a step is timed where it finds the GPU idle anyway, behind a log line, and read at the next one.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from fastrot.speed.bounds import Measured

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
        self._single: list[tuple[float, float]] = []  # a step's seconds: to issue, of the device
        self._under_way: tuple[float, torch.cuda.Event, torch.cuda.Event] | None = None
        self._idle = False  # whether the device has nothing to do

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of training."""
        timed = self._idle and self.steps >= WARM and len(self._single) < KEPT
        self._idle = False
        with self.around(self.steps), self._timed() if timed else contextlib.nullcontext():
            yield
        self.steps += 1

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        asked = time.perf_counter()
        yield
        issued = time.perf_counter() - asked
        end.record()
        self._under_way = issued, begin, end

    def line(self, images_per_s: float, wait_share: float) -> None:
        """At a log line, for which the device was waited for."""
        if self._under_way is not None:
            issued, begin, end = self._under_way
            self._single.append((issued, begin.elapsed_time(end) / 1e3))
            self._under_way = None
        self._rates.append((1 / images_per_s, wait_share))
        self._begun = self._begun or self.steps
        self.lines += 1
        self._idle = self.device.type == "cuda"

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
        if self.device.type != "cuda":
            return Measured(step=step, wait=wait, busy=step - wait)
        if not self._single:
            return Measured(step=step, wait=wait)
        issue, busy = map(statistics.median, zip(*self._single, strict=True))
        return Measured(step=step, wait=wait, issue=issue, busy=busy)
