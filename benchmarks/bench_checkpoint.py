"""What a checkpoint costs the training loop: Rotation Feature Decoupling at full width, a bank row for each picture of ImageNet.

    python -m benchmarks.bench_checkpoint [--work FOLDER] [--device cpu|cuda] [--quick]

In turn: a save as it was, written by the loop itself between two steps; steps with nothing beside them; a save as it is,
copied between two steps, and the steps beside the thread that writes. A save looks first whether all is finite. The
steps are of two pictures on a CPU, whose whole batch would take minutes: the pause does not depend on it.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import forms, measure, runs
from benchmarks.measure import IMAGENET, PRESET
from fastrot import assemble, entry
from fastrot.config import AlexNet
from fastrot.entry import in_bytes
from fastrot.machine import wait_for
from fastrot.training import checkpoint
from fastrot.training.loop import train_step
from fastrot.training.state import TrainState
from fastrot.training.writer import Writer

REPEATS, STEPS = 5, 4  # saves of each kind; steps between them
LOOP, THREAD = "written by the loop", "copied, written by a thread"
ALONE, BESIDE = "alone", "beside the writing"


def rows(device: torch.device, work: Path, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """The loop's pause at a save, both ways; a step alone and beside the writing."""
    small = {} if quick or device.type == "cuda" else {"batch": 2, "backbone": AlexNet()}
    cfg = forms.sized(PRESET, device, quick=quick, **small)
    data, view = assemble.open_data("synthetic:1000"), assemble.training_view(cfg)
    loader = assemble.open_loader(data, view, batch=cfg.batch, device=device, enlarge=True)
    bank = 1000 if quick else IMAGENET
    state = forms.state_of(cfg, loader, device, steps=10**6, bank=bank)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "last.pt"
        took = timed(state, next(iter(loader.epoch(0))), path)
        size = path.stat().st_size
    for (what, mode), seconds in took.items():
        yield measure.row(
            "checkpoint",
            theme="train",
            variant=f"{what}, {cfg.preset} of {in_bytes(size)}",
            mode=mode,
            shape={"batch": cfg.batch, "bank": bank, "width": cfg.backbone.width, "bytes": size},
            dtype=cfg.precision,
            warmup=1,
            **measure.middle(seconds, "s"),
        )


def timed(state: TrainState, batch: Any, path: Path) -> dict[tuple[str, str], list[float]]:
    """Seconds by what was timed and how; the first of each pause is not among them, nor the first steps."""
    writer = Writer(state.device, contextlib.nullcontext)
    pause, step, whole = "the loop's pause at a save", "a step", "a save until it is on disk"
    took: dict[tuple[str, str], list[float]] = {
        (pause, LOOP): [], (pause, THREAD): [], (step, ALONE): [], (step, BESIDE): [], (whole, THREAD): [],
    }  # fmt: skip

    def clocked(name: tuple[str, str], work: Any) -> None:
        begun = time.perf_counter()
        work()
        wait_for(state.device)
        took[name].append(time.perf_counter() - begun)

    def finite() -> dict[str, Any]:
        parts = state.state_dict()
        assert checkpoint.all_finite([*parts["net"].values(), *parts["method"].values()])
        return parts

    def one() -> None:
        train_step(state, batch)

    for k in range(1 + REPEATS):
        for _ in range(STEPS):
            clocked((step, ALONE), one)
        clocked((pause, LOOP), lambda: checkpoint.save(path, finite()))
        begun = time.perf_counter()
        clocked((pause, THREAD), lambda: writer.begin(finite(), [path]))
        writing = True
        while writing:
            clocked((step, BESIDE), one)
            writing = writer.check()
        took[whole, THREAD].append(time.perf_counter() - begun)
        if k == 0:  # memory was new
            for seconds in took.values():
                seconds.clear()
    return took


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    asked = runs.parser(__doc__, "work", "device", "quick").parse_args(args)
    asked.work.mkdir(parents=True, exist_ok=True)
    runs.keep(rows(torch.device(asked.device), asked.work, quick=asked.quick), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
