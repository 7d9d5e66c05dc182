"""AlexNet with batch norm and without groups, as RotNet and Rotation Feature Decoupling train it."""

from collections import OrderedDict

from torch import nn

from fastrot import config
from fastrot.backbones.convolved import Convolved
from fastrot.backbones.space_to_depth import SpaceToDepthConv2d, space_to_depth_of
from fastrot.backbones.staged import Staged, scaled
from fastrot.config import UsageError

CHANNELS = (64, 192, 384, 256, 256)  # of conv1 ... conv5
HIDDEN = 4096  # of both layers of fc_block
# pixels a side of what linear probes read: 9,216 to 9,600 numbers of the full width
PROBED = {"conv1": 12, "conv2": 7, "conv3": 5, "conv4": 6, "conv5": 6, "pool1": 12, "pool2": 7}


def alexnet(
    cfg: config.AlexNet, size: int, channels: tuple[int, ...] = CHANNELS, hidden: int = HIDDEN
) -> Staged:
    """For images of `size` pixels a side. Stages conv1 pool1 ... pool5 fc_block, each after its ReLU; with `last` conv5 those up to it.

    The first convolution is padded by 2 pixels, as in the paper (11x11, stride 4) and for 5x5, and by
    half the kernel below that. `space_to_depth` is done by space_to_depth.py, `fuse` by convolved.py.
    """
    c1, c2, c3, c4, c5, hidden = (scaled(c, cfg.width) for c in (*channels, hidden))
    side, fuse = pool5_side(size, cfg.kernel, cfg.stride), bool(cfg.fuse)
    conv1 = (cfg.kernel, cfg.stride, min(2, cfg.kernel // 2))
    cells = space_to_depth_of(size, *conv1) if cfg.space_to_depth else None
    first = SpaceToDepthConv2d if cfg.space_to_depth else nn.Conv2d
    stages = {
        "conv1": Convolved(first(3, c1, *conv1), fuse),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": Convolved(nn.Conv2d(c1, c2, 5, 1, 2), fuse),
        "pool2": nn.MaxPool2d(3, 2),
        "conv3": Convolved(nn.Conv2d(c2, c3, 3, 1, 1), fuse),
        "conv4": Convolved(nn.Conv2d(c3, c4, 3, 1, 1), fuse),
        "conv5": Convolved(nn.Conv2d(c4, c5, 3, 1, 1), fuse),
    }
    if cfg.last == "fc_block":
        stages |= {"pool5": nn.MaxPool2d(3, 2), "fc_block": _linears(c5 * side * side, hidden)}
    widths = dict(zip(stages, (c1, c1, c2, c2, c3, c4, c5, c5, hidden), strict=False))
    least = smallest(cfg.kernel, cfg.stride)
    return Staged(stages, widths, cells, telling="conv5", probed=PROBED, least=least)


def pool5_side(size: int, kernel: int, stride: int) -> int:
    """Pixels a side of pool5: 6 at 224 pixels."""
    for name, value in {"kernel": kernel, "stride": stride}.items():
        if value < 1:
            raise UsageError(f"--backbone.{name} got {value}: it wants at least 1 pixel")
    padding, least = min(2, kernel // 2), smallest(kernel, stride)
    if size < least:
        wants = f"AlexNet of kernel {kernel} and stride {stride} wants at least {least}"
        smaller = (
            "for less try --backbone.kernel 5 --backbone.stride 2 (from 29), or the NIN presets"
        )
        raise UsageError(f"--image-size got {size}: {wants}; {smaller}")
    side = (size + 2 * padding - kernel) // stride + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def smallest(kernel: int, stride: int) -> int:
    """Pixels a side of the smallest pictures: conv1 of 15, pool1 of 7, pool2 of 3, pool5 of 1."""
    return 14 * stride + kernel - 2 * min(2, kernel // 2)


def _linears(before: int, hidden: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for n, wide in ((1, before), (2, hidden)):
        layers[f"fc{n}"] = nn.Linear(wide, hidden, bias=False)
        layers[f"bn{n}"], layers[f"relu{n}"] = nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
    return nn.Sequential(layers)
