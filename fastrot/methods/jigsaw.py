"""Jigsaw: predict in which of some orders nine patches of a picture are shown (Noroozi 2016; on deep nets Goyal 2019); PIRL takes its patches too."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Staged, pooled
from fastrot.config import Crop, UsageError
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.augment import DRAWS, augmented, shares
from fastrot.ops.patches import CELLS, patches
from fastrot.ops.philox import philox
from fastrot.ops.rotate import rotated_views

EACH = 1000  # numbers that are made of a patch, before they are put beside each other (Goyal 2019)
ORDERS = math.factorial(CELLS)
_ORDER, _SHIFT, _FLIP, _COLOUR = 0x100, 0x101, 0x102, 0x110  # what a puzzle's draws are for


# ---- which orders ----


@functools.lru_cache(maxsize=2)
def far_apart(count: int) -> Int64[np.ndarray, "n 9"]:
    """`count` orders of nine patches, each as far in Hamming distance from all before it as any is. Fewer are the first of more."""
    every = itertools.chain.from_iterable(itertools.permutations(range(CELLS)))
    table = np.fromiter(every, np.uint8, CELLS * ORDERS).reshape(ORDERS, CELLS)
    mixed = philox(0, torch.arange(ORDERS), *[torch.zeros((), dtype=torch.int64)] * 3)[0]
    table = table[mixed.argsort(stable=True).numpy()]
    columns = np.ascontiguousarray(table.T)
    apart, chosen = np.full(ORDERS, CELLS + 1, np.uint8), list[int]()
    while len(chosen) < count:
        at = int(apart.argmax())
        if apart[at] == 2:  # no two orders are nearer: all that is left is as far
            chosen += np.flatnonzero(apart).tolist()[: count - len(chosen)]
            break
        chosen.append(at)
        mine = np.zeros(ORDERS, np.uint8)
        for column, shown in zip(columns, table[at], strict=True):
            mine += column != shown
        np.minimum(apart, mine, out=apart)
    return table[chosen].astype(np.int64)


# ---- the puzzle of a crop ----


class Puzzle:
    """Cuts, shows and changes the patches of crops, by (seed, epoch, row).

    side    pixels a side of a patch: 64 where `crop`, which it is cut of in training, has 255
    orders  int64 [n, 9], of which one is drawn; None: any of all
    """

    def __init__(
        self, crop: Crop, orders: int | None, how: config.Augment, trunk: Staged, info: DataInfo
    ):
        self.how, self.seed = how, info.seed
        self.side = _side(crop.size)
        if trunk.stages[-1] == "fc_block":
            told = "fc_block is for crops of one size, and a puzzle has patches of another"
            raise UsageError(f"{told}: set --backbone.last conv5")
        if self.side < trunk.least:
            size = next(n for n in itertools.count() if _side(_whole(n)) >= trunk.least)
            told = f"the puzzle's patches of {self.side} pixels are too small"
            way = f"set --image-size {size} or larger"
            raise UsageError(f"{told}, this network wants at least {trunk.least}: {way}")
        self.orders = None
        if orders is not None:
            self.orders = torch.from_numpy(far_apart(orders)).to(info.device)

    def shown(
        self, images: UInt8[Tensor, "b c c 3"], batch: Batch, augmented: Any = None
    ) -> UInt8[Tensor, "n s s 3"]:
        """The nine patches of each crop, in the order that is drawn; each mirrored or not and its colours changed where `augmented` is given."""
        draw = functools.partial(shares, self.seed, batch.index, batch.epoch_step[0])
        if self.orders is None:
            order = draw(_ORDER, CELLS).argsort(dim=1, stable=True)
        else:
            order = self.orders[self.number(batch)]
        room = images.shape[1] // 3 - self.side
        shift = (draw(_SHIFT, 2 * CELLS) * room).long().unflatten(1, (CELLS, 2))
        found = patches(images, order, shift, self.side)
        if augmented is None:
            return found
        flip = draw(_FLIP, CELLS).flatten()[:, None, None, None] < 0.5
        found = torch.where(flip, found.flip(2), found)
        return augmented(found, self.how, draw(_COLOUR, CELLS * DRAWS).view(-1, DRAWS))

    def number(self, batch: Batch) -> Int64[Tensor, " b"]:
        """Of the order that is drawn."""
        assert self.orders is not None
        share = shares(self.seed, batch.index, batch.epoch_step[0], _ORDER, 1)
        return (share[:, 0] * len(self.orders)).long()


def puzzle_crop(crop: Crop) -> Crop:
    """The crop that patches are cut of: 255 pixels for 224, never mirrored as a whole."""
    return dataclasses.replace(config.with_size(crop, _whole(crop.size)), flip=False)


def _whole(size: int) -> int:
    """Pixels a side of the crop that a puzzle is cut of, where --image-size is `size`."""
    return round(size * 255 / 224)


def _side(whole: int) -> int:
    """Pixels a side of its patches."""
    return round(whole // 3 * 64 / 85)


class JigsawNet(nn.Module):
    """A trunk, a layer that makes 1,000 numbers of each patch, batch norm and ReLU, and a layer that tells the order by all nine."""

    def __init__(self, trunk: Staged, orders: int):
        super().__init__()
        self.trunk = trunk
        width = trunk.channels[trunk.stages[-1]]
        self.each = nn.Sequential(nn.Linear(width, EACH), nn.BatchNorm1d(EACH), nn.ReLU())
        self.head = nn.Linear(CELLS * EACH, orders)

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "b k"]:
        return self.head(self.each(pooled(self.trunk(x))).unflatten(0, (-1, CELLS)).flatten(1))


class Jigsaw(Method):
    """Nine patches of each crop in one of some orders; mean cross-entropy over the B pictures."""

    def __init__(self, cfg: config.Jigsaw, trunk: Staged, info: DataInfo):
        self.info, self.augmented = info, augmented
        cut = puzzle_crop(cfg.crop), cfg.permutations, cfg.augment
        self.puzzle = Puzzle(*cut, trunk, info)
        self.net = JigsawNet(trunk, cfg.permutations)
        self.headline = Headline(title="Accuracy of the order", chance=1 / cfg.permutations)

    @staticmethod
    def crops(cfg: config.Jigsaw) -> tuple[Crop, ...]:
        return (puzzle_crop(cfg.crop),)

    def views(self, batch: Batch) -> Float[Tensor, "n c s s"]:
        info = self.info
        shown = self.puzzle.shown(
            batch.images, batch, self.augmented if self.net.training else None
        )
        return rotated_views(shown, (0,), info.mean, info.std, info.dtype)

    def losses(self, outputs: Float[Tensor, "b k"], batch: Batch) -> Losses:
        order = self.puzzle.number(batch)
        right = (outputs.argmax(dim=1) == order).float().mean()
        return Losses({"loss_cls": F.cross_entropy(wide(outputs), order)}, {"accuracy": right})

    def score(self, outputs: Float[Tensor, "b k"], batch: Batch) -> Scores:
        return classification_scores(outputs, self.puzzle.number(batch))
