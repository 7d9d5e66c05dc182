"""Nine patches of each crop, in any order: what a jigsaw puzzle shows.

Shapes.  images uint8 [B, C, C, 3]; order and shift int64 [B, 9] and [B, 9, 2]; out uint8 [9 B, S, S, 3], image-major, place by place.
Maths.   The crop is cut in 3 x 3 cells of C // 3 pixels, numbered row by row. Place k shows cell order[k], and of it the S x S pixels that
         begin shift[order[k]] = (y, x) pixels inside, which are 0 up to C // 3 - S.
Idea.    An address for each pixel, so that no image is looked at by itself.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

CELLS = 9
ACROSS = 3


def patches(
    images: UInt8[Tensor, "b c c 3"],
    order: Int64[Tensor, "b 9"],
    shift: Int64[Tensor, "b 9 2"],
    side: int,
) -> UInt8[Tensor, "n s s 3"]:
    """Patches of `side` pixels, [9 b, side, side, 3], as `order` shows them. Its numbers are not looked at, which would wait."""
    b, c = images.shape[:2]
    moved = shift.gather(1, order[:, :, None].expand(-1, -1, 2))
    corner = torch.stack([order // ACROSS, order % ACROSS], dim=2) * (c // ACROSS) + moved
    inside = torch.arange(side, device=images.device)
    y, x = (corner[:, :, axis, None] + inside for axis in (0, 1))  # [b, 9, side]
    image = torch.arange(b, device=images.device)[:, None, None, None]
    return images[image, y[:, :, :, None], x[:, :, None, :]].flatten(0, 1)
