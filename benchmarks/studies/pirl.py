"""PIRL beside its pretext counterparts: how invariant and how good features are, and what lambda, negatives and orders of patches do.

    python -m benchmarks.studies.pirl [--root FOLDER] [--seeds 3] [--device cpu|cuda] [--tables NAME ...]

--root holds cifar10/cifar-10-batches-py and imagenette128/, or what lies beside the checkout does. On CIFAR-10 a NIN and rotations; puzzles
need more pixels, so that jigsaw is tried on imagenette with an AlexNet up to conv5. On a CPU nets of a quarter of the width and few steps.
All methods of a table take about the same time: a PIRL step has two views of a picture, RotNet's four, jigsaw's nine patches.
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
TURNED, PUZZLED = "rotation, CIFAR-10", "puzzle, imagenette"
FAR = "distance of a picture's last features from those of its own (or another's) "
LAMBDA, NEGATIVES = "lambda (0: NPID)", "negatives"
LINEAR = "linear probe of the last layer, imagenette"
ORDERS = "orders of patches"
MARGIN = 0.03  # by which kNN of PIRL's last block is to be above: stated before it was tried


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a study."""

    width: float
    pictures: int  # of CIFAR-10
    rotnet: int  # epochs on CIFAR-10 of RotNet; others' take as long
    pirl: int
    steps: int  # on imagenette
    batch: int
    side: int  # pixels of imagenette's crops
    lambdas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    negatives: tuple[int, ...] = (64, 512, 4096)
    orders: tuple[int, ...] = (10, 100, 2000)
    words: tuple = ()  # more, for train.py


SIZES = {
    "cuda": Size(
        width=1.0, pictures=50_000, rotnet=50, pirl=100, steps=20_000, batch=128, side=112,
        orders=(100, 2000, 10_000), words=("--compile",),
    ),
    "cpu": Size(width=0.25, pictures=5000, rotnet=10, pirl=20, steps=600, batch=64, side=102),
}  # fmt: skip


