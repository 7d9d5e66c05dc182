"""What we are measured against: Rotation Feature Decoupling as the authors' code trains it, as slow, for the same reasons.

    python -m benchmarks.baseline [--root FOLDER] [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]

Written anew from what that code does (philiptheother/FeatureDecoupling; none of it is copied), on today's torch:
ImageFolder, Pillow and torchvision's transforms in a DataLoader, with the original's default of 0 workers and with 8;
float32 pictures over the bus, rotated there by flips and transposes, NCHW; rows of the bank as [B, K + 1, D], gathered,
kept for backward and read twice; the constants of the contrast in a tensor that is read back number by number; the bank
written inside backward; the PU weights of all pictures made an array of a Python list in every step; three optimisers;
`.item()` of each loss and of the precision in every step. tests/test_baseline.py holds six of its steps to the
original's, in float64.

Measured in turns with ours (decoupling-alexnet from a .beton, our Loader and loop.train_step, not compiled) on the same
pictures, with the same batch, size, width, bank and negatives. Steps with loading run for some seconds, after as many
batches as workers have read ahead. An epoch is 1,281,167 pictures at the measured rate and 50,000 of a validation pass,
never run whole: its rows say `extrapolated`. Both have torch's own settings on a GPU: convolutions of float32 in TF32, matrix
products not. On a CPU the net has a quarter of the width and the batch is 16; then the list
of PU weights is as much shorter as the batch, so that a picture costs what it costs in a batch of 192.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks import contestants, forms, measure, runs
from benchmarks.measure import HELD_OUT, IMAGENET
from fastrot import assemble, entry
from fastrot.backbones.alexnet import alexnet
from fastrot.config import AlexNet, Config, Decoupling, UsageError
from fastrot.core import Batch
from fastrot.machine import wait_for
from fastrot.training.device import time_kernels
from fastrot.training.loop import train_step

BATCH = 192  # the paper's
PU_FROM = 210  # epoch; the original has it in its code
EPS = 1e-7  # in both denominators of the contrast
WORKERS = (0, 8)  # the original's default, and what people set
AHEAD = 2  # batches that each worker of a DataLoader reads ahead
SMALL, QUICK = {"batch": 16}, {"batch": 4}  # on a CPU
QUICK_BANK = 20_000  # rows
ENDLESS = 10**9  # pictures drawn of a few: a DataLoader that does not end while it is timed
WAY = "original's way"


# ---- the contrast with the memory bank ----


class Alias:
    """Walker's alias table of equal weights: a draw looks both of its tables up and tosses a coin that always falls one way.

    The original fills them by a loop in Python, once; what comes out is written down here.
    """

    def __init__(self, rows: int, device: torch.device):
        self.keep = torch.ones(rows, device=device)
        self.other = torch.zeros(rows, dtype=torch.int64, device=device)

    def draw(self, count: int) -> Tensor:
        """Rows with replacement: int64 [count]."""
        column = torch.randint(len(self.keep), (count,), device=self.keep.device)
        stays = torch.bernoulli(self.keep[column]).long()
        return column * stays + self.other[column] * (1 - stays)


class Contrast(torch.autograd.Function):
    """P = exp(<row, x> / T) / Z of B x (K + 1) rows; backward writes the bank as well.

    Shapes. x [B, D], bank [N, D], y [B], picked [B, K + 1] with y in its first column, constants [4]: K, T, Z, momentum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, y: Tensor, picked: Tensor, constants: Tensor):
        _, temperature, z, _ = (each.item() for each in constants)
        rows = bank[picked.flatten()].view(*picked.shape, -1)  # [B, K + 1, D]
        scores = torch.bmm(rows, x[:, :, None]).div(temperature).exp()
        if z < 0:  # of the first batch, for good
            constants[2] = scores.mean() * len(bank)
            z = constants[2].item()
        p = scores.div(z).squeeze(2)
        ctx.save_for_backward(x, bank, y, rows, p, constants)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, bank, y, rows, p, constants = ctx.saved_tensors
        _, temperature, _, momentum = (each.item() for each in constants)
        slope = (grads[0] * p).div(temperature)
        grad = torch.bmm(slope[:, None, :], rows).squeeze(1)
        with torch.no_grad():
            row = rows[:, 0] * momentum + x * (1 - momentum)
            bank.index_copy_(0, y, row / row.pow(2).sum(1, keepdim=True).sqrt())
        return grad, None, None, None, None


