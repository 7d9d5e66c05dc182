"""The tables of the RotNet paper (Gidaris 2018, arXiv 1803.07728) on CIFAR-10, beside the paper's figures where we know them.

    python -m benchmarks.studies.cifar10 [--root cifar-10-batches-py] [--seeds 3] [--device cpu|cuda] [--tables NAME ...]

On a GPU the paper's sizes; on a CPU small ones (a quarter of the width, 5,000 pictures, fewer epochs): there the study shows which of
the paper's orderings hold. Each job is a call of train.py or evaluate.py, meant to take under four minutes on a GPU; a study that was
broken off goes on. Pictures come as raw pixels from a pack, which lies in the GPU's memory.
"""

import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench_cifar, runs
from benchmarks.studies import study
from benchmarks.studies.study import Figure, Job, Limit, Order, Study
from fastrot import entry

IMAGES, EPOCHS = 50_000, 200  # pictures of CIFAR-10 to learn from; epochs of RotNet in the paper
STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")
JUDGED = "the last step is judged, where the paper tells the best epoch on the test pictures"
LOOK = "the smallest number of labels was added after a look (LOG.md)"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MLP, CONV = "MLP on conv2", "convolutions on conv2"
NET, RANDOM, SUPERVISED = "RotNet, 4 blocks", "random net", "supervised"
ALL, ONE = "all four rotations of each", "one of them, of four times as many"
# tables
BLOCK, ROTATIONS, WAYS, CLASS = "MLP on each block", "rotations", "RotNet and labels", "by class"
LENGTH, LABELS, VIEWS = "pretext epochs", "labels a class", "copies of a picture in a step"
BY_BLOCK = {  # blocks of the net -> top-1 of the MLP on each in the paper; None: we do not know it
    3: (None, 0.8826, 0.6209),
    4: (0.8507, 0.8906, 0.8621, 0.6173),
    5: (0.8504, 0.8976, 0.8682, 0.7450, 0.5037),
}
FOUR, TWO = "4 rotations", "2 rotations (0, 180)"
EIGHT = "8 rotations (blurred copies of the middle quarter)"  # see fastrot/ops/angles.py
BY_ROTATIONS = {
    FOUR: ((0, 90, 180, 270), 0.8906),
    EIGHT: ((0, 45, 90, 135, 180, 225, 270, 315), 0.8851),
    TWO: ((0, 180), 0.8746),
    "2 rotations (90, 270)": ((90, 270), 0.8552),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a study. Numbers of epochs: None is the preset's."""

    width: float
    pictures: int
    batch: int
    few_steps: int  # of what learns from few labels
    at: tuple[int, ...]  # epochs of RotNet whose net is probed
    labels: tuple[int, ...]  # a class
    epochs: int | None = None  # of RotNet and of supervised runs
    probe_epochs: int | None = None
    blocks: tuple[int, ...] = tuple(BY_BLOCK)  # of the nets
    rotations: tuple[str, ...] = tuple(BY_ROTATIONS)
    words: tuple = ()  # more, for train.py

    def steps(self, epochs: int | None) -> int:
        """RotNet's, of whole batches."""
        return (epochs or EPOCHS) * (self.pictures // self.batch)


SIZES = {
    "cuda": Size(
        width=1.0,
        pictures=IMAGES,
        batch=128,
        few_steps=10_000,  # in epochs of one step, a checkpoint each
        at=(20, 60, 100, 160, 200),
        labels=(20, 100, 400, 1000, 5000),
        words=("--compile",),
    ),
    "cpu": Size(
        width=0.25,
        pictures=5000,
        batch=64,
        few_steps=600,
        at=(2, 4, 8, 12),
        labels=(10, 20, 100, 450),  # 10 was added after a look (LOG.md)
        epochs=12,
        probe_epochs=12,
        blocks=(4,),
        rotations=(FOUR, TWO),
    ),
}


def long(epochs: int | None) -> tuple:
    return () if epochs is None else ("--epochs", epochs)


def study_of(data: tuple, size: Size, about: str) -> Study:
    """All jobs and tables, on the pictures that these knobs name."""
    same = (*data, "--backbone.width", size.width, "--batch", size.batch, *size.words)
    probe = (*data, "--batch", size.batch, *size.words)
    conv_of_few, length = ("probe-conv-cifar10", *probe), long(size.probe_epochs)
    mlp, conv = ("probe-mlp-cifar10", *probe, *length), (*conv_of_few, *length)
    on_conv2, tuned = ("--method.stages", "conv2"), ("--method.tune",)
    fresh = ("--backbone.width", size.width, "--method.random")
    rotnet = ("rotnet-nin-cifar10", *same)
    labels_alone = ("supervised-nin-cifar10", *same)
    jobs: dict[str, Job] = {}
    figures: list[Figure] = []

    def cell(table: str, line: str, column: str, job: str, score="top1_conv2", **more: Any) -> None:
        figures.append(Figure(table, line, column, job, score, **more))

    # RotNet by blocks, and an MLP on each
    for blocks in size.blocks:
        name = f"rotnet-{blocks}"
        keep = ("--keep-every", size.steps(math.gcd(*size.at))) if blocks == 4 else ()
        words = (*long(size.epochs), "--backbone.stages", blocks, *keep)
        jobs[name] = Job((*rotnet, *words))
        jobs[f"{name}-mlp"] = Job((*mlp, "--method.stages", *STAGES[:blocks]), of=name)
        for stage, paper in zip(STAGES, BY_BLOCK[blocks], strict=False):
            line = f"RotNet, {blocks} blocks"
            cell(BLOCK, line, stage, f"{name}-mlp", f"top1_{stage}", paper=paper)
    jobs["random-mlp"] = Job((*mlp, *fresh))
    for stage in STAGES[:4]:
        cell(BLOCK, RANDOM, stage, "random-mlp", f"top1_{stage}")

    # fewer and more rotations
    for line in size.rotations:
        angles, paper = BY_ROTATIONS[line]
        name = "rotnet-4"
        if len(angles) != 4:
            name = f"rotnet-{'-'.join(map(str, angles))}"
            jobs[name] = Job((*rotnet, *long(size.epochs), "--method.angles", *angles))
            jobs[f"{name}-mlp"] = Job((*mlp, *on_conv2), of=name)
        cell(ROTATIONS, line, MLP, f"{name}-mlp", paper=paper)

    # beside labels, whole and by class
    jobs["supervised"] = Job((*labels_alone, *long(size.epochs)))
    jobs["rotnet-4-conv"] = Job(conv, of="rotnet-4")
    jobs["rotnet-4-conv-tuned"] = Job((*conv, *tuned), of="rotnet-4")
    jobs["rotnet-4-mlp-tuned"] = Job((*mlp, *on_conv2, *tuned), of="rotnet-4")
    jobs["random-conv"] = Job((*conv, *fresh))
    ways = {
        SUPERVISED: ("supervised", "net", 0.9280),
        f"{RANDOM}, {CONV}": ("random-conv", "conv2", 0.7250),
        f"RotNet, {MLP}": ("rotnet-4-mlp", "conv2", 0.8906),
        f"RotNet, {MLP}, fine-tuned": ("rotnet-4-mlp-tuned", "conv2", 0.9173),
        f"RotNet, {CONV}": ("rotnet-4-conv", "conv2", 0.9116),
        f"RotNet, {CONV}, fine-tuned": ("rotnet-4-conv-tuned", "conv2", 0.9217),
    }
    for line, (job, head, paper) in ways.items():
        score = "accuracy" if head == "net" else f"top1_{head}"
        to_reach = job in ("rotnet-4-mlp", "rotnet-4-conv")
        cell(WAYS, line, "top-1", job, score, paper=paper, to_reach=to_reach)
        jobs[f"{job}-classes"] = Job(("classes",), of=job, asks=True)
        for name in CLASSES:
            cell(CLASS, line, name, f"{job}-classes", f"{head}.classes.{name}")

    # as RotNet is trained longer
    for epochs in size.at:
        job = f"rotnet-4-at-{epochs}-mlp"
        jobs[job] = Job((*mlp, *on_conv2), of="rotnet-4", step=size.steps(epochs))
        cell(LENGTH, NET, f"{epochs}", job)

    # from few labels
    for count in size.labels:
        few = ("--rows", count, "--schedule.steps", size.few_steps)
        jobs[f"rotnet-4-conv-{count}"] = Job((*conv_of_few, *few), of="rotnet-4")
        jobs[f"supervised-{count}"] = Job((*labels_alone, *few))
        cell(LABELS, f"RotNet, {CONV}", f"{count}", f"rotnet-4-conv-{count}")
        cell(LABELS, SUPERVISED, f"{count}", f"supervised-{count}", "accuracy")

    # all copies of a picture in a step, or one of four times as many pictures: as many steps and views
    one = ("--method.copies", "one", "--batch", 4 * size.batch)
    jobs["rotnet-4-one"] = Job((*rotnet, *one, "--schedule.steps", size.steps(size.epochs)))
    jobs["rotnet-4-one-mlp"] = Job((*mlp, *on_conv2), of="rotnet-4-one")
    cell(VIEWS, ALL, MLP, "rotnet-4-mlp")
    cell(VIEWS, ONE, MLP, "rotnet-4-one-mlp")

    least = f"{min(size.labels)}"  # on a CPU chosen after a look
    orders = (
        Order("4 rotations over 2", *((ROTATIONS, each, MLP) for each in (FOUR, TWO))),
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
            *((VIEWS, copies, MLP) for copies in (ALL, ONE)),
        ),
    )
    probes = ("rotnet-4", "rotnet-4-mlp", "rotnet-4-conv")
    limit = Limit("RotNet with 4 blocks, and its probes", probes, 8 * 60)
    return Study("cifar10", about, jobs, tuple(figures), orders, (limit,))


def prepared(root: Path, work: Path, pictures: int) -> tuple:
    """The first training pictures and the test pictures, as raw packs: the knobs that name them."""
    words, kind = (), f"{zlib.crc32(str(root.resolve()).encode()):08x}"
    for knob, split, count in (("--data", "train", pictures), ("--val", "test", 10_000)):
        of = ("--source", "cifar10", "--root", root, "--split", split, "--limit", count)
        out = work / f"cifar10-{split}-{count}-{kind}.pack"
        words += (knob, runs.convert("to_pack.py", out, *of, "--encoding", "raw"))
    return words


def main(args: list[str] | None = None) -> int:
    """Prepare, train, ask, print, and append to the machine's file of results."""
    asked = study.parser(__doc__, "the folder cifar-10-batches-py").parse_args(args)
    size = SIZES[asked.device]
    root, about = bench_cifar.pictures(asked.root, asked.work)
    data = prepared(root, asked.work, size.pictures)
    shape = {name: getattr(size, name) for name in ("width", "pictures", "batch")}
    shape |= {"epochs": size.epochs or EPOCHS}
    sizes = f"width {size.width:g}, {size.pictures:,} pictures, {shape['epochs']} epochs of RotNet"
    about = f"{sizes} (the paper: 1, {IMAGES:,}, {EPOCHS}); {about}; {JUDGED}; {LOOK}"
    runs.keep(study.rows(study_of(data, size, about), asked, shape), asked, study.said)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
