"""Learning on real pictures: RotNet with a quarter-width NIN on CIFAR-10, on the CPU, through the real train entry.

    python -m benchmarks.bench_cifar [--root FOLDER] [--seconds 90] [--out FILE.jsonl or FOLDER]

The steps are fixed, so a busy machine takes longer and learns the same; the row says how long it took. The run is
shorter than an epoch: no picture is seen twice, and the curve of the training accuracy is of pictures not seen before.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure, runs
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
        command = [sys.executable, script, "--src", "full-q95", "--out", unpacked]
        subprocess.run(list(map(str, command)), check=True)
    return unpacked / "cifar-10-batches-py", COPIES


def prepared(root: Path, work: Path) -> dict[str, Path]:
    """Training pictures, and the first JUDGED test pictures (their classes are mixed), as raw .beton."""
    made = {}
    for knob, split, some in (("--data", "train", ()), ("--val", "test", ("--limit", JUDGED))):
        out = work / f"cifar10-{split}{some[1] if some else ''}.beton"
        of = ("--source", "cifar10", "--root", root, "--split", split, "--encoding", "raw")
        made[knob] = runs.convert("to_ffcv.py", out, *of, *some)
    return made


def rows(summary: dict[str, Any], lines: list[dict], seconds: float, about: str) -> list[dict]:
    """The accuracy with its curve, and the seconds of training that it took."""
    clock, curve = 0.0, []
    for line in lines:
        if "images_per_s" in line:
            clock += LOG_EVERY * BATCH / line["images_per_s"]
            curve.append({"step": line["step"], "s": round(clock, 2), "accuracy": line["accuracy"]})
    shape = {"batch": BATCH, "steps": summary["steps"], "width": WIDTH, "judged": JUDGED}
    each = dict(theme="cifar", variant=PRESET, mode="learning", shape=shape, dtype="float32")
    each |= dict(warmup=0, about=about, images_per_s=summary["images_per_s"])
    right = measure.row(
        "held-out rotation accuracy",
        **each,
        **measure.middle([summary["val_accuracy"]], "share"),
        chance=summary["chance"],
        first=summary["val_accuracy_first"],
        seconds=summary["seconds"],
        curve=curve,
        target=TARGET,
        better="higher",
    )
    took = measure.middle([summary["seconds"]], "s")
    aim = {"target": seconds, "better": "lower"}
    return [right, measure.row("seconds of training", **each, **took, **aim)]


def main() -> int:
    """Prepare, train, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training that are allowed")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} pictures")
    asked = parser.parse_args()
    root, about = pictures(asked.root, asked.work)
    knobs: dict[str, Any] = prepared(root, asked.work) | {
        **{"--schedule.kind": "linear", "--schedule.steps": asked.steps, "--lr": RATE},
        **{"--batch": BATCH, "--backbone.width": WIDTH, "--device": "cpu"},
        "--log-every": LOG_EVERY,
    }
    folder = asked.work / "bench-cifar-run"
    shutil.rmtree(folder, ignore_errors=True)
    found = runs.train(PRESET, folder, knobs)
    runs.keep(rows(*found, asked.seconds, f"{about}; {CHOSEN}"), asked)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry.status(main))
