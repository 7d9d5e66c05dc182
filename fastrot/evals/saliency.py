"""How well what a net's answers hang on agrees with boxes of objects: `evaluate.py RUN saliency`, and maps for pictures.

By Q(S, B) of maps.py, over pictures squashed to the net's size. A threshold on raw gradients decides much, since nets differ in how large
theirs are; so Q stands there for one threshold, for the best of a sweep, and as a mean over shares of most salient pixels, which no scale decides.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastrot import assemble, config, dist
from fastrot.backbones.staged import Classifier
from fastrot.config import RunError, UsageError
from fastrot.core import Batch, Data, Method
from fastrot.data.boxes import Annotations, read_boxes
from fastrot.data.loader import Loader
from fastrot.evals.asked import Named, given, keep, loader_of, own_pictures, say, writable
from fastrot.evals.features import exact, followed
from fastrot.evals.knobs import Saliency
from fastrot.evals.maps import inside_of, qualities, saliency
from fastrot.evals.trained import Trained, net_of, trained_method
from fastrot.methods.rotation_table import ROTATIONS
from fastrot.ops.rotate import rotated_views
from fastrot.training.device import choose_device

LAYERS = ("rotation", "embedding")
# thresholds; batch norm that has seen nothing leaves a random EfficientNet gradients of 1e-18
SWEEP = np.logspace(-20, 1, 85)
SHARES = np.arange(0.05, 1, 0.05)  # of a picture's pixels, the most salient


class Scores(NamedTuple):
    """Q of a layer's maps, means over pictures."""

    q: float  # at the threshold that was asked for
    best: float  # of the sweep, and this one
    at: float  # the threshold that is the best
    ranked: float  # mean over shares of most salient pixels

    def told(self) -> str:
        swept = f"best {self.best:.1%} at {self.at:.2g}, by rank {self.ranked:.1%}"
        return f"{self.q:.1%}; {swept}"


def evaluate(run: str, knobs: Saliency) -> int:
    """Print Q of each layer, of the run's net and of one with random weights."""
    net = net_of(run)
    layers = layers_of(net, knobs.layers)
    device = choose_device(knobs.device, dist.place())
    if knobs.data is None:
        named = own_pictures(run, net.cfg, "val", knobs.loader, "--data")
    else:
        named = given(knobs.data, knobs)
    asked = (
        None
        if knobs.categories is None
        else [each.strip() for each in knobs.categories.split(",") if each.strip()]
    )
    boxes = read_boxes(named.data, named.name)
    rows = boxed(boxes, named, asked, knobs.pictures)
    if knobs.json is not None:
        writable(knobs.json.parent, "--json")
    found: dict[str, Scores] = {}
    with dist.joined(device, "give the same command again"):
        loader = whole_pictures(named.data, rows, net, knobs, device)
        side = loader.view.crops[0].size

        def inside(row: int) -> Float[Tensor, "s s"]:
            return inside_of(boxes.squashed(row, side, asked), side, side)

        begin = time.perf_counter()
        for words, learnt in (("", True), ("random ", False)):
            method = trained_method(net.source, device, learnt=learnt)
            for layer in layers:
                found[words + layer] = _scores(asker(method, layer), net, loader, inside, knobs)
        seconds = time.perf_counter() - begin
    every, drawn = _by_chance(np.array([float(inside(row).mean()) for row in rows.tolist()]))
    told = f"Q at {knobs.threshold:g} (every pixel: {every:.1%}; pixels at random, by rank: {drawn:.1%})"
    say(f"{run}: {len(rows):,} pictures of {named.name} with boxes; {told}", found, Scores.told)
    say(f"{len(found) * len(rows) / seconds:.3g} pictures/s, of which each layer's map is made")
    stages = {name: each._asdict() for name, each in found.items()}
    stages["chance"] = {"best": every, "ranked": drawn}
    keep({"run": run, "pictures": len(rows), "stages": stages}, knobs.json)
    return 0


