"""Learning on real pictures: RotNet with a quarter-width NIN on CIFAR-10, on the CPU, through the real train entry.

    python -m benchmarks.bench_cifar [--root FOLDER] [--seconds 90] [--out FILE.jsonl or FOLDER]

The steps are fixed, so a busy machine takes longer and learns the same; the row says how long it took. The run is
shorter than an epoch: no picture is seen twice, and the curve of the training accuracy is of pictures not seen before.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import shutil
import subprocess
from typing import Any

from benchmarks import measure
from fastrot import entry
from fastrot.config import UsageError

PRESET, WIDTH, BATCH, STEPS, RATE, JUDGED = "rotnet-nin-cifar10", 0.25, 64, 150, 0.1, 1000
TARGET = 0.5  # of the rotations right, on JUDGED test pictures
LOG_EVERY = 10  # steps
CHOSEN = "the number of steps was chosen after seeing what others gave on the same test pictures, one seed (LOG.md)"
COPIES = "the pictures are copies of JPEG quality 95 (39.9 dB against the originals)"


def pictures(root: Path | None, work: Path) -> tuple[Path, str]:
    """The official python batches and what is to be said of them; the copies are unpacked once, into `work`."""
    if root is not None:
        return root, "the official batches, as --root holds them"
    unpacked, packed = work / "cifar10", measure.shared_data() / "cifar10"
    if not (unpacked / "cifar-10-batches-py" / "test_batch").exists():
        script = packed / "unpack_cifar10.py"
        if not script.exists():
            raise UsageError(
                f"{packed} holds no CIFAR-10: name cifar-10-batches-py with --root DIR"
            )
        _run(script, "--src", "full-q95", "--out", unpacked)
    return unpacked / "cifar-10-batches-py", COPIES


def prepared(root: Path, work: Path) -> tuple[Path, Path]:
    """Training pictures, and the first JUDGED test pictures (their classes are mixed), as raw .beton."""
    made = []
    for split, limit in (("train", None), ("test", JUDGED)):
        out = work / f"cifar10-{split}{limit or ''}.beton"
        some = [] if limit is None else ["--limit", limit]
        knobs = ["--source", "cifar10", "--root", root, "--split", split, "--encoding", "raw"]
        if not out.exists():
            _run(measure.ROOT / "dataprep" / "to_ffcv.py", *knobs, *some, "--out", out)
        made.append(out)
    return made[0], made[1]


def learn(train: Path, judge: Path, run: Path, steps: int) -> tuple[dict[str, Any], list[dict]]:
    """Train from nothing; the run's summary and its lines."""
    shutil.rmtree(run, ignore_errors=True)
    length = ["--schedule.kind", "linear", "--schedule.steps", steps, "--lr", RATE]
    knobs = ["--batch", BATCH, "--backbone.width", WIDTH, "--device", "cpu", *length]
    told = ["--log-every", LOG_EVERY, "--no-tensorboard", "--out", run]
    script = measure.ROOT / "fastrot" / "train.py"
    _run(script, PRESET, "--data", train, "--val", judge, *knobs, *told)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads((run / "summary.json").read_text()), [json.loads(line) for line in lines]


def rows(summary: dict[str, Any], lines: list[dict], seconds: float, about: str) -> list[dict]:
    """The accuracy with its curve, and the seconds of training that it took."""
    clock, curve = 0.0, []
    for line in lines:
        if "images_per_s" in line:
            clock += LOG_EVERY * BATCH / line["images_per_s"]
            curve.append({"step": line["step"], "s": round(clock, 2), "accuracy": line["accuracy"]})
    shape = {"batch": BATCH, "steps": summary["steps"], "width": WIDTH, "judged": JUDGED}
    each = dict(theme="cifar", variant=PRESET, shape=shape, dtype="float32", warmup=0, about=about)
    right = measure.row(
        "held-out rotation accuracy",
        mode="learning",
        **each,
        **measure.middle([summary["val_accuracy"]], "share"),
        chance=summary["chance"],
        first=summary["val_accuracy_first"],
        seconds=summary["seconds"],
        images_per_s=summary["images_per_s"],
        curve=curve,
        target=TARGET,
        better="higher",
    )
    took = measure.row(
        "seconds of training",
        mode="learning",
        **each,
        **measure.middle([summary["seconds"]], "s"),
        images_per_s=summary["images_per_s"],
        target=seconds,
        better="lower",
    )
    return [right, took]


def _run(script: Path, *knobs: Any) -> None:
    command = [sys.executable, str(script), *map(str, knobs)]
    if subprocess.run(command).returncode:
        raise UsageError(f"this failed, see above: {' '.join(command)}")


def main() -> int:
    """Prepare, train, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="CIFAR-10's cifar-10-batches-py")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training that are allowed")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} pictures")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    root, about = pictures(asked.root, asked.work)
    train, judge = prepared(root, asked.work)
    summary, lines = learn(train, judge, asked.work / "bench-cifar-run", asked.steps)
    for row in rows(summary, lines, asked.seconds, f"{about}; {CHOSEN}"):
        measure.append(measure.results("cpu", asked.out), row)
        measure.say(row)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
