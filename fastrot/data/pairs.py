"""Pairs of pictures of people, in the form of LFW's pairs.txt."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from fastrot.config import UsageError

FOLDS = 10  # where the file does not tell


class PairList(NamedTuple):
    """The pairs of a file."""

    names: list[tuple[str, str]]  # of pictures, as Name/Name_0001.jpg
    same: Bool[np.ndarray, " n"]  # both show one person
    fold: Int64[np.ndarray, " n"]


def read_pairs(file: Path, knob: str = "") -> PairList:
    """The pairs of a file. A line is `Name 1 4`, or `Name 1 Other 3`; before them stands how many there are.

    `10 300` says ten folds, each of 300 pairs of one person and then 300 of two; else every tenth pair is in one fold,
    since files have those of one person and of two in runs. Raises UsageError, naming the `knob`, for other lines.
    """
    named = f"{knob} {file}".strip()
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{named} cannot be read ({error}): name a pairs.txt") from None
    head = lines[0] if lines and all(word.isdecimal() for word in lines[0]) else []
    names, same = [], []
    for number, words in enumerate(lines, 1):
        if not words or words is head:
            continue
        four = [*words[:2], words[0], words[2]] if len(words) == 3 else words
        if len(four) != 4 or not (four[1].isdecimal() and four[3].isdecimal()):
            told = f"{named} has {' '.join(words)!r} in line {number}"
            raise UsageError(f"{told}: it wants Name 1 4, or Name 1 Other 3")
        first, second = (f"{who}/{who}_{int(n):04}.jpg" for who, n in (four[:2], four[2:]))
        names.append((first, second))
        same.append(four[0] == four[2])
    if not any(same) or all(same):
        raise UsageError(f"{named} wants pairs of one person, and of two")
    fold = np.arange(len(names)) % FOLDS
    if len(head) == 2 and int(head[0]) > 1 and int(head[0]) * int(head[1]) * 2 == len(names):
        fold = np.arange(len(names)) // (2 * int(head[1]))
    return PairList(names, np.array(same), fold)
