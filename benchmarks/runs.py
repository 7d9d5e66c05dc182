"""What the benchmarks share: their command line, rows as they come, scripts in processes of their own, a training run's figures."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from fastrot.config import RunError

KNOBS: dict[str, dict[str, Any]] = {
    "root": {"type": Path, "help": "class folders of original pictures"},
    "work": {"type": Path, "default": Path("prepared"), "help": "for prepared files and runs"},
    "quick": {"action": "store_true", "help": "a short look; kept only with --out"},
    "device": {
        "choices": ("cpu", "cuda"),
        "default": "cuda" if torch.cuda.is_available() else "cpu",
    },
    "out": {
        "type": Path,
        "help": "FILE.jsonl or folder; default: benchmarks/results/<machine>.jsonl",
    },
}


def parser(doc: str | None, *knobs: str) -> argparse.ArgumentParser:
    """A command line with the named of KNOBS, and --out."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name in (*knobs, "out"):
        made.add_argument(f"--{name}", **KNOBS[name])
    return made


def keep(
    rows: Iterable[dict[str, Any]],
    asked: argparse.Namespace,
    more: Callable[[dict[str, Any]], str] = lambda row: "",
) -> None:
    """Append each row to the machine's file of results as soon as it is measured, and say it."""
    wanted = asked.out or not getattr(asked, "quick", False)
    out = measure.results(getattr(asked, "device", "cpu"), asked.out) if wanted else None
    for row in rows:
        if out is not None:
            measure.append(out, row)
        measure.say(row, more(row))


def command(script: str, *words: Any) -> list[str]:
    """A script of this checkout, as a command."""
    return [sys.executable, str(measure.ROOT / script), *map(str, words)]


def run(script: str, *words: Any, quiet: bool = False) -> None:
    """Run a script to its end. Raises RunError where it fails."""
    line = command(script, *words)
    done = subprocess.run(line, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        raise RunError(f"this ended with status {done.returncode}, see above: {' '.join(line)}")


def convert(script: str, out: Path, *words: Any) -> Path:
    """What a script of dataprep/ makes of pictures; made where it is not there yet."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        run(f"dataprep/{script}", *words, "--out", out)
    return out


def train(
    preset: str, folder: Path, knobs: dict[str, Any], *words: str, quiet: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train into a run's folder, or go on there: the run's summary, and its lines of metrics.jsonl."""
    for knob, value in knobs.items():
        words += (knob, *map(str, value if isinstance(value, tuple) else (value,)))
    run("fastrot/train.py", preset, *words, "--out", folder, "--no-tensorboard", quiet=quiet)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]


def prepared(root: Path | None, work: Path, few: dict[str, int] | None = None) -> dict[str, Path]:
    """The class folders train/ and val/ of `root` (ten ImageNet classes of 128 pixels) as .beton; `few`: pictures of each."""
    root, made = root or measure.shared_data() / "imagenette128", {}
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise RunError(
                f"{root / split} is no folder: name one that holds train/ and val/, --root DIR"
            )
        out = work / f"{root.name}-{split}{few[split] if few else ''}.beton"
        some = ["--limit", few[split]] if few else []
        words = ["--source", "imagefolder", "--root", root / split, *some]
        made[split] = convert("to_ffcv.py", out, *words)
    return made
