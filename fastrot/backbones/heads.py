"""What sits on a trunk."""

from jaxtyping import Float
from torch import Tensor, nn

from fastrot.backbones.staged import Staged


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
