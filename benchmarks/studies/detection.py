"""How far features carry: objects found by detectors that begin with trained backbones, beside one that begins with random weights.

    python -m benchmarks.studies.detection RUN ... [--random] [--root VOCdevkit/VOC2007] [--seeds 3] [--device cpu|cuda] [--steps N]

A RUN is one of resnet18 or resnet50, or the word `random`. Its trunk becomes the body of a Faster R-CNN with a feature pyramid
(torchvision's; PIRL's paper has C4), all of which learns on trainval of each --root; COCO's AP, AP50 and AP75 are of the first one's
test. On a GPU the standard sizes, on a CPU short sides of 128 pixels and a few hundred steps.

Batch norm is frozen, as is standard with few pictures a step: statistics, scale and shift are the run's. Random weights have none; theirs
are measured on training pictures before the first step, without which the signal grows from block to block.

Difficult objects are not learnt from, and what is found on them is not judged (COCO's iscrowd).
"""

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import measure, runs
from benchmarks.studies import study
from benchmarks.studies.study import Figure, Study
from fastrot import dist, entry
from fastrot.backbones.named import library_names
from fastrot.config import Config, RunError, UsageError, net_name
from fastrot.data.pictures import decode
from fastrot.data.sources.annotated import Annotated
from fastrot.data.sources.records import Listing
from fastrot.data.sources.voc import voc
from fastrot.disk import replace_bytes
from fastrot.evals.trained import load
from fastrot.training.device import choose_device

