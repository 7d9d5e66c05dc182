"""Checkpoints beside training: the state is copied between two steps, and a thread writes the copy."""

import concurrent.futures
import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrot import entry
from fastrot.training import checkpoint


class Writer:
    """Writes one state at a time. The host memory of its copy is kept for the next: new pages cost as much as the copy."""

    def __init__(
        self, device: torch.device, unhurried: Callable[[], contextlib.AbstractContextManager]
    ):
        """`device`: of the state; `unhurried`: entered while files are written."""
        self._device, self._unhurried = device, unhurried
        self._held: dict[int, Tensor] = {}  # the copies, by their place in the state
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: concurrent.futures.Future[None] | None = None

    def begin(self, state: dict[str, Any], paths: list[Path]) -> None:
        """Write plain values and tensors, as they are now, under one path after the other.

        Waits for the state before, not for the device; raises what went wrong with that one. Tensors in host memory of
        a run on a GPU were made for this and are taken over.
        """
        self.wait()
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        memo = {id(tensor): self._in_host(k, tensor) for k, tensor in enumerate(tensors)}
        state, copied = copy.deepcopy(state, memo), lambda: None
        if self._device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self._device))
            copied = event.synchronize
        self._under_way = self._thread.submit(self._write, state, paths, copied)

    def check(self) -> bool:
        """Whether files are being written. Raises what went wrong with those before; waits for nothing."""
        if self._under_way is not None and self._under_way.done():
            self.wait()
        return self._under_way is not None

    def wait(self) -> None:
        """Until all is on disk. Raises what went wrong, once."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def wait_beside(self) -> None:
        """Wait where something else has gone wrong, which is told by others: what did here is said."""
        try:
            self.wait()
        except Exception as error:
            entry.say(entry.describe(error))

    def _in_host(self, k: int, tensor: Tensor) -> Tensor:
        """Its copy there, which is whole once the device has come to it."""
        if tensor.device.type != self._device.type:
            return tensor
        held = self._held.get(k)
        like = (tensor.shape, tensor.dtype, tensor.stride())
        if held is None or (held.shape, held.dtype, held.stride()) != like:
            on_gpu = self._device.type == "cuda"
            held = self._held[k] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        held.copy_(tensor, non_blocking=True)
        return held

    def _write(self, state: dict[str, Any], paths: list[Path], copied: Callable[[], None]) -> None:
        with self._unhurried():
            copied()
            for path in paths:
                checkpoint.save(path, state)
