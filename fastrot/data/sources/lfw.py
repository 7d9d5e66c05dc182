"""Labelled Faces in the Wild: a folder a person, and pairs of their pictures in a file beside these."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastrot.arrays import Numbers
from fastrot.config import UsageError
from fastrot.data.files import counted, some
from fastrot.data.pairs import PairList, read_pairs
from fastrot.data.sources.records import Listing, Source
from fastrot.data.sources.tree import image_folder


@dataclass(kw_only=True)
class Faces(Source):
    """Pictures of people."""

    pairs: PairList | None

    def beside(self, records: Numbers) -> dict[str, dict[str, np.ndarray]]:
        if self.pairs is None:
            return {}
        return {"pairs": _by_row(self.pairs, [self.records[i].path for i in records.tolist()])}

    def part(self, first: int, stop: int) -> Source:
        return replace(super().part(first, stop), pairs=None)


def lfw(root: Path, how: Listing) -> Faces:
    """The pictures as `image_folder` lists them, by people; pairs.txt, or the one pairs*.txt, is in their folder or beside it."""
    source = image_folder(root, how)
    file = _pairs_file(source.root)
    if file is None:
        return Faces(**vars(source), pairs=None)
    pairs = read_pairs(file)
    there = len(_by_row(pairs, [record.path for record in source.records])["pair"])
    if not there:
        raise UsageError(
            f"no pair of {file} is among the pictures of {source.root}: give the folder of people's folders"
        )
    if lost := len(pairs.names) - there:
        source.notes.append(f"{counted(lost, 'pair')} of {file.name} without a picture, left out")
    return Faces(**vars(source), pairs=pairs)


def _pairs_file(people: Path) -> Path | None:
    """The file of pairs in the people's folder, or beside it. Raises UsageError where it could be one of several."""
    for folder in (people, people.parent):
        found = sorted(folder.glob("pairs*.txt"))
        named = [file for file in found if file.name == "pairs.txt"] or found
        if len(named) > 1:
            listed = some([file.name for file in found], 5)
            raise UsageError(f"{folder} has {listed}: call the one that counts pairs.txt")
        if named:
            return named[0]
    return None


def _by_row(pairs: PairList, paths: list[str]) -> dict[str, np.ndarray]:
    """What of the pairs is among these pictures, which are rows."""
    row = {path: number for number, path in enumerate(paths)}
    pair = np.array([[row.get(name, -1) for name in names] for names in pairs.names], np.int64)
    whole = (pair >= 0).all(axis=1)
    return {"pair": pair[whole], "same": pairs.same[whole], "fold": pairs.fold[whole]}
