"""What bounds a step: read, decode, copy, launch, memory or arithmetic; by how much, and what to change.

A step is a pipeline: pictures are read, decoded and copied beside the step before, the host issues work, the device
does it. The slowest stage binds, and the others wait for it:

    the device idles, and the host waits for data    read, decode or copy, whichever takes longest for a batch
    the device idles, or ends as soon as work comes  launch: Python and calls cannot issue work any faster
    neither                                          memory or arithmetic, whichever has the higher floor

Floors are counts over ceilings: a step's FLOP over those of a large matrix product, its bytes over those of a copy.
On a CPU there is nothing to launch, but a step whose floors explain next to nothing of it is bound by calls as well.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fastrot import native
from fastrot.config import Config
from fastrot.core import DTYPES, View
from fastrot.entry import cores
from fastrot.machine import wait_for
from fastrot.speed.cost import StepCost, random_batch

Bound = Literal["read", "decode", "copy", "launch", "memory", "arithmetic"]
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
    issue: float | None = None  # host time to launch a step's work (GPU)
    busy: float | None = None  # device time of a step (GPU), or the step itself on a CPU
    arithmetic: float | None = None  # floor by matrix arithmetic: flop / ceiling
    memory: float | None = None  # floor by other kernels' and the optimiser's traffic


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run has already, so that it is not told to do that; None: not known."""

    workers: int | None = None  # threads or processes that decode
    format: str | None = None  # beton, pack, tars, folder, synthetic
    placement: str | None = None  # of a pack: resident, pinned
    precision: str | None = None  # bf16, fp16, fp32
    compiled: bool | None = None
    graphed: bool | None = None  # None: or cannot be
    fused: bool | None = None  # batch norm and ReLU in one kernel; None: or cannot be


# ---- what binds ----


def bound(m: Measured) -> Bound:
    """The stage that all others wait for."""
    if _idle(m) >= IDLE:
        if m.wait >= (m.step - (m.busy or 0.0)) / 2 or m.busy is None:
            return _slowest_of_loading(m)
        return "launch"
    floors = (m.arithmetic or 0.0) + (m.memory or 0.0)
    busy = m.step if m.busy is None else m.busy
    if m.issue is not None and m.issue >= FULL * busy and floors < FULL * busy:
        return "launch"
    if m.issue is None and None not in (m.arithmetic, m.memory) and floors < CALLS * busy:
        return "launch"
    return "memory" if (m.memory or 0.0) > (m.arithmetic or 0.0) else "arithmetic"


def _idle(m: Measured) -> float:
    """The share of a step in which the device has nothing to do."""
    return (m.wait if m.busy is None else m.step - m.busy) / m.step


def _slowest_of_loading(m: Measured) -> Bound:
    """Decoding that was not timed alone takes what the copy leaves of a step that waits for data."""
    decode = m.step - (m.copy or 0.0) if m.decode is None else m.decode
    if (m.copy or 0.0) > decode + (m.read or 0.0):
        return "copy"
    return "read" if (m.read or 0.0) > decode else "decode"


def verdict(
    m: Measured, device: torch.device, images_per_s: float, setting: Setting = Setting()
) -> str:
    """One sentence: bound by what, by how much, what to change."""
    kind = bound(m)
    how_much = {"launch": _by_launch, "memory": _by_device, "arithmetic": _by_device}
    said = how_much.get(kind, _by_data)(m, kind, "GPU" if device.type == "cuda" else "CPU")
    return f"bound by {kind} at {digits(images_per_s)} images/s: {said}; {_what_to_change(m, kind, device, setting)}"


# ---- by how much ----


def _by_data(m: Measured, kind: Bound, name: str) -> str:
    found = f"{_idle(m):.0%} of the time the {name} has nothing to do but wait for data"
    alone = {"read": m.read, "decode": m.decode, "copy": m.copy}[kind]
    doing = {"read": "reading", "decode": "decoding", "copy": "copying"}[kind]
    return found if alone is None else f"{found}, since {doing} a batch takes {_ms(alone)}"


def _by_launch(m: Measured, kind: Bound, name: str) -> str:
    if m.issue is None:
        floors = (m.arithmetic or 0.0) + (m.memory or 0.0)
        return (
            f"arithmetic and memory explain {_ms(floors)} of a step's {_ms(m.busy or m.step)}, the rest "
            "are calls of small operations"
        )
    if m.busy is not None and m.issue < m.busy:
        return f"the host issues work for {_ms(m.issue)} of the {_ms(m.busy)} that a step takes the {name}"
    kept = "" if m.busy is None else f", and it keeps the {name} busy for {_ms(m.busy)}"
    return f"the host needs {_ms(m.issue)} to issue a step's work{kept}"


