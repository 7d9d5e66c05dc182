"""A network as named stages in a row, of which any may be read, and a classifier on it."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from fastrot.backbones.convolved import Convolved
from fastrot.config import UsageError
from fastrot.ops.rotate import SpaceToDepth


class Staged(nn.Module):
    """Stages run one after another; `channels` says how wide each one's output is.

    space_to_depth  the cells in which it would rather have its views than as [v, 3, s, s]; None: it takes these alone
    telling         the stage whose features say most of a picture's content; None: the last
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        channels: Mapping[str, int],
        space_to_depth: SpaceToDepth | None = None,
        telling: str | None = None,
    ):
        super().__init__()
        self.space_to_depth = space_to_depth
        self.stages = tuple(stages)
        self.channels = dict(channels)
        self.telling = telling or self.stages[-1]
        for name, stage in stages.items():
            self.add_module(name, stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.stages[-1:])[0]

    def outputs(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """What the named stages give, in the order of the request. Later stages are not run."""
        for name in names:
            if name not in self.stages:
                known = ", ".join(self.stages)
                raise UsageError(f"no stage is called {name!r}: choose from {known}")
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
        return [seen[name] for name in names]


class Classifier(nn.Module):
    """A linear layer on the trunk's last stage, behind a global average pool where that stage is a map."""

    def __init__(self, trunk: Staged, classes: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.channels[trunk.stages[-1]], classes)

    def forward(self, x: Float[Tensor, "v c s s"]) -> Float[Tensor, "v k"]:
        features = self.trunk(x)
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return self.head(features)


def scaled(channels: int, width: float) -> int:
    """A layer's channels in a network `width` times as wide."""
    return max(1, round(channels * width))
