"""Decoupling on real pictures: a quarter-width AlexNet on ten ImageNet classes, on the CPU, through the real train entry.

    python -m benchmarks.bench_decoupling [--root FOLDER] [--epochs N] [--seeds N] [--device cpu|cuda] [--quick]

What is judged is the shape of the authors' own curves: the loss against the memory bank rises first, while the rows
leave their random start and all features look alike, and then falls below its beginning; the rotation head reads
turns from the half that it was trained on, ever better, and nothing from the other half. --root holds the class folders
train/ and val/; both are converted once, into --work. The same command goes on where it was broken off.
"""

import statistics
import sys
from typing import Any

from benchmarks import measure, runs
from fastrot import entry
from fastrot.config import RunError

PRESET, CHANCE = "decoupling-alexnet", 0.25
NET = {"--backbone.width": 0.25, "--backbone.kernel": 5, "--backbone.stride": 2}
CROP = {"--image-size": 64, "--method.crop.scale": (0.5, 1.0)}
BATCH, NEGATIVES, RATE, EPOCHS = 16, 512, 0.01, 50
LOG_EVERY = 10  # steps
RISE = 1.1  # times its first value, at least, that loss_nce reaches on its way
FALL = 1.0  # times its first value, at most, where it ends
NEAR = 0.02  # prec_inv's distance from chance, at most, in any validation
GAIN = 0.1  # of prec_rot, from before training to the end
TERMS = ("loss_cls", "loss_mse", "loss_nce")
QUICK = {"train": 640, "val": 160}  # pictures
ABOUT = (
    "the shape is that of the authors' own curves; the limits of rise, nearness and gain are ours, and rate, batch, "
    "negatives and crops were chosen after short runs on the same pictures (LOG.md)"
)


# ---- what the curves say ----


def shape_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The few numbers that the curves are judged by.

    Raises RunError where a run has fewer than two log lines or two validations.
    """
    whole = [line for line in lines if "loss_nce" in line and line["step"] % LOG_EVERY == 0]
    nce = [line["loss_nce"] for line in whole]  # the last line may be of a few steps alone
    seen = [line for line in lines if "val_prec_rot" in line]
    if len(nce) < 2 or len(seen) < 2:
        raise RunError(
            f"{len(nce)} log lines and {len(seen)} validations show no curve: train for more steps"
        )
    tenth = -(-len(nce) // 10)
    other = [line["val_prec_inv"] for line in seen]
    return {
        "rise": max(nce) / nce[0],
        "fall": statistics.mean(nce[-tenth:]) / nce[0],
        "first": nce[0],
        "highest": max(nce),
        "highest_at": nce.index(max(nce)) / len(nce),  # share of the run
        "last": statistics.mean(nce[-tenth:]),
        "inv_lowest": min(other),
        "inv_highest": max(other),
        "apart": max(abs(each - CHANCE) for each in other),
        "rot_first": seen[0]["val_prec_rot"],
        "rot_last": seen[-1]["val_prec_rot"],
        "gain": seen[-1]["val_prec_rot"] - seen[0]["val_prec_rot"],
    }


def curve(lines: list[dict[str, Any]], steps: float) -> dict[str, list[dict[str, float]]]:
    """Losses and validations against epochs of so many steps: the first epoch line by line, then a mean each."""
    losses: dict[float, list[dict]] = {}
    for line in lines:
        if "loss_nce" in line:
            epoch = line["step"] / steps
            losses.setdefault(epoch if epoch < 1 else -(-line["step"] // steps), []).append(line)
    return {
        "losses": [
            {"epoch": round(epoch, 3)}
            | {name: short(statistics.mean(each[name] for each in some)) for name in TERMS}
            for epoch, some in losses.items()
        ],
        "validations": [
            {"epoch": round(line["step"] / steps, 3)}
            | {name: short(line[f"val_{name}"]) for name in ("prec_rot", "prec_inv")}
            for line in lines
            if "val_prec_rot" in line
        ],
    }


def rows(trained: list[tuple[dict, list[dict]]], shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure over all seeds, and beside it the numbers that it comes from."""
    found = [shape_of(lines) for _, lines in trained]
    summary, lines = trained[0]
    of = dict(theme="decoupling", variant=PRESET, mode="learning", shape=shape, warmup=0)
    of |= {"dtype": summary.get("precision"), "about": ABOUT}

    def row(what: str, name: str, unit: str, *beside: str, **more: Any) -> dict[str, Any]:
        figure = measure.middle([each[name] for each in found], unit)
        values = {part: [short(each[part]) for each in found] for part in beside}
        return measure.row(what, **of, **figure, **values, **more)

    return [
        row(
            *("loss_nce's highest over its first", "rise", "times"),
            *("first", "highest", "highest_at"),
            target=RISE,
            better="higher",
        ),
        row(
            *("loss_nce's last over its first", "fall", "times", "first", "last"),
            target=FALL,
            better="lower",
        ),
        row(
            *("prec_inv's farthest from chance", "apart", "share", "inv_lowest", "inv_highest"),
            target=NEAR,
            better="lower",
        ),
        row(
            *("prec_rot's gain", "gain", "share", "rot_first", "rot_last"),
            target=GAIN,
            better="higher",
        ),
        row(
            *("prec_rot at the end", "rot_last", "share"),
            seconds=summary["seconds"],
            images_per_s=summary["images_per_s"],
            chance=CHANCE,
            curve=curve(lines, summary["steps"] / summary["epochs"]),
        ),
    ]


def short(value: float) -> float:
    return float(f"{value:.4g}")


# ---- the command ----


def main(args: list[str] | None = None) -> int:
    """Prepare, train, judge, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "device", "quick")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--seeds", type=int, default=1, help="runs, one after the other")
    asked = parser.parse_args(args)
    epochs = 2 if asked.quick else asked.epochs
    data = runs.prepared(asked.root, asked.work, QUICK if asked.quick else None)
    knobs = NET | CROP | {"--batch": BATCH, "--method.negatives": NEGATIVES, "--epochs": epochs}
    knobs |= {"--lr": asked.lr, "--schedule.kind": "constant", "--device": asked.device}
    knobs |= {"--data": data["train"], "--val": data["val"], "--log-every": LOG_EVERY}
    commit = measure.row("run")["commit"][:12]  # a run of other code is not gone on with
    trained = []
    for seed in range(asked.seeds):
        name = f"decoupling-{commit}-{data['train'].stem}-{epochs}-{asked.lr:g}-{seed}"
        trained.append(runs.train(PRESET, asked.work / name, knobs | {"--seed": seed}))
    shape = {"batch": BATCH, "negatives": NEGATIVES, "lr": asked.lr, "epochs": epochs}
    shape |= {
        "steps": trained[0][0]["steps"],
        "width": NET["--backbone.width"],
        "seeds": asked.seeds,
    }
    runs.keep(rows(trained, shape), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
