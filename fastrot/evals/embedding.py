"""Pictures in a plane by the features of a stage: by PCA and by t-SNE, as points of their classes' colours and as thumbnails."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from torch.nn import functional as F

from fastrot import dist
from fastrot.arrays import Numbers
from fastrot.config import UsageError
from fastrot.core import Data
from fastrot.evals.asked import loader_of
from fastrot.evals.drawn import PAGE, TEXT, alone, of_step, pictures_of, write
from fastrot.evals.features import features
from fastrot.evals.page import COLOURS, GREY
from fastrot.evals.picture import INK, legible
from fastrot.evals.trained import load
from fastrot.training.device import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 5000
FEWEST = 5  # that t-SNE has neighbours for
TOLD = 10  # classes that a legend names
OWN = (*COLOURS, "#000000", "#F0E442")  # Okabe and Ito's eight
MARKERS = "os^Dv*PX"  # another from the ninth class on
CELLS = 24  # thumbnails a side, at most
THUMB, FRAME = 84, 4  # pixels


def embedding(knobs: Any) -> Path:
    """Draw what a draw.Embedding asks for; return the page."""
    try:
        parts = ("sklearn.decomposition", "sklearn.manifold")
        decomposition, manifold = map(importlib.import_module, parts)
    except ImportError as error:
        way = 'type  pip install "fastrot[study]"'
        raise UsageError(f"draw embedding wants scikit-learn ({error}): {way}") from None
    device = choose_device(knobs.device, dist.place())
    trunk = load(knobs.run, device)
    trunk.net.check_stage(stage := knobs.stage or trunk.net.telling)
    if not knobs.perplexity > 0:
        raise UsageError(f"--perplexity got {knobs.perplexity:g}: give a number above 0")
    named, rows = pictures_of(knobs, trunk.config, MOST)
    found = features(trunk, loader_of(named.data, rows, trunk.config, knobs, device), (stage,))
    rows = rows[found.read.numpy()]
    unit = F.normalize(found[stage][found.read]).numpy()
    if len(rows) < FEWEST:
        told = f"t-SNE wants {FEWEST} pictures or more, and got {len(rows)}"
        raise UsageError(f"{told}: set --pictures, or --data")
    if not unit.std(axis=0).max() > 0:
        raise UsageError(f"{stage} of {knobs.run} tells no pictures apart: name another --stage")
    pca = decomposition.PCA(2, svd_solver="full").fit(unit)
    perplexity = min(knobs.perplexity, (len(rows) - 1) / 3)
    tsne = manifold.TSNE(perplexity=perplexity, init="pca", random_state=knobs.seed % 2**32)
    planes = {"PCA": pca.transform(unit), "t-SNE": tsne.fit_transform(unit)}
    shares = " and ".join(f"{share:.0%}" for share in pca.explained_variance_ratio_)
    labels = named.data.labels[rows]
    classes = len({*labels.tolist()} - {-1})
    coloured = f"{classes:,} classes by colour and mark" if classes else "without labels"
    told = f"{len(rows):,} pictures of {named.name} by their features of {stage}, averaged over places, of unit length"
    run, by = of_step(knobs.run), f"t-SNE (perplexity {perplexity:.3g}, seed {knobs.seed})"
    sheets = {
        "embedding": (
            _points(planes, labels, named.data.classes),
            f"{told}: left PCA ({shares} of the variance), right {by}; {coloured}. {run}.",
        ),
        "thumbnails": (
            alone(_thumbnails(named.data, rows, planes["t-SNE"]), PAGE),
            f"{told}: {by}, in each cell the picture that is nearest to its middle. {run}.",
        ),
    }
    return write(knobs, sheets)


def snapped(places: Float[np.ndarray, "n 2"], cells: int) -> Int64[np.ndarray, "cells cells"]:
    """Of each cell of the plane, the topmost row first, which of n places in it is the nearest to its middle; -1: none is."""
    low = places.min(axis=0)
    at = (places - low) / np.maximum(places.max(axis=0) - low, 1e-12) * cells
    column, row = cell = at.astype(int).clip(0, cells - 1).T
    order = np.argsort(-np.linalg.norm(at - cell.T - 0.5, axis=1), kind="stable")
    grid = np.full((cells, cells), -1)
    grid[cells - 1 - row[order], column[order]] = order  # of several the last stays
    return grid


def _points(planes: dict[str, np.ndarray], labels: Numbers, classes: Sequence[str]) -> "Figure":
    """Planes side by side, in the colours of classes; a legend where these are few."""
    from matplotlib.figure import Figure

    known = sorted({*labels.tolist()} - {-1})
    below = 0.03 + 0.17 * -(-len(known) // 5) * (len(known) <= TOLD)  # inches
    figure = Figure(figsize=(PAGE, PAGE / 2 + below))
    axes = figure.subplots(1, 2)
    look: dict[str, Any] = {"linewidths": 0.2, "edgecolors": INK}
    look["s"] = np.clip(3000 / len(labels), 2, 14)
    for each, (name, plane) in zip(axes, planes.items(), strict=True):
        each.scatter(*plane[labels < 0].T, color=GREY, **look)
        for label in known:
            word = legible(classes[int(label)])[:16] if label < len(classes) else str(label)
            look["label"] = word.replace("$", r"\$")
            colour, mark = OWN[label % len(OWN)], MARKERS[label // len(OWN) % len(MARKERS)]
            each.scatter(*plane[labels == label].T, color=colour, marker=mark, **look)
        each.set(xticks=[], yticks=[])
        each.spines[:].set(color="#c4c9d0", linewidth=0.6)
        each.text(0.02, 0.98, name, size=TEXT + 1, va="top", transform=each.transAxes)
    if len(known) <= TOLD:
        how = {"ncols": 5, "frameon": False, "fontsize": TEXT, "markerscale": 1.6}
        figure.legend(handles=axes[0].collections[1:], loc="lower center", handletextpad=0.1, **how)
    figure.subplots_adjust(0.005, below / (PAGE / 2 + below), 0.995, 0.99, 0.02)
    return figure


def _thumbnails(
    data: Data, rows: Int64[np.ndarray, " n"], plane: Float[np.ndarray, "n 2"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures at their places in the plane, on white."""
    grid = snapped(plane, int(np.clip(1.1 * len(rows) ** 0.5, 2, CELLS)))
    sheet = np.full((len(grid) * THUMB, len(grid) * THUMB, 3), 255, np.uint8)
    side = THUMB - FRAME
    for row, column in np.argwhere(grid >= 0).tolist():
        picture = Image.fromarray(data.picture(int(rows[grid[row, column]])))
        y, x = row * THUMB, column * THUMB
        sheet[y : y + side, x : x + side] = np.asarray(ImageOps.fit(picture, (side, side)))
    return sheet
