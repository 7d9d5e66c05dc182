"""Whether quick forms of a step learn as well as the plain one: held-out rotations predicted right, and their loss, over steps.

    python -m benchmarks.bench_learning [--root FOLDER] [--seeds N] [--forms FORM ...] [--device cpu|cuda] [--quick]

RotNet with the demonstration's net and Rotation Feature Decoupling with the same, through the real train entry, on ten
ImageNet classes of 128 pixels (--root holds train/ and val/, converted once into --work). The rule, stated before
anything was measured: "float32 eager" must get LEARNT above chance, or nothing is told; another form learns as well
where its last held-out accuracy, the median of its seeds, is not lower than that of "float32 eager" by more than the
seeds of "float32 eager" differ among themselves, and at least BOUND: two runs judged on a thousand pictures differ by
two or three points of a hundred by chance alone. The same command goes on where it was broken off.

On a GPU three seeds learn from train/ and are judged on val/; on a CPU one seed learns from three quarters of val/ and is
judged on the rest, at 32 pixels: a look, in six minutes on one core. The contrast with the bank weighs a tenth: a run this
short sees only how that loss rises at first, and at its full weight hardly learns turns beside it, in any form.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import bench_decoupling, measure
from fastrot import entry
from fastrot.config import AlexNet, Config, RunError, UsageError

CHANCE, LEARNT, BOUND = 0.25, 0.05, 0.03  # shares
PLAIN = "float32 eager"
WORDS: dict[str, tuple[str, ...]] = {  # of a form's name -> knobs
    "float32": ("--precision", "fp32"),
    "bf16": ("--precision", "bf16"),
    "eager": ("--no-compile",),
    "compiled": ("--compile",),
    "folded": ("--backbone.space-to-depth",),
    "fused": ("--backbone.fuse",),
    "graph": ("--graph",),
}
FORMS = {  # those that are compared with PLAIN
    "cuda": ("bf16 eager", "bf16 compiled", "bf16 compiled + folded + fused + graph"),
    "cpu": ("float32 compiled + folded + fused", "bf16 eager"),
}
NET = {"--backbone.width": 0.25, "--backbone.kernel": 5, "--backbone.stride": 2}
LINE = {"--schedule.kind": "linear", "--log-every": 20, "--validate-every": 1}
TASKS = {
    "rotnet": {"preset": "demo", "--lr": 0.05},
    "decoupling": {
        **{"preset": "decoupling-alexnet", "--lr": 0.02, "--method.negatives": 512},
        "--method.lambda-nce": 0.1,
    },
}
SIZES = {  # of a run, by device
    "cuda": {"--image-size": 64, "--batch": 64, "--schedule.steps": 1100},
    "cpu": {"--image-size": 32, "--batch": 32, "--schedule.steps": 400},
}
CROP = {"--method.crop.scale": (0.5, 1.0)}
QUICK = {"--image-size": 32, "--batch": 16, "--schedule.steps": 12}
HELD_OUT = 0.25  # of the pictures, on a CPU
ABOUT = (
    f"a form learns as well where its last held-out accuracy is not lower than that of {PLAIN} by more than its seeds "
    f"differ among themselves, and at least {BOUND:g}; stated before measuring"
)


def knobs_of(form: str) -> tuple[list[str], list[str]]:
    """What a form sets on the command line, and of it what this version does not know.

    Raises UsageError for a word that is none.
    """
    words = form.replace(" + ", " ").split()
    if unknown := [word for word in words if word not in WORDS]:
        raise UsageError(f"--forms got {form!r}: {unknown[0]!r} is none of {', '.join(WORDS)}")
    known = {field.name for field in dataclasses.fields(Config)}
    known |= {f"backbone.{field.name}" for field in dataclasses.fields(AlexNet)}
    knobs = [knob for word in words for knob in WORDS[word]]
    named = [k for k in knobs if k.startswith("--")]
    return knobs, [k for k in named if k.removeprefix("--").removeprefix("no-") not in known]


def forms(asked: list[str] | None, device: str) -> list[str]:
    """PLAIN, then those that this version and this device have; the others are told in a line each."""
    found = [PLAIN]
    for form in asked or FORMS[device]:
        _, missing = knobs_of(form)
        if missing and not asked:  # a form without what is not there yet
            fewer = [w for w in form.split(" + ") if not set(WORDS.get(w, ())) & set(missing)]
            print(f"{form}: there is no knob {missing[0]}; measured: {' + '.join(fewer)}")
            form, missing = " + ".join(fewer), []
        if missing or (device == "cpu" and "graph" in form):
            print(f"left out: {form}, since {missing[0] if missing else 'a CPU has no graphs'}")
        elif form not in found:
            found.append(form)
    return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """What all runs share."""

    device: str
    data: list[str]  # knobs that name the pictures
    work: Path
    quick: bool


def learn(task: str, form: str, seed: int, asked: Asked) -> tuple[dict, list[dict]]:
    """Train, or go on; the run's summary and its lines."""
    commit = measure.row("run")["commit"][:12]  # a run of other code is not gone on with
    name = f"{asked.device}{'-quick' * asked.quick}-{task}-{form.replace(' ', '_')}-{seed}-{commit}"
    run = asked.work / "learning" / name
    knobs = NET | CROP | LINE | (QUICK if asked.quick else SIZES[asked.device]) | TASKS[task]
    preset = knobs.pop("preset")
    told = [str(word) for knob, value in knobs.items() for word in (knob, *_each(value))]
    told += [*asked.data, "--device", asked.device, "--seed", str(seed), "--out", str(run)]
    script = str(measure.ROOT / "fastrot" / "train.py")
    command = [sys.executable, script, str(preset), *told, *knobs_of(form)[0], "--no-tensorboard"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RunError(f"this ended with status {done.returncode}, see above: {' '.join(command)}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), lines


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out accuracy and loss of the rotations at each validation, and the mean of the training loss since the last one."""
    points: list[dict[str, Any]] = []
    since: list[float] = []
    for line in lines:
        if "val_accuracy" in line:
            each = {"step": line["step"], "accuracy": _short(line["val_accuracy"])}
            each |= {"loss": _short(line["val_loss"])}
            points.append(each | ({"training": _short(sum(since) / len(since))} if since else {}))
            since = []
        elif "loss" in line:
            since.append(line["loss"])
    return points


def row_of(
    task: str,
    form: str,
    runs: list[tuple[dict, list[dict]]],
    plain: dict[str, Any] | None,
    asked: Asked,
) -> dict[str, Any]:
    """A form's figure over its seeds, judged beside `plain`, the row of float32 eager; None: this is it."""
    curves = [curve(lines) for _, lines in runs]
    last = [points[-1]["accuracy"] for points in curves]
    spread = max(last) - min(last)
    least = CHANCE + LEARNT if plain is None else plain["p50"] - max(plain["spread"], BOUND)
    summary = runs[0][0]
    size = QUICK if asked.quick else SIZES[asked.device]
    shape = {name.strip("-").replace("schedule.", ""): value for name, value in size.items()}
    made = measure.row(
        "learning",
        theme="train",
        variant=form if task == "rotnet" else f"{task}, {form}",
        preset=summary["preset"],
        form=form,
        mode="held-out rotations predicted right at the end, by the real train entry",
        shape={**shape, "width": NET["--backbone.width"], "seeds": len(runs)},
        dtype=form.split()[0],
        **measure.middle(last, "share"),
        seeds=len(runs),
        spread=spread,
        losses=[points[-1]["loss"] for points in curves],
        curves=curves,
        images_per_s=summary["images_per_s"],
        seconds=sum(one["seconds"] for one, _ in runs),
        warmup=0,
        target=least,
        better="higher",
        about=ABOUT,
    )
    return made | {"judgement": judged(made, plain)}


def judged(row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """The rule, applied, in a sentence."""
    if plain is None:
        learnt = "learns" if measure.met(row) else "does not learn enough to compare with"
        return (
            f"{row['variant']} {learnt}: {row['p50']:.1%} of held-out turns, chance is {CHANCE:.0%}"
        )
    apart = row["p50"] - plain["p50"]
    if not measure.met(plain):
        return f"{row['variant']}: nothing is told, since {PLAIN} did not learn enough"
    verb = "learns as well as" if measure.met(row) else "learns LESS well than"
    allowed = max(plain["spread"], BOUND)
    return f"{row['variant']} {verb} {PLAIN}: {apart:+.1%} of held-out turns, where {-allowed:.1%} is allowed"


def rows(tasks: list[str], named: list[str], seeds: int, asked: Asked) -> Iterator[dict[str, Any]]:
    """Rows, each as soon as its seeds have learnt."""
    for task in tasks:
        plain = None
        for form in named:
            runs = [learn(task, form, seed, asked) for seed in range(seeds)]
            made = row_of(task, form, runs, plain, asked)
            plain = plain or made
            yield made


def pictures(root: Path | None, work: Path, device: str, quick: bool) -> list[str]:
    """The knobs that name what is learnt from and judged on, prepared where they are not yet."""
    if device == "cuda" and not quick:
        both = bench_decoupling.prepared(root, work, quick)
        return ["--data", str(both["train"]), "--val", str(both["val"])]
    one = bench_decoupling.prepared(root, work, quick)["val"]
    return ["--data", str(one), "--hold-out", str(HELD_OUT)]


def _each(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main(args: list[str] | None = None) -> int:
    """Prepare, train, judge, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--root", type=Path, help="holds class folders in train/ and in val/")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for files and runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--seeds", type=int, help="default: 3 on a GPU, 1 on a CPU")
    parser.add_argument("--forms", nargs="+", help=f"words joined by +, of {', '.join(WORDS)}")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="a few steps; kept only with --out")
    asked = parser.parse_args(args)
    seeds = asked.seeds or (3 if asked.device == "cuda" and not asked.quick else 1)
    named = forms(asked.forms, asked.device)
    data = pictures(asked.root, asked.work, asked.device, asked.quick)
    of = Asked(asked.device, data, asked.work, asked.quick)
    for each in rows(asked.tasks, named, seeds, of):
        if asked.out or not asked.quick:
            measure.append(measure.results(asked.device, asked.out), each)
        measure.say(each)
        print(each["judgement"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