def nce(p: Tensor, population: int) -> Tensor:
    """Noise-contrastive loss of P [B, K + 1], the positive first, against uniform noise over the population."""
    noise = (p.shape[1] - 1) / population
    right = p[:, 0] / (p[:, 0] + noise + EPS)
    wrong = noise / (p[:, 1:] + noise + EPS)
    return -(right.log().sum() + wrong.log().sum()) / len(p)


# ---- its step ----


class Original:
    """Three nets, their optimisers, the bank; `step` and `judge` do what train_step and evaluation_step did."""

    def __init__(
        self,
        feature: nn.Module,
        width: int,
        *,
        bank: int,
        listed: list[float],
        device: torch.device,
        dim: int = 128,
        negatives: int = 4096,
        rate: float = 0.01,
    ):
        self.device, self.listed, self.negatives, self.half = device, listed, negatives, width // 2
        self.feature = feature.to(device)
        self.classifier = nn.Linear(self.half, 4).to(device)
        self.norm = nn.Linear(self.half, dim).to(device)
        self.bank = torch.empty(bank, dim, device=device).uniform_(-1, 1).mul_(math.sqrt(3 / dim))
        self.constants = torch.tensor([negatives, 0.07, -1, 0.5], device=device)
        self.alias = Alias(bank, device)
        how = dict(lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.nets = (self.feature, self.classifier, self.norm)
        self.optimisers = [torch.optim.SGD(net.parameters(), **how) for net in self.nets]  # type: ignore[arg-type]

    def step(
        self, images: Tensor, rotation: Tensor, index: Tensor, epoch: int = 0
    ) -> dict[str, float]:
        """One step: pictures [B, 3, s, s] in host memory or on the device; rotation and index [B, 4], each picture's fourfold."""
        weight = self.weights(index, rotation)
        views, rotation = self.rotated(images.to(self.device)), rotation.flatten().to(self.device)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        features = self.feature(views)
        told, other = features[:, : self.half], features[:, self.half :]
        logits = self.classifier(told)
        each = F.cross_entropy(logits, rotation, reduction="none")
        weighted = torch.dot(each, weight.to(each)) if epoch >= PU_FROM else each.sum()
        mean = 0.25 * (other[0::4] + other[1::4] + other[2::4] + other[3::4])
        embedding = self.norm(mean)
        embedding = embedding / embedding.pow(2).sum(1, keepdim=True).sqrt()
        terms = {
            "loss_cls": weighted / len(each),
            "loss_mse": F.mse_loss(other, mean.repeat_interleave(4, dim=0).detach()),
            "loss_nce": self.contrast(embedding, index[:, 0].to(self.device)),
        }
        loss = terms["loss_cls"] + terms["loss_mse"] + terms["loss_nce"]
        right = (logits.argmax(dim=1) == rotation).float().mean() * 100
        record = {"prec_cls": right.item(), "loss": loss.item()}
        record |= {name: term.item() for name, term in terms.items()}
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
        return record

    @torch.no_grad()
    def judge(self, images: Tensor, rotation: Tensor) -> dict[str, float]:
        """Held-out pictures: the same head asked of both halves, by nets in eval mode."""
        views, rotation = self.rotated(images.to(self.device)), rotation.flatten().to(self.device)
        for net in self.nets:
            net.eval()
        features = self.feature(views)
        record = {}
        for name, half in zip(("rot", "inv"), features.split(self.half, dim=1), strict=True):
            logits = self.classifier(half)
            right = (logits.argmax(dim=1) == rotation).float().mean() * 100
            record[f"prec_{name}"] = right.item()
            record[f"loss_{name}"] = F.cross_entropy(logits, rotation).item()
        for net in self.nets:
            net.train()
        return record

    def rotated(self, images: Tensor) -> Tensor:
        """Four rotations of each picture, image-major: [B, 3, s, s] -> [4 B, 3, s, s]."""
        quarter = images.transpose(2, 3).flip([2])
        half = images.flip([2]).flip([3])
        back = images.flip([2]).transpose(2, 3)
        return torch.stack([images, quarter, half, back], dim=1).flatten(0, 1)

    def contrast(self, embedding: Tensor, y: Tensor) -> Tensor:
        picked = self.alias.draw(len(y) * (self.negatives + 1)).view(len(y), -1)
        picked[:, 0] = y
        p = Contrast.apply(embedding, self.bank, y, picked, self.constants)
        return nce(p, len(self.bank))  # type: ignore[arg-type]

    def weights(self, index: Tensor, rotation: Tensor) -> Tensor:
        """The PU weights of a batch: float64 [4 B], by way of an array of all pictures'."""
        return torch.from_numpy(np.array(self.listed)[(4 * index + rotation).flatten().numpy()])


def pu_weights(prob: np.ndarray, gamma: float = 2.0) -> list[float]:
    """1 of each picture that is not rotated, 1 - p ** gamma of its rotated copies: a list, as the original holds it."""
    weights = 1 - prob.reshape(-1, 4) ** gamma
    weights[:, 0] = 1
    return weights.flatten().tolist()


# ---- its data ----


class Turnable(Dataset):
    """ImageFolder's pictures, each with its four labels and its number four times."""

    def __init__(self, root: Path, looks: Callable):
        from torchvision import datasets

        self.folder = datasets.ImageFolder(str(root), looks)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.folder[i][0], torch.arange(4), torch.full((4,), i)


def looks(cfg: Config, *, training: bool) -> Callable:
    """Pillow's picture to float32 [3, s, s]: the original's transforms."""
    from torchvision import transforms as T

    size = cfg.method.crop.size
    if training:
        cut = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
    else:
        cut = [T.Resize(round(256 / 224 * size)), T.CenterCrop(size)]
    return T.Compose([*cut, T.ToTensor(), T.Normalize(cfg.mean, cfg.std)])


def batches(pictures: Dataset, batch: int, workers: int) -> Iterator[list[Tensor]]:
    """A DataLoader without end, its settings the original's."""
    drawn = RandomSampler(pictures, replacement=True, num_samples=ENDLESS)  # type: ignore[arg-type]
    how = {"multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(pictures, batch, sampler=drawn, num_workers=workers, **how))  # type: ignore[arg-type]


# ---- both, measured ----


@dataclasses.dataclass
class Side:
    """One that is measured: endless batches, and what is done with one."""

    batches: Callable[[], Any]
    work: Callable[[Any], Any]
    warm: int = 3  # batches before the clock starts


def the_original(cfg: Config, root: Path, device: torch.device, bank: int) -> dict[str, Side]:
    """The original's way as sides: training with loading, the step alone, validation."""
    assert isinstance(cfg.method, Decoupling)
    assert isinstance(cfg.backbone, AlexNet)
    pictures = Turnable(root, looks(cfg, training=True))
    held_out = Turnable(root, looks(cfg, training=False))
    trunk = alexnet(cfg.backbone, cfg.method.crop.size)
    known = max(len(pictures), bank * cfg.batch // BATCH)
    torch.manual_seed(cfg.seed)
    made = Original(
        trunk,
        trunk.channels[trunk.stages[-1]],
        bank=bank,
        listed=pu_weights(np.random.default_rng(0).random(4 * known)),
        device=device,
        dim=cfg.method.dim,
        negatives=cfg.method.negatives,
    )
    images, rotation, index = next(batches(pictures, cfg.batch, 0))
    held = [images.to(device), rotation, index]
    sides = {"step alone": Side(lambda: itertools.repeat(held), lambda batch: made.step(*batch))}
    for workers in WORKERS:
        name, warm = f"num_workers {workers}", max(1, AHEAD * workers)
        sides[name] = Side(
            lambda n=workers: batches(pictures, cfg.batch, n), lambda b: made.step(*b), warm
        )
        sides[f"{name}, validation"] = Side(
            lambda n=workers: batches(held_out, cfg.batch, n), lambda b: made.judge(*b[:2]), warm
        )
    return {f"{WAY}, {name}": side for name, side in sides.items()}


def ours(cfg: Config, beton: Path, device: torch.device, bank: int) -> dict[str, Side]:
    """Ours as sides, eager, from a .beton."""
    few = assemble.open_data(beton)
    data = contestants.Repeated(few, -(-max(1_000 * cfg.batch, bank) // few.rows))
    how: dict[str, Any] = {"batch": cfg.batch, "device": device, "enlarge": True}
    loader = assemble.open_loader(data, assemble.training_view(cfg), **how)
    held_out = assemble.open_loader(data, assemble.evaluation_view(cfg), **how)
    state = forms.state_of(cfg, loader, device, steps=10**9)
    method = state.method

    def step(batch: Batch) -> None:
        train_step(state, batch)
        state.step += 1

    @torch.no_grad()
    def judge(batch: Batch) -> None:
        method.net.eval()
        with state.autocast():
            method.score(method.net(method.views(batch)), batch)
        method.net.train()

    held = next(loader.epoch(0))
    return {
        "ours, eager, step alone": Side(lambda: itertools.repeat(held), step),
        "ours, eager, .beton": Side(lambda: loader.epoch(0), step),
        "ours, eager, .beton, validation": Side(lambda: held_out.epoch(0), judge),
    }


def images_per_s(side: Side, batch: int, device: torch.device, seconds: float) -> float:
    """Pictures a second through `side`, after its warm-up, over at least two batches."""
    drawn = side.batches()
    try:
        for _ in range(side.warm):
            side.work(next(drawn))
        wait_for(device)
        begun, done = time.perf_counter(), 0
        while done < 2 or time.perf_counter() - begun < seconds:
            side.work(next(drawn))
            done += 1
        wait_for(device)
        return done * batch / (time.perf_counter() - begun)
    finally:
        getattr(drawn, "close", lambda: None)()  # our Loader's: ends what reads ahead


def rows(
    cfg: Config,
    root: Path,
    beton: Path,
    device: torch.device,
    *,
    bank: int,
    seconds: float,
    reps: int,
) -> Iterator[dict[str, Any]]:
    """Rows of all sides, measured in turns, and what ours is to the original's."""
    sides = the_original(cfg, root, device, bank) | ours(cfg, beton, device, bank)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for rotation in range(reps):
        for name, side in sides.items():
            if rotation and name.endswith("validation"):
                continue  # a small part of an epoch: once is enough
            found[name].append(images_per_s(side, cfg.batch, device, seconds))
    assert isinstance(cfg.method, Decoupling)
    shape = {"batch": cfg.batch, "size": cfg.method.crop.size, "width": cfg.backbone.width}
    shape |= {
        "negatives": cfg.method.negatives,
        "bank": bank,
        "pictures": len(Turnable(root, lambda picture: picture)),
    }
    mode = f"in turns, {seconds:g} s each"
    for name, each in found.items():
        if name.endswith("validation"):
            continue
        figure = measure.middle(each, "images/s")
        more: dict[str, Any] = {"step_ms": 1e3 * cfg.batch / figure["p50"]}
        if judged := found.get(f"{name}, validation"):
            more |= epoch(figure["p50"], measure.middle(judged, "images/s")["p50"])
        dtype = cfg.precision if name.startswith("ours") else "fp32"
        yield row("baseline", name, mode=mode, shape=shape, dtype=dtype, **figure, **more)
    for other in found:
        beside = "step alone" if other.endswith("step alone") else ".beton"
        if other.startswith("ours") or other.endswith("validation"):
            continue
        pairs = zip(found[f"ours, eager, {beside}"], found[other], strict=True)
        times = measure.middle([mine / theirs for mine, theirs in pairs], "times")
        name = f"ours, eager, {beside} / {other}"
        yield row("baseline ratio", name, mode=mode, shape=shape, dtype=cfg.precision, **times)


def epoch(training: float, validation: float) -> dict[str, Any]:
    """Seconds of an ImageNet-size epoch at these images/s, never run whole."""
    split = {"train": IMAGENET / training, "validation": HELD_OUT / validation}
    return {
        "epoch_s": sum(split.values()),
        "split": split,
        "images": IMAGENET,
        "extrapolated": True,
        "validation": True,
        "validation_images_per_s": validation,
    }


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="train", variant=variant, warmup=1, about=ABOUT, **fields)


ABOUT = (
    "the original's way and ours see the same pictures, batch, size, width, bank and negatives; ours is not compiled. "
    "An epoch is extrapolated from some seconds of steps; in batches smaller than 192 the original's list of PU weights is "
    "shortened by as much"
)


# ---- the command ----


def config_of(device: torch.device, quick: bool) -> Config:
    small = QUICK if quick else SMALL if device.type == "cpu" else {}
    return forms.sized(measure.PRESET, device, quick=quick, **small)


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "device", "quick")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--reps", type=int, default=3)
    asked = parser.parse_args(args)
    device = torch.device(asked.device)
    time_kernels(device)  # as a run does, for both
    if not contestants.installed("torchvision"):
        raise UsageError("the baseline needs torchvision: install torch's pair of it")
    root = contestants.originals(asked.root)
    beton = contestants.Formats(root, asked.work, entry.cores()).beton()
    seconds, reps = (0.2, 1) if asked.quick else (asked.seconds, asked.reps)
    bank = QUICK_BANK if asked.quick else IMAGENET
    cfg = config_of(device, asked.quick)
    made = rows(cfg, root, beton, device, bank=bank, seconds=seconds, reps=reps)
    runs.keep(
        made,
        asked,
        lambda r: f", an epoch {r['epoch_s'] / 3600:.3g} hours" if "epoch_s" in r else "",
    )
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
