"""Network in network for 32x32 pictures, as RotNet trains it on CIFAR-10."""

from collections import OrderedDict

from torch import nn

from fastrot import config
from fastrot.backbones.convolved import Convolved
from fastrot.backbones.staged import Staged, scaled
from fastrot.config import UsageError

CHANNELS = (192, 160, 96)  # of most layers, of the first block's second and of its third


def nin(cfg: config.Nin, size: int, channels: tuple[int, int, int] = CHANNELS) -> Staged:
    """Stages conv1 ... convN of one wide and two pointwise convolutions each; no head, any size of image.

    The first block ends in a max pool and the second in an average pool that counts its padding; so does
    the third with `pool_conv3`, where a fourth follows.
    """
    if cfg.stages < 3:
        raise UsageError(f"--backbone.stages got {cfg.stages}: it wants at least 3")
    wide, middle, narrow = (scaled(c, cfg.width) for c in channels)
    blocks = {
        "conv1": block(3, (wide, middle, narrow), 5, nn.MaxPool2d(3, 2, 1)),
        "conv2": block(narrow, (wide, wide, wide), 5, nn.AvgPool2d(3, 2, 1)),
    }
    for n in range(3, cfg.stages + 1):
        pooled = n == 3 and cfg.stages > 3 and cfg.pool_conv3
        pool = nn.AvgPool2d(3, 2, 1) if pooled else None
        blocks[f"conv{n}"] = block(wide, (wide, wide, wide), 3, pool)
    widths = {name: narrow if name == "conv1" else wide for name in blocks}
    return Staged(
        blocks, widths, telling="conv2", least=16
    )  # later blocks know rotations better than content


def block(
    before: int, after: tuple[int, int, int], kernel: int, pool: nn.Module | None
) -> nn.Sequential:
    """A convolution and two pointwise ones, each with batch norm and ReLU, `after` channels wide; then the pool."""
    wide, point1, point2 = after
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        wide=Convolved(nn.Conv2d(before, wide, kernel, padding=kernel // 2, bias=False)),
        point1=Convolved(nn.Conv2d(wide, point1, 1, bias=False)),
        point2=Convolved(nn.Conv2d(point1, point2, 1, bias=False)),
    )
    return nn.Sequential(layers if pool is None else layers | {"pool": pool})
