"""A convolution with batch norm and ReLU behind it, as one stage; in training these and a pool may be one op."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from fastrot.ops.norm import norm_relu


class Convolved(nn.Sequential):
    """Children conv, bn, relu, one after another.

    With `fuse`, in training, all behind the convolution is `ops.norm.norm_relu`: the convolution runs without its
    bias, which batch norm would take off again, and the bias gets a gradient of zero, which is what it has.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, conv: nn.Conv2d, fuse: bool = False):
        # the bias does nothing in front of batch norm, but the originals' weights have it
        norm = nn.BatchNorm2d(conv.out_channels)
        super().__init__(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU(inplace=True)))
        self.fuse = fuse

    def forward(self, input: Tensor, pool: bool = False) -> Tensor:
        """Views [V, C, S, S] through the three; with `pool` through a pool that `joins` said yes to as well."""
        if not self._fuses():
            assert not pool
            return super().forward(input)
        norm: Any = self.bn  # torch declares its statistics optional
        norm.num_batches_tracked.add_(1)
        affine, running = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
        how: Any = dict(shift=self.conv.bias, momentum=norm.momentum, eps=norm.eps, pool=pool)
        bare = self.conv._conv_forward(input, self.conv.weight, None)  # a subclass's own form too
        return norm_relu(bare, *affine, *running, **how)

    def joins(self, after: nn.Module | None) -> bool:
        """Whether `after` is a pool that forward can do too, now."""
        return (
            self._fuses()
            and isinstance(after, nn.MaxPool2d)
            and (after.kernel_size, after.stride, after.padding, after.dilation) == (3, 2, 0, 1)
            and not (after.ceil_mode or after.return_indices)
        )

    def _fuses(self) -> bool:
        return self.fuse and self.bn.training
