"""How good the features are while they are being learnt: `--online-probe knn`, at each validation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastrot import assemble
from fastrot.data.keys import some
from fastrot.data.loader import Loader
from fastrot.evals.features import Bare, features
from fastrot.evals.knn import knn_top1
from fastrot.training.state import Session

# pictures, always the same: of the training view, and of the held-out one
LEARNT, ASKED = 2_000, 1_000
K, SIGMA = 200, 0.07


class OnlineKnn:
    """The class of held-out pictures by their nearest training pictures, from the stage that says most of content.

    Refuses data without labels. Changes nothing of the run; costs 3,000 pictures' forward passes of one view.
    """

    def __init__(self, s: Session):
        assert s.val_loader is not None
        assemble.check_labels("--online-probe knn", s.loader.data, s.val_loader.data)
        self.net: Any = s.state.method.net
        self.trunk = Bare(self.net.trunk, s.cfg.mean, s.cfg.std)
        self.stage = self.net.trunk.telling
        self.learnt = _few(s, s.loader, LEARNT)
        self.asked = _few(s, s.val_loader, ASKED)
        self.classes = len(s.loader.data.classes) or int(s.loader.data.labels.max()) + 1

    def __call__(self, alive: Callable[[], object]) -> dict[str, float]:
        """The share that is right, by the score's name. Called on all ranks, each of which calls `alive` with each batch.

        The net is left in training mode.
        """
        self.net.eval()
        both = (self._seen(each, alive) for each in (self.learnt, self.asked))
        (train, known), (test, truth) = both
        self.net.train()
        right = knn_top1(train, known, test, truth, self.classes, min(K, len(train)), SIGMA)
        return {f"knn_{self.stage}": right}

    def _seen(self, loader: Loader, alive: Callable[[], object]) -> tuple[Tensor, Tensor]:
        found = features(self.trunk, loader, [self.stage], alive=alive)
        labels = torch.from_numpy(loader.data.labels[loader.rows])
        return F.normalize(found[self.stage][found.read]), labels[found.read]


def _few(s: Session, whole: Loader, count: int) -> Loader:
    """A loader of the evaluation's view over so many of a view's pictures."""
    rows = np.arange(whole.data.rows) if whole.rows is None else whole.rows
    rows = rows[some(whole.data.keys[rows], count)]
    view = assemble.evaluation_view(s.cfg, rows)
    how: dict[str, Any] = {n: getattr(whole, n) for n in ("batch", "rank", "world", "device")}
    how |= {"workers": whole.workers, "on_bad_record": whole.on_bad_record}
    return Loader(whole.data, view, enlarge=s.cfg.enlarge, **how)
