"""Rank and world, as torchrun or srun set them, and the only collectives in the house."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from fastrot import entry
from fastrot.config import PeerLost, RunError, UsageError
from fastrot.entry import Place, Preempted, number, place

HINT = 10  # seconds of waiting for the others until it is said
NAMED = 60  # seconds in which rank 0's machine gets its name, on Kubernetes as its pod comes up
# how gloo and NCCL say that another rank is gone
LOST = ("by peer", "by remote peer", "Broken pipe", "remote process", "was aborted")


_patient: Any = None  # the group in which `everyones` waits; None: torch's own


def start(here: Place, device: torch.device, *, patience: timedelta | None = None) -> None:
    """Join the other processes: NCCL for GPU tensors, gloo for those in host memory.

    `patience`: how long `everyones` waits for a rank that has joined; None: torch's half hour, as to join.
    """
    global _patient
    if here.world == 1:
        return
    # DDP imports it; imported behind the group it keeps that for ever, and gloo's threads abort the end of some processes
    from torch import _dynamo  # noqa: F401

    where = _meeting_place(here)
    entry.met_others = True
    backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    waits = f"rank {here.rank} of {here.world} waits for the others at {where}"
    hint = threading.Timer(HINT, entry.say, [f"{waits}: {entry.ALONE}"])
    hint.daemon = True
    hint.start()
    try:
        distributed.init_process_group(
            backend, rank=here.rank, world_size=here.world, device_id=gpu
        )
    except (distributed.DistNetworkError, distributed.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UsageError(f"MASTER_PORT: {where} is taken: choose another port") from None
        raise RunError(f"{waits}, who did not come: {entry.ALONE}") from error
    finally:
        hint.cancel()
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


def _meeting_place(here: Place) -> str:
    """Of all processes, ADDRESS:PORT; srun names none: the first node, a port that follows from job and step."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env:
        env.setdefault("MASTER_ADDR", _first_node(env["SLURM_STEP_NODELIST"]))
        step = number("SLURM_JOB_ID", 0) + number("SLURM_STEP_ID", 0)
        env.setdefault("MASTER_PORT", str(20000 + step % 20000))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UsageError(f"{here.world} processes, but {name} is not set: {entry.ALONE}")
    address, port = env["MASTER_ADDR"], number("MASTER_PORT")
    if not 0 < port < 2**16:
        raise UsageError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535")
    end = time.monotonic() + (NAMED if here.rank else 0)
    while True:
        try:
            socket.getaddrinfo(address, port)
            return f"{address}:{port}"
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                why = f"MASTER_ADDR={address} is not known here ({error})"
                raise UsageError(f"{why}: name the machine of rank 0") from None
        time.sleep(1)


def _first_node(nodes: str) -> str:
    """`gpu[07-09,12],cpu1` -> `gpu07`: the first name of SLURM's list."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert match
    return match[1] + (match[2] or "")
