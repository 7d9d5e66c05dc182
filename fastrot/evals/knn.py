"""Weighted k-nearest-neighbour classification (Wu 2018, as zhirongw/lemniscate.pytorch computes it): `evaluate.py RUN knn`."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot import dist
from fastrot.config import UsageError
from fastrot.evals.asked import Search, keep, say, searched
from fastrot.evals.knobs import Knn
from fastrot.evals.nearest import similarities


def knn_top1(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "q d"],
    test_labels: Int64[Tensor, " q"],
    classes: int,
    k: int,
    sigma: float,
) -> float:
    """Share of the test pictures whose class the k most alike training pictures vote for, by exp(cosine / sigma).

    Features are of unit length; the work is done where `train` is.
    """
    how = classes, k, sigma, train.device
    return _right((train, train_labels), (test, test_labels), *how, same=False)[0]


def evaluate(run: str, knobs: Knn) -> int:
    """Print top-1 and top-5 of each stage."""

    def check(most: int) -> None:
        if knobs.k > most:
            raise UsageError(f"--k got {knobs.k}: there are {most} pictures of --data to vote")

    def ask(search: Search) -> dict[str, Any]:
        gallery, queries = search.gallery, search.queries
        classes, found = len(gallery.data.classes) or int(gallery.labels.max()) + 1, {}
        for stage in gallery.features:
            train = gallery.features[stage], gallery.labels
            test = queries.features[stage], queries.labels
            k = min(knobs.k, len(gallery.rows) - search.same)  # some may be unread
            top1, top5 = _right(
                train, test, classes, k, knobs.sigma, search.device, same=search.same
            )
            found[stage] = {"top1": top1, "top5": top5, "numbers": train[0].shape[1]}
        return found

    search, found = searched(run, knobs, check, ask)
    say(f"{search.told()}, by {knobs.k}, sigma {knobs.sigma:g}", found, _said)
    keep({"run": run, "k": knobs.k, "sigma": knobs.sigma, "stages": found}, knobs.json)
    return 0


def _said(each: dict[str, Any]) -> str:
    return f"top-1 {each['top1']:.2%}, top-5 {each['top5']:.2%}, of {each['numbers']:,} numbers"


def _right(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    k: int,
    sigma: float,
    device: torch.device,
    *,
    same: bool,
) -> tuple[float, float]:
    """Shares of top-1 and top-5, over all ranks."""
    (gallery, known), (queries, truth) = train, test
    known, right = known.to(device), torch.zeros(2, dtype=torch.int64)
    for places, found in similarities(queries, gallery, device, same=same):
        cosine, rows = found.topk(k, dim=1)
        votes = torch.zeros(len(places), classes, device=device)
        weights = ((cosine - cosine[:, :1]) / sigma).exp()  # of the nearest 1: none overflows
        votes.scatter_add_(1, known[rows], weights)
        best = votes.topk(min(5, classes), dim=1).indices.cpu() == truth[places, None].cpu()
        right += torch.stack([best[:, 0].sum(), best.any(dim=1).sum()])
    top1, top5 = (dist.sum_over_ranks(right) / len(queries)).tolist()
    return top1, top5
