"""Networks by their names, with random weights: six layers without residuals, some of torchvision, any of timm.

Each has stages from fine maps to coarse ones, and last `embedding`, [v, d]: in timm's what its head reads, else the mean of the last map.
"""

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrot import config
from fastrot.backbones.convolved import Convolved
from fastrot.backbones.staged import Staged
from fastrot.config import UsageError

EMBEDDING = "embedding"
SIX = ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2))  # channels and stride of each layer
TIMM = "timm/"
DROPOUTS = (nn.Dropout, nn.Dropout2d)


def named(cfg: config.Named, size: int) -> Staged:
    """The network `cfg.name`, for images of `size` pixels a side. Raises UsageError for a name that nobody has."""
    if cfg.name.startswith(TIMM):
        return TimmNet(cfg.name.removeprefix(TIMM), size)
    if cfg.name not in NETS:
        known = ", ".join(NETS)
        raise UsageError(f"--backbone.name got {cfg.name}: choose from {known}, or timm/NAME")
    stages = NETS[cfg.name]()
    stages[EMBEDDING] = _layers(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return Staged(stages, _widths(stages, size))


def six_layer() -> dict[str, nn.Module]:
    """Six convolutions of 3x3, each with batch norm and ReLU, 107 thousand weights: the plain net of the object- and scene-centric study."""
    stages, before = {}, 3
    for n, (after, stride) in enumerate(SIX, 1):
        stages[f"conv{n}"] = Convolved(nn.Conv2d(before, after, 3, stride, 1, bias=False))
        before = after
    return stages


def resnet(name: str) -> dict[str, nn.Module]:
    net: Any = _of_torchvision(name)
    stages = {"conv1": _layers(conv1=net.conv1, bn1=net.bn1, relu=net.relu), "pool1": net.maxpool}
    return stages | {f"layer{n}": net.get_submodule(f"layer{n}") for n in (1, 2, 3, 4)}


def inverted_residuals(name: str, begins: Sequence[int], **how: Any) -> dict[str, nn.Module]:
    """Of MobileNets and EfficientNets: conv1, layer1 ... layer4, conv2, which begin at these of its blocks."""
    blocks: Any = _of_torchvision(name, **how).features
    names = ("conv1", "layer1", "layer2", "layer3", "layer4", "conv2")
    ends = (*begins[1:], len(blocks))
    return {n: blocks[i:j] for n, i, j in zip(names, begins, ends, strict=True)}


# stages of each are maps of a half, a quarter, ... of the picture's side; conv2, before the average, is as coarse as layer4
NETS: Mapping[str, Callable[[], dict[str, nn.Module]]] = {
    "six-layer": six_layer,
    "mobilenet_v2": lambda: inverted_residuals("mobilenet_v2", (0, 2, 4, 7, 14, 18)),
    # no block is left out at random: ranks and restarts would each draw others
    "efficientnet_b0": lambda: inverted_residuals(
        "efficientnet_b0", (0, 2, 3, 4, 6, 8), stochastic_depth_prob=0.0
    ),
    "resnet18": lambda: resnet("resnet18"),
    "resnet50": lambda: resnet("resnet50"),
}


OF_TORCHVISION = tuple(name for name in NETS if name != "six-layer")


def library_names(trunk: Staged) -> dict[str, Tensor]:
    """The weights of a trunk that is torchvision's, by the names of torchvision: the stage is `features`, or nothing for conv1 of a ResNet."""
    features = "conv2" in trunk.stages
    named = {}
    for name, value in trunk.state_dict().items():
        inside = name.partition(".")[2]
        named[f"features.{inside}" if features else name.removeprefix("conv1.")] = value
    return named


class TimmNet(Staged):
    """A network of timm: its `feature_info` names the stages, `forward_intermediates` gives them as maps."""

    in_a_row = False

    def __init__(self, name: str, size: int):
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            way = 'type  pip install "fastrot[timm]"'
            raise UsageError(f"--backbone.name {TIMM}{name} wants timm ({error}): {way}") from None
        try:
            # those of a fixed size, as transformers are, are told it
            fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
            net = timm.create_model(name, num_classes=0, **({"img_size": size} if fixed else {}))
            with torch.no_grad():  # one picture tells what each stage gives
                last, maps = net.eval().forward_intermediates(torch.zeros(1, 3, size, size))
                last = net.forward_head(last)
            names = [each["module"].replace(".", "_") for each in net.feature_info]
            found = dict(zip(names, maps, strict=True))
            if not all(names) or len(found) < len(names) or last.ndim != 2:
                raise ValueError("its stages have no names of their own")
        except Exception as error:  # timm's nets each fail in a way of their own
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            way = "name another of timm.list_models(), or another --image-size"
            told = f"--backbone.name {TIMM}{name} gives no stages of {size} pixels ({why}): {way}"
            raise UsageError(told) from None
        for each in net.modules():  # ranks and restarts would each drop others
            for drop in ("drop_prob", "drop_rate", "p" if isinstance(each, DROPOUTS) else ""):
                if isinstance(getattr(each, drop, None), float):
                    setattr(each, drop, 0.0)
        channels = {stage: each.shape[1] for stage, each in found.items()}
        super().__init__({EMBEDDING: nn.Identity()}, channels | {EMBEDDING: last.shape[1]})
        self.net, self.maps = net.train(), tuple(found)
        self.stages = (*self.maps, EMBEDDING)

    def outputs(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """See Staged. Without the embedding later stages are not run."""
        asked = [self.check_stage(name) for name in names]
        net: Any = self.net
        last = EMBEDDING in asked
        wanted = [self.maps.index(name) for name in self.maps if name in asked]
        if not wanted:
            return self.of(names, {EMBEDDING: net(x)} if asked else {})
        found = net.forward_intermediates(
            x, indices=wanted, stop_early=not last, intermediates_only=not last
        )
        maps = found[1] if last else found
        seen = dict(zip((self.maps[i] for i in wanted), maps, strict=True))
        if last:
            seen[EMBEDDING] = net.forward_head(found[0])
        return self.of(names, seen)


def _of_torchvision(name: str, **how: Any) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, **how)


def _layers(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _widths(stages: Mapping[str, nn.Module], size: int) -> dict[str, int]:
    """Channels of each stage's output: by a copy without numbers."""
    x, widths = torch.empty(1, 3, size, size, device="meta"), {}
    for name, stage in stages.items():
        x = copy.deepcopy(stage).to("meta").eval()(x)
        widths[name] = x.shape[1]
    return widths
