"""What bounds a step: read, decode, copy, launch, memory or arithmetic; by how much, and what to change.

A step is a pipeline: pictures are read, decoded and copied beside the step before, the host issues work, the device
does it. The slowest stage binds, and the others wait for it:

    the device idles, and the host waits for data    read, decode or copy, whichever takes longest for a batch
    the device idles, or ends as soon as work comes  launch: Python and calls cannot issue work any faster
    neither                                          memory or arithmetic, whichever has the higher floor

Floors are counts over ceilings: a step's FLOP over those of a large matrix product, its bytes over those of a copy.
A CPU's step is bound by launch where its floors explain next to nothing of it: by neighbours, where other processes
take the cores meanwhile, since threads that compute together wait for the one that has no core.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fastrot import dist, native
from fastrot.config import Config
from fastrot.core import DTYPES, Data, View
from fastrot.entry import cores
from fastrot.machine import wait_for
from fastrot.speed.cost import StepCost, random_batch
from fastrot.speed.neighbours import left

Bound = Literal["read", "decode", "copy", "launch", "memory", "arithmetic", "neighbours"]
IDLE = 0.1  # share of a step: a device that idles for less is busy
FULL = 0.9  # share of the device's time: a host that issues for longer than this binds
CALLS = 0.1  # share of a CPU's step: floors that explain less than this leave it to calls
GOOD = 0.6  # share of a ceiling that large matrix products reach among other kernels


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Of this device, measured now."""

    tflops: float  # of a large matrix product in the run's precision
    gb_per_s: float  # of a copy in the device's memory, bytes read plus bytes written


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds a batch; None: not measured, or there is none."""

    step: float  # wall time of a whole step, end to end
    wait: float  # of it, the host waited for data
    read: float | None = None  # what reading a batch takes, alone
    decode: float | None = None  # what decoding and cropping a batch takes, alone
    copy: float | None = None  # of a batch to the device
    issue: float | None = None  # host time to launch a step's work (GPU); 0: it is ahead
    busy: float | None = None  # device time of a step (GPU), or the step itself on a CPU
    arithmetic: float = 0.0  # floor by matrix arithmetic: flop / ceiling; 0: not counted
    memory: float = 0.0  # floor by other kernels' and the optimiser's traffic; 0: not counted
    others: float = 0.0  # cores that other processes took from it; 0: none, or not known

    @property
    def work(self) -> float:
        """The device's own share of a step; all of it where that was not measured."""
        return self.step if self.busy is None else self.busy

    @property
    def idle(self) -> float:
        """The share of a step in which the device has nothing to do."""
        return (self.wait if self.busy is None else self.step - self.busy) / self.step


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a verdict or an advice is for: a run, its data, and the machine."""

    cfg: Config
    format: str  # of the data: beton, pack, tars, folder, synthetic
    placement: str | None  # of a pack for a GPU: resident, pinned
    device: torch.device
    cores: int
    memory: int  # bytes of the host's; 0: not known
    gpu: tuple[int, int] | None  # bytes free and in all; None: no GPU here


def subject_of(cfg: Config, data: Data, device: torch.device) -> Subject:
    """This run, on this machine."""
    known = "SC_PHYS_PAGES" in os.sysconf_names
    return Subject(
        cfg=cfg,
        format=data.format,
        placement=data.chosen,
        device=device,
        cores=cores(),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0,
        gpu=torch.cuda.mem_get_info(device) if device.type == "cuda" else None,
    )


# ---- what binds ----


def bound(m: Measured) -> Bound:
    """The stage that all others wait for."""
    if m.idle >= IDLE:
        if m.busy is None or m.wait >= (m.step - m.busy) / 2:
            return _slowest_of_loading(m)
        return "launch"
    floors = m.arithmetic + m.memory
    if m.issue is None and 0 < floors < CALLS * m.work:
        return "neighbours" if m.others else "launch"
    if m.issue is not None and m.issue >= FULL * m.work > floors:
        return "launch"
    return "memory" if m.memory > m.arithmetic else "arithmetic"


def _slowest_of_loading(m: Measured) -> Bound:
    """Decoding that was not timed alone takes what the copy leaves of a step that waits for data."""
    read, copy = m.read or 0.0, m.copy or 0.0
    decode = m.step - copy if m.decode is None else m.decode
    if copy > decode + read:
        return "copy"
    return "read" if read > decode else "decode"


def verdict(m: Measured, images_per_s: float, workers: int, subject: Subject) -> str:
    """One sentence: bound by what, by how much, what to change. `workers`: threads or processes that decode."""
    kind, at = bound(m), f"{digits(images_per_s)} images/s"
    if kind == "neighbours":
        told = f"at {at} {_explained(m)}, what binds the rest shows without them"
        return f"{_beside(m, subject)}; {told}"
    how_much = {"launch": _by_launch, "memory": _by_device, "arithmetic": _by_device}
    said = how_much.get(kind, _by_data)(m, kind, "GPU" if subject.device.type == "cuda" else "CPU")
    change = _what_to_change(m, kind, workers, subject)
    told = f"bound by {kind} at {at}: {said}; {change}"
    waits = kind in ("read", "decode") and workers > left(m.others)
    concerned = m.others and (subject.device.type == "cpu" or waits)
    return f"{_beside(m, subject)}; beside them {told}" if concerned else told


def _beside(m: Measured, subject: Subject) -> str:
    """That others have the cores, and what to do about it."""
    threads = max(1, round(left(m.others)))
    fewer = subject.device.type == "cpu" and threads < torch.get_num_threads()
    way = f"let them end, or try --threads {threads}" if fewer else "let them end"
    return f"other processes take {m.others:.1f} of {subject.cores} cores: {way}"


# ---- by how much ----


def _by_data(m: Measured, kind: Bound, name: str) -> str:
    found = f"{m.idle:.0%} of the time the {name} has nothing to do but wait for data"
    alone = {"read": m.read, "decode": m.decode, "copy": m.copy}[kind]
    doing = {"read": "reading", "decode": "decoding", "copy": "copying"}[kind]
    return found if alone is None else f"{found}, since {doing} a batch takes {_ms(alone)}"


def _by_launch(m: Measured, kind: Bound, name: str) -> str:
    if not m.issue:
        return f"{_explained(m)}, the rest are calls of small operations"
    if m.issue < m.work:
        return f"the host issues work for {_ms(m.issue)} of the {_ms(m.work)} that a step takes the {name}"
    return f"the host needs {_ms(m.issue)} to issue a step's work, and it keeps the {name} busy for {_ms(m.work)}"


def _explained(m: Measured) -> str:
    floors = f"{_ms(m.arithmetic + m.memory)} of a step's {_ms(m.work)}"
    return f"arithmetic and memory explain {floors}"


def _by_device(m: Measured, kind: Bound, name: str) -> str:
    floor = m.memory if kind == "memory" else m.arithmetic
    doing = "moving numbers" if kind == "memory" else "multiplying"
    if not floor:
        return f"{_ms(m.work)} of a step's {_ms(m.step)} are the {name}'s own work"
    return f"{doing} takes {floor / m.work:.0%} of a step's {_ms(m.work)} at this {name}'s measured peak"


# ---- what to change ----


def _what_to_change(m: Measured, kind: Bound, workers: int, subject: Subject) -> str:
    if kind == "copy":
        packed = subject.format == "pack"
        way = "--placement resident" if packed else "a .pack (fastrot pack)"
        return f"try {way}, which copies no pictures once it lies in the GPU's memory"
    cpu = subject.device.type == "cpu"
    if kind == "arithmetic" and m.arithmetic >= GOOD * m.work and not (cpu and m.others):
        return "that is about as fast as it multiplies, so only smaller crops or another device are faster"
    if kind == "arithmetic" and cpu:
        return "a GPU, smaller crops (--image-size) or a narrower net are faster"
    ways = _ways(kind, workers, subject)
    if not ways:
        return "smaller crops (--image-size) would move less"
    *others, last = ways
    return f"try {', '.join(others)} or {last}" if others else f"try {last}"


def _ways(kind: Bound, workers: int, subject: Subject) -> list[str]:
    """What may help against this and is not done yet, the best first."""
    cfg, gpu = subject.cfg, subject.device.type == "cuda"
    folder, pack = subject.format == "folder", subject.format == "pack"
    few, more = workers < subject.cores, f"--workers {subject.cores} instead of {workers}"
    slow = subject.format in ("beton", "pack") and native.load() is None
    smaller = "smaller pictures (fastrot convert --short-side)"
    compile, fp32 = not cfg.compile, cfg.precision == "fp32"
    graph = gpu and not cfg.graph and dist.world() == 1
    fuse = gpu and not getattr(cfg.backbone, "fuse", True)
    ways: dict[Bound, dict[str, bool]] = {
        "read": {
            "a faster disk": True,
            more: few,
            "a .beton of the same pictures (fastrot convert), read in larger pieces": folder,
            "--order blocks, which reads neighbours together": not folder and not pack,
            smaller: True,
        },
        "decode": {
            more: few,
            f"the C++ extension ({native.why()})": slow,
            "a .beton of the same pictures (fastrot convert)": folder,
            "a .pack, which hardly needs decoding (fastrot pack)": not pack,
            "--placement resident, where the GPU's memory holds it": subject.placement == "pinned",
            smaller: True,
        },
        "launch": {"--compile": compile, "--graph": graph, "a larger --batch": True},
        "memory": {"--compile": compile, "--backbone.fuse": fuse, "--precision bf16": gpu and fp32},
        "arithmetic": {"--precision bf16": fp32, "--compile": compile, "a larger --batch": True},
    }
    fitting = [way for way, fits in ways[kind].items() if fits]
    return fitting[:3] if kind == "decode" else fitting


def digits(value: float) -> str:
    """`1,234`, and three digits of what is less than a hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{digits(1e3 * seconds)} ms"


