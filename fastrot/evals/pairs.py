"""Verification of pairs, by the protocol of Labelled Faces in the Wild (Huang 2007): `evaluate.py RUN pairs`."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from fastrot import dist, entry
from fastrot.config import UsageError
from fastrot.data.keys import path_keys
from fastrot.evals.asked import keep, looked_at
from fastrot.evals.knobs import Pairs
from fastrot.training.device import choose_device

FOLDS = 10


def evaluate(run: str, knobs: Pairs) -> int:
    """Print accuracy and area under the curve of each stage."""
    if knobs.pairs is None or knobs.data is None:
        raise UsageError(
            "pairs wants --data of people's folders, and --pairs FILE in the form of pairs.txt"
        )
    device = choose_device(knobs.device, dist.place())
    names, same = read_pairs(knobs.pairs)
    with dist.joined(device, "give the same command again"):
        _, pictures = looked_at(run, knobs, device)
        rows = _rows(names, pictures.data.keys, knobs)
        found: dict[str, Any] = {}
        for stage, features in pictures.features.items():
            first, second = (features[rows[:, side]] for side in (0, 1))
            cosine = (first * second).sum(dim=1).double().numpy()
            found[stage] = {"accuracy": accuracy(cosine, same), "auc": area(cosine, same)}
        if dist.rank() == 0:
            told = f"{int(same.sum())} pairs of one person and {int((~same).sum())} of two"
            print(f"{run}: {told}, of {pictures.name} (chance: 50%)")
            said = "accuracy {accuracy:.2%}, area under the curve {auc:.3f}"
            print(*entry.table((k, said.format(**v)) for k, v in found.items()), sep="\n")
        keep({"run": run, "stages": found}, knobs.json)
    return 0


def read_pairs(file: Path) -> tuple[list[tuple[str, str]], Bool[np.ndarray, " n"]]:
    """The pictures of each pair, as `Name/Name_0001.jpg`, and whether both show one person.

    A line is `Name 1 4`, or `Name 1 Other 3`; the first says how many there are. Raises UsageError for other lines.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--pairs {file} cannot be read ({error}): name a pairs.txt") from None
    names, same = [], []
    for number, line in enumerate(lines, 2):
        words = line.split()
        if not words:
            continue
        if len(words) == 3:
            words = [words[0], words[1], words[0], words[2]]
        if len(words) != 4 or not (words[1].isdecimal() and words[3].isdecimal()):
            wants = "Name 1 4, or Name 1 Other 3"
            raise UsageError(f"--pairs {file} has {line!r} in line {number}: it wants {wants}")
        first, second = (
            f"{who}/{who}_{int(number):04}.jpg" for who, number in (words[:2], words[2:])
        )
        names.append((first, second))
        same.append(words[0] == words[2])
    if not any(same) or all(same):
        raise UsageError(f"--pairs {file} wants pairs of one person, and of two")
    return names, np.array(same)


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


def accuracy(cosine: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> float:
    """Share of pairs told right, each tenth of them by the threshold that is best for the others.

    Every tenth pair is in the same tenth: files have those of one person and of two in runs.
    """
    fold, right = np.arange(len(cosine)) % FOLDS, 0
    for held in range(min(FOLDS, len(cosine))):
        mine, others = fold == held, fold != held
        cuts = np.unique(cosine[others])
        told = cosine[others][None] >= cuts[:, None]
        cut = cuts[(told == same[others]).mean(axis=1).argmax()] if len(cuts) else 0.0
        right += int(((cosine[mine] >= cut) == same[mine]).sum())
    return right / len(cosine)


def area(cosine: Float[np.ndarray, " n"], same: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: how often a pair of one person is more alike than a pair of two; equal counts half."""
    others = np.sort(cosine[~same])
    below, up_to = (np.searchsorted(others, cosine[same], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(others))
