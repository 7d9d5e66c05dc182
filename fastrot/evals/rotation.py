"""What a network says of pictures' rotations: probabilities of the four, and how often it is right."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.utils._pytree import tree_map

from fastrot import dist
from fastrot.core import Batch, Method
from fastrot.data.loader import Loader
from fastrot.methods.rotation_table import ROTATIONS


@torch.no_grad()
def rotation_guesses(method: Method, batch: Batch) -> Float[Tensor, "b 4 4"] | None:
    """Probabilities [picture, rotation it was given, rotation the net says], on the CPU in float32.

    None for a method that does not guess rotations. The net is left in the mode that it was in.
    """
    logits = _logits(method, batch)
    return None if logits is None else logits.softmax(dim=2).cpu()


@dataclass(frozen=True)
class Answers:
    """What nets said of the rows of a data set; zeros where nothing was asked, or a picture cannot be read."""

    probabilities: Float32[np.ndarray, "rows 4 4"]  # row, rotation given, rotation the net says
    right: UInt8[np.ndarray, "rows 4"]  # 1: the likeliest is the rotation that it was given
    asked: UInt8[np.ndarray, " rows"]

    @classmethod
    def none_yet(cls, rows: int) -> "Answers":
        return cls(
            np.zeros((rows, ROTATIONS, ROTATIONS), np.float32),
            np.zeros((rows, ROTATIONS), np.uint8),
            np.zeros(rows, np.uint8),
        )

    def of_all_ranks(self) -> "Answers":
        """Called on all ranks, whose shares do not overlap: each number is exact."""
        mine = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Answers(*(dist.sum_over_ranks(torch.from_numpy(each)).numpy() for each in mine))


@torch.no_grad()
def ask(
    method: Method, loader: Loader, answers: Answers, asked: Callable[[int], None] = lambda _: None
) -> None:
    """Ask a method that predicts rotations about this rank's share of a view in data order.

    `asked` hears how many pictures a batch had.
    """
    for batch in loader.epoch(0):
        logits = _logits(method, _filled(batch, loader.batch))
        assert logits is not None
        logits, rows = logits[: len(batch.index)], batch.index.cpu().numpy()
        right = logits.argmax(dim=2) == torch.arange(ROTATIONS, device=logits.device)
        answers.probabilities[rows] = logits.softmax(dim=2).cpu().numpy()
        answers.right[rows] = right.cpu().numpy()
        answers.asked[rows] = 1
        asked(len(rows))


def exactly() -> contextlib.AbstractContextManager[None]:
    """Convolutions in full float32, by algorithms that give the same bits each time."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _logits(method: Method, batch: Batch) -> Float[Tensor, "b 4 4"] | None:
    training = method.net.training
    method.net.eval()
    outputs = method.net(tree_map(Tensor.float, method.views(batch)))
    method.net.train(training)
    logits = method.rotation_logits(outputs)
    return None if logits is None else logits.float().unflatten(0, (-1, ROTATIONS))


def _filled(batch: Batch, size: int) -> Batch:
    """A batch of `size`, its last picture repeated: libraries may choose by shape how they add up."""
    places = torch.arange(size, device=batch.index.device).clamp(max=len(batch.index) - 1)
    return Batch(
        tuple(crop[places.to(crop.device)] for crop in batch.crops),
        batch.index[places],
        batch.label[places],
        batch.epoch_step,
    )
