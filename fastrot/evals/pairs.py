"""Verification of pairs, by the protocol of Labelled Faces in the Wild (Huang 2007): `evaluate.py RUN pairs`."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from fastrot import dist
from fastrot.config import UsageError
from fastrot.data.keys import path_keys
from fastrot.evals.asked import begin, given, keep, say, seen
from fastrot.evals.knobs import Pairs
from fastrot.evals.trained import load
from fastrot.training.device import choose_device

FOLDS = 10  # where the file does not tell


class PairList(NamedTuple):
    """The pairs of a file."""

    names: list[tuple[str, str]]  # of pictures, as Name/Name_0001.jpg
    same: Bool[np.ndarray, " n"]  # both show one person
    fold: Int64[np.ndarray, " n"]


def evaluate(run: str, knobs: Pairs) -> int:
    """Print accuracy and area under the curve of each stage."""
    if knobs.pairs is None or knobs.data is None:
        raise UsageError(
            "pairs wants --data of people's folders, and --pairs FILE in the form of pairs.txt"
        )
    device = choose_device(knobs.device, dist.place())
    asked, trunk, named = read_pairs(knobs.pairs), load(run, device), given(knobs.data, knobs)
    rows = _rows(asked.names, named.data.keys, knobs)
    begin(trunk, knobs)
    with dist.joined(device, "give the same command again"):
        pictures = seen(trunk, named, knobs, device)
    place = np.full(named.data.rows, -1)
    place[pictures.rows] = np.arange(len(pictures.rows))
    places = place[rows]
    whole = (places >= 0).all(axis=1)  # both can be read
    same, fold, found = asked.same[whole], asked.fold[whole], dict[str, Any]()
    for stage, features in pictures.features.items():
        first, second = (features[places[whole, side]] for side in (0, 1))
        cosine = (first * second).sum(dim=1).double().numpy()
        accurate = accuracy(cosine, same, fold)
        found[stage] = {"accuracy": accurate, "auc": area(cosine, same)}
    told = f"{int(same.sum())} pairs of one person and {int((~same).sum())} of two"
    words = "accuracy {accuracy:.2%}, area under the curve {auc:.3f}"
    say(
        f"{run}: {told}, of {named.name} (chance: 50%)",
        found,
        lambda each: words.format(**each),
    )
    keep({"run": run, "stages": found}, knobs.json)
    return 0


def read_pairs(file: Path) -> PairList:
    """The pairs of a file. A line is `Name 1 4`, or `Name 1 Other 3`; before them stands how many there are.

    `10 300` says ten folds, each of 300 pairs of one person and then 300 of two; else every tenth pair is in one fold,
    since files have those of one person and of two in runs. Raises UsageError for other lines.
    """
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--pairs {file} cannot be read ({error}): name a pairs.txt") from None
    head = lines[0] if lines and all(word.isdecimal() for word in lines[0]) else []
    names, same = [], []
    for number, words in enumerate(lines, 1):
        if not words or words is head:
            continue
        four = [*words[:2], words[0], words[2]] if len(words) == 3 else words
        if len(four) != 4 or not (four[1].isdecimal() and four[3].isdecimal()):
            told = f"--pairs {file} has {' '.join(words)!r} in line {number}"
            raise UsageError(f"{told}: it wants Name 1 4, or Name 1 Other 3")
        first, second = (f"{who}/{who}_{int(n):04}.jpg" for who, n in (four[:2], four[2:]))
        names.append((first, second))
        same.append(four[0] == four[2])
    if not any(same) or all(same):
        raise UsageError(f"--pairs {file} wants pairs of one person, and of two")
    fold = np.arange(len(names)) % FOLDS
    if len(head) == 2 and int(head[0]) > 1 and int(head[0]) * int(head[1]) * 2 == len(names):
        fold = np.arange(len(names)) // (2 * int(head[1]))
    return PairList(names, np.array(same), fold)


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
