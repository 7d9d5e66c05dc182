"""Features of all pictures of a view by row, from all ranks: what evaluations of a trained trunk read."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fastrot import dist
from fastrot.backbones.staged import Staged
from fastrot.core import Batch
from fastrot.data.loader import Loader
from fastrot.evals.trained import Trunk
from fastrot.ops.rotate import rotated_views

BLOCK = 2**14  # rows that ranks exchange at once


class Bare(NamedTuple):
    """A network that is still being trained, in the place of a Trunk. It is in eval mode."""

    net: Staged
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Features(dict[str, Float[Tensor, "n d"]]):
    """By stage, for n pictures in the order of a view. `read`: which could be read; the others have zeros."""

    read: Bool[Tensor, " n"]


@torch.no_grad()
def features(
    trunk: Trunk | Bare,
    loader: Loader,
    stages: Sequence[str],
    pool: int | None = 1,
    *,
    dtype: torch.dtype = torch.float32,
    alive: Callable[[], object] | None = None,
) -> Features:
    """What each stage gives for the n pictures of the loader's view, in the view's order, on every rank's host.

    loader  of a view in data order (`assemble.evaluation_view`); each rank asks about its own share
    pool    side that maps are averaged to, d = channels pool^2; None: whole maps, d = channels h w
    dtype   float32, or float16 for half the memory
    alive   called with each batch, in place of a progress bar

    Convolutions are in full float32, by algorithms that give the same bits each time. Called on all ranks.
    """
    for stage in stages:
        trunk.net.check_stage(stage)
    found: dict[str, Tensor] = {}
    place = torch.arange(loader.data.rows)
    if loader.rows is not None:
        place[torch.from_numpy(loader.rows)] = torch.arange(loader.images)
    read = torch.zeros(loader.images)
    for batch in followed(loader) if alive is None else loader.epoch(0):
        if alive is not None:
            alive()
        at = place[batch.index.cpu()]
        read[at] = 1
        views = rotated_views(batch.images, (0,), trunk.mean, trunk.std, dtype=torch.float32)
        with exact():
            outputs = trunk.net.outputs(views, stages)
        for stage, each in zip(stages, outputs, strict=True):
            if each.ndim == 4 and pool is not None:
                each = F.adaptive_avg_pool2d(each, pool)
            flat = each.flatten(1).to("cpu", dtype)
            if stage not in found:
                found[stage] = torch.zeros(loader.images, flat.shape[1], dtype=dtype)
            found[stage][at] = flat
    whole = Features({s: _of_all_ranks(found.get(s), loader.images, dtype) for s in stages})
    whole.read = dist.sum_over_ranks(read) > 0
    return whole


def exact() -> AbstractContextManager[None]:
    """Convolutions in full float32, by algorithms that give the same bits each time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def followed(loader: Loader) -> Iterable[Batch]:
    """The batches of a view in data order, with a progress bar where somebody looks on."""
    console = Console()
    show = {"console": console, "disable": dist.place().rank > 0 or not console.is_terminal}
    return track(loader.epoch(0), "pictures", len(loader), **show)


def _of_all_ranks(mine: Tensor | None, images: int, dtype: torch.dtype) -> Tensor:
    """The rows of all ranks, whose shares do not overlap: each number is exact. None: this rank's share is empty."""
    width = max(dist.everyones(0 if mine is None else mine.shape[1]))
    whole = torch.zeros(images, width, dtype=dtype) if mine is None else mine
    for part in whole.split(BLOCK):
        part.copy_(dist.sum_over_ranks(part.float()))
    return whole
