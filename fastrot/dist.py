"""Rank and world, as torchrun or srun set them, and the only collectives in the house."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from fastrot import entry
from fastrot.config import PeerLost, RunError
from fastrot.entry import Preempted

# how gloo and NCCL say that another rank is gone
LOST = ("by peer", "by remote peer", "Broken pipe", "remote process", "was aborted")


@dataclass(frozen=True)
class Place:
    """Where this process stands among all."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on this machine: which GPU
    local_world: int = 1


def place() -> Place:
    """Of this process; one alone needs no launcher."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        local, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), local, local_world)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in env:
        tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
        local = int(env.get("SLURM_LOCALID", 0))
        return Place(int(env["SLURM_PROCID"]), tasks, local, tasks // nodes)
    return Place()


_patient: Any = None  # the group in which `everyones` waits; None: torch's own


def start(here: Place, device: torch.device, *, patience: timedelta | None = None) -> None:
    """Join the other processes: NCCL for GPU tensors, gloo for those in host memory.

    `patience`: how long `everyones` waits for a rank that has joined; None: torch's half hour, as to join.
    """
    global _patient
    if here.world == 1:
        return
    if "MASTER_ADDR" not in os.environ:  # srun: the first node, a port that follows from the job
        os.environ["MASTER_ADDR"] = _first_node(os.environ.get("SLURM_STEP_NODELIST", "localhost"))
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
    entry.met_others = True
    backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    distributed.init_process_group(backend, rank=here.rank, world_size=here.world, device_id=gpu)
    if patience is not None:
        _patient = distributed.new_group(backend="gloo", timeout=patience)


def stop(*, together: bool = False) -> None:
    """Leave the others; `together` waits for them first, as one that is still at it would fail; not after an error."""
    global _patient
    if distributed.is_initialized():
        if together:
            distributed.barrier()
        distributed.destroy_process_group()
        _patient = None


@contextlib.contextmanager
def joined(
    device: torch.device, again: str = "the same command goes on from the last checkpoint"
) -> Iterator[None]:
    """Among the other processes, from here to the end. Raises PeerLost where one is gone, which says `again`."""
    start(place(), device)
    together = False
    try:
        yield
        together = True
    except Preempted:
        together = True  # all ranks raise it, and rank 0 is the last to have saved
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and "killed" in str(error):
            raise RunError(
                f"a process that decodes was killed, perhaps for want of memory (then use fewer --workers): {again}"
            ) from error
        lost = isinstance(error, distributed.DistNetworkError) or any(x in str(error) for x in LOST)
        if lost and world() > 1 and not isinstance(error, RunError):
            raise PeerLost(
                f"another process of this run has ended: see what it says, and {again}"
            ) from error
        raise
    finally:
        stop(together=together)


def abandon(device: torch.device) -> None:
    """Give up what is under way with the others on a GPU: where one has failed it would never end."""
    if world() > 1 and device.type == "cuda":
        distributed.distributed_c10d._abort_process_group()


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        distributed.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on each of them."""
    if world() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def highest(number: int) -> int:
    """The highest of all ranks' numbers from 0 to 255, on each of them. One byte, through host memory."""
    if world() == 1:
        return number
    byte = torch.tensor([number], dtype=torch.uint8)
    distributed.all_reduce(byte, op=distributed.ReduceOp.MAX)
    return int(byte)


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks, one rank after the other: [n, ...] -> [world * n, ...]; n is the same on all."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def broadcast_(tensors: list[Tensor]) -> None:
    """Rank 0's values, written into every rank's tensors."""
    if world() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def everyones(value: Any) -> list[Any]:
    """Small values of all ranks, rank 0's first, on every rank. Raises RuntimeError where a rank is gone."""
    values = [value] * world()
    if world() > 1:
        distributed.all_gather_object(values, value, group=_patient)
    return values


def _first_node(nodes: str) -> str:
    """`gpu[07-09,12],cpu1` -> `gpu07`: the first name of SLURM's list."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match
    return match[1] + (match[2] or "")
