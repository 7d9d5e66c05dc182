"""A strided convolution done as one of stride 1 over cells of pixels: the same sum in a form that matrix units like.

Shapes.  Kernel K, stride D, padding P; T = ceil(K / D) cells a side of the kernel; weight [O, C, K, K]; views [V, C, S, S] or,
         in cells (ops/rotate.py), [V, D D C, n, n]; out [V, O, m, m], m = (S + 2 P - K) // D + 1 = n - T + 1.
Maths.   out[o, i, j] = sum over c, y, x of weight[o, c, y, x] * padded view[c, D i + y, D j + x]. With y = D t + y', y' < D,
         pixel D i + y is pixel y' of cell i + t; where y is K or more the weight is 0. So the same products are summed,
         and T T D D - K K products with 0 a colour: for AlexNet's 11 x 11 of stride 4, 3 x 3 over 48 channels, 144 for 121.
Bytes.   The weight is padded and rearranged at each call, 3 O (T D)**2 numbers (28 thousand in AlexNet), with its gradient.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot.ops.rotate import SpaceToDepth


class SpaceToDepthConv2d(nn.Conv2d):
    """`nn.Conv2d` of a square kernel: the same parameters and results, computed in cells of `stride` pixels a side.

    Takes views as nn.Conv2d does, or in cells already. A stride of 1 has cells of one pixel: there it is nn.Conv2d.
    """

    # what forward calls, so that whoever calls it with another bias has this form too
    def _conv_forward(
        self, input: Float[Tensor, "v c s s"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "v o m m"]:
        if input.shape[1] == self.in_channels:
            kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
            space_to_depth = space_to_depth_of(input.shape[-1], kernel, stride, padding)
            if space_to_depth is None:
                return super()._conv_forward(input, weight, bias)
            input = space_to_depth(input)
        return F.conv2d(input, space_to_depth_weight(weight, self.stride[0]), bias)


def space_to_depth_of(size: int, kernel: int, stride: int, padding: int) -> SpaceToDepth | None:
    """Which cells of views of `size` pixels such a convolution reads; None at a stride of 1: the pixels themselves."""
    if stride == 1:
        return None
    out = (size + 2 * padding - kernel) // stride + 1
    return SpaceToDepth(stride, padding, out + math.ceil(kernel / stride) - 1)


def space_to_depth_weight(weight: Float[Tensor, "o c k k"], side: int) -> Float[Tensor, "o d t t"]:
    """The weight [O, C, K, K] of a stride of `side` as the one over cells, [O, side * side * C, T, T]; channels_last."""
    kernel = weight.shape[-1]
    taps = math.ceil(kernel / side)
    more = taps * side - kernel
    padded = F.pad(weight, (0, more, 0, more))
    each = padded.unflatten(3, (taps, side)).unflatten(2, (taps, side))  # [O, C, T, D, T, D]
    return each.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)
