"""RotNet: predict which of four rotations (0, 90, 180, 270 degrees) a picture has been given (Gidaris 2018, arXiv 1803.07728)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Classifier, Staged
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.angles import rotated_by
from fastrot.ops.philox import philox, scaled
from fastrot.ops.rotate import rotated_views

ROTATIONS = (0, 1, 2, 3)  # times 90 degrees counter-clockwise; the label of a view is its rotation
ONE = 0x6F6E65  # "one": keeps these draws apart from others of the same address
HEADLINE = Headline(title="Rotation accuracy", chance=1 / len(ROTATIONS))


class RotNet(Method):
    """Rotations of each crop in one batch, all or one of them; mean cross-entropy over the views."""

    def __init__(self, cfg: config.RotNet, trunk: Staged, info: DataInfo):
        self.angles, self.tilted = cfg.angles, any(degrees % 90 for degrees in cfg.angles)
        self.quarters = tuple(degrees // 90 % 4 for degrees in cfg.angles)
        self.net, self.one = Classifier(trunk, len(cfg.angles)), cfg.copies == "one"
        self.info, self.space_to_depth = info, trunk.space_to_depth
        self.headline = Headline(title=HEADLINE.title, chance=1 / len(cfg.angles))
        self.table = torch.tensor(self.quarters, device=info.device)

    def views(self, batch: Batch) -> Float[Tensor, "v c s s"]:
        info, how = self.info, {"dtype": self.info.dtype, "space_to_depth": self.space_to_depth}
        if self.tilted:  # upright ones too are resampled: that they are not would tell
            copies = rotated_by(batch.images, self.angles)
            if self._drawn():
                first = torch.arange(0, len(copies), len(self.angles), device=copies.device)
                copies = copies[first + self.labels(batch)]
            return rotated_views(copies, (0,), info.mean, info.std, **how)
        rotations = self.table[self.labels(batch)[:, None]] if self._drawn() else self.quarters
        return rotated_views(batch.images, rotations, info.mean, info.std, **how)

    def labels(self, batch: Batch) -> Int64[Tensor, " v"]:
        """Of the views, image-major: places of their angles. Where one is trained on, it is drawn by (seed, epoch, row)."""
        count, index = len(self.quarters), batch.index
        if not self._drawn():
            return torch.arange(count, device=index.device).repeat(len(index))
        none = torch.zeros_like(index)
        words = philox(
            self.info.seed, index, batch.epoch_step[0].expand_as(index), none, none + ONE
        )
        return scaled(words[0], count)

    def losses(self, outputs: Float[Tensor, "v k"], batch: Batch) -> Losses:
        rotation = self.labels(batch)
        right = (outputs.argmax(dim=1) == rotation).float().mean()
        return Losses({"loss_cls": F.cross_entropy(wide(outputs), rotation)}, {"accuracy": right})

    def score(self, outputs: Float[Tensor, "v k"], batch: Batch) -> Scores:
        return classification_scores(outputs, self.labels(batch))

    @staticmethod
    def predicts_rotation(cfg: config.RotNet) -> bool:
        return cfg.angles == config.RotNet.angles

    def rotation_logits(self, outputs: Float[Tensor, "v k"]) -> Float[Tensor, "v 4"] | None:
        return outputs if self.angles == config.RotNet.angles else None

    def _drawn(self) -> bool:
        return self.one and self.net.training


def rotation_labels(outputs: Tensor) -> Tensor:
    """Labels of image-major views: 0 1 2 3 0 1 2 3 ..."""
    return torch.arange(len(outputs), device=outputs.device) % len(ROTATIONS)
