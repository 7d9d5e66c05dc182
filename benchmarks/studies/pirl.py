"""PIRL beside its pretext counterparts: how invariant and how good features are, and what lambda, negatives and orders of patches do.

    python -m benchmarks.studies.pirl [--root FOLDER] [--seeds 3] [--device cpu|cuda] [--tables NAME ...]

--root holds cifar10/cifar-10-batches-py and imagenette128/, or what lies beside the checkout does. On CIFAR-10 a NIN and rotations, PIRL and
RotNet for about the same time: a picture has two views by the one, four by the other. Puzzles need more pixels, so that jigsaw is tried on
imagenette with an AlexNet up to conv5, for as many pictures each. On a CPU nets of a quarter of the width and few steps.
"""

import sys
from dataclasses import dataclass
from typing import Any

from benchmarks import bench_cifar, measure, runs
from benchmarks.studies import cifar10, study
from benchmarks.studies.study import Figure, Job, Order, Spread, Study
from fastrot import entry

PIRL, NPID, ROTNET, RANDOM = "PIRL, rotation", "NPID", "RotNet", "random net"
PUZZLES, JIGSAW = "PIRL, jigsaw", "jigsaw"
# tables
BLOCKS = "kNN by block, CIFAR-10"
NEARER = "a transform is nearer to its own picture than to another"  # chance: a half
LAMBDA, NEGATIVES = "lambda (0: NPID), kNN of the last block", "negatives, kNN of the last block"
LINEAR = "linear probe of the last layer, imagenette"
PERMUTATIONS = "orders of patches, linear probe of the last layer"
TURNED, PUZZLED = "rotation, CIFAR-10", "puzzle, imagenette"
FAR = "distance of a picture's last features from those of its own (or another's) "
MARGIN = 0.03  # by which PIRL's kNN is to be above RotNet's and a random net's: stated before any was seen
RATE = 0.06  # of learning, but where a preset's own stays


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a study."""

    width: float
    pictures: int  # of CIFAR-10
    rotnet: int  # epochs on CIFAR-10 of RotNet
    pirl: int  # of PIRL, which take as long
    short: int  # of PIRL, where lambda and negatives are tried
    batch: int
    steps: int  # on imagenette
    few: int  # pictures a step there
    side: int  # pixels of its crops
    negatives: tuple[int, ...]  # the second is all others'
    orders: tuple[int, ...]
    lambdas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    contrast: tuple = ()  # more for PIRL and NPID
    colours: tuple = ()  # more for whatever changes colours
    words: tuple = ()  # more, for train.py


SIZES = {
    "cuda": Size(
        width=1.0, pictures=50_000, rotnet=50, pirl=100, short=30, batch=128, steps=20_000, few=128, side=112,
        negatives=(512, 4096, 32_000), orders=(100, 2000, 10_000), words=("--compile",),
    ),
    # chosen after looks at one seed (LOG.md)
    "cpu": Size(
        width=0.25, pictures=5000, rotnet=20, pirl=32, short=6, batch=64, steps=250, few=32, side=102,
        negatives=(16, 64, 512), orders=(10, 100, 2000),
        contrast=("--method.contrast", "infonce", "--method.temperature", 0.1, "--optim.nesterov", "--method.crop.scale", 0.4, 1),
        colours=(
            *("--method.augment.brightness", 0.2, "--method.augment.contrast", 0.2, "--method.augment.saturation", 0.2),
            *("--method.augment.hue", 0.1, "--method.augment.grey", 0.05, "--method.augment.photometric", 0),
        ),
    ),
}  # fmt: skip


def study_of(cifar: tuple, imagenette: tuple, size: Size, about: str) -> Study:
    """All jobs and tables, on the pictures that these knobs name."""
    jobs: dict[str, Job] = {}
    figures: list[Figure] = []
    spreads: list[Spread] = []
    same = (*cifar, "--backbone.width", size.width, "--batch", size.batch, *size.words)
    contrast, count = (*size.contrast, *size.colours, "--lr", RATE), size.negatives[1]
    pirl = ("pirl-nin-cifar10", *same, *contrast)

    def asked(table: str, line: str, job: str, columns: dict[str, str], *words: Any) -> None:
        jobs[f"{job}-{words[0]}"] = Job(words, of=job, asks=True)
        for column, score in columns.items():
            figures.append(Figure(table, line, column, f"{job}-{words[0]}", score))

    def far(column: str, line: str, job: str, data: Any, transform: str) -> None:
        words = ("invariance", "--data", data, "--transform", transform)
        asked(NEARER, line, job, {column: "last.nearer"}, *words)
        for name, of in (("histogram", ""), ("of_others", measure.OTHERS)):
            which = f"{job}-invariance", f"last.{name}", 2.0
            spreads.append(Spread(FAR + column, line + of, *which))

    def short(table: str, column: str, share: float, negatives: int) -> None:
        name = f"pirl-{share:g}-{negatives}"
        words = ("--method.lambda-transform", share, "--method.negatives", negatives)
        jobs.setdefault(name, Job((*pirl, "--epochs", size.short, *words)))
        asked(table, PIRL, name, {column: "conv4.top1"}, "knn", *cifar)

    # rotations, on CIFAR-10
    long = (*pirl, "--epochs", size.pirl, "--method.negatives", count)
    jobs["pirl"] = Job(long)
    jobs["npid"] = Job((*long, "--method.lambda-transform", 0))
    jobs["rotnet"] = Job(("rotnet-nin-cifar10", *same, "--epochs", size.rotnet))
    fresh = ("--backbone.width", size.width, "--method.random", "--method.stages", "conv4")
    jobs["random"] = Job(("probe-mlp-cifar10", *cifar, *fresh, "--schedule.steps", 1))
    for line, job in {PIRL: "pirl", NPID: "npid", ROTNET: "rotnet", RANDOM: "random"}.items():
        asked(BLOCKS, line, job, {f"conv{n}": f"conv{n}.top1" for n in (1, 2, 3, 4)}, "knn", *cifar)
        far(TURNED, line, job, cifar[3], "rotation")
    for share in size.lambdas:
        short(LAMBDA, f"{share:g}", share, count)
    for other in size.negatives:
        short(NEGATIVES, f"{other:,}", 0.5, other)

    # puzzles, on imagenette
    net = ("--backbone.width", size.width, "--backbone.kernel", 5, "--backbone.stride", 2)
    length = ("--image-size", size.side, "--batch", size.few, "--schedule.steps", size.steps)
    own, most = (*imagenette, *net, *length, *size.words), max(size.orders)
    probe = ("probe-linear", *imagenette, "--epochs", 5, "--batch", 64, "--method.stages", "last")
    contrast += ("--method.negatives", count)

    def probed(name: str, words: tuple, *cells: tuple[str, str, str]) -> None:
        jobs[name], jobs[f"{name}-linear"] = Job(words), Job(probe, of=name)
        for cell in cells:
            figures.append(Figure(*cell, f"{name}-linear", "top1_last"))

    for line, preset, more in (
        (PUZZLES, "pirl-alexnet", ("--method.transform", "jigsaw", *contrast)),
        (JIGSAW, "jigsaw-alexnet", (*size.colours, "--lr", RATE)),
    ):
        for orders in size.orders:
            words = (preset, *own, *more, "--method.permutations", orders)
            best = [(LINEAR, line, "last")] if orders == most else []
            probed(f"{preset}-{orders}", words, (PERMUTATIONS, line, f"{orders:,}"), *best)
        far(PUZZLED, line, f"{preset}-{most}", imagenette[3], "jigsaw")
    upright = ("--lr", RATE, "--backbone.last", "conv5")
    for line, preset, more in (
        (PIRL, "pirl-alexnet", contrast),
        (ROTNET, "rotnet-alexnet", upright),
    ):
        probed(f"{preset}-turned", (preset, *own, *more), (LINEAR, line, "last"))

    expected = (
        Order("PIRL over RotNet", (BLOCKS, PIRL, "conv4"), (BLOCKS, ROTNET, "conv4"), by=MARGIN),
        Order("PIRL over a random net", (BLOCKS, PIRL, "conv4"), (BLOCKS, RANDOM, "conv4"), by=MARGIN),
        Order("a rotation nearer to its picture: PIRL over RotNet", (NEARER, PIRL, TURNED), (NEARER, ROTNET, TURNED)),
        Order("a puzzle nearer to its picture: PIRL over jigsaw", (NEARER, PUZZLES, PUZZLED), (NEARER, JIGSAW, PUZZLED)),
        Order("PIRL over RotNet, linear probe", (LINEAR, PIRL, "last"), (LINEAR, ROTNET, "last")),
        Order("PIRL over jigsaw, linear probe", (LINEAR, PUZZLES, "last"), (LINEAR, JIGSAW, "last")),
    )  # fmt: skip
    return Study("pirl", about, jobs, tuple(figures), expected, spreads=tuple(spreads))


def main(args: list[str] | None = None) -> int:
    """Prepare, train, ask, print, and append to the machine's file of results."""
    asked = study.parser(__doc__, "cifar10/cifar-10-batches-py and imagenette128/").parse_args(args)
    size, root = SIZES[asked.device], asked.root or measure.shared_data()
    batches = root / "cifar10" / "cifar-10-batches-py" if asked.root else None
    batches, told = bench_cifar.pictures(batches, asked.work)
    cifar = cifar10.prepared(batches, asked.work, size.pictures)
    made = runs.prepared(root / "imagenette128", asked.work)
    imagenette = ("--data", made["train"], "--val", made["val"])
    about = (
        f"width {size.width:g}; CIFAR-10: {size.pictures:,} pictures, {size.pirl} epochs of PIRL, {size.rotnet} of RotNet ({told}), "
        f"{size.short} where lambda and negatives are tried; imagenette: {size.steps:,} steps of {size.few}, crops of {size.side} pixels; "
        "the last step is judged"
    )
    shape = {n: getattr(size, n) for n in ("width", "pictures", "pirl", "rotnet", "steps", "side")}
    made = study_of(cifar, imagenette, size, about)
    runs.keep(study.rows(made, asked, shape), asked, study.said)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
