"""How a run without a GPU shares its cores: torch's threads against workers that decode, and bf16 against fp32.

    python -m benchmarks.bench_threads --data FILE.beton [--preset demo] [--reps 3] [--steps 40] [--out FILE.jsonl or FOLDER]

Whole runs of fastrot/train.py in processes of their own, in turns, since neighbours on the machine touch all alike.
A run's rate is that of its log lines but for the first, in which workers start.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
from typing import Any

from benchmarks import measure
from fastrot import entry
from fastrot.config import RunError
from fastrot.presets import PRESETS

LINE = 10  # steps a log line


def forms() -> dict[str, dict[str, Any]]:
    """Threads by workers, from one to all cores; then both precisions with what a run chooses itself."""
    several = sorted({1, entry.cores()})
    shared = {
        f"{threads} threads, {workers} workers": dict(threads=threads, workers=workers)
        for threads, workers in itertools.product(several, several)
    }
    return {**shared, "fp32": dict(precision="fp32"), "bf16": dict(precision="bf16")}


def rate(
    asked: argparse.Namespace,
    threads: int | None = None,
    workers: int | None = None,
    precision: str = "fp32",
) -> tuple[float, float]:
    """Images a second of a run, and the share of its time that it waited for data."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads or entry.cores())}
    with tempfile.TemporaryDirectory() as folder:
        knobs = ["--data", asked.data, "--out", folder, "--device", "cpu", "--precision", precision]
        knobs += ["--max-steps", asked.steps, "--log-every", LINE, "--hold-out", 0]
        knobs += [] if workers is None else ["--workers", workers]
        script = measure.ROOT / "fastrot" / "train.py"
        command = [sys.executable, str(script), asked.preset, *map(str, knobs), "--no-tensorboard"]
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RunError(f"a run ended with status {done.returncode}: {' '.join(command)}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]
    told = [json.loads(line) for line in lines]
    seconds = sum(1 / line["images_per_s"] for line in told)
    return len(told) / seconds, statistics.mean(line["wait_share"] for line in told)


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="anything that --data of a run takes")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help=f"of a run, at least {2 * LINE}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    asked = parser.parse_args(args)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in forms()}
    for _ in range(asked.reps):
        for name, form in forms().items():
            found[name].append(rate(asked, **form))
    for name, each in found.items():
        row = measure.row(
            "bf16 on a CPU" if name in ("bf16", "fp32") else "threads",
            theme="train",
            variant=name,
            mode=f"whole runs in turns, {asked.steps} steps, the first {LINE} not counted",
            shape={"preset": asked.preset},
            dtype=forms()[name].get("precision", "fp32"),
            **measure.middle([images for images, _ in each], "images/s"),
            warmup=0,
            wait_share=statistics.median(wait for _, wait in each),
            load=os.getloadavg()[0],
            form=forms()[name],
        )
        measure.append(measure.results("cpu", asked.out), row)
        measure.say(row)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
