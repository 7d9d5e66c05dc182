"""Supervised classification of upright pictures: the yardstick of the self-supervised methods."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastrot import config
from fastrot.backbones.staged import Classifier, Staged
from fastrot.core import Batch, DataInfo, Headline, Losses, Method
from fastrot.methods.scores import Scores, classification_scores, wide
from fastrot.ops.rotate import rotated_views


class Supervised(Method):
    """One upright view of each crop; mean cross-entropy over the B pictures."""

    wants_labels = True
    heads = ("net",)

    def __init__(self, cfg: config.Supervised, trunk: Staged, info: DataInfo):
        self.net = Classifier(trunk, info.classes)
        self.info, self.space_to_depth = info, trunk.space_to_depth
        self.headline = Headline(chance=1 / info.classes)

    def views(self, batch: Batch) -> Float[Tensor, "b c s s"]:
        info, how = self.info, {"dtype": self.info.dtype, "space_to_depth": self.space_to_depth}
        return rotated_views(batch.images, (0,), info.mean, info.std, **how)

    def losses(self, outputs: Float[Tensor, "b k"], batch: Batch) -> Losses:
        right = (outputs.argmax(dim=1) == batch.label).float().mean()
        loss = F.cross_entropy(wide(outputs), batch.label)
        return Losses({"loss_cls": loss}, {"accuracy": right})

    def score(self, outputs: Float[Tensor, "b k"], batch: Batch) -> Scores:
        return classification_scores(outputs, batch.label)
