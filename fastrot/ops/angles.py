"""uint8 crops -> copies rotated by any angles, none of which shows by how it was made which one it is.

Shapes.  images uint8 [B, S, S, 3], S of 24 or more; V angles. Out uint8 [B*V, S, S, 3]: row V*i + v is image i rotated degrees[v]
         counter-clockwise.
Maths.   Each copy shows the centred square of side (S - 1 - 2 REACH) / sqrt(2) pixels, enlarged to S. Its pixel is the mean of
         the image's pixels around the place where it falls, weighted by a Gaussian of standard deviation 1 pixel, rounded.
Idea.    Bilinear and bicubic kernels are squares that turn with the image: a linear classifier tells 0 from 45 degrees by
         spectra of noise. A Gaussian is the same in all directions, and REACH keeps it off the border in all corners.
Bytes.   The places and weights of an angle are the same for all images: a sum of (2 REACH)^2 rows of B*3 numbers a pixel.
"""

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor
from torch.nn import functional as F

from fastrot.ops.rows import misfit

SMALLEST = 24  # pixels a side: of a smaller image too little would be seen
REACH = 4  # pixels to each side that the kernel reads: at 3 its own edges tell the angle


def rotated_by(
    images: UInt8[Tensor, "b s s 3"], degrees: Sequence[int]
) -> UInt8[Tensor, "w s s 3"]:
    """Every angle of every crop, image-major. No gradient; the same bits each time on one kind of device."""
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != torch.uint8 or not square or images.shape[1] < SMALLEST:
        raise misfit(
            "images are", images, f"square ones, torch.uint8 [B, S, S, 3], S >= {SMALLEST}"
        )
    size = images.shape[1]
    places, weights = _taps(size, tuple(degrees), images.device)
    # a row of `pixels`: the colours of all images there
    pixels = images.permute(1, 2, 0, 3).reshape(size * size, -1).float()
    found = F.embedding_bag(places, pixels, per_sample_weights=weights, mode="sum")
    copies = found.round().to(torch.uint8).view(len(degrees), size, size, len(images), 3)
    return copies.permute(3, 0, 1, 2, 4).flatten(0, 1).contiguous()


@functools.lru_cache(maxsize=8)
def _taps(
    size: int, degrees: tuple[int, ...], device: torch.device
) -> tuple[Int32[Tensor, "p t"], Float[Tensor, "p t"]]:
    """Of each pixel of each copy: which pixels of the image it is the mean of, and their weights."""
    side = (size - 1 - 2 * REACH) / math.sqrt(2)
    steps = ((torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5) * side
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()[:, None, None]
    middle, near = (size - 1) / 2, torch.arange(1 - REACH, REACH + 1)
    y = (middle + angle.cos() * down + angle.sin() * right).flatten()[:, None]
    x = (middle - angle.sin() * down + angle.cos() * right).flatten()[:, None]
    rows, columns = y.floor().long() + near, x.floor().long() + near
    heavy = [torch.exp(-((at - where) ** 2) / 2) for at, where in ((rows, y), (columns, x))]
    weights = torch.einsum("pi,pj->pij", *heavy).flatten(1)
    places = (rows[:, :, None] * size + columns[:, None]).flatten(1).int()
    return places.to(device), (weights / weights.sum(1, keepdim=True)).float().to(device)
