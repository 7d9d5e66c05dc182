"""All that a step of training reads and writes: built, saved, restored."""

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrot import assemble, dist
from fastrot.config import Config
from fastrot.core import Batch, DataInfo, Method
from fastrot.data.loader import Loader
from fastrot.speed.timer import StepTimer
from fastrot.training import checkpoint
from fastrot.training.graph import Cuda, Graphed
from fastrot.training.journal import Meter
from fastrot.training.optim import LRSchedule, load_state, optimizer_of, state_of


@dataclass
class Progress:
    """What a run has been through, over all its starts; goes into checkpoints and the summary."""

    images: int = 0  # seen in training, over all ranks
    seconds: float = 0.0  # of training, without validation
    waited: float = 0.0  # of these seconds: waiting for data
    saving: float = 0.0  # of these seconds: standing still for checkpoints
    val_first: dict[str, float] = field(default_factory=dict)  # before training
    val: dict[str, float] = field(default_factory=dict)  # the latest
    best: float = -math.inf  # validation accuracy, or minus the loss where there is none
    skipped: list[str] = field(default_factory=list)  # damaged records, a sentence each

    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def wait_share(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0

    def saving_share(self) -> float:
        return self.saving / self.seconds if self.seconds else 0.0


@dataclass
class TrainState:
    """All that a step reads and writes."""

    method: Method
    net: Callable[[Any], Any]  # method.net, perhaps compiled, perhaps wrapped by DDP
    optimizer: torch.optim.Optimizer
    schedule: LRSchedule
    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic
    step: int = 0  # the optimiser's steps so far
    validated_step: int = 0  # at which an epoch's end was last seen through, validation included
    fresh: bool = True  # no step taken yet in this run
    meter: Meter = field(default_factory=Meter)
    progress: Progress = field(default_factory=Progress)
    graphed: Graphed | None = None  # plays steps that were recorded; None: each is launched anew
    eval_net: Callable[[Any], Any] | None = None  # method.net, as full batches are judged by it

    def __post_init__(self):
        # float16 gradients underflow; bfloat16 and float32 need no scaling
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def descend(self, loss: Tensor) -> None:
        """Gradient and optimiser's step, at the rate that was set."""
        self.optimizer.zero_grad()  # to None: a captured graph's gradients lie in its own memory
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def scores(self, batch: Batch, images: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What the method's evaluation says of a batch, of full ones of so many `images`. The net is in eval mode.

        A ragged batch goes through the bare net, for which nothing is compiled.
        """
        net = self.method.net
        if self.eval_net is not None and len(batch.index) == images:
            net = self.eval_net
        with self.autocast():
            return self.method.score(net(self.method.views(batch)), batch)

    def state_dict(self) -> dict[str, Any]:
        """Called on all ranks."""
        return {
            "step": self.step,
            "validated_step": self.validated_step,
            "net": self.method.net.state_dict(),
            "optimizer": state_of(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "method": self.method.state_dict(),
            "meter": self.meter.state_dict(),
            "progress": vars(self.progress),
            "rng": checkpoint.random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.validated_step, self.fresh = state["step"], state["validated_step"], False
        self.method.net.load_state_dict(state["net"])
        load_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        self.meter.load_state_dict(state["meter"], self.device)
        self.progress = Progress(**state["progress"])
        checkpoint.set_random_state(state["rng"], self.device)
        if self.graphed is not None:  # what it reads lies in other memory now
            self.graphed.forget()


def build(cfg: Config, info: DataInfo, schedule: LRSchedule) -> TrainState:
    """A state at step 0: weights from the config's seed, on the device and in the arithmetic that `info` names."""
    torch.manual_seed(cfg.seed)
    method = assemble.method(cfg, info)
    method.net.to(info.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if method.augmented is not None and cfg.compile:
        method.augmented = torch.compile(method.augmented, fullgraph=True, dynamic=False)
    return TrainState(
        method=method,
        net=wrapped(method.net, cfg, info.device),
        optimizer=optimizer_of(method.net, cfg.optim, 0.0),
        schedule=schedule,
        device=info.device,
        dtype=info.dtype,
        graphed=Graphed(Cuda(info.device)) if cfg.graph else None,
        eval_net=compiled(method.net, cfg),
    )


def compiled(net: torch.nn.Module, cfg: Config) -> Any:
    """The net, compiled where asked: once for training, once for the full batches of an evaluation."""
    # shapes are fixed; a second form in one process would else be compiled for any shape
    how = {"fullgraph": True, "dynamic": False, "mode": cfg.compile_mode}
    return torch.compile(net, **how) if cfg.compile else net


def wrapped(net: torch.nn.Module, cfg: Config, device: torch.device) -> Any:
    """The net as the step calls it: compiled where asked, under DDP where there are several ranks."""
    net = compiled(net, cfg)
    if dist.world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        # rank 0's BatchNorm statistics are the run's: they are broadcast before a validation, not each step
        ddp = torch.nn.parallel.DistributedDataParallel
        # torch 2.14 renamed the option and warns of its old name
        names = inspect.signature(ddp.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        # gradients lie where they are summed, so that none is copied there and back
        net = ddp(net, device_ids=ids, gradient_as_bucket_view=True, **options)
        if cfg.gradients == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            net.register_comm_hook(None, bf16_compress_hook)
    return net


def warm_up_ddp(state: TrainState, loader: Loader) -> None:
    """One forward and backward through DDP, forgotten again; before the first step of every start.

    DDP puts its gradients into other buckets after its first backward, and a sum over three or more ranks follows their
    order: a resumed run would else differ in the last bits from an unbroken one.
    """
    if dist.world() == 1:
        return
    batch = next(iter(loader.epoch(0)))
    buffers = [(b, b.clone()) for b in state.method.net.buffers()]
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices), state.autocast():
        outputs = state.net(state.method.views(batch))
    leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    torch.stack([t.float().mean() for t in leaves]).sum().backward()  # reaches all of them
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.data.copy_(before)


@dataclass
class Session:
    """One start of a run: what it is made of."""

    cfg: Config
    folder: Path
    saved: dict[str, Any] | None  # the checkpoint that it goes on from
    begun: float  # by time.perf_counter
    loader: Loader
    val_loader: Loader | None
    state: TrainState
    identity: dict[str, Any]  # what a resumed run must agree with, beside the config
    step_timer: StepTimer
    # scores of features, asked at validations: each rank calls its argument with each batch
    online: Callable[[Callable[[], object]], dict[str, float]] | None = None

    @property
    def end(self) -> int:
        """The step at which this start ends: the schedule's, or --max-steps."""
        return min(self.state.schedule.steps, self.cfg.max_steps or self.state.schedule.steps)
