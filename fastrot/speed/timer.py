"""What a run sees of its own speed, for its verdict: rates of its log lines, single steps on a GPU, floors.

It waits for nothing: a step is timed where it finds the GPU idle anyway, behind a log line, and read at the next one.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrot.core import Batch, Method, View
from fastrot.speed import cost
from fastrot.speed.bounds import Ceilings, Measured, ceilings, wait_for

WARM = 12  # steps of a start in which kernels are chosen and graphs captured
KEPT = 100  # single steps that are timed


class StepTimer:
    """One start of a run. `around(k)` is entered for the start's k-th step, from 0: a profile."""

    def __init__(
        self,
        device: torch.device,
        around: Callable[[int], contextlib.AbstractContextManager] | None = None,
    ):
        self.device, self.around = device, around
        self.steps = self.lines = 0  # so far
        self.disturbed = False  # by a profile, since the last log line
        self._rates: list[tuple[float, float]] = []  # seconds a picture, share that was waited
        self._single: list[tuple[float, float]] = []  # a step's seconds: to issue, of the device
        self._under_way: tuple[float, torch.cuda.Event, torch.cuda.Event] | None = None
        self._idle = False  # whether the device has nothing to do

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of training."""
        timed = self._idle and self.steps >= WARM and len(self._single) < KEPT
        self._idle = False
        around = contextlib.nullcontext() if self.around is None else self.around(self.steps)
        with around, self._timed() if timed else contextlib.nullcontext():
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
        if not self.disturbed:
            self._rates.append((1 / images_per_s, wait_share))
        self.lines, self.disturbed = self.lines + 1, False
        self._idle = self.device.type == "cuda"

    def measured(self, images: int) -> Measured | None:
        """A step of so many pictures; None where no line was told.

        The first line, in which workers start and kernels are compiled, counts where it is the only one.
        """
        if not self._rates:
            return None
        rates = self._rates[1:] or self._rates
        step = images * statistics.fmean(seconds for seconds, _ in rates)
        wait = images * statistics.fmean(seconds * share for seconds, share in rates)
        if self.device.type != "cuda":
            return Measured(step=step, wait=wait, busy=step - wait)
        if not self._single:
            return Measured(step=step, wait=wait)
        issue, busy = map(statistics.median, zip(*self._single, strict=True))
        return Measured(step=step, wait=wait, issue=issue, busy=busy)


# ---- floors ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does at least, see cost.py."""

    flop: int  # of matrix products
    traffic: int  # bytes that other kernels and the optimiser move

    def floors(self, peak: Ceilings) -> dict[str, float]:
        """Seconds by arithmetic and by memory, as `Measured` names them."""
        return {
            "arithmetic": self.flop / (peak.tflops * 1e12),
            "memory": self.traffic / (peak.gb_per_s * 1e9),
        }


def work_of(
    method: Method, view: View, images: int, device: torch.device, dtype: torch.dtype, fused: bool
) -> Work | None:
    """A step of so many pictures; `fused`: whether what follows a product is one kernel. None: it cannot be counted.

    The network is not run, so nothing of it changes.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        views = method.views(blank(view, 1, device))
    if not isinstance(views, Tensor):
        return None
    layers = cost.layers(method.net, (images * len(views), *views.shape[1:]), dtype)
    traffic = sum(each.traffic if fused else each.traffic_unfused for each in layers)
    return Work(
        flop=sum(each.flop for each in layers),
        traffic=traffic + cost.optimiser_bytes(method.net, dtype),
    )


def blank(view: View, images: int, device: torch.device) -> Batch:
    """A batch of black pictures, in the shapes that a Loader gives."""
    return Batch(
        tuple(
            torch.zeros(images, recipe.size, recipe.size, 3, dtype=torch.uint8, device=device)
            for recipe in view.crops
        ),
        index=torch.arange(images, device=device),
        label=torch.zeros(images, dtype=torch.int64, device=device),
        epoch_step=torch.zeros(2, dtype=torch.int64, device=device),
    )


# ---- at the end of a run ----


def completed(
    m: Measured, work: Work | None, view: View, images: int, device: torch.device, dtype: Any
) -> Measured:
    """With the floors, by ceilings measured now, and what a batch takes to the GPU. Under a second."""
    floors = {} if work is None else work.floors(ceilings(device, dtype))
    copy = _seconds_to_copy(view, images, device) if device.type == "cuda" else None
    return dataclasses.replace(m, copy=copy, **floors)


def _seconds_to_copy(view: View, images: int, device: torch.device) -> float:
    """The best of five copies of a batch's pictures from pinned memory to the device."""
    host = [each.pin_memory() for each in blank(view, images, torch.device("cpu")).crops]
    best = math.inf
    for _ in range(5):
        wait_for(device)
        begun = time.perf_counter()
        there = [each.to(device, non_blocking=True) for each in host]
        wait_for(device)
        best = min(best, time.perf_counter() - begun)
        del there
    return best
