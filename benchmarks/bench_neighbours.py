"""Training on a CPU beside other processes that compute, by how long threads of OpenMP spin while they wait.

    python -m benchmarks.bench_neighbours [--spins WORD ...] [--neighbours N ...] [--reps N] [--out FILE.jsonl or FOLDER]

Each setting has a process of its own, which trains when it is its turn and sleeps else, so that all are measured
interleaved: the demo over its prepared photographs, and steps of a quarter-width NIN on one batch. A neighbour is a process that
adds numbers.

    default   as libgomp comes: threads spin 300,000 times for each other, then sleep
    passive   OMP_WAIT_POLICY=passive: they sleep at once
    a number  GOMP_SPINCOUNT
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import forms, measure, runs
from fastrot import assemble, entry
from fastrot.config import Nin
from fastrot.presets import PRESETS
from fastrot.training.loop import train_step

SPINS = ("default", "passive", str(entry.SPINS))
NEIGHBOURS = (0, 1, 2)
SECONDS = 4.0  # of a turn
DEMO = PRESETS["demo"]()
KNOBS: dict[str, dict[str, Any]] = {
    "demo": {"batch": DEMO.batch, "backbone": DEMO.backbone},
    "rotnet-nin-cifar10": {"batch": 16, "backbone": Nin(width=0.25)},
}
COMPUTES = "n = 0\nwhile True: n += 1"


def serve(preset: str, data: str) -> None:
    """Train for as many seconds as each line of stdin says, and answer with images/s."""
    cfg = forms.sized(preset, torch.device("cpu"), **KNOBS[preset])
    loader = assemble.open_loader(data, assemble.training_view(cfg), batch=cfg.batch)
    state = forms.state_of(cfg, loader, torch.device("cpu"), steps=10**9)
    state.method.net.train()
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    if preset != "demo":
        batches = itertools.repeat(next(batches))
    for line in sys.stdin:
        train_step(state, next(batches))
        images, begun = 0, time.perf_counter()
        until = begun + float(line)
        while time.perf_counter() < until:
            train_step(state, next(batches))
            images += cfg.batch
        print(images / (time.perf_counter() - begun), flush=True)


class Served:
    """`serve` in a process with a setting of its own."""

    def __init__(self, preset: str, data: str, spins: str):
        env = {
            k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        env |= {
            "default": {"GOMP_SPINCOUNT": "300000"},
            "passive": {"OMP_WAIT_POLICY": "passive"},
        }.get(spins, {"GOMP_SPINCOUNT": spins})
        command = [sys.executable, "-m", "benchmarks.bench_neighbours", "--serve", preset, data]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def images_per_s(self, seconds: float) -> float:
        asked: Any = self.process.stdin
        asked.write(f"{seconds}\n")
        asked.flush()
        answered: Any = self.process.stdout
        return float(answered.readline())


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute."""
    each = [subprocess.Popen([sys.executable, "-c", COMPUTES]) for _ in range(count)]
    try:
        yield
    finally:
        for process in each:
            process.kill()
            process.wait()


def rows(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    made = runs.prepared(measure.ROOT / "dataprep" / "demo_pictures", asked.work)
    data = {"demo": str(made["train"]), "rotnet-nin-cifar10": "synthetic:64"}
    for preset, path in data.items():
        served = {spins: Served(preset, path, spins) for spins in asked.spins}
        try:
            for each in served.values():
                each.images_per_s(0.1)
            found: dict[tuple[int, str], list[float]] = {}
            for _ in range(asked.reps):
                for count in asked.neighbours:
                    with neighbours(count):
                        for spins, each in served.items():
                            rate = each.images_per_s(asked.seconds)
                            found.setdefault((count, spins), []).append(rate)
            for (count, spins), rates in found.items():
                yield measure.row(
                    "neighbours",
                    theme="neighbours",
                    variant=f"{preset}, spins {spins}, {count} neighbours",
                    mode=f"turns of {asked.seconds:g} s, interleaved",
                    preset=preset,
                    spins=spins,
                    neighbours=count,
                    warmup=1,
                    **measure.middle(rates, "images/s"),
                )
        finally:
            for each in served.values():
                each.process.kill()
                each.process.wait()


def main(args: list[str] | None = None) -> int:
    parser = runs.parser(__doc__, "work")
    parser.add_argument("--spins", nargs="+", default=SPINS)
    parser.add_argument("--neighbours", nargs="+", type=int, default=NEIGHBOURS)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(args)
    if asked.serve:
        serve(*asked.serve)
        return 0
    runs.keep(rows(asked), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
