"""How far features of a picture are from those of its transform: `evaluate.py RUN invariance` (Misra 2020, figure 5).

Distances of two features of unit length, 0 to 2. A net all of whose features are alike has small ones too, so that the distances
to other pictures' transforms stand beside them, and how often a picture's own is the nearer of two.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastrot import config, dist
from fastrot.config import RunError, UsageError
from fastrot.core import Batch, Method
from fastrot.data.loader import Loader
from fastrot.evals.asked import begin, given, keep, loader_of, own_pictures, say
from fastrot.evals.features import exact, followed
from fastrot.evals.knobs import Invariance
from fastrot.evals.trained import load, net_of, trained_method
from fastrot.methods.jigsaw import Puzzle, puzzle_crop
from fastrot.methods.pirl import PICTURE, PirlNet
from fastrot.methods.scores import told_apart
from fastrot.ops.patches import CELLS
from fastrot.ops.rotate import rotated_views
from fastrot.training.device import choose_device

BINS = 40  # of a histogram of distances, from 0 to 2
ROTATIONS = (1, 2, 3)  # times 90 degrees
HEADS = "heads"  # beside stages: what a PIRL run's own heads make of both

Pair = tuple[Float[Tensor, "b d"], Float[Tensor, "v b d"]]  # of pictures, of their transforms


class Distances(NamedTuple):
    """Of one stage, over all pictures."""

    own: float  # means: from a picture to its own transform
    other: float  # to another picture's
    nearer: float  # how often the own one is nearer than another
    histogram: list[float]  # shares of own distances, in BINS from 0 to 2
    of_others: list[float]

    def told(self) -> str:
        pair = f"{self.own:.3f} to its transform, {self.other:.3f} to another's"
        return f"{pair}; its own is nearer {self.nearer:.1%}"


def evaluate(run: str, knobs: Invariance) -> int:
    """Print the distances by stage."""
    net, device = net_of(run), choose_device(knobs.device, dist.place())
    if knobs.data is None:
        named = own_pictures(run, net.cfg, "val", knobs.loader, "--data")
    else:
        named = given(knobs.data, knobs)
    begin(load(run), knobs)
    transform = knobs.transform or own_transform(net.cfg.method)
    if transform == "jigsaw" and knobs.pool != 1:
        raise UsageError(f"--pool {knobs.pool}: a puzzle's features are averaged; leave it out")
    if (knobs.batch or net.cfg.batch) < 2:
        raise UsageError("pictures are told from others of their batch: set --batch 2 or more")
    # neighbours are often of one class
    rows = np.arange(named.data.rows) if named.rows is None else np.load(named.rows)
    rows = np.random.default_rng(0).permutation(rows)
    with dist.joined(device, "give the same command again"):
        loader = loader_of(named.data, rows, net.cfg, knobs, device)
        method = trained_method(net.source, device)
        found = distances(seen_by(method, knobs.stages, knobs.pool, transform, net.cfg), loader)
    of = "by 90, 180 and 270 degrees" if transform == "rotation" else "in nine patches"
    title = f"{run}: {loader.images:,} pictures of {named.name}, {transform} {of}"
    say(title, found, Distances.told)
    stages = {stage: each._asdict() for stage, each in found.items()}
    keep({"run": run, "transform": transform, "stages": stages}, knobs.json)
    return 0


def own_transform(cfg: Any) -> str:
    """That of a run's method: rotation, where it has none or both."""
    jigsaw = isinstance(cfg, config.Jigsaw) or getattr(cfg, "transform", "") == "jigsaw"
    return "jigsaw" if jigsaw else "rotation"


