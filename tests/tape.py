"""A stand-in for CUDA's graphs on a CPU: notes each operator with the very tensors that it met, and runs it on them again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrot.core import Losses
from fastrot.training.graph import Cuda

ASKS = torch.ops.aten._local_scalar_dense.default  # .item(), bool(), int()
OF_HOST = torch.ops.aten.lift_fresh.default  # torch.tensor(...) of numbers


class Tape(TorchDispatchMode):
    """As on a GPU: recording leaves no trace in what was there before, what Python does and the numbers that it holds
    are those of the recording, a value that is asked for and a tensor made of the host's numbers are refused.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that was there, and what it held
        self.made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not ASKS, "a recorded step cannot ask for a value"
        assert func is not OF_HOST, "a recorded step cannot take numbers of the host's memory"
        for tensor in _tensors((args, kwargs)):
            memory = tensor.untyped_storage()
            if memory._cdata not in self.made and memory._cdata not in self.before:
                self.before[memory._cdata] = (memory, memory.clone())
        given = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(given)))
        self.made |= {t.untyped_storage()._cdata for t in _tensors(given)} - set(self.before)
        return given

    def undo(self) -> None:
        for memory, held in self.before.values():
            memory.copy_(held)
        self.before.clear()

    @torch.no_grad()
    def play(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results in self.calls:
                for held, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if held.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        held.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class TapeRecorder(Cuda):
    """What records and plays in fastrot.training.graph, with what became of it."""

    def __init__(self, *_):
        self.done: list[str] = []
        self.tape = Tape()

    def aside(self, step: Callable[[], Losses]) -> Losses:
        self.done.append("aside")
        return step()

    def record(self, step: Callable[[], Losses]) -> Losses:
        self.done.append("record")
        self.tape = Tape()
        with self.tape:
            losses = step()
        self.tape.undo()
        return losses

    def play(self) -> None:
        self.done.append("play")
        self.tape.play()
