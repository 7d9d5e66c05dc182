"""PIRL: features of a picture that are the same for its transform, told from others by a memory bank (Misra 2020, arXiv 1912.01991).

Without a transform it is NPID (Wu 2018). As the authors' code computes it (VISSL): README.md names where paper and code differ.
"""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Staged, pooled
from fastrot.config import Crop, UsageError
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.contrast import Contrast
from fastrot.methods.jigsaw import Puzzle, puzzle_crop
from fastrot.methods.scores import Scores, told_apart, wide
from fastrot.ops.augment import DRAWS, augmented, shares
from fastrot.ops.patches import CELLS
from fastrot.ops.rotate import rotated_views

PICTURE = "picture"
EPS = 2.0**-23  # in NCE: float32's machine epsilon, as the authors' code has it
_ROTATION, _COLOUR = 0x200, 0x210  # what draws are for


class Embeddings(NamedTuple):
    """Of unit length."""

    picture: Float[Tensor, "b d"]
    transforms: tuple[Float[Tensor, "b d"], ...]


class PirlNet(nn.Module):
    """A trunk and its heads: f embeds pictures, and one for each transform embeds that.

    Takes views [b, c, s, s] of pictures, then of each transform [b, c, s, s], or of a puzzle [9 b, c, p, p].
    """

    def __init__(self, trunk: Staged, cfg: config.Pirl):
        super().__init__()
        width = trunk.channels[trunk.stages[-1]]
        self.trunk, self.picture = trunk, _head(width, cfg)
        heads = {name: _head(width, cfg) for name in transforms(cfg)}
        self.heads = nn.ModuleDict(heads)
        if "jigsaw" in heads:
            self.nine = nn.Linear(CELLS * cfg.dim, cfg.dim)

    def forward(self, views: tuple[Tensor, ...]) -> Embeddings:
        picture, *others = views
        names = tuple(self.heads.keys()) or (PICTURE,) * len(others)  # NPID's second view
        rest = [self.embedded(name, x) for name, x in zip(names, others, strict=True)]
        return Embeddings(self.embedded(PICTURE, picture), tuple(rest))

    def embedded(self, name: str, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "b d"]:
        """Unit length; `name` of a transform, or `picture`."""
        found = pooled(self.trunk(x))
        found = self.picture(found) if name == PICTURE else self.heads[name](found)
        if name == "jigsaw":
            found = self.nine(found.unflatten(0, (-1, CELLS)).flatten(1))
        return F.normalize(wide(found), dim=1, eps=1e-12)


