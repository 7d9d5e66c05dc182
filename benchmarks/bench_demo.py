"""The demonstration as a newcomer sees it: `make demo` in a fresh checkout, timed from the first command to the last.

    python -m benchmarks.bench_demo [--out FILE.jsonl or FOLDER]

Clones the commit that stands here into a temporary folder, installation into a new .venv included.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import measure, runs
from fastrot import entry
from fastrot.config import RunError

MINUTES = 8  # on 2 cores without GPU, installation included
ACCURACY = 0.6


def keep_picture(made: Path) -> None:
    """The run's sheet for the README, small enough for a repository."""
    picture = Image.open(made).convert("RGB")
    picture.thumbnail((600, 2000))
    picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(measure.ROOT / "benchmarks" / "reports" / "demo.png", optimize=True)


def rows(summary: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Minutes that it took, and what the net then gets right."""
    for variant, figure, unit, target, better in (
        ("installation, conversion and training", seconds / 60, "minutes", MINUTES, "lower"),
        ("held-out rotation accuracy", summary["val_accuracy"], "share", ACCURACY, "higher"),
    ):
        yield measure.row(
            "demo",
            theme="demo",
            variant=variant,
            mode="make demo",
            shape={"steps": summary["steps"], "images": summary["images"]},
            dtype="fp32 or bf16, by the processor",
            **measure.middle([figure], unit),
            warmup=0,
            target=target,
            better=better,
            images_per_s=summary["images_per_s"],
            wait_share=summary["wait_share"],
            before=summary["val_accuracy_first"],
            training_s=summary["seconds"],
        )


def main(args: list[str] | None = None) -> int:
    asked = runs.parser(__doc__).parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "fastrot"
        subprocess.run(["git", "clone", "-q", str(measure.ROOT), str(checkout)], check=True)
        begin = time.perf_counter()
        done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}"], cwd=checkout)
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RunError(f"make demo ended with status {done.returncode}: see what it printed")
        run = checkout / "runs" / "demo"
        summary = json.loads((run / "summary.json").read_text())
        keep_picture(run / "plots" / "turned.png")
    asked.device = "cpu" if summary["device"].endswith("cores") else "cuda"
    runs.keep(rows(summary, seconds), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
