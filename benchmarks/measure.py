"""Benchmark rows: one JSON object a line, with the machine, the versions and the commit that they come from."""

import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastrot import machine
from fastrot.config import UsageError
from fastrot.entry import cores

ROOT = Path(__file__).parents[1]
IMAGENET, HELD_OUT = 1_281_167, 50_000  # pictures of ILSVRC 2012: training, validation
PRESET = "decoupling-alexnet"  # whose epoch the benchmarks are about
EPOCH_S = 60  # the aim for such an epoch on one H200, its validation included
GPU_BYTES, KEPT_BYTES = 141e9, 20e9  # an H200's memory, and what net, bank and views take of it
OTHERS = ", another's"  # ends the name of a curve that is drawn dotted beside the one of that name


def row(what: str, **fields: Any) -> dict[str, Any]:
    """One figure and where it comes from. COMMIT and DIRTY tell the commit where there is no .git."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "what": what,
        **fields,
        "gpu": gpu.name if gpu else None,
        "cpu": machine.processor(),
        "cores": cores(),
        "simd": _simd(),
        "threads": torch.get_num_threads(),
        **_driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "triton", "numpy", "simplejpeg")},
        "opencv": version("opencv-python-headless") or version("opencv-python"),
        "cuda": torch.version.cuda,
        **_commit(),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def append(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one line to a file of results. Raises ValueError for a row that does not say its commit."""
    if not row.get("commit"):
        raise ValueError(f"the row {row.get('what')!r} has no commit: make it with measure.row")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def results(device: str, out: Path | None = None) -> Path:
    """The file of results of this machine's GPU, or of its CPU and cores; in the folder `out` where one is given."""
    cpu = f"cpu {machine.processor()} {cores()} cores"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    file = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".jsonl"
    if out is not None and out.suffix == ".jsonl":
        return out
    return (out or ROOT / "benchmarks" / "results") / file


def shared_data() -> Path:
    """Where real pictures lie: $FASTROT_DATA, or beside the checkout."""
    return Path(os.environ.get("FASTROT_DATA", ROOT.parent / "shared" / "data"))


def say(row: Mapping[str, Any], more: str = "") -> None:
    """A row for the eye."""
    wall = f", {row['images_per_s']:,.0f} images/s" if row.get("images_per_s") else ""
    print(
        f"{row['what']}: {row.get('variant')}: {row['p50']:,.3g} {row['unit']} "
        f"({row['p20']:,.3g} to {row['p80']:,.3g}){wall}{more}{verdict(row)}",
        flush=True,
    )


def met(row: Mapping[str, Any]) -> bool:
    """Whether a row with a target has reached it."""
    more = row["better"] == "higher"
    return row["p50"] >= row["target"] if more else row["p50"] <= row["target"]


def verdict(row: Mapping[str, Any]) -> str:
    """The row's figure beside its target, in words; nothing where there is none."""
    if row.get("target") is None:
        return ""
    limit = f"at {'least' if row['better'] == 'higher' else 'most'} {row['target']:g} {row['unit']}"
    return f" (target {limit}: {'met' if met(row) else 'MISSED'})"


def number(value: float) -> str:
    """Three digits, or all of a larger one."""
    if abs(value) < 1e-9:
        return "0"  # a slope through equal points
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in each)


def memory(name: str) -> float:
    """MB of this process as Linux tells them: VmRSS, in memory now; VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0]) / 1024


def middle(values: list[float], unit: str) -> dict[str, Any]:
    """p20, p50 and p80 of repetitions; of a single one, itself."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
    low, high = max(fifths[0], min(values)), min(fifths[3], max(values))
    median = statistics.median(values)
    return {"unit": unit, "p20": low, "p50": median, "p80": high, "reps": len(values)}


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: str, *, seconds: float, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that clocks and neighbours touch all alike."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in runs.items():
            times[name].append(_timed(run, device))
    return times


def spread(seconds: list[float]) -> dict[str, Any]:
    """p20, p50 and p80 in milliseconds."""
    return middle([1e3 * each for each in seconds], "ms")


def _timed(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    # several calls between two events: the launch of one is hidden behind the work of another
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 10
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def _commit() -> dict[str, Any]:
    if commit := os.environ.get("COMMIT"):
        return {"commit": commit, "dirty": os.environ.get("DIRTY", "0") not in ("", "0")}
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
        # rows of results that this very run adds are no change of the code
        made = (":!benchmarks/results", ":!benchmarks/reports")
        status = [*git, "status", "--porcelain", "--", ".", *made]
        changed = subprocess.run(status, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            "a benchmark row needs the commit: run inside the git checkout, or set COMMIT and DIRTY=0 or 1"
        ) from None
    return {"commit": commit.stdout.strip(), "dirty": bool(changed.stdout.strip())}


def _driver() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"driver": None, "power_limit_w": None}
    query = "nvidia-smi --query-gpu=driver_version,power.limit --format=csv,noheader,nounits -i 0"
    try:
        said = subprocess.run(query.split(), check=True, capture_output=True, text=True).stdout
        driver, watts = (part.strip() for part in said.split(","))
        return {"driver": driver, "power_limit_w": float(watts)}
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {"driver": None, "power_limit_w": None}


def _simd() -> str:
    """What a processor's name does not always tell: the widest instructions that torch uses, and bfloat16's."""
    bf16 = machine.multiplies_bf16(torch.device("cpu"))
    return torch.backends.cpu.get_cpu_capability() + ", bf16" * bf16


def version(module: str) -> str | None:
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None
