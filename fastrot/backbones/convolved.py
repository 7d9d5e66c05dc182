"""A convolution with batch norm and ReLU behind it, as one stage; in training these and a pool may be one op."""

from collections import OrderedDict

from torch import Tensor, nn

from fastrot.ops.norm import norm_relu


class Convolved(nn.Sequential):
    """Children conv, bn, relu, one after another.

    With `fuse`, in training, all behind the convolution is `ops.norm.norm_relu`: the convolution runs without its
    bias, which batch norm would take off again, and the bias gets a gradient of zero, which is what it has.
    """

    def __init__(self, conv: nn.Conv2d):
        # the bias does nothing in front of batch norm, but the originals' weights have it
        norm = nn.BatchNorm2d(conv.out_channels)
        super().__init__(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU(inplace=True)))
        self.fuse = False  # AlexNet sets it, of all its stages

    def forward(self, input: Tensor, pool: bool = False) -> Tensor:
        """Views [V, C, S, S] through the three; with `pool` through a pool that `joins` said yes to as well."""
        if not self._fuses():
            assert not pool
            return super().forward(input)
        conv, norm = self.get_submodule("conv"), self.get_submodule("bn")
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        return norm_relu(
            without_bias(conv, input),
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            shift=conv.bias,
            momentum=norm.momentum,
            eps=norm.eps,
            pool=pool,
        )

    def joins(self, after: nn.Module) -> bool:
        """Whether `after` is a pool that forward can do too, now."""
        return (
            self._fuses()
            and isinstance(after, nn.MaxPool2d)
            and (after.kernel_size, after.stride, after.padding, after.dilation) == (3, 2, 0, 1)
            and not (after.ceil_mode or after.return_indices)
        )

    def _fuses(self) -> bool:
        return self.fuse and self.get_submodule("bn").training


def without_bias(conv: nn.Conv2d, views: Tensor) -> Tensor:
    """What a convolution, or a subclass with a `_conv_forward` of its own, gives before its bias is added."""
    return conv._conv_forward(views, conv.weight, None)