NETS, RANDOM = ("resnet18", "resnet50"), "random"
SCORES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # by torchmetrics' names
CLIP = 10.0  # of the gradient's norm: without, losses of the first hundred steps may grow to nan
Views = list[list[tuple[int, bool]]]  # of a batch each: row, and whether it is mirrored
Batches = Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]  # pixels 0 to 1, and objects


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a detector, and of how long it learns."""

    net: str  # of random weights that stand beside no run
    sides: tuple[int, ...]  # pixels of a picture's short side: one of these; the last is judged
    anchor: int  # pixels a side of the smallest; each level of the pyramid doubles it
    regions: int  # of a picture, that the head learns from in a step
    proposals: int  # of a picture, that the head judges
    batch: int
    steps: int
    rate: float  # up at first, a tenth of it from 3/4 of the steps on, of that from 11/12 on

    def share(self, step: int) -> float:
        """Of the rate, at a step."""
        warm = min(1.0, (step + 1) / min(1000, max(1, self.steps // 10)))
        return warm * 0.1 ** sum(step >= self.steps * at for at in (3 / 4, 11 / 12))


SIZES = {
    "cuda": Size(net="resnet50", sides=(*range(480, 801, 32),), anchor=32, regions=512, proposals=1000, batch=16, steps=24_000, rate=0.02),
    "cpu": Size(net="resnet18", sides=(128,), anchor=8, regions=64, proposals=100, batch=2, steps=300, rate=0.005),
}  # fmt: skip


# ---- what a detector is, and begins with ----


class Begin(NamedTuple):
    """What a detector begins with."""

    line: str  # of the tables
    file: str  # of its results
    weights: dict[str, Tensor] | None  # by torchvision's names; None: random ones
    mean: tuple[float, ...] = Config.mean
    std: tuple[float, ...] = Config.std


def begins(asked: Sequence[str], net: str) -> tuple[list[Begin], str]:
    """Of runs, then of `random`; and their net, which is `net` where no run says it."""
    made, nets = [], []
    for run in [each for each in asked if each != RANDOM]:
        trunk, name = load(run), Path(run).resolve().name
        nets.append(net_name(trunk.config.backbone))
        if nets[-1] not in NETS or nets[-1] != nets[0]:
            told = f"{run} has {nets[-1]}: a detector takes {' or '.join(NETS)} (--backbone.name)"
            raise UsageError(f"{told}, and all of a call the same")
        weights = library_names(trunk.net)
        bits = reduce(lambda crc, each: zlib.crc32(each.numpy(), crc), weights.values(), 0)
        line = f"{type(trunk.config.method).__name__}, {name}"
        made.append(Begin(line, f"{name}-{bits:08x}", weights, trunk.mean, trunk.std))
    if RANDOM in asked:
        made.append(Begin("random weights", RANDOM, None, *(made[0][3:] if made else ())))
    if not made or len({each.line for each in made}) < len(made):
        raise UsageError(f"RUN wants folders whose names differ, of trained runs, or {RANDOM}")
    return made, (nets or [net])[0]


def detector(begin: Begin, net: str, classes: int, size: Size) -> Any:
    """A FasterRCNN of so many classes, whose body has the weights of `begin`, where it has some; all else is random."""
    anchors = [(size.anchor * 2**level,) for level in range(5)]
    model: Any = FasterRCNN(
        resnet_fpn_backbone(backbone_name=net, weights=None, trainable_layers=5), classes + 1, size.sides, size.sides[-1] * 5 // 3,
        [*begin.mean], [*begin.std], AnchorGenerator(tuple(anchors), ((0.5, 1.0, 2.0),) * 5),
        box_batch_size_per_image=size.regions, rpn_post_nms_top_n_test=size.proposals,
    )  # fmt: skip
    if begin.weights is not None:
        model.backbone.body.load_state_dict(begin.weights)  # strict: none missing, none left over
    return model


@torch.no_grad()
def randomise(model: Any, net: str, batches: Batches) -> None:
    """Give a body random weights with the statistics of these pictures, means of the batches."""
    norm: Any = partial(nn.BatchNorm2d, momentum=None)
    trunk = get_model(net, weights=None, norm_layer=norm).to(next(model.parameters()).device)
    for images, _ in batches:
        trunk(model.transform(images)[0].tensors)
    trunk.fc = nn.Identity()
    model.backbone.body.load_state_dict(trunk.state_dict())


# ---- pictures ----


def listed(root: Path, split: str) -> Annotated:
    """The pictures of a split and their objects. Raises UsageError where none is to be learnt or found."""
    source = voc(root, Listing(split=split))
    lost = [f"rejected: {path} ({reason})" for path, reason in source.rejected]
    print("\n".join([f"{split}: {len(source.records):,} pictures", *lost, *source.notes]))
    if all(boxes["ignore"].all() for boxes in source.boxes):
        told = f"no XML of {split} in {root} has an object that is not difficult"
        raise UsageError(f"{told}: name a folder like VOCdevkit/VOC2007")
    return source


class Pictures(Dataset):
    """(row, mirrored) in; pixels, and what a FasterRCNN is told of their objects, out.

    `learnt`: without difficult objects, and without pictures that have no others.
    """

    def __init__(self, sources: Sequence[Annotated], names: Sequence[str], *, learnt: bool):
        self.names, self.learnt = names, learnt
        every = [(source, i) for source in sources for i in range(len(source.records))]
        self.every = [(s, i) for s, i in every if not (learnt and s.boxes[i]["ignore"].all())]

    def __len__(self) -> int:
        return len(self.every)

    def __getitem__(self, at: tuple[int, bool]) -> tuple[UInt8[Tensor, "3 h w"], dict[str, Tensor]]:
        (source, i), mirrored = self.every[at[0]], at[1]
        try:
            pixels = decode(source.read(i))
        except ValueError as error:  # BadPicture
            told = f"{source.records[i].path} cannot be decoded ({error})"
            raise RunError(f"{told}: take it out of the lists in ImageSets/Main") from None
        told = source.boxes[i]
        told = told[~told["ignore"]] if self.learnt else told
        high, wide = pixels.shape[:2]
        y, x = np.divide((high, wide), np.maximum(source.size[i], 1))  # of pictures shrunk since
        top, left, bottom, right = (told["box"] * (y, x, y, x)).T
        if mirrored:
            pixels, left, right = pixels[:, ::-1], wide - right, wide - left
        boxes = np.stack([left, top, right, bottom], axis=1)
        labels = [1 + self.names.index(source.categories[c]) for c in told["category"]]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "iscrowd": torch.tensor(told["ignore"].astype(np.int64)),
        }


def drawn(pictures: int, size: Size, seed: int) -> Views:
    """Of all steps: one shuffled epoch behind the other."""
    views = size.steps * size.batch
    draw = np.random.default_rng(seed)
    rows = [draw.permutation(pictures) for _ in range(math.ceil(views / pictures))]
    every = list(zip(np.concatenate(rows).tolist(), (draw.random(views) < 0.5).tolist()))  # noqa: B905
    return [every[at : at + size.batch] for at in range(0, views, size.batch)]


def read(pictures: Pictures, views: Views, device: torch.device, words: str) -> Batches:
    """Batches on the device, and a bar with these words where somebody looks on."""
    workers = min(8, entry.cores()) if device.type == "cuda" else 0
    loader = DataLoader(pictures, batch_sampler=views, collate_fn=list, num_workers=workers)
    console = Console(stderr=True)
    for pairs in track(loader, words, console=console, disable=not console.is_terminal):
        images = [image.to(device).float() / 255 for image, _ in pairs]
        yield images, [{k: v.to(device) for k, v in told.items()} for _, told in pairs]


# ---- learnt and judged ----


def learn(model: Any, batches: Batches, size: Size) -> list[float]:
    """Train on batches, a step each; the loss of each step."""
    descent = torch.optim.SGD(model.parameters(), size.rate, momentum=0.9, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(descent, size.share)
    losses = []
    for images, objects in batches:
        loss = sum(model.train()(images, objects).values())
        losses.append(loss.item())  # waits for the device, as the choice of regions does
        if not math.isfinite(losses[-1]):
            raise RunError(f"the loss of step {len(losses)} is {losses[-1]}: nothing can be learnt")
        descent.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        descent.step()
        rate.step()
    return losses


@torch.no_grad()
def judge(model: Any, batches: Batches) -> dict[str, float]:
    """AP, AP50 and AP75 of what a detector finds, as shares: means of the classes, by COCO's rules."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="faster_coco_eval")
    for images, objects in batches:
        metric.update(model.eval()(images), objects)
    scores = metric.compute()
    return {name: float(scores[theirs]) for name, theirs in SCORES.items()}