# ---- floors and ceilings ----


def with_floors(m: Measured, cost: StepCost, view: View, subject: Subject) -> Measured:
    """With the floors, by ceilings measured now, and the time of a batch's copy to the GPU. Under a second."""
    cfg, device = subject.cfg, subject.device
    m = replace(m, **floors(cost, ceilings(device, DTYPES[cfg.precision])))
    if device.type != "cuda":
        return m
    batch = random_batch(view, cfg.batch, torch.device("cpu"))
    host = [crop.pin_memory() for crop in batch.crops]
    copied = _best(lambda: [crop.to(device, non_blocking=True) for crop in host], device, 0.05)
    return replace(m, copy=copied)


def floors(cost: StepCost, peak: Ceilings) -> dict[str, float]:
    """Seconds that a step takes at least, by matrix arithmetic and by memory traffic, as `Measured` names them."""
    return {
        "arithmetic": cost.flop / (peak.tflops * 1e12),
        "memory": cost.traffic / (peak.gb_per_s * 1e9),
    }


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Ceilings:
    """Measure this device, for about so many seconds; disturbs no random numbers.

    Best of many repetitions, since others may be at work on the machine; of random numbers, since zeros take less
    current and flatter. On a GPU whose memory is nearly full, of smaller matrices.
    """
    large = device.type == "cuda"
    return Ceilings(
        tflops=_halved(8192 if large else 1024, lambda n: _tflops(n, device, dtype, seconds / 2)),
        gb_per_s=_halved(2**30 if large else 2**26, lambda n: _gb_per_s(n, device, seconds / 2)),
    )


def _halved(size: int, measure: Callable[[int], float]) -> float:
    """`measure` of the largest size that fits, from `size` down."""
    try:
        return measure(size)
    except torch.OutOfMemoryError:
        if size < 512:
            raise
    return _halved(size // 2, measure)


def _tflops(side: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    # a ceiling of convolutions too, which take TF32 for float32 where products do not
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _gb_per_s(size: int, device: torch.device, seconds: float) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)  # bytes
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, seconds) / 1e9


def _best(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of some repetitions, at least three, the first not counted."""
    work()
    wait_for(device)
    best, times, until = math.inf, 0, time.perf_counter() + seconds
    while times < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        wait_for(device)
        best, times = min(best, time.perf_counter() - begun), times + 1
    return best
