"""Retrieval of pictures of the same class: `evaluate.py RUN retrieval`, with a gallery of queries and what was found."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot import dist
from fastrot.config import UsageError
from fastrot.evals.asked import Search, keep, say, searched, writable
from fastrot.evals.gallery import write
from fastrot.evals.knobs import Retrieval
from fastrot.evals.nearest import similarities

SHOWN, NEIGHBOURS = 12, 8  # of a gallery: queries, and pictures found for each


class Scores(NamedTuple):
    """Over the queries that have a picture of their class to be found."""

    precision: dict[int, float]  # share of the first so many that are of the query's class
    mean_average_precision: float
    queries: int


def retrieval_scores(
    gallery: Float[Tensor, "n d"],
    gallery_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    labels: Int64[Tensor, " q"],
    at: tuple[int, ...],
    device: torch.device,
    *,
    same: bool = False,
) -> Scores:
    """Precision among the first of a ranking by cosine, and the mean of average precision over the whole ranking.

    Average precision of a query is the mean, over the pictures of its class, of the precision at the place where each
    stands. `same`: queries and gallery are the same pictures, and each is asked among the others. Of all ranks.
    """
    known = gallery_labels.to(device)
    place = torch.arange(1, len(gallery) + 1, device=device)
    each = torch.zeros(len(queries), len(at) + 2, dtype=torch.float64)
    for places, cosine in similarities(queries, gallery, device, same=same):
        order = cosine.argsort(dim=1, descending=True, stable=True)
        right = known[order] == labels[places].to(device)[:, None]
        right &= cosine.gather(1, order) > -torch.inf  # itself
        so_far = right.cumsum(dim=1)
        there = so_far[:, -1]
        average = (so_far / place * right).sum(dim=1) / there.clamp(min=1)
        first = [so_far[:, k - 1] / k for k in at]
        each[places] = torch.stack([*first, average, (there > 0).double()], dim=1).cpu()
    # ranks have queries of their own: each sum is exact, and the total is one process's
    *precision, average, asked = dist.sum_over_ranks(each).sum(dim=0).tolist()
    shares = (value / max(asked, 1) for value in precision)
    return Scores(dict(zip(at, shares, strict=True)), average / max(asked, 1), int(asked))


def evaluate(run: str, knobs: Retrieval) -> int:
    """Print the scores of each stage, and write the gallery where one is asked for."""

    def check(most: int) -> None:
        if max(knobs.at) > most:
            raise UsageError(f"--at got {max(knobs.at)}: there are {most} pictures of --data")
        if knobs.gallery is not None:
            writable(knobs.gallery, "--gallery")

    def ask(search: Search) -> dict[str, Scores]:
        gallery, queries, found = search.gallery, search.queries, {}
        at = tuple(min(k, len(gallery.rows) - search.same) for k in knobs.at)  # some may be unread
        for stage, rows in gallery.features.items():
            asked = rows, gallery.labels, queries.features[stage], queries.labels, at
            found[stage] = retrieval_scores(*asked, search.device, same=search.same)
        return found

    search, found = searched(run, knobs, check, ask)
    say(search.told(), found, _said)
    if alone := len(search.queries.rows) - next(iter(found.values())).queries:
        say(f"{alone:,} have no other picture of their class there, and do not count")
    if knobs.gallery is not None and dist.place().rank == 0:
        stage = search.trunk.net.telling
        stage = stage if stage in found else list(found)[-1]
        _draw(search, stage, knobs.gallery, _said(found[stage]))
    keep({"run": run, "stages": {k: v._asdict() for k, v in found.items()}}, knobs.json)
    return 0


def _said(scores: Scores) -> str:
    first = ", ".join(f"precision@{k} {each:.2%}" for k, each in scores.precision.items())
    return f"{first}, mAP {scores.mean_average_precision:.2%}"


def _draw(search: Search, stage: str, folder: Path, said: str) -> None:
    """The gallery of some queries, evenly spread."""
    gallery, queries = search.gallery, search.queries
    few = np.linspace(0, len(queries.rows) - 1, min(SHOWN, len(queries.rows))).round().astype(int)
    rows = queries.features[stage][few] @ gallery.features[stage].T
    if search.same:
        rows[torch.arange(len(few)), torch.from_numpy(few)] = -torch.inf
    best = rows.topk(min(NEIGHBOURS, rows.shape[1] - search.same), dim=1)
    write(folder, search, stage, few, best, said)