# ---- the study ----


def rows(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and judge what is not done yet; rows of each beginning's scores."""
    try:
        import faster_coco_eval  # noqa: F401 (not behind the first training)
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise UsageError(f'{error}: type  pip install -e ".[study]"') from None
    device, size = choose_device(asked.device, dist.place()), SIZES[asked.device]
    size = replace(size, steps=size.steps if asked.steps is None else asked.steps)
    if min(asked.seeds, size.steps) < 1:
        raise UsageError(f"--seeds got {asked.seeds}, --steps {size.steps}: each wants at least 1")
    made, net = begins([*asked.runs, *[RANDOM] * asked.random], size.net)
    roots = asked.root or [measure.shared_data() / "voc" / "VOCdevkit" / "VOC2007"]
    sources, test = [listed(root, "trainval") for root in roots], listed(roots[0], "test")
    names = sorted({name for source in (*sources, test) for name in source.categories})
    train, held = Pictures(sources, names, learnt=True), Pictures([test], names, learnt=False)
    kind = zlib.crc32(repr((net, size, [root.resolve() for root in roots])).encode())
    commit = measure.row("detection")["commit"][:12]
    folder = asked.work / "studies" / f"detection-{asked.device}-{commit}-{kind:08x}"

    def done(begin: Begin, seed: int) -> dict[str, float]:
        """Scores and seconds, out of their file where it is there."""
        if not (file := folder / f"{begin.file}-{seed}.json").exists():
            clock, words = time.perf_counter(), f"{begin.line}, seed {seed}"
            torch.manual_seed(seed)
            model = detector(begin, net, len(names), size).to(device)
            views = drawn(len(train), size, seed)
            if begin.weights is None:
                randomise(model, net, read(train, views[:8], device, "statistics"))
            learn(model, read(train, views, device, words), size)
            whole = [[(row, False)] for row in range(len(held))]
            scores = judge(model, read(held, whole, device, f"{words}, judged"))
            scores["seconds"] = time.perf_counter() - clock
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(file, json.dumps(scores).encode())
        return json.loads(file.read_text())

    about = (
        f"Faster R-CNN with a feature pyramid on {net}, {size.steps:,} steps of {size.batch} pictures; {len(train):,} to learn from, "
        f"{len(held):,} judged at a short side of {size.sides[-1]} pixels; batch norm is frozen"
    )
    shape = {"net": net, "side": size.sides[-1], "steps": size.steps, "batch": size.batch}
    shape |= {"pictures": len(train), "judged": len(held)}
    same = study.shared(Study("detection", about, {}, (), precision="fp32"), asked, shape)
    for begin in made:
        found = [done(begin, seed) for seed in range(asked.seeds)]
        seconds = measure.middle([each["seconds"] for each in found], "s")["p50"]
        for score in SCORES:
            figure = Figure(f"objects found, {net}", begin.line, score, "", "")
            yield study.cell(figure, [each[score] for each in found], seconds, same)


def main(args: list[str] | None = None) -> int:
    """Train, judge, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "work", "device")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of fastrot train; or {RANDOM}")
    parser.add_argument("--random", action="store_true", help=f"the same as a RUN {RANDOM}")
    parser.add_argument("--root", action="append", type=Path, help="like VOCdevkit/VOC2007")
    parser.add_argument("--seeds", type=int, default=3, help="of all that is drawn")
    parser.add_argument("--steps", type=int, help="default: the device's")
    asked = parser.parse_args(args)
    runs.keep(rows(asked), asked, study.said)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