class Pirl(Method):
    """NCE of pictures and of their transforms against the bank, which holds pictures alone."""

    headline = Headline(title="Pictures told apart by their transforms", chance=0.5)

    def __init__(self, cfg: config.Pirl, trunk: Staged, info: DataInfo):
        self.cfg, self.info, self.space_to_depth = cfg, info, trunk.space_to_depth
        self.augmented = augmented
        self.names, self.puzzle = transforms(cfg), None
        if "jigsaw" in self.names:
            cut = _patch_crop(cfg), cfg.permutations, cfg.augment
            self.puzzle = Puzzle(*cut, trunk, info)
        self.net = PirlNet(trunk, cfg)
        self.contrast = Contrast(cfg, info, unit=True, eps=EPS)
        if cfg.negatives > (population := self.contrast.bank.population):
            told = f"--method.negatives got {cfg.negatives}, but the memory bank has {population} pictures"
            raise UsageError(f"{told}: set {population} or fewer")

    @staticmethod
    def crops(cfg: config.Pirl) -> tuple[Crop, ...]:
        """Of the picture, and of each transform another."""
        each = {"rotation": cfg.crop, "jigsaw": _patch_crop(cfg)}
        return (cfg.crop, *(each[name] for name in transforms(cfg)))

    @staticmethod
    def owned(cfg: config.Pirl) -> bool:
        return cfg.bank == "sharded"

    @staticmethod
    def for_inference(cfg: config.Pirl) -> config.Pirl:
        return dataclasses.replace(cfg, bank="replicated", negatives=1, permutations=None)

    def views(self, batch: Batch) -> tuple[Float[Tensor, "n c s s"], ...]:
        """In training each of a crop of its own, its colours changed; in evaluation all of one crop as it is, NPID's second view excepted."""
        training = self.net.training
        images = [batch.crops[n if training else 0] for n in range(1 + len(self.names))]
        found = [self._view(self._coloured(images[0], batch, 0) if training else images[0])]
        for n, (name, image) in enumerate(zip(self.names, images[1:], strict=True), 1):
            found.append(self.transformed(name, image, batch, view=n))
        if not self.names and not training:
            found.append(self._view(self._coloured(images[0], batch, 1)))
        return tuple(found)

    def transformed(
        self, name: str, images: UInt8[Tensor, "b s s 3"], batch: Batch, view: int
    ) -> Float[Tensor, "n c h h"]:
        """Views of crops under a transform of `transforms`, as the net takes them."""
        training = self.net.training
        if name == "jigsaw":
            assert self.puzzle is not None
            shown = self.puzzle.shown(images, batch, self.augmented if training else None)
            return self._view(shown, cells=False)
        drawn = shares(self.info.seed, batch.index, batch.epoch_step[0], _ROTATION, 1)
        images = self._coloured(images, batch, view) if training else images
        return self._view(images, (drawn * 4).long())

    def before_first_step(self, outputs: Embeddings, batch: Batch) -> None:
        """Z, of the transforms where there are any, as in the authors' code."""
        first = (*outputs.transforms, outputs.picture)[0]
        self.contrast.before_first_step(first, batch, view=min(1, len(outputs.transforms)))

    def losses(self, outputs: Embeddings, batch: Batch) -> Losses:
        share = self.cfg.lambda_transform / max(1, len(self.names))
        terms, metrics = dict[str, Tensor](), dict[str, Tensor]()
        for n, (name, each) in enumerate(zip(self.names, outputs.transforms, strict=True), 1):
            loss, z = self.contrast.loss(each, batch, view=n)
            terms[f"loss_{name}"] = share * loss.mean()
            metrics = z | metrics
            metrics[f"cosine_{name}"] = (each * outputs.picture).sum(dim=1).mean()
        # at a lambda of 1 too: f would else have no gradient, which DDP refuses
        loss, z = self.contrast.loss(outputs.picture, batch)
        terms["loss_picture"] = (1 - self.cfg.lambda_transform) * loss.mean()
        return Losses(terms, z | metrics)

    def score(self, outputs: Embeddings, batch: Batch) -> Scores:
        """Over all pairs of a transform and another picture of its batch: `accuracy`, how often its own picture is nearer, and `loss`, the
        mean of -log sigmoid((s(own) - s(other)) / T) of cosines s. A half and ln 2 where all are alike, or there is no other.
        """
        found: Scores = {}
        for each in outputs.transforms:
            apart, pairs = told_apart(each @ outputs.picture.T)
            loss = F.softplus(-apart / self.cfg.temperature)
            right = (apart > 0).float() + 0.5 * (apart == 0)
            for name, values in {"loss": loss, "accuracy": right}.items():
                total, count = found.get(name, (0, 0))
                found[name] = total + (values * pairs).sum(), count + pairs.sum()
        return found

    def after_step(self, outputs: Embeddings, batch: Batch, losses: Losses) -> None:
        self.contrast.after_step(outputs.picture, batch, losses.metrics.get("z"))

    def state_dict(self) -> dict[str, Tensor]:
        return self.contrast.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.contrast.load_state_dict(state)

    def resume_contract(self) -> dict[str, Any]:
        return self.contrast.resume_contract()

    def describe(self) -> list[str]:
        return [self.contrast.bank.describe()]

    # ---- inside ----

    def _coloured(self, images: Tensor, batch: Batch, view: int) -> UInt8[Tensor, "b s s 3"]:
        assert self.augmented is not None
        where = batch.index, batch.epoch_step[0], _COLOUR + view
        return self.augmented(images, self.cfg.augment, shares(self.info.seed, *where, DRAWS))

    def _view(self, images: Tensor, rotations: Any = (0,), cells: bool = True) -> Tensor:
        info = self.info
        how = (info.mean, info.std, info.dtype, self.space_to_depth if cells else None)
        return rotated_views(images, rotations, *how)


def transforms(cfg: config.Pirl) -> tuple[str, ...]:
    if not cfg.lambda_transform:
        return ()
    return ("rotation", "jigsaw") if cfg.transform == "both" else (cfg.transform,)


def _patch_crop(cfg: config.Pirl) -> Crop:
    crop = cfg.crop
    if isinstance(crop, config.RandomResized):
        crop = dataclasses.replace(crop, scale=cfg.patch_scale)
    return puzzle_crop(crop)


def _head(width: int, cfg: config.Pirl) -> nn.Module:
    out = nn.Linear(width, cfg.dim)
    return out if cfg.head == "linear" else nn.Sequential(nn.Linear(width, width), nn.ReLU(), out)
