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
short sees only how that loss rises at first, and at its full weight hardly learns rotations beside it, in any form.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_decoupling, forms, measure, runs
from fastrot import entry

CHANCE, LEARNT, BOUND = 0.25, 0.05, 0.03  # shares
PLAIN = "float32 eager"
FORMS = {  # those that are compared with PLAIN; forms.py names their words
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


def named(asked: list[str] | None, device: str) -> list[str]:
    """PLAIN, then the forms that are asked for, as far as this device has them."""
    wanted = [*map(str, asked or FORMS[device])]
    return list(dict.fromkeys([PLAIN, *forms.present(wanted, torch.device(device))]))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What all runs share."""

    device: str
    data: dict[str, Any]  # knobs that name the pictures
    work: Path
    quick: bool


def learn(task: str, form: str, seed: int, asked: Asked) -> tuple[dict, list[dict]]:
    """Train, or go on; the run's summary and its lines."""
    commit = measure.row("run")["commit"][:12]  # a run of other code is not gone on with
    name = f"{asked.device}{'-quick' * asked.quick}-{task}-{form.replace(' ', '_')}-{seed}-{commit}"
    run = asked.work / "learning" / name
    knobs = NET | CROP | LINE | (QUICK if asked.quick else SIZES[asked.device]) | TASKS[task]
    knobs |= asked.data | {"--device": asked.device, "--seed": seed}
    return runs.train(str(knobs.pop("preset")), run, knobs, *forms.words_of(form), quiet=True)


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out accuracy and loss of the rotations at each validation, and the mean of the training loss since the last one."""
    points: list[dict[str, Any]] = []
    since: list[float] = []
    for line in lines:
        if "val_accuracy" in line:
            each = {"step": line["step"], "accuracy": bench_decoupling.short(line["val_accuracy"])}
            each |= {"loss": bench_decoupling.short(line["val_loss"])}
            points.append(
                each
                | ({"training": bench_decoupling.short(sum(since) / len(since))} if since else {})
            )
            since = []
        elif "loss" in line:
            since.append(line["loss"])
    return points


def row_of(
    task: str,
    form: str,
    trained: list[tuple[dict, list[dict]]],
    plain: dict[str, Any] | None,
    asked: Asked,
) -> dict[str, Any]:
    """A form's figure over its seeds, judged beside `plain`, the row of float32 eager; None: this is it."""
    curves = [curve(lines) for _, lines in trained]
    last = [points[-1]["accuracy"] for points in curves]
    spread = max(last) - min(last)
    least = CHANCE + LEARNT if plain is None else plain["p50"] - max(plain["spread"], BOUND)
    summary = trained[0][0]
    size = QUICK if asked.quick else SIZES[asked.device]
    shape = {name.strip("-").replace("schedule.", ""): value for name, value in size.items()}
    made = measure.row(
        "learning",
        theme="train",
        variant=form if task == "rotnet" else f"{task}, {form}",
        preset=summary["preset"],
        form=form,
        mode="held-out rotations predicted right at the end, by the real train entry",
        shape={**shape, "width": NET["--backbone.width"], "seeds": len(trained)},
        dtype=form.split()[0],
        **measure.middle(last, "share"),
        seeds=len(trained),
        spread=spread,
        losses=[points[-1]["loss"] for points in curves],
        curves=curves,
        images_per_s=summary["images_per_s"],
        seconds=sum(one["seconds"] for one, _ in trained),
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
        return f"{row['variant']} {learnt}: {row['p50']:.1%} of held-out rotations, chance is {CHANCE:.0%}"
    apart = row["p50"] - plain["p50"]
    if not measure.met(plain):
        return f"{row['variant']}: nothing is told, since {PLAIN} did not learn enough"
    verb = "learns as well as" if measure.met(row) else "learns LESS well than"
    allowed = max(plain["spread"], BOUND)
    return f"{row['variant']} {verb} {PLAIN}: {apart:+.1%} of held-out rotations, where {-allowed:.1%} is allowed"


def rows(tasks: list[str], names: list[str], seeds: int, asked: Asked) -> Iterator[dict[str, Any]]:
    """Rows, each as soon as its seeds have learnt."""
    for task in tasks:
        plain = None
        for form in names:
            trained = [learn(task, form, seed, asked) for seed in range(seeds)]
            made = row_of(task, form, trained, plain, asked)
            plain = plain or made
            yield made


def pictures(asked: argparse.Namespace) -> dict[str, Any]:
    """The knobs that name what is learnt from and judged on, prepared where they are not yet."""
    few = bench_decoupling.QUICK if asked.quick else None
    made = runs.prepared(asked.root, asked.work, few)
    if asked.device == "cuda" and not asked.quick:
        return {"--data": made["train"], "--val": made["val"]}
    return {"--data": made["val"], "--hold-out": HELD_OUT}


def main(args: list[str] | None = None) -> int:
    """Prepare, train, judge, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "device", "quick")
    parser.add_argument("--seeds", type=int, help="default: 3 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--forms", nargs="+", help=f"words joined by +, of {', '.join(forms.WORDS)}"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    asked = parser.parse_args(args)
    seeds = asked.seeds or (3 if asked.device == "cuda" and not asked.quick else 1)
    of = Asked(asked.device, pictures(asked), asked.work, asked.quick)
    made = rows(asked.tasks, named(asked.forms, asked.device), seeds, of)
    runs.keep(made, asked, lambda row: f"\n{row['judgement']}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