def _by_chance(share: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Q of maps that hold every pixel, and by rank of pixels drawn at random: means over pictures, of which boxes cover a share."""
    both = share[:, None] * SHARES
    return float(share.mean()), float((both / (share[:, None] + SHARES - both)).mean())


def layers_of(net: Trained, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Those asked for, or all that a net has. Raises UsageError for the rotations' scores of one that gives none."""
    cfg = net.cfg.method
    predicts = assemble.METHODS[type(cfg)].predicts_rotation(cfg)
    if "rotation" in asked and not predicts:
        told = f"{net.source} predicts no rotations ({type(cfg).__name__})"
        raise UsageError(f"{told}: name a run of rotnet or decoupling, or --layers embedding")
    return asked or LAYERS[0 if predicts else 1 :]


def asker(method: Method, layer: str) -> Callable[[Tensor], Float[Tensor, "b n"]]:
    """From upright views to the neurons of a layer of the method's net, whose parameters want no gradient from here on."""
    net: Any = method.net.requires_grad_(False)
    # a net that is more than a classifier wants a picture's rotations together
    copies = 1 if isinstance(net, Classifier) else ROTATIONS

    def rotation(views: Tensor) -> Tensor:
        logits = method.rotation_logits(net(views.repeat_interleave(copies, dim=0)))
        assert logits is not None
        return logits[::copies]

    def embedding(views: Tensor) -> Tensor:
        last = net.trunk(views)
        return last.mean(dim=(2, 3)) if last.ndim == 4 else last

    return rotation if layer == "rotation" else embedding


def whole_pictures(
    data: Data, rows: np.ndarray, net: Trained, knobs: Any, device: torch.device
) -> Loader:
    """Pictures squashed whole to the net's size, so that boxes can follow; each rank's share, in the order of the data."""
    own = net.cfg.method
    crop = config.Whole(size=own.crop.size)
    cfg = dataclasses.replace(net.cfg, method=dataclasses.replace(own, crop=crop), enlarge=True)
    return loader_of(data, rows, cfg, knobs, device)


def maps_of(
    ask: Callable[[Tensor], Tensor], batch: Batch, cfg: config.Config, reduce: Any
) -> Float[Tensor, "b s s"]:
    """The saliency maps of a batch's pictures."""
    views = rotated_views(batch.images, (0,), cfg.mean, cfg.std, dtype=torch.float32)
    with exact():
        return saliency(ask, views, reduce)


def boxed(
    boxes: Annotations, named: Named, asked: list[str] | None, count: int | None
) -> np.ndarray:
    """Rows with a box that counts, all or so many of them, evenly spread."""
    if unknown := sorted({*(asked or ())} - {*boxes.categories.tolist()}):
        known = ", ".join(boxes.categories.tolist())
        raise UsageError(f"--categories got {', '.join(unknown)}: {named.name} has {known}")
    rows = np.arange(named.data.rows) if named.rows is None else np.load(named.rows)
    rows = np.array([row for row in rows.tolist() if len(boxes.squashed(row, 8, asked))], np.int64)
    if not len(rows):
        raise UsageError(f"no picture of {named.name} has a box that counts: name others by --data")
    if count is not None and count < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return rows


def _scores(
    ask: Callable[[Tensor], Tensor],
    net: Trained,
    loader: Loader,
    inside: Callable[[int], Float[Tensor, "s s"]],
    knobs: Saliency,
) -> Scores:
    """`inside`: 1 within boxes of a row, else 0. Called on all ranks; each asks about its own share."""
    assert loader.rows is not None
    place = torch.full((loader.data.rows,), -1)
    place[torch.from_numpy(loader.rows)] = torch.arange(len(loader.rows))
    fixed = torch.tensor([knobs.threshold, *SWEEP], dtype=torch.float64)
    found = torch.zeros(len(loader.rows), 1 + len(fixed) + len(SHARES), dtype=torch.float64)
    for batch in followed(loader):
        maps = maps_of(ask, batch, net.cfg, knobs.reduce).double().cpu()
        at = place[batch.index.cpu()]
        ordered = maps.flatten(1).sort(dim=1, descending=True).values
        ranked = ordered[:, (SHARES * ordered.shape[1]).astype(int)]
        thresholds = torch.hstack([fixed.expand(len(maps), -1), ranked])
        read = torch.ones(len(maps), 1)
        boxed = torch.stack([inside(row) for row in batch.index.tolist()])
        found[at] = torch.hstack([read, qualities(maps, boxed, thresholds)])
    count, *means = dist.sum_over_ranks(found).sum(dim=0).tolist()
    if not count:
        raise RunError("no picture with a box can be read: prepare them anew")
    q, *_ = swept = [mean / count for mean in means[: len(fixed)]]
    ranked = [mean / count for mean in means[len(fixed) :]]
    best = int(np.argmax(swept))
    return Scores(q, swept[best], float(fixed[best]), float(np.mean(ranked)))
