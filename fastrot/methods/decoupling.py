"""Rotation Feature Decoupling: half of the features predict the rotation, the other half tells pictures apart (Feng 2019, CVPR).

As the authors' code computes it (philiptheother/FeatureDecoupling), but for its faults: README.md names them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Staged, pooled
from fastrot.config import UsageError
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.contrast import Contrast
from fastrot.methods.rotation_table import pu_weights, read
from fastrot.methods.rotnet import HEADLINE, ROTATIONS, rotation_labels
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.rotate import rotated_views


class Parts(NamedTuple):
    """What the net makes of 4 B views; None: nothing asks for it."""

    logits: Float[Tensor, "v 4"] | None  # of the rotations, from the first half of the features
    other: Float[Tensor, "v h"]  # the second half
    embedding: Float[Tensor, "b d"] | None  # unit length, of the other half's mean over rotations


class DecouplingNet(nn.Module):
    """A trunk whose features are split in half; a head that predicts the rotation, and one that embeds pictures."""

    def __init__(self, trunk: Staged, cfg: config.Decoupling):
        super().__init__()
        width = trunk.channels[trunk.stages[-1]]
        if width % 2:
            halves = f"the trunk has {width} features, which cannot be split in half"
            raise UsageError(f"{halves}: choose another --backbone.width")
        self.trunk, self.each = trunk, width // 2
        # a head without a loss would have no gradient, which DDP refuses
        self.rotation = nn.Linear(self.each, len(ROTATIONS)) if cfg.lambda_cls else None
        self.embed = nn.Linear(self.each, cfg.dim) if _has_bank(cfg) else None

    def forward(self, x: Float[Tensor, "v c s s"]) -> Parts:
        return self.heads(pooled(self.trunk(x)))

    def heads(self, features: Float[Tensor, "v w"]) -> Parts:
        told, other = features.split(self.each, dim=1)
        logits = None if self.rotation is None else self.rotation(told)
        embedding = None
        if self.embed is not None:
            # guarded: the original divides a zero vector by its length of zero
            mean = wide(other).unflatten(0, (-1, len(ROTATIONS))).mean(dim=1)
            embedding = F.normalize(wide(self.embed(mean)), dim=1, eps=1e-12)
        return Parts(logits, other, embedding)


class Decoupling(Method):
    """PU-weighted rotation loss + spread of the other half over a picture's rotations + NCE against the bank."""

    headline = HEADLINE

    def __init__(self, cfg: config.Decoupling, trunk: Staged, info: DataInfo):
        self.cfg, self.info = cfg, info
        self.net, self.space_to_depth = DecouplingNet(trunk, cfg), trunk.space_to_depth
        if not cfg.lambda_cls:  # there is no head that answers
            self.headline = Headline(title="Spread over rotations", score="loss")
        self.contrast = Contrast(cfg, info, asked=cfg.lambda_nce > 0) if _has_bank(cfg) else None
        self.weights, self.pu_epoch, self.table_digest = None, cfg.pu_from, None
        if cfg.pu_table is not None:
            table = read(cfg.pu_table, rows=info.data_rows, fingerprint=info.data_fingerprint)
            weights = torch.from_numpy(pu_weights(table.upright, cfg.gamma))
            self.weights, self.table_digest = weights.float().to(info.device), table.digest

    @staticmethod
    def owned(cfg: config.Decoupling) -> bool:
        return cfg.bank == "sharded" and _has_bank(cfg)

    @staticmethod
    def for_inference(cfg: config.Decoupling) -> config.Decoupling:
        return dataclasses.replace(cfg, pu_table=None, bank="replicated")

    def set_schedule(self, epochs: int, begins: Callable[[int], int]) -> None:
        if self.weights is None:
            return
        self.pu_epoch = begins(self.cfg.pu_from)
        if self.pu_epoch >= epochs:
            late = f"--method.pu-from {self.cfg.pu_from} is epoch {self.pu_epoch} of this run"
            raise UsageError(f"{late}, which ends before it: set a smaller one, or more --epochs")

    def views(self, batch: Batch) -> Float[Tensor, "v c s s"]:
        info, how = self.info, {"dtype": self.info.dtype, "space_to_depth": self.space_to_depth}
        return rotated_views(batch.images, ROTATIONS, info.mean, info.std, **how)

    def before_first_step(self, outputs: Parts, batch: Batch) -> None:
        if self.contrast is not None and outputs.embedding is not None:
            self.contrast.before_first_step(outputs.embedding, batch)

    def losses(self, outputs: Parts, batch: Batch) -> Losses:
        terms, metrics = {}, {}
        if outputs.logits is not None:
            rotation = rotation_labels(outputs.logits)
            each = F.cross_entropy(wide(outputs.logits), rotation, reduction="none")
            terms["loss_cls"] = self.cfg.lambda_cls * (self._weight(batch, each) * each).mean()
            right = (outputs.logits.argmax(dim=1) == rotation).float().mean()
            metrics |= {"accuracy": right, "prec_cls": right}
        if self.cfg.lambda_mse:
            terms["loss_mse"] = self.cfg.lambda_mse * _spread(outputs.other).mean()
        if self.contrast is not None and outputs.embedding is not None:
            if self.cfg.lambda_nce:
                each, z = self.contrast.loss(outputs.embedding, batch)
                terms["loss_nce"] = self.cfg.lambda_nce * each.mean()
                metrics |= z
            if self.cfg.proximal:
                apart = self.contrast.distance(outputs.embedding, batch)
                terms["loss_proximal"] = self.cfg.proximal * apart.mean()
        return Losses(terms, metrics)

    def score(self, outputs: Parts, batch: Batch) -> Scores:
        """prec_rot and loss_rot of the rotation head; prec_inv and loss_inv of the same head on the other half.

        prec_inv should stay at chance: the other half holds nothing that this head can read. Without a
        rotation loss there is only `loss`, the spread.
        """
        if outputs.logits is None:
            spread = _spread(outputs.other)
            return {"loss": (spread.sum(), torch.full_like(spread.sum(), len(spread)))}
        answer = rotation_labels(outputs.logits)
        rotation = classification_scores(outputs.logits, answer)
        head = self.net.get_submodule("rotation")
        invariant = classification_scores(head(outputs.other), answer)
        return rotation | {
            "prec_rot": rotation["accuracy"],
            "loss_rot": rotation["loss"],
            "prec_inv": invariant["accuracy"],
            "loss_inv": invariant["loss"],
        }

    @staticmethod
    def predicts_rotation(cfg: config.Decoupling) -> bool:
        return cfg.lambda_cls > 0

    def rotation_logits(self, outputs: Parts) -> Tensor | None:
        return outputs.logits

    def after_step(self, outputs: Parts, batch: Batch, losses: Losses) -> None:
        if self.contrast is not None and outputs.embedding is not None:
            self.contrast.after_step(outputs.embedding, batch, losses.metrics.get("z"))

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.contrast is None else self.contrast.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.contrast is not None:
            self.contrast.load_state_dict(state)

    def resume_contract(self) -> dict[str, Any]:
        found = {} if self.contrast is None else self.contrast.resume_contract()
        return found if self.table_digest is None else found | {"pu_table": self.table_digest}

    def describe(self) -> list[str]:
        lines = [] if self.contrast is None else [self.contrast.bank.describe()]
        if self.weights is not None:
            lines.append(f"PU weights from epoch {self.pu_epoch} on, of {self.cfg.pu_table}")
        return lines

    # ---- inside ----

    def _weight(self, batch: Batch, like: Tensor) -> Float[Tensor, " v"] | float:
        """1, or 1 - p ** gamma of each rotated copy: one that looks upright may be a wrong label."""
        if self.weights is None:
            return 1.0
        weights = self.weights[batch.index].flatten().to(like.dtype)
        return torch.where(batch.epoch_step[0] >= self.pu_epoch, weights, torch.ones_like(weights))


def _has_bank(cfg: config.Decoupling) -> bool:
    return cfg.lambda_nce > 0 or cfg.proximal > 0


def _spread(other: Float[Tensor, "v h"]) -> Float[Tensor, " b"]:
    """Mean square distance of each picture's four copies from their mean, over copies and features."""
    each = wide(other).unflatten(0, (-1, len(ROTATIONS)))
    # the mean is held: its own gradient is zero anyway
    return (each - each.mean(dim=1, keepdim=True).detach()).square().mean(dim=(1, 2))
