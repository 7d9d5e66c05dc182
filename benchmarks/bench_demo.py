"""The demonstration as a newcomer sees it: `make demo` in a fresh checkout, timed from the first command to the last.

    python -m benchmarks.bench_demo [--out FILE.jsonl or FOLDER]

Clones the commit that stands here into a temporary folder, installation into a new .venv included. Its training is then
done again with two other seeds.
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

MINUTES, SECONDS = (
    6,
    200,
)  # on 2 cores without GPU: installation included, and of the training alone
ACCURACY = 0.66  # with each seed


def keep_picture(made: Path) -> None:
    """The run's sheet for the README, small enough for a repository."""
    picture = Image.open(made).convert("RGB")
    picture.thumbnail((600, 2000))
    picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(measure.ROOT / "benchmarks" / "reports" / "demo.png", optimize=True)


def rows(seeds: list[dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """Minutes that it took, and what the nets then get right. `seeds`: a run's summary each, the demo's own first."""
    first, right = seeds[0], [summary["val_accuracy"] for summary in seeds]
    for variant, figures, unit, target in (
        ("installation, conversion and training", [seconds / 60], "minutes", MINUTES),
        ("training", [summary["seconds"] for summary in seeds], "s", SECONDS),
        ("held-out rotation accuracy", right, "share", None),
        (f"held-out rotation accuracy, lowest of {len(seeds)} seeds", [min(right)], "share", ACCURACY),
    ):  # fmt: skip
        yield measure.row(
            "demo",
            theme="demo",
            variant=variant,
            mode="make demo",
            shape={"steps": first["steps"], "images": first["images"]},
            dtype="fp32 or bf16, by the processor",
            **measure.middle(figures, unit),
            warmup=0,
            **({} if target is None else {"target": target}),
            better="higher" if unit == "share" else "lower",
            images_per_s=first["images_per_s"],
            wait_share=first["wait_share"],
            before=first["val_accuracy_first"],
        )


def again(checkout: Path, seed: int) -> dict[str, Any]:
    """The demo's training with another seed: its summary."""
    out = checkout / "runs" / f"demo-{seed}"
    made = checkout / "prepared"
    words = ["demo", "--data", made / "demo-train.beton", "--val", made / "demo-val.beton"]
    train = [checkout / ".venv/bin/python", checkout / "fastrot" / "train.py"]
    subprocess.run([*train, *words, "--seed", str(seed), "--out", out], check=True)
    return json.loads((out / "summary.json").read_text())


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
        seeds = [summary, *(again(checkout, seed) for seed in (1, 2))]
    asked.device = "cpu" if summary["device"].endswith("cores") else "cuda"
    runs.keep(rows(seeds, seconds), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
