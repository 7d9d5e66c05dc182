"""Probes: how well labels can be told from the stages of a trained trunk, each by a head of its own (Gidaris 2018, Feng 2019)."""

import contextlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.heads import HEADS
from fastrot.backbones.staged import Staged
from fastrot.config import Config
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.rotate import rotated_views


class ProbeNet(nn.Module):
    """A trunk and the heads on its stages, by their names. A frozen trunk stays in eval mode, and has no gradient."""

    def __init__(self, trunk: Staged, heads: Mapping[str, nn.Module], *, frozen: bool):
        super().__init__()
        self.trunk, self.heads, self.frozen = trunk, nn.ModuleDict(heads), frozen

    def train(self, mode: bool = True) -> "ProbeNet":
        super().train(mode)
        if self.frozen:
            self.trunk.eval()  # batch norm would else go on learning its statistics
        return self

    def forward(self, x: Float[Tensor, "b c s s"]) -> tuple[Float[Tensor, "b k"], ...]:
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            seen = self.trunk.outputs(x, tuple(self.heads))
        return tuple(head(each) for head, each in zip(self.heads.values(), seen, strict=True))


class Probe(Method):
    """Upright views; the sum over the stages of the mean cross-entropy of each head. `accuracy` is the last stage's."""

    wants_labels = True

    def __init__(self, cfg: config.Probe, trunk: Staged, info: DataInfo):
        self.info, self.space_to_depth = info, trunk.space_to_depth
        stages = (*cfg.stages, trunk.stages[-1])  # one black picture tells their shapes
        seen = trunk.eval().outputs(torch.zeros(1, 3, info.size, info.size), stages)
        if cfg.tune:
            torch.stack([each.sum() for each in seen[:-1]]).sum().backward()
        for p in trunk.parameters():  # what no head reads has no gradient, which DDP refuses
            p.requires_grad_(p.grad is not None)
            p.grad = None
        shapes = {name: tuple(each.shape[1:]) for name, each in zip(stages, seen, strict=True)}
        head = HEADS[cfg.head]
        heads = {stage: head(trunk, stage, shapes, info.classes) for stage in cfg.stages}
        self.net, self.stages = ProbeNet(trunk, heads, frozen=not cfg.tune), cfg.stages
        self.heads = cfg.stages
        self.headline = Headline(title=f"Accuracy of {cfg.stages[-1]}", chance=1 / info.classes)

    def views(self, batch: Batch) -> Float[Tensor, "b c s s"]:
        info, how = self.info, {"dtype": self.info.dtype, "space_to_depth": self.space_to_depth}
        return rotated_views(batch.images, (0,), info.mean, info.std, **how)

    @staticmethod
    def trunk(cfg: Config) -> str | None:
        return cfg.start_from

    def losses(self, outputs: tuple[Float[Tensor, "b k"], ...], batch: Batch) -> Losses:
        terms, metrics = {}, {}
        for stage, logits in zip(self.stages, outputs, strict=True):
            terms[f"loss_{stage}"] = F.cross_entropy(wide(logits), batch.label)
            metrics[f"top1_{stage}"] = (logits.argmax(dim=1) == batch.label).float().mean()
        return Losses(terms, metrics | {"accuracy": metrics[f"top1_{self.stages[-1]}"]})

    def score(self, outputs: tuple[Float[Tensor, "b k"], ...], batch: Batch) -> Scores:
        found: Scores = {}
        for stage, logits in zip(self.stages, outputs, strict=True):
            each = classification_scores(logits, batch.label)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            among = (best == batch.label[:, None]).any(dim=1).float().sum()
            found[f"loss_{stage}"], found[f"top1_{stage}"] = each["loss"], each["accuracy"]
            found[f"top5_{stage}"] = (among, each["loss"][1])
        whole = sum(found[f"loss_{stage}"][0] for stage in self.stages)
        count = found[f"loss_{self.stages[-1]}"][1]
        return found | {"loss": (whole, count), "accuracy": found[f"top1_{self.stages[-1]}"]}
