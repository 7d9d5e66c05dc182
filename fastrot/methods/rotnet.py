"""RotNet: predict which of four rotations (0, 90, 180, 270 degrees) a picture has been given (Gidaris 2018, arXiv 1803.07728)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Classifier, Staged
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.rotate import rotated_views

ROTATIONS = (0, 1, 2, 3)  # times 90 degrees counter-clockwise; the label of a view is its rotation
HEADLINE = Headline(title="Rotation accuracy", chance=1 / len(ROTATIONS))


class RotNet(Method):
    """All four rotations of each crop in one batch; mean cross-entropy over the 4 B views."""

    headline = HEADLINE

    def __init__(self, cfg: config.RotNet, trunk: Staged, info: DataInfo):
        self.net = Classifier(trunk, len(ROTATIONS))
        self.info, self.space_to_depth = info, trunk.space_to_depth

    def views(self, batch: Batch) -> Float[Tensor, "v c s s"]:
        info, how = self.info, {"dtype": self.info.dtype, "space_to_depth": self.space_to_depth}
        return rotated_views(batch.images, ROTATIONS, info.mean, info.std, **how)

    def losses(self, outputs: Float[Tensor, "v 4"], batch: Batch) -> Losses:
        rotation = rotation_labels(outputs)
        right = (outputs.argmax(dim=1) == rotation).float().mean()
        return Losses({"loss_cls": F.cross_entropy(wide(outputs), rotation)}, {"accuracy": right})

    def score(self, outputs: Float[Tensor, "v 4"], batch: Batch) -> Scores:
        return classification_scores(outputs, rotation_labels(outputs))

    @staticmethod
    def predicts_rotation(cfg: config.RotNet) -> bool:
        return True

    def rotation_logits(self, outputs: Float[Tensor, "v 4"]) -> Float[Tensor, "v 4"]:
        return outputs


def rotation_labels(outputs: Tensor) -> Tensor:
    """Labels of image-major views: 0 1 2 3 0 1 2 3 ..."""
    return torch.arange(len(outputs), device=outputs.device) % len(ROTATIONS)
