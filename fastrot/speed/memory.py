"""Out of memory at the first steps: one sentence with the batch that fits, found by halving."""

import gc
import traceback

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrot import dist, machine
from fastrot.config import Config, MemoryBank, RunError, UsageError
from fastrot.core import View
from fastrot.entry import in_bytes
from fastrot.speed.cost import random_batch
from fastrot.speed.timer import StepTimer
from fastrot.training.state import TrainState

FULL = (  # what says so without torch's class for it: a CPU's allocator, the driver, cuBLAS, cuDNN
    "DefaultCPUAllocator: can't",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)


def is_full(error: BaseException) -> bool:
    """Whether the error says that a device's memory is full. cuDNN's words have other causes too, rarely."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL)


def forget(error: BaseException) -> None:
    """Free what the frames hold through which an error came: a step's activations."""
    traceback.clear_frames(error.__traceback__)
    for earlier in (error.__cause__, error.__context__):
        if earlier is not None:
            forget(earlier)


def out_of_memory_error(
    cfg: Config, device: torch.device, built: tuple[TrainState, View, StepTimer] | None
) -> UsageError | RunError:
    """The error for people where memory is full, to be called after `forget`: the failed step holds nothing any more.

    built  None: there was no net yet

    Before the first log line it names a batch that fits; later, something else has taken the memory.
    """
    where = _memory_of(device)
    if built is None:
        bank = " and its memory bank" if isinstance(cfg.method, MemoryBank) else ""
        what = f"the network of {cfg.preset}{bank}"
        return UsageError(f"{what} is too large for {where}: {_less(cfg)}")
    state, view, step_timer = built
    if step_timer.lines:
        way = "end what else takes memory there, and the same command goes on"
        return RunError(f"step {state.step + 1} did not fit into {where}, but others did: {way}")
    dist.abandon(device)
    if found := largest(state, view, cfg.batch):
        return UsageError(f"--batch {cfg.batch} does not fit into {where}: --batch {found} does")
    return UsageError(f"{cfg.preset} is too large for {where}, even with --batch 1: {_less(cfg)}")


def _memory_of(device: torch.device) -> str:
    """`the 24 GB of NVIDIA ...`, and what of them others hold."""
    if device.type != "cuda":
        return f"the memory of this machine ({machine.device_name(device)})"
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    taken = f" ({in_bytes(others)} of which others hold)" if others > total / 10 else ""
    return f"the {in_bytes(total)} of {torch.cuda.get_device_name(device)}{taken}"


def _less(cfg: Config) -> str:
    ways = "choose smaller crops (--image-size)"
    if hasattr(cfg.backbone, "width"):
        ways += ", or a narrower net (--backbone.width)"
    if isinstance(cfg.method, MemoryBank) and cfg.method.bank_dtype == "fp32":
        ways += ", or --method.bank-dtype bf16"
    if cfg.placement != "pinned" and (cfg.data or "").rstrip("/").endswith(".pack"):
        ways += ", or --placement pinned"
    return ways


def largest(state: TrainState, view: View, batch: int) -> int | None:
    """The first of batch / 2, batch / 4, ... of which a step fits; None: not even one picture does.

    Talks to no other rank, which may be waiting or gone. Nothing stays of it but chosen kernels.
    """
    images = batch // 2
    while images and not _fits(state, view, images):
        images //= 2
    return images or None


def _fits(state: TrainState, view: View, images: int) -> bool:
    _free(state)
    try:
        _try_step(state, view, images)
    except RuntimeError as error:
        if not is_full(error):
            raise
        forget(error)
        return False
    finally:
        _free(state)
    return True


def _try_step(state: TrainState, view: View, images: int) -> None:
    """A step's forward and backward, beside what later steps hold: the gradients of the step before.

    The network as it stands, neither compiled nor under DDP, which need less or little more; the mean of its outputs
    as loss, since a loss takes next to nothing beside it.
    """
    net, device, was_training = state.method.net, state.device, state.method.net.training
    trained = [p for p in net.parameters() if p.requires_grad]
    gradients = [torch.empty_like(p) for p in trained]
    # the same numbers under other names: DDP listens to the parameters themselves, and would talk to other ranks
    own = {n: p.detach().requires_grad_(p.requires_grad) for n, p in net.named_parameters()}
    own |= {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    try:
        batch = random_batch(view, images, device)
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng([device] if device.type == "cuda" else []), eager:
            views = state.method.views(batch)
            with state.autocast():
                outputs = torch.func.functional_call(net, own, (views,))
        gradients.clear()
        leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
        torch.stack([t.float().mean() for t in leaves]).sum().backward()
    finally:
        net.train(was_training)


def _free(state: TrainState) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
