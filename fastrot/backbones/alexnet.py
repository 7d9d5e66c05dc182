"""AlexNet with batch norm and without groups, as RotNet and Rotation Feature Decoupling train it."""

from collections import OrderedDict
from typing import Any

from torch import nn

from fastrot import config
from fastrot.backbones.convolved import Convolved
from fastrot.backbones.space_to_depth import SpaceToDepthConv2d, space_to_depth_of
from fastrot.backbones.staged import Staged, scaled
from fastrot.config import UsageError

CHANNELS = (64, 192, 384, 256, 256)  # of conv1 ... conv5
HIDDEN = 4096  # of both layers of fc_block


class AlexNet(Staged):
    """Stages conv1 pool1 conv2 pool2 conv3 conv4 conv5 pool5 fc_block, each after its ReLU.

    The first convolution is padded by 2 pixels, as in the paper (11x11, stride 4) and for 5x5, and by
    half the kernel below that. fc_block's input is as wide as pool5 at `size` pixels a side makes it.
    With `space_to_depth` the first convolution takes cells of pixels as channels (space_to_depth.py), by the same weights.
    With `fuse`, in training, what stands between two convolutions is one op (convolved.py).
    """

    def __init__(
        self,
        size: int,
        *,
        channels: tuple[int, int, int, int, int] = CHANNELS,
        hidden: int = HIDDEN,
        kernel: int = 11,
        stride: int = 4,
        space_to_depth: bool = False,
        fuse: bool = False,
    ):
        padding = min(2, kernel // 2)
        c1, c2, c3, c4, c5 = channels
        side = pool5_side(size, kernel, stride)
        cells = space_to_depth_of(size, kernel, stride, padding) if space_to_depth else None
        first = SpaceToDepthConv2d if space_to_depth else nn.Conv2d
        stages = {
            "conv1": Convolved(first(3, c1, kernel, stride, padding), fuse),
            "pool1": nn.MaxPool2d(3, 2),
            "conv2": Convolved(nn.Conv2d(c1, c2, 5, 1, 2), fuse),
            "pool2": nn.MaxPool2d(3, 2),
            "conv3": Convolved(nn.Conv2d(c2, c3, 3, 1, 1), fuse),
            "conv4": Convolved(nn.Conv2d(c3, c4, 3, 1, 1), fuse),
            "conv5": Convolved(nn.Conv2d(c4, c5, 3, 1, 1), fuse),
            "pool5": nn.MaxPool2d(3, 2),
            "fc_block": _linears(c5 * side * side, hidden),
        }
        widths = (c1, c1, c2, c2, c3, c4, c5, c5, hidden)
        super().__init__(stages, dict(zip(stages, widths, strict=True)), cells)
        self.telling = "conv5"


def alexnet(cfg: config.AlexNet, size: int) -> AlexNet:
    """The network that the config describes, for images of `size` pixels a side."""
    c1, c2, c3, c4, c5 = (scaled(c, cfg.width) for c in CHANNELS)
    widths: dict[str, Any] = dict(channels=(c1, c2, c3, c4, c5), hidden=scaled(HIDDEN, cfg.width))
    forms: dict[str, Any] = dict(space_to_depth=cfg.space_to_depth, fuse=cfg.fuse)
    return AlexNet(size, kernel=cfg.kernel, stride=cfg.stride, **widths, **forms)


def pool5_side(size: int, kernel: int, stride: int) -> int:
    """Pixels a side of pool5: 6 at 224 pixels."""
    for name, value in {"kernel": kernel, "stride": stride}.items():
        if value < 1:
            raise UsageError(f"--backbone.{name} got {value}: it wants at least 1 pixel")
    padding = min(2, kernel // 2)
    least = 14 * stride + kernel - 2 * padding  # conv1 of 15, pool1 of 7, pool2 of 3, pool5 of 1
    if size < least:
        raise UsageError(
            f"--image-size got {size}: AlexNet with --backbone.kernel {kernel} and --backbone.stride "
            f"{stride} wants at least {least}; for smaller images try --backbone.kernel 5 "
            "--backbone.stride 2 (from 29 pixels), or the NIN presets"
        )
    side = (size + 2 * padding - kernel) // stride + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _linears(before: int, hidden: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for n, wide in ((1, before), (2, hidden)):
        layers[f"fc{n}"] = nn.Linear(wide, hidden, bias=False)
        layers[f"bn{n}"], layers[f"relu{n}"] = nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
    return nn.Sequential(layers)
