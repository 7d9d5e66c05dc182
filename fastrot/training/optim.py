"""Parameter groups, optimisers and learning-rate schedules (the papers' tables, in whole epochs)."""

import importlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastrot.config import Optim, Schedule, Sgd, UsageError


def parameter_groups(net: nn.Module, cfg: Optim) -> list[dict]:
    """All parameters that learn; where `decay_norms` is off those of one dimension, biases and norms, undecayed."""
    learning = [p for p in net.parameters() if p.requires_grad]
    if cfg.decay_norms:
        return [{"params": learning, "weight_decay": cfg.weight_decay}]
    return [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_of(net: nn.Module, cfg: Optim, rate: float) -> Optimizer:
    """The config's. On a GPU its rate is a 0-d float32 tensor there, so that a captured graph reads today's."""
    if isinstance(cfg, Sgd):
        return sgd(net, cfg, rate)
    groups = parameter_groups(net, cfg)
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    lr = torch.full((), rate, device=device) if on_gpu else rate
    return torch.optim.RMSprop(groups, lr=lr, momentum=cfg.momentum, capturable=on_gpu)


def sgd(net: nn.Module, cfg: Sgd, rate: float, *, fused: bool | None = None) -> Optimizer:
    """SGD by torch or by NVIDIA apex, as the config says.

    fused  one kernel over all tensors, whose bits differ from the plain form's; None: where all are float32. Its rate
           is a 0-d float32 tensor on the parameters' device, so that a captured graph reads today's.

    Momenta begin at zero here: made by fused kernels, they would stay uninitialised where float16's first step overflows.
    """
    groups = parameter_groups(net, cfg)
    rule: dict[str, Any] = {"momentum": cfg.momentum, "nesterov": cfg.nesterov and cfg.momentum > 0}
    if cfg.kernel == "apex":
        try:
            fused_sgd = importlib.import_module("apex.optimizers").FusedSGD
            return _with_momenta(fused_sgd(groups, lr=rate, weight_decay=cfg.weight_decay, **rule))
        except (ImportError, AttributeError, SyntaxError, RuntimeError) as error:
            # none, the package index's other apex, or NVIDIA's without its extensions
            raise UsageError(
                f"--optim.kernel apex wants NVIDIA's apex, built with its CUDA extensions ({error}): "
                "build it, or use --optim.kernel torch"
            ) from None
    learning = [p for group in groups for p in group["params"]]
    if fused is None:
        fused = all(p.dtype == torch.float32 for p in learning)
    lr = torch.full((), rate, device=learning[0].device) if fused else rate
    return _with_momenta(torch.optim.SGD(groups, lr=lr, fused=fused, **rule))


def _with_momenta(optimizer: Optimizer) -> Optimizer:
    """SGD with a momentum for each parameter, zero where there is none yet: in its layout, as fused kernels go by addresses."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            known = optimizer.state[p].get("momentum_buffer")
            momentum = optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if known is not None:
                momentum.copy_(known)
    return optimizer


def set_lr(optimizer: Optimizer, rate: float) -> None:
    """The learning rate of the steps to come. Waits for nothing; not to be recorded in a graph."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Its state with plain rates, from which any device and kernel can go on. Waits for the device."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What `state_of` gave, on whatever device: momenta and rate; how a step is computed stays this run's."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    both = zip(state["param_groups"], own, strict=True)
    # by the options in it torch decides where a number of steps is to lie
    optimizer.load_state_dict({**state, "param_groups": [{**was, **mine} for was, mine in both]})
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)
    if not isinstance(optimizer, torch.optim.RMSprop):
        _with_momenta(optimizer)
    set_lr(optimizer, float(state["param_groups"][0]["lr"]))


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of each step of a run; a table keeps its shape in a run of other length."""

    schedule: Schedule
    epochs: int  # of the run
    batches: int  # steps an epoch
    steps: int  # of the run, at most epochs * batches
    lr: float | None = None  # scales the whole schedule so that it begins with this rate

    def __call__(self, step: int) -> float:
        """Rate of a 0-based step."""
        plan, first = self.schedule, self.schedule.table[0][1]
        rate, share = first, min(1.0, step / self.steps)
        if plan.kind == "table":
            rate = self.of_epoch(step // self.batches)
        elif plan.kind == "cosine":
            rate = first * (plan.last + (1 - plan.last) * (0.5 * (1 + math.cos(math.pi * share))))
        elif plan.kind == "linear":
            rate = first * (plan.last + (1 - plan.last) * (1 - share))
        elif plan.kind == "exponential":
            rate = first * plan.last**share
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

    def describe(self) -> Iterable[str]:
        """The schedule as it will run, a line a change."""
        if self.schedule.kind != "table":
            falls = f"falls ({self.schedule.kind}) over {self.steps} steps"
            shape = "stays there" if self.schedule.kind == "constant" else falls
            yield f"learning rate begins at {self(0):g} and {shape}"
            return
        scale = 1.0 if self.lr is None else self.lr / self.schedule.table[0][1]
        for rate, group in itertools.groupby(range(self.epochs), self.of_epoch):
            epochs = list(group)
            yield f"learning rate {rate * scale:g} in epochs {epochs[0]} to {epochs[-1]}"

    def _lengths(self) -> tuple[int, int]:
        plan = self.schedule
        return (1, 1) if plan.as_published else (plan.epochs, self.epochs)
