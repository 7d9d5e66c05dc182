"""Buffers for crops, used again as soon as nobody can see them: saves the page faults of fresh memory."""

import math
import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fastrot.core import CropRequest

KEPT = 8  # free buffers of one size; what is beyond goes back to the system


class Ring:
    """Host memory for the crops of a batch.

    On the CPU a tensor shares memory with a numpy view made for it alone. Torch holds that view for as long
    as any tensor shares its storage, so when the view dies the buffer under it can be handed out again, and
    not before: whoever keeps a Batch keeps its pixels. Pinned memory is recycled by torch's own allocator,
    which also waits for copies under way.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = {}  # by size in bytes

    def buffers(self, request: CropRequest, *, pinned: bool = False) -> tuple[Tensor, ...]:
        """A buffer of any content for each crop of a batch."""
        images = len(request.rows[0])
        return tuple(self.take(images, size, pinned=pinned) for size in request.sizes)

    def take(self, images: int, size: int, *, pinned: bool = False) -> UInt8[Tensor, "b s s 3"]:
        """A buffer of any content."""
        shape = (images, size, size, 3)
        if pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        free = self._free.setdefault(math.prod(shape), deque(maxlen=KEPT))
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(math.prod(shape), np.uint8)
        view = buffer.reshape(shape)
        weakref.finalize(view, free.append, buffer).atexit = False
        return torch.from_numpy(view)
