"""A network as named stages in a row, of which any may be read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastrot.backbones.convolved import Convolved
from fastrot.config import UsageError
from fastrot.ops.rotate import SpaceToDepth


class Staged(nn.Module):
    """Stages run one after another; `channels` says how wide each one's output is.

    space_to_depth  the cells in which it would rather have its views than as [v, 3, s, s]; None: it takes these alone
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        channels: Mapping[str, int],
        space_to_depth: SpaceToDepth | None = None,
    ):
        super().__init__()
        self.space_to_depth = space_to_depth
        self.stages = tuple(stages)
        self.channels = dict(channels)
        for name, stage in stages.items():
            self.add_module(name, stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.stages[-1:])[0]

    def outputs(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """What the named stages give, in the order of the request. Later stages are not run."""
        for name in names:
            if name not in self.stages:
                raise UsageError(
                    f"no stage is called {name!r}: choose from {', '.join(self.stages)}"
                )
        seen = {}
        coming = list(self.stages[: max(map(self.stages.index, names), default=-1) + 1])
        while coming:
            name = coming.pop(0)
            stage = self.get_submodule(name)
            if name not in names and coming and joined(stage, self.get_submodule(coming[0])):
                name, x = coming.pop(0), stage(x, pool=True)
            else:
                x = stage(x)
            seen[name] = x
        return [seen[name] for name in names]


def joined(stage: nn.Module, after: nn.Module) -> bool:
    """Whether the first stage can do the second's work with its own."""
    return isinstance(stage, Convolved) and stage.joins(after)


def scaled(channels: int, width: float) -> int:
    """A layer's channels in a network `width` times as wide."""
    return max(1, round(channels * width))


def fitted(
    state: Mapping[str, Any],
    rename: Callable[[str], str | None],
    net: nn.Module,
    convolutions_only: bool,
) -> dict[str, Tensor]:
    """An original code's weights under our names, checked against `net`: a trunk, or a Classifier round one.

    A trunk leaves out the original's classifier. With `convolutions_only` the result lacks whatever
    follows the convolutions, so it is loaded with `strict=False`.
    """
    own = net.state_dict()
    whole = any(key.startswith("trunk.") for key in own)
    state = state.get("network", state)  # the originals' checkpoint files hold more than weights
    found, strange = {}, []
    for key, value in state.items():
        name = rename(key.removeprefix("module."))  # DataParallel's prefix
        if name is None:
            strange.append(key)
        elif whole:
            found[name if name.startswith("head.") else f"trunk.{name}"] = value
        elif not name.startswith("head."):
            found[name] = value
    if convolutions_only:
        found = {k: v for k, v in found.items() if k.removeprefix("trunk.").startswith("conv")}
        own = {k: v for k, v in own.items() if k.removeprefix("trunk.").startswith("conv")}
    strange += [k for k in found if k not in own]
    strange += [k for k in own if k not in found and not k.endswith("num_batches_tracked")]
    strange += [
        f"{k} {tuple(found[k].shape)} into {tuple(own[k].shape)}"
        for k in found.keys() & own.keys()
        if found[k].shape != own[k].shape
    ]
    if strange:
        raise UsageError(
            f"these weights do not fit the network: {', '.join(sorted(strange))}; use the --image-size and "
            "--backbone they were trained with, or load the convolutions alone (convolutions_only=True)"
        )
    return found
