"""Verification of pairs, by the protocol of Labelled Faces in the Wild (Huang 2007): `evaluate.py RUN pairs`."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from fastrot import dist
from fastrot.config import UsageError
from fastrot.core import Data
from fastrot.data.beside import read_beside
from fastrot.data.keys import path_keys
from fastrot.data.pairs import read_pairs
from fastrot.evals.asked import begin, given, keep, say, seen
from fastrot.evals.knobs import Pairs
from fastrot.evals.trained import load
from fastrot.training.device import choose_device

WANTS = (
    "pairs wants --data of people's folders, and --pairs FILE in the form of pairs.txt, or --data that was "
    "prepared with --source lfw"
)


def evaluate(run: str, knobs: Pairs) -> int:
    """Print accuracy and area under the curve of each stage."""
    if knobs.data is None:
        raise UsageError(WANTS)
    device = choose_device(knobs.device, dist.place())
    listed = None if knobs.pairs is None else read_pairs(knobs.pairs, "--pairs")
    trunk, named = load(run, device), given(knobs.data, knobs)
    if listed is not None:
        rows, same, fold = _rows(listed.names, named.data.keys, knobs), listed.same, listed.fold
    else:
        rows, same, fold = _beside(named.data, knobs)
    begin(trunk, knobs)
    with dist.joined(device, "give the same command again"):
        pictures = seen(trunk, named, knobs, device)
    place = np.full(named.data.rows, -1)
    place[pictures.rows] = np.arange(len(pictures.rows))
    places = place[rows]
    whole = (places >= 0).all(axis=1)  # both can be read
    same, fold, found = same[whole], fold[whole], dict[str, Any]()
    if same.all() or not same.any() or len({*fold.tolist()}) < 2:
        few = f"{len(same)} pairs of pictures that can be read are not of one person and of two, in two folds or more"
        raise UsageError(
            f"--data {knobs.data}: {few}: prepare all of its pictures, or name --pairs FILE"
        )
    for stage, features in pictures.features.items():
        first, second = (features[places[whole, side]] for side in (0, 1))
        cosine = (first * second).sum(dim=1).double().numpy()
        accurate = accuracy(cosine, same, fold)
        found[stage] = {"accuracy": accurate, "auc": area(cosine, same)}
    told = f"{int(same.sum())} pairs of one person and {int((~same).sum())} of two"
    words = "accuracy {accuracy:.2%}, area under the curve {auc:.3f}"
    say(
        f"{run}: {told}, of {named.name} (chance: {max(same.mean(), 1 - same.mean()):.0%})",
        found,
        lambda each: words.format(**each),
    )
    keep({"run": run, "stages": found}, knobs.json)
    return 0


def _beside(data: Data, knobs: Pairs) -> list[np.ndarray]:
    """Rows [n, 2] of the pairs that lie beside the data, whether both show one person [n], and folds [n]."""
    arrays = read_beside(data, "pairs")
    if arrays is None:
        raise UsageError(WANTS)
    return [arrays[name] for name in ("pair", "same", "fold")]


def _rows(names: list[tuple[str, str]], keys: np.ndarray, knobs: Pairs) -> Int64[np.ndarray, "n 2"]:
    """The rows of the pairs' pictures, which are known by their keys: in any prepared format."""
    row = {key: number for number, key in enumerate(keys.tolist())}
    flat = [name for pair in names for name in pair]
    asked = path_keys(flat).tolist()
    if missing := [name for name, key in zip(flat, asked, strict=True) if key not in row]:
        told = f"{missing[0]} of --pairs is not in --data {knobs.data}"
        raise UsageError(
            f"{told}: give a folder of people's folders, or what was prepared from one"
        )
    return np.array([row[key] for key in asked]).reshape(-1, 2)


def accuracy(
    cosine: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"], fold: Int64[np.ndarray, " n"]
) -> float:
    """Share of pairs told right, those of each fold by the threshold that is best for the others."""
    right = 0
    for held in np.unique(fold):
        mine, others = fold == held, fold != held
        right += int(((cosine[mine] >= _cut(cosine[others], same[others])) == same[mine]).sum())
    return right / len(cosine)


def _cut(cosine: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> float:
    """The lowest of the best thresholds, from which on a pair is told to be of one person; one of the cosines."""
    order = np.argsort(cosine)
    cosine, same = cosine[order], same[order]
    below = np.cumsum(~same) - ~same  # of two persons, and under this cosine
    above = np.cumsum(same[::-1])[::-1]
    first = np.append(True, np.diff(cosine) != 0)  # of equal ones
    return float(cosine[np.where(first, below + above, -1).argmax()])


def area(cosine: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: how often a pair of one person is more alike than a pair of two; equal counts half."""
    others = np.sort(cosine[~same])
    below, up_to = (np.searchsorted(others, cosine[same], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(others))
