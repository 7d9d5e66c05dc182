"""Parameter groups, SGD and learning-rate schedules (the papers' tables, in whole epochs)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastrot.config import Schedule, Sgd


def parameter_groups(net: nn.Module, cfg: Sgd) -> list[dict]:
    """All parameters that learn; biases and norms apart, undecayed, where `decay_norms` is off.

    A parameter with fewer than two dimensions is a bias or belongs to a norm.
    """
    learning = [p for p in net.parameters() if p.requires_grad]
    if cfg.decay_norms:
        return [{"params": learning, "weight_decay": cfg.weight_decay}]
    return [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]


def sgd(net: nn.Module, cfg: Sgd, rate: float) -> torch.optim.SGD:
    """Torch's SGD; one fused kernel over all tensors on a GPU (its bits differ from the plain one's)."""
    groups = parameter_groups(net, cfg)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.SGD(
        groups,
        lr=rate,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov and cfg.momentum > 0,
        fused=fused,
    )


@dataclass(frozen=True)
class Rates:
    """The learning rate of each step of a run.

    A table's pair (E, rate) holds while `epoch * published < E * epochs`, in whole numbers: a run of other
    length keeps the shape, and floating point shifts no boundary. Behind the last pair its rate stays.
    """

    schedule: Schedule
    epochs: int  # of the run
    batches: int  # steps an epoch
    steps: int  # of the run, at most epochs * batches
    lr: float | None = None  # scales the whole schedule so that it begins with this rate

    def __call__(self, step: int) -> float:
        """Rate of a 0-based step."""
        first = self.schedule.table[0][1]
        share = min(1.0, step / self.steps)
        if self.schedule.kind == "table":
            rate = self.of_epoch(step // self.batches)
        elif self.schedule.kind == "cosine":
            rate = first * self._between(0.5 * (1 + math.cos(math.pi * share)))
        elif self.schedule.kind == "linear":
            rate = first * self._between(1 - share)
        else:
            rate = first
        warm = self.schedule.warmup * self.batches  # steps
        if step + 1 < warm:
            rate *= (step + 1) / warm
        return rate if self.lr is None else rate * (self.lr / first)

    def of_epoch(self, epoch: int) -> float:
        """The table's rate in a 0-based epoch, before --lr scales it."""
        published, length = self._lengths()
        for end, rate in self.schedule.table:
            if epoch * published < end * length:
                return rate
        return self.schedule.table[-1][1]

    def begins(self, published: int) -> int:
        """The epoch of this run in which the paper's 0-based epoch begins."""
        paper, length = self._lengths()
        return -(-published * length // paper)

    def in_words(self) -> Iterable[str]:
        """The schedule as it will run, a line a change."""
        if self.schedule.kind != "table":
            shape = {"constant": "stays there"}.get(
                self.schedule.kind, f"falls ({self.schedule.kind}) over {self.steps} steps"
            )
            yield f"learning rate begins at {self(0):g} and {shape}"
            return
        scale = 1.0 if self.lr is None else self.lr / self.schedule.table[0][1]
        begin = 0
        for epoch in range(1, self.epochs + 1):
            if epoch == self.epochs or self.of_epoch(epoch) != self.of_epoch(begin):
                yield f"learning rate {self.of_epoch(begin) * scale:g} in epochs {begin} to {epoch - 1}"
                begin = epoch

    def _between(self, share: float) -> float:
        return self.schedule.last + (1 - self.schedule.last) * share

    def _lengths(self) -> tuple[int, int]:
        if self.schedule.as_published:
            return 1, 1
        return self.schedule.epochs, self.epochs