def seen_by(
    method: Method, stages: tuple[str, ...], pool: int, transform: str, cfg: config.Config
) -> Callable[[Batch], dict[str, Pair]]:
    """What of a batch each stage and the heads give, of unit length: of pictures, and of each of their transforms.

    A puzzle's features are the mean over its patches; its heads see it whole.
    """
    net, info = method.net, method.info
    trunk: Any = net.trunk
    heads = net if isinstance(net, PirlNet) and transform in net.heads else None
    puzzle = None
    if transform == "jigsaw":
        orders = getattr(cfg.method, "permutations", None)
        cut = puzzle_crop(cfg.method.crop), orders, config.Augment()
        puzzle = Puzzle(*cut, trunk, info)

    def unit(features: Tensor) -> Tensor:
        if features.ndim == 4:
            features = F.adaptive_avg_pool2d(features, pool)
        return F.normalize(features.flatten(1), dim=1)

    def seen(batch: Batch) -> dict[str, Pair]:
        def shown(images: Tensor, rotation: int = 0) -> Tensor:
            return rotated_views(images, (rotation,), info.mean, info.std, torch.float32)

        upright = shown(batch.images)
        if puzzle is None:
            others = [shown(batch.images, rotation) for rotation in ROTATIONS]
        else:
            others = [shown(puzzle.shown(batch.images, batch))]
        found: dict[str, Pair] = {}
        with exact():
            first = trunk.outputs(upright, stages)
            rest = [trunk.outputs(each, stages) for each in others]
            for stage, mine, theirs in zip(stages, first, zip(*rest, strict=True), strict=True):
                found[stage] = unit(mine), torch.stack([unit(each) for each in theirs])
            if puzzle is not None:
                for stage, (mine, theirs) in found.items():
                    mean = theirs.unflatten(1, (-1, CELLS)).mean(dim=2)
                    found[stage] = mine, F.normalize(mean, dim=2)
            if heads is not None:
                views = torch.stack([heads.embedded(transform, each) for each in others])
                found[HEADS] = heads.embedded(PICTURE, upright), views
        return found

    return seen


@torch.no_grad()
def distances(seen: Callable[[Batch], dict[str, Pair]], loader: Loader) -> dict[str, Distances]:
    """By stage, over the loader's view and all pairs in each batch. Called on all ranks."""
    sums: dict[str, Tensor] = {}
    for batch in followed(loader):
        for stage, (mine, theirs) in seen(batch).items():
            for view in theirs:
                cosine = view @ mine.T
                apart, pairs = told_apart(cosine)
                right = (apart > 0).float() + 0.5 * (apart == 0)
                distance = (2 - 2 * cosine).clamp_min(0).sqrt()
                own = distance.diagonal()
                pairs = pairs * (len(own) > 1)  # a lone picture has no other
                counts = [_counted(own, torch.ones_like(own)), _counted(distance, pairs)]
                mean = own.sum(), (distance * pairs).sum(), (right * pairs).sum()
                each = torch.cat([torch.stack(mean), *counts]).double()
                sums[stage] = sums.get(stage, 0) + each
    found, none = {}, torch.zeros(3 + 2 * BINS, dtype=torch.float64, device=loader.device)
    for stage in dict.fromkeys(itertools.chain(*dist.everyones([*sums]))):  # a rank may have none
        mine = sums.get(stage, none)
        own, other, right, *counts = dist.sum_over_ranks(mine).tolist()
        first, second = counts[:BINS], counts[BINS:]
        n, pairs = sum(first), sum(second)
        if not pairs:
            raise RunError("no two pictures of a batch can be read: prepare them anew")
        shares = [each / n for each in first], [each / pairs for each in second]
        found[stage] = Distances(own / n, other / pairs, right / pairs, *shares)
    return found


def _counted(distance: Float[Tensor, "..."], weight: Float[Tensor, "..."]) -> Float[Tensor, " n"]:
    """A histogram; what rounding brought over 2 counts as 2."""
    place = (distance * (BINS / 2)).long().clamp_max(BINS - 1)
    return torch.zeros(BINS, device=distance.device).scatter_add_(
        0, place.flatten(), weight.flatten()
    )