def _by_device(m: Measured, kind: Bound, name: str) -> str:
    floor = m.memory if kind == "memory" else m.arithmetic
    doing = "moving numbers" if kind == "memory" else "multiplying"
    whole = m.step if m.busy is None else m.busy
    if floor is None:
        return f"{_ms(whole)} of a step's {_ms(m.step)} are the {name}'s own work"
    share = f"{floor / whole:.0%} of a step's {_ms(whole)}"
    return f"{doing} takes {share} at this {name}'s measured peak"


# ---- what to change ----


def _what_to_change(m: Measured, kind: Bound, device: torch.device, has: Setting) -> str:
    gpu, folder, pack = device.type == "cuda", has.format == "folder", has.format == "pack"
    if kind == "copy":
        resident = "--placement resident" if pack else "a .pack (dataprep/to_pack.py)"
        return f"try {resident}, which copies no pictures once it lies in the GPU's memory"
    if kind == "arithmetic" and (m.arithmetic or 0.0) >= GOOD * (m.busy or m.step):
        return "that is about as fast as it multiplies, so only smaller crops or another device are faster"
    if kind == "arithmetic" and not gpu:
        return "a GPU, smaller crops (--image-size) or a narrower net are faster"
    workers = f"--workers {cores()} instead of {has.workers}"
    few = has.workers is not None and has.workers < cores()
    slow = has.format in (None, "beton", "pack") and native.load() is None
    pinned = gpu and pack and has.placement == "pinned"
    smaller = "smaller pictures (--short-side of dataprep)"
    fp32, compile = has.precision == "fp32", not has.compiled
    graph, fuse = gpu and has.graphed is False, gpu and has.fused is False
    ways: dict[Bound, dict[str, bool]] = {
        "read": {
            "a faster disk": True,
            workers: few,
            "a .beton of the same pictures (dataprep/to_ffcv.py), read in larger pieces": folder,
            "--order blocks, which reads neighbours together": not folder and not pack,
            smaller: True,
        },
        "decode": {
            workers: few,
            f"the C++ extension ({native.why() if slow else ''})": slow,
            "a .beton of the same pictures (dataprep/to_ffcv.py)": folder,
            "a .pack, which hardly needs decoding (dataprep/to_pack.py)": not pack,
            "--placement resident, where the GPU's memory holds it": pinned,
            smaller: True,
        },
        "launch": {"--compile": compile, "--graph": graph, "a larger --batch": True},
        "memory": {"--compile": compile, "--backbone.fuse": fuse, "--precision bf16": gpu and fp32},
        "arithmetic": {"--precision bf16": fp32, "--compile": compile, "a larger --batch": True},
    }
    fitting = [way for way, fits in ways[kind].items() if fits][: 3 if kind == "decode" else None]
    if not fitting:
        return "smaller crops (--image-size) would move less"
    before = ", ".join(fitting[:-1])
    return f"try {before} or {fitting[-1]}" if before else f"try {fitting[0]}"


def digits(value: float) -> str:
    """`1,234`, and three digits of what is less than a hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{digits(1e3 * seconds)} ms"


# ---- floors and ceilings ----


def floors(cost: StepCost, peak: Ceilings) -> dict[str, float]:
    """Seconds that a step takes at least, by matrix arithmetic and by memory traffic, as `Measured` names them."""
    return {
        "arithmetic": cost.flop / (peak.tflops * 1e12),
        "memory": cost.traffic / (peak.gb_per_s * 1e9),
    }


def with_floors(
    m: Measured, cost: StepCost, view: View, cfg: Config, device: torch.device
) -> Measured:
    """With the floors, by ceilings measured now, and the time of a batch's copy to the GPU. Under a second."""
    peak = ceilings(device, DTYPES[cfg.precision])
    return replace(m, copy=copy_seconds(view, cfg.batch, device), **floors(cost, peak))


def copy_seconds(view: View, images: int, device: torch.device) -> float | None:
    """Seconds to copy a batch's crops from pinned memory to the GPU; None: there is none."""
    if device.type != "cuda":
        return None
    host = [crop.pin_memory() for crop in random_batch(view, images, torch.device("cpu")).crops]
    return _best(lambda: [crop.to(device, non_blocking=True) for crop in host], device, 0.05)


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Ceilings:
    """Measure this device, for about so many seconds; disturbs no random numbers.

    Best of many repetitions, since others may be at work on the machine; of random numbers, since zeros take less
    current and flatter. On a GPU whose memory is nearly full, of smaller matrices.
    """
    large = device.type == "cuda"
    return Ceilings(
        tflops=_halved(_tflops, 8192 if large else 1024, device, dtype, seconds / 2),
        gb_per_s=_halved(_gb_per_s, 2**30 if large else 2**26, device, dtype, seconds / 2),
    )


def _halved(measure: Callable[..., float], size: int, *rest: Any) -> float:
    """`measure` of the largest size that fits, from `size` down."""
    try:
        return measure(size, *rest)
    except torch.OutOfMemoryError:
        if size < 512:
            raise
    return _halved(measure, size // 2, *rest)


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


def _gb_per_s(size: int, device: torch.device, _: torch.dtype, seconds: float) -> float:
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