def study_of(cifar: tuple, imagenette: tuple, size: Size, about: str) -> Study:
    """All jobs and tables, on the pictures that these knobs name."""
    jobs: dict[str, Job] = {}
    figures: list[Figure] = []
    spreads: list[Spread] = []
    same = (*cifar, "--backbone.width", size.width, "--batch", size.batch, *size.words)
    pirl = ("pirl-nin-cifar10", *same, "--epochs", size.pirl)

    def asked(table: str, line: str, job: str, columns: dict[str, str], *words: Any) -> None:
        jobs[f"{job}-{words[0]}"] = Job(words, of=job, asks=True)
        for column, score in columns.items():
            figures.append(Figure(table, line, column, f"{job}-{words[0]}", score))

    def judged(table: str, line: str, column: str, job: str) -> None:
        asked(table, line, job, {column: "conv4.top1"}, "knn", *cifar)

    def far(column: str, line: str, job: str, data: Any, transform: str) -> None:
        words = ("invariance", "--data", data, "--transform", transform)
        asked(NEARER, line, job, {column: "last.nearer"}, *words)
        for name, of in (("histogram", ""), ("of_others", ", another's")):
            which = f"{job}-invariance", f"last.{name}", 2.0
            spreads.append(Spread(FAR + column, line + of, *which))

    # rotations, on CIFAR-10
    jobs["pirl"] = Job(pirl)
    jobs["npid"] = Job((*pirl, "--method.lambda-transform", 0))
    jobs["rotnet"] = Job(("rotnet-nin-cifar10", *same, "--epochs", size.rotnet))
    fresh = ("--backbone.width", size.width, "--method.random", "--method.stages", "conv4")
    jobs["random"] = Job(("probe-mlp-cifar10", *cifar, *fresh, "--schedule.steps", 1))
    for line, job in {PIRL: "pirl", NPID: "npid", ROTNET: "rotnet", RANDOM: "random"}.items():
        asked(BLOCKS, line, job, {f"conv{n}": f"conv{n}.top1" for n in (1, 2, 3, 4)}, "knn", *cifar)
        far(TURNED, line, job, cifar[3], "rotation")
    for share in size.lambdas:
        name = {0.0: "npid", 0.5: "pirl"}.get(share, f"pirl-lambda-{share:g}")
        jobs.setdefault(name, Job((*pirl, "--method.lambda-transform", share)))
        judged(LAMBDA, PIRL, f"{share:g}", name)
    for count in size.negatives:
        name = "pirl" if count == 4096 else f"pirl-negatives-{count}"
        jobs.setdefault(name, Job((*pirl, "--method.negatives", count)))
        judged(NEGATIVES, PIRL, f"{count:,}", name)

    # puzzles, on imagenette
    net = ("--backbone.width", size.width, "--backbone.kernel", 5, "--backbone.stride", 2)
    length = ("--image-size", size.side, "--batch", size.batch, "--schedule.steps", size.steps)
    own = (*imagenette, *net, *length, *size.words)
    probe = (
        "probe-linear",
        *imagenette,
        "--epochs",
        10,
        "--batch",
        size.batch,
        "--method.stages",
        "last",
    )
    contrast = ("--method.negatives", 4096, "--lr", 0.03)
    most = max(size.orders)
    for line, preset, more in (
        (PUZZLES, "pirl-alexnet", ("--method.transform", "jigsaw", *contrast)),
        (JIGSAW, "jigsaw-alexnet", ("--lr", 0.03)),
    ):
        for count in size.orders:
            job = f"{preset}-{count}"
            jobs[job] = Job((preset, *own, *more, "--method.permutations", count))
            jobs[f"{job}-linear"] = Job(probe, of=job)
            figures.append(Figure(ORDERS, line, f"{count:,}", f"{job}-linear", "top1_last"))
        far(PUZZLED, line, f"{preset}-{most}", imagenette[3], "jigsaw")
        figures.append(Figure(LINEAR, line, "last", f"{preset}-{most}-linear", "top1_last"))
    for line, preset, more in (
        (PIRL, "pirl-alexnet", contrast),
        (ROTNET, "rotnet-alexnet", ("--lr", 0.03, "--backbone.last", "conv5")),
    ):
        jobs[f"{preset}-turned"] = Job((preset, *own, *more))
        jobs[f"{preset}-turned-linear"] = Job(probe, of=f"{preset}-turned")
        figures.append(Figure(LINEAR, line, "last", f"{preset}-turned-linear", "top1_last"))

    orders = (
        Order("PIRL over RotNet", (BLOCKS, PIRL, "conv4"), (BLOCKS, ROTNET, "conv4"), by=MARGIN),
        Order("PIRL over a random net", (BLOCKS, PIRL, "conv4"), (BLOCKS, RANDOM, "conv4"), by=MARGIN),
        Order("a rotation nearer to its picture: PIRL over RotNet", (NEARER, PIRL, TURNED), (NEARER, ROTNET, TURNED)),
        Order("a puzzle nearer to its picture: PIRL over jigsaw", (NEARER, PUZZLES, PUZZLED), (NEARER, JIGSAW, PUZZLED)),
        Order("PIRL over RotNet, linear probe", (LINEAR, PIRL, "last"), (LINEAR, ROTNET, "last")),
        Order("PIRL over jigsaw, linear probe", (LINEAR, PUZZLES, "last"), (LINEAR, JIGSAW, "last")),
    )  # fmt: skip
    return Study("pirl", about, jobs, tuple(figures), orders, spreads=tuple(spreads))


def main(args: list[str] | None = None) -> int:
    """Prepare, train, ask, print, and append to the machine's file of results."""
    asked = study.parser(__doc__, "cifar10/cifar-10-batches-py and imagenette128/").parse_args(args)
    size, root = SIZES[asked.device], asked.root or measure.shared_data()
    batches = root / "cifar10" / "cifar-10-batches-py" if asked.root else None
    batches, about = bench_cifar.pictures(batches, asked.work)
    cifar = cifar10.prepared(batches, asked.work, size.pictures)
    made = runs.prepared(root / "imagenette128", asked.work)
    imagenette = ("--data", made["train"], "--val", made["val"])
    words = (
        f"width {size.width:g}; CIFAR-10: {size.pictures:,} pictures, {size.pirl} epochs, {size.rotnet} of RotNet ({about}); "
        f"imagenette: {size.steps:,} steps of {size.batch}, crops of {size.side} pixels; the last step is judged"
    )
    shape = {n: getattr(size, n) for n in ("width", "pictures", "pirl", "rotnet", "steps", "side")}
    runs.keep(study.rows(study_of(cifar, imagenette, size, words), asked, shape), asked, study.said)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
