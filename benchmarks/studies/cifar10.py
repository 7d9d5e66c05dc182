"""The tables of the RotNet paper (Gidaris 2018, arXiv 1803.07728) on CIFAR-10, each figure beside the paper's.

    python -m benchmarks.studies.cifar10 [--root cifar-10-batches-py] [--seeds 3] [--device cpu|cuda] [--tables NAME ...]

On a GPU the paper's sizes; on a CPU small ones (a quarter of the width, 5,000 pictures, fewer epochs), for which the paper has no
figures: there the study shows which of its orderings hold. Each job is a call of train.py or evaluate.py, of under four minutes on
a GPU; a study that was broken off goes on. Pictures come as raw pixels from a .beton.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bench_cifar, runs
from benchmarks.studies import study
from benchmarks.studies.study import Figure, Job, Order, Spent, Study
from fastrot import entry

LABELLED = 5000  # pictures of each class in all of CIFAR-10
BLOCKS = ("conv1", "conv2", "conv3", "conv4", "conv5")
BLOCK, ROTATIONS, WAYS, CLASSES, LENGTH, LABELS, VIEWS = (
    *("MLP on each block", "rotations", "against labels", "by class"),
    *("pretext epochs", "labels a class", "copies a picture"),
)
MLP, CONV = "MLP on conv2", "convolutions on conv2"
NET, RANDOM, SUPERVISED = "RotNet, 4 blocks", "random net", "supervised"
BY_BLOCK = {  # blocks of the net -> top-1 of the MLP on each, in the paper; NaN: not known to us
    3: (None, 0.8826, 0.6209),
    4: (0.8507, 0.8906, 0.8621, 0.6173),
    5: (0.8504, 0.8976, 0.8682, 0.7450, 0.5037),
}
BY_ROTATIONS = {
    "4 rotations": ((0, 90, 180, 270), 0.8906),
    "8 rotations": ((0, 45, 90, 135, 180, 225, 270, 315), 0.8851),
    "2 rotations (0, 180)": ((0, 180), 0.8746),
    "2 rotations (90, 270)": ((90, 270), 0.8552),
}


@dataclass(frozen=True)
class Size:
    """Of a study: None is the preset's."""

    width: float
    pictures: int | None
    batch: int
    epochs: int | None  # of RotNet and of supervised runs
    probe_epochs: int | None
    steps: int  # of what learns from few labels
    at: tuple[int, ...]  # epochs of RotNet whose net is probed
    labels: tuple[int, ...]  # of each class
    tables: tuple[str, ...]
    blocks: tuple[int, ...]  # of the nets
    rotations: tuple[str, ...]
    words: tuple[str, ...]

    def long(self, epochs: int | None) -> tuple:
        return () if epochs is None else ("--epochs", epochs)

    def steps_of(self, epochs: int) -> int:
        """RotNet's, of whole batches."""
        return epochs * ((self.pictures or 10 * LABELLED) // self.batch)


EVERY = (BLOCK, ROTATIONS, WAYS, CLASSES, LENGTH, LABELS, VIEWS)
SIZES = {
    "cuda": Size(
        *(1.0, None, 128, None, None, 39_000, (20, 60, 100, 160, 200)),
        *((20, 100, 400, 1000, 5000), EVERY, (3, 4, 5), tuple(BY_ROTATIONS), ("--compile",)),
    ),
    "cpu": Size(
        *(0.25, 5000, 64, 12, 12, 600, (2, 4, 8, 12)),
        *((20, 100, 500), EVERY, (4,), ("4 rotations", "2 rotations (0, 180)"), ()),
    ),
}
PAPERS = 200  # epochs of RotNet in the paper


def study_of(data: tuple, size: Size, about: str) -> Study:
    """All jobs and tables, on the pictures that these knobs name."""
    same = (*data, "--backbone.width", size.width, "--batch", size.batch, *size.words)
    mlp = ("probe-mlp-cifar10", *data, "--batch", size.batch, *size.long(size.probe_epochs))
    conv = ("probe-conv-cifar10", *data, "--batch", size.batch, *size.long(size.probe_epochs))
    on_conv2 = ("--method.stages", "conv2")
    fresh = ("--backbone.width", size.width, "--method.random")
    rotnet = ("rotnet-nin-cifar10", *same, *size.long(size.epochs))
    jobs: dict[str, Job] = {}
    figures: list[Figure] = []

    def cell(table, line, column, job, stage, paper=None) -> None:
        figures.append(Figure(table, line, column, job, f"top1_{stage}", paper))

    # RotNet by blocks, and an MLP on each
    for blocks in size.blocks:
        name = f"rotnet-{blocks}"
        keep = ("--keep-every", size.steps_of(math.gcd(*size.at))) if blocks == 4 else ()
        jobs[name] = Job((*rotnet, "--backbone.stages", blocks, *keep))
        jobs[f"{name}-mlp"] = Job((*mlp, "--method.stages", *BLOCKS[:blocks]), of=name)
        for block, paper in zip(BLOCKS, BY_BLOCK[blocks], strict=False):
            cell(BLOCK, f"RotNet, {blocks} blocks", block, f"{name}-mlp", block, paper)
    jobs["random-mlp"] = Job((*mlp, *fresh))
    for block in BLOCKS[:4]:
        cell(BLOCK, RANDOM, block, "random-mlp", block)

    # fewer and more rotations
    for line in size.rotations:
        angles, paper = BY_ROTATIONS[line]
        name = "rotnet-4"
        if len(angles) != 4:
            name = f"rotnet-{'-'.join(map(str, angles))}"
            jobs[name] = Job((*rotnet, "--method.angles", *angles))
            jobs[f"{name}-mlp"] = Job((*mlp, *on_conv2), of=name)
        cell(ROTATIONS, line, MLP, f"{name}-mlp", "conv2", paper)

    # beside labels, whole and by class
    tune = ("--method.tune",)
    jobs["supervised"] = Job(("supervised-nin-cifar10", *same, *size.long(size.epochs)))
    jobs["rotnet-4-conv"] = Job(conv, of="rotnet-4")
    jobs["rotnet-4-conv-tuned"] = Job((*conv, *tune), of="rotnet-4")
    jobs["rotnet-4-mlp-tuned"] = Job((*mlp, *on_conv2, *tune), of="rotnet-4")
    jobs["random-conv"] = Job((*conv, *fresh))
    ways = {
        SUPERVISED: ("supervised", None, 0.9280),
        f"{RANDOM}, {CONV}": ("random-conv", "conv2", 0.7250),
        f"RotNet, {MLP}": ("rotnet-4-mlp", "conv2", 0.8906),
        f"RotNet, {MLP}, fine-tuned": ("rotnet-4-mlp-tuned", "conv2", 0.9173),
        f"RotNet, {CONV}": ("rotnet-4-conv", "conv2", 0.9116),
        f"RotNet, {CONV}, fine-tuned": ("rotnet-4-conv-tuned", "conv2", 0.9217),
    }
    for line, (job, stage, paper) in ways.items():
        score = f"top1_{stage}" if stage else "accuracy"
        reach = job in ("rotnet-4-mlp", "rotnet-4-conv")
        figures.append(Figure(WAYS, line, "top-1", job, score, paper, reach))
        jobs[f"{job}-classes"] = Job(("classes",), of=job, asks=True)
        for name in NAMES:
            shown = f"{stage or 'net'}.classes.{name}"
            figures.append(Figure(CLASSES, line, name, f"{job}-classes", shown))

    # as RotNet is trained longer
    for epochs in size.at:
        job = f"rotnet-4-at-{epochs}-mlp"
        jobs[job] = Job((*mlp, *on_conv2), of="rotnet-4", step=size.steps_of(epochs))
        cell(LENGTH, NET, f"{epochs}", job, "conv2")

    # from few labels
    for count in size.labels:
        few = ("--rows", count, "--schedule.steps", size.steps)
        jobs[f"rotnet-4-conv-{count}"] = Job((*conv, *few), of="rotnet-4")
        jobs[f"supervised-{count}"] = Job(("supervised-nin-cifar10", *same, *few))
        cell(LABELS, f"RotNet, {CONV}", f"{count}", f"rotnet-4-conv-{count}", "conv2")
        figures.append(Figure(LABELS, SUPERVISED, f"{count}", f"supervised-{count}", "accuracy"))

    # all copies of a picture in a step, or one of four times as many pictures: as many steps and views
    steps = size.steps_of(size.epochs or PAPERS)
    one = ("--method.copies", "one", "--batch", 4 * size.batch, "--schedule.steps", steps)
    jobs["rotnet-4-one"] = Job(("rotnet-nin-cifar10", *same, *one))
    jobs["rotnet-4-one-mlp"] = Job((*mlp, *on_conv2), of="rotnet-4-one")
    cell(VIEWS, "all four rotations of each", MLP, "rotnet-4-mlp", "conv2")
    cell(VIEWS, "one of them, of four times as many", MLP, "rotnet-4-one-mlp", "conv2")

    least = f"{min(size.labels)}"
    orders = (
        Order(
            "4 rotations over 2",
            (ROTATIONS, "4 rotations", MLP),
            (ROTATIONS, "2 rotations (0, 180)", MLP),
        ),
        Order("the second block over the last", (BLOCK, NET, "conv2"), (BLOCK, NET, "conv4")),
        Order("RotNet over a random net", (BLOCK, NET, "conv2"), (BLOCK, RANDOM, "conv2")),
        Order(
            f"from {least} labels a class, RotNet over labels alone",
            (LABELS, f"RotNet, {CONV}", least),
            (LABELS, SUPERVISED, least),
        ),
        Order(
            "more epochs of RotNet over fewer",
            *((LENGTH, NET, f"{epochs}") for epochs in (max(size.at), min(size.at))),
        ),
        Order(
            "all four rotations of a picture over one",
            (VIEWS, "all four rotations of each", MLP),
            (VIEWS, "one of them, of four times as many", MLP),
        ),
    )
    probes = ("rotnet-4", "rotnet-4-mlp", "rotnet-4-conv")
    spent = Spent("RotNet with 4 blocks, and its probes", probes, 8 * 60)
    return Study("cifar10", about, jobs, tuple(figures), orders, (spent,))


NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def prepared(root: Path, work: Path, pictures: int | None) -> tuple:
    """Training pictures, of `pictures` the first, and the test pictures, as raw .beton: the knobs that name them."""
    words: tuple = ()
    for knob, split, some in (("--data", "train", pictures), ("--val", "test", None)):
        out = work / f"cifar10-{split}{some or ''}.beton"
        of = ("--source", "cifar10", "--root", root, "--split", split, "--encoding", "raw")
        words += (knob, runs.convert("to_ffcv.py", out, *of, *(("--limit", some) if some else ())))
    return words


def main(args: list[str] | None = None) -> int:
    """Prepare, train, ask, print, and append to the machine's file of results."""
    asked: argparse.Namespace = study.parser(__doc__).parse_args(args)
    size = SIZES[asked.device]
    root, about = bench_cifar.pictures(asked.root, asked.work)
    data = prepared(root, asked.work, size.pictures)
    shape = {"width": size.width, "pictures": size.pictures or 10 * LABELLED, "seeds": asked.seeds}
    shape |= {"epochs": size.epochs or PAPERS, "batch": size.batch}
    about += "; the last step is judged, where the paper tells the best epoch on the test pictures"
    runs.keep(study.rows(study_of(data, size, about), asked, shape), asked, study.said)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
