"""A network as named stages in a row, of which any may be read, and a classifier on it."""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from fastrot.backbones.convolved import Convolved
from fastrot.config import UsageError
from fastrot.ops.rotate import SpaceToDepth

HALVES = ("f1", "f2")  # of the last stage
LAST = "last"
PROBED = 9600  # numbers that a linear probe reads of a stage, about


class Staged(nn.Module):
    """Stages run one after another; `channels` says how wide each one's output is.

    space_to_depth  the cells in which it would rather have its views than as [v, 3, s, s]; None: it takes these alone
    telling         the stage whose features say most of a picture's content; None: the last
    probed          pixels a side of the maps that a linear probe reads, by stage, where not as many as give 9,600 numbers
    least           pixels a side of the smallest pictures that it should see

    Beside its stages it can be asked for `last`, the last one, and for `f1` and `f2`, the two halves of the last one: where Feature Decoupling has
    trained it, that which predicts the rotation, and that which is the same for all four.
    """

    in_a_row = True  # whether each stage is a module of its own that takes what the one before gave

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        channels: Mapping[str, int],
        space_to_depth: SpaceToDepth | None = None,
        telling: str | None = None,
        probed: Mapping[str, int] | None = None,
        least: int = 32,
    ):
        super().__init__()
        self.space_to_depth = space_to_depth
        self.stages = tuple(stages)
        self.channels = dict(channels)
        self.telling = telling or self.stages[-1]
        self.probed, self.least = dict(probed or {}), least
        for name, stage in stages.items():
            self.add_module(name, stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.stages[-1:])[0]

    def outputs(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """What the named stages give, in the order of the request. Later stages are not run."""
        asked, names = names, [self.check_stage(name) for name in names]
        seen = {}
        # no max(..., default=): torch 2.11 cannot trace it
        coming = list(self.stages[: 1 + max([-1, *(self.stages.index(name) for name in names)])])
        while coming:
            name = coming.pop(0)
            stage = self.get_submodule(name)
            after = self.get_submodule(coming[0]) if coming and name not in names else None
            if isinstance(stage, Convolved) and stage.joins(after):
                name, x = coming.pop(0), stage(x, pool=True)
            else:
                x = stage(x)
            seen[name] = x
        return self.of(asked, seen)

    def of(self, asked: Sequence[str], seen: Mapping[str, Tensor]) -> list[Tensor]:
        """What was asked for, halves of the last stage among it, of what stages have given."""
        last = self.stages[-1]
        return [
            seen[last].chunk(2, dim=1)[HALVES.index(each)]
            if each in HALVES
            else seen[self.check_stage(each)]
            for each in asked
        ]

    def check_stage(self, name: str) -> str:
        """The stage that gives what is called `name`: itself, or the last. Raises UsageError for another name."""
        if name in (*HALVES, LAST):
            return self.stages[-1]
        if name not in self.stages:
            known = ", ".join((*self.stages, *HALVES, LAST))
            raise UsageError(f"there is no stage {name!r}: choose from {known}")
        return name

    def probed_side(self, stage: str, channels: int) -> int:
        """Pixels a side to which a linear probe pools the maps of a stage."""
        return self.probed.get(self.check_stage(stage)) or max(1, math.isqrt(PROBED // channels))


class Classifier(nn.Module):
    """A linear layer on the trunk's last stage, behind a global average pool where that stage is a map."""

    def __init__(self, trunk: Staged, classes: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.channels[trunk.stages[-1]], classes)

    def forward(self, x: Float[Tensor, "v c s s"]) -> Float[Tensor, "v k"]:
        return self.head(pooled(self.trunk(x)))


def pooled(features: Float[Tensor, "v c ..."]) -> Float[Tensor, "v c"]:
    """The mean of maps; what is no map as it is."""
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features


def scaled(channels: int, width: float) -> int:
    """A layer's channels in a network `width` times as wide."""
    return max(1, round(channels * width))
