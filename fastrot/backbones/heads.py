"""Heads that classify pictures by one stage of a trunk, as the papers' probes do (Gidaris 2018, Feng 2019).

Each takes the trunk, the stage, what stages give for one picture ([c, h, w] or [c], by name) and the number of classes, and
gives a module from a batch of the stage's outputs to logits [b, classes].
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import nn

from fastrot.backbones.nin import block
from fastrot.backbones.staged import Staged
from fastrot.config import UsageError

WIDEST = 2048  # numbers of a hidden layer of `mlp`
Shapes = Mapping[str, tuple[int, ...]]


def linear(trunk: Staged, stage: str, shapes: Shapes, classes: int) -> nn.Sequential:
    """Adaptive max pool (of a map), batch norm without weights, a linear layer."""
    channels, *sides = shapes[stage]
    if not sides:
        return _row(norm=nn.BatchNorm1d(channels, affine=False), out=nn.Linear(channels, classes))
    side = min(trunk.probed_side(stage, channels), *sides)
    return _row(
        pool=nn.AdaptiveMaxPool2d(side),
        norm=nn.BatchNorm2d(channels, affine=False),
        flatten=nn.Flatten(),
        out=nn.Linear(channels * side**2, classes),
    )


def nonlinear(trunk: Staged, stage: str, shapes: Shapes, classes: int) -> nn.Sequential:
    """All of the trunk that follows the stage, to be learnt anew, and a linear layer."""
    if stage not in trunk.stages or not trunk.in_a_row:
        raise UsageError(f"nothing follows {stage}: for it give --method.head linear, or mlp")
    behind = trunk.stages[trunk.stages.index(stage) + 1 :]
    layers = {name: copy.deepcopy(trunk.get_submodule(name)) for name in behind}
    last = trunk.stages[-1]
    if len(shapes[last]) > 1:
        layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return _row(**layers, out=nn.Linear(trunk.channels[last], classes))


def mlp(trunk: Staged, stage: str, shapes: Shapes, classes: int) -> nn.Sequential:
    """Three linear layers on the whole map, batch norm and ReLU between them; hidden ones of 20 numbers a class."""
    wide = min(20 * classes, WIDEST)
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for n, before in ((1, math.prod(shapes[stage])), (2, wide)):
        layers |= {f"fc{n}": nn.Linear(before, wide, bias=False), f"bn{n}": nn.BatchNorm1d(wide)}
        layers[f"relu{n}"] = nn.ReLU(inplace=True)
    return _row(**layers, out=nn.Linear(wide, classes))


def conv(trunk: Staged, stage: str, shapes: Shapes, classes: int) -> nn.Sequential:
    """A block of Network in Network on the map, its average, a linear layer."""
    channels, *sides = shapes[stage]
    if not sides:
        raise UsageError(f"{stage} is no map: for it give --method.head linear, or mlp")
    average = nn.AdaptiveAvgPool2d(1)
    return _row(
        block=block(channels, (channels, channels, channels), 3, None),
        average=average,
        flatten=nn.Flatten(),
        out=nn.Linear(channels, classes),
    )


HEADS: dict[str, Callable[[Staged, str, Shapes, int], nn.Sequential]] = {
    "linear": linear,
    "nonlinear": nonlinear,
    "mlp": mlp,
    "conv": conv,
}


def _row(**layers: nn.Module) -> nn.Sequential:
    """The layers in a row, begun as the papers' probes are: weights normal, of variance 2 / fan-out, biases at zero."""
    head = nn.Sequential(OrderedDict(layers))
    for layer in head.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:])
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head.requires_grad_()  # though a frozen trunk lent its layers
