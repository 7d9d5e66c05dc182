"""Pictures with boxes: what COCO and VOC share."""

import contextlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fastrot import cli
from fastrot.arrays import Numbers
from fastrot.config import UsageError
from fastrot.data.files import BadPicture, Verdict, rejected, shown, some
from fastrot.data.pictures import is_turned, size_of
from fastrot.data.sources.lists import PathFinder
from fastrot.data.sources.records import LeftOut, Listing, Source
from fastrot.data.sources.tree import OPENED_AT_ONCE

BOX = np.dtype([("box", "<f8", 4), ("category", "<i8"), ("ignore", "?"), ("area", "<f8")])
_BLOCK = 256  # pictures a task
_OTHERS = Verdict("left out", "no box of --categories")
_NO_BOX = "pictures without a box that counts, their label is -1 (--categories all leaves them out)"
_ROUNDING = 0.01  # pixels over a border that are not worth a word

Odd = defaultdict[str, list[str]]  # what is odd -> where it was met


class Box(NamedTuple):
    """A box of a picture."""

    edges: tuple[float, ...]  # top, left, bottom, right in pixels, half open
    category: str
    ignore: bool  # of a crowd, or difficult
    area: float | None = None  # None: that of the edges


class Told(NamedTuple):
    """What is told of a picture."""

    path: str
    size: tuple[int, int] | None  # height and width that boxes refer to; None: the picture's own
    boxes: list[Box]
    fault: str = ""  # why what is told cannot be read


def size_told(height: float, width: float) -> tuple[int, int] | None:
    """A size, where these may be one."""
    return (int(height), int(width)) if all(1 <= n < 2**31 for n in (height, width)) else None


@dataclass(kw_only=True)
class Annotated(Source):
    """Pictures with boxes; what lies beside them is in data/boxes.py."""

    boxes: list[np.ndarray]  # of each record, BOX [k]
    size: Int64[np.ndarray, "n 2"]  # height and width that these refer to
    categories: tuple[str, ...]

    def _of_records(self, rows: Numbers) -> dict[str, Any]:
        mine = {"boxes": [self.boxes[i] for i in rows.tolist()], "size": self.size[rows]}
        return {**super()._of_records(rows), **mine}

    def beside(self, records: Numbers) -> dict[str, dict[str, np.ndarray]]:
        boxes = [self.boxes[i] for i in records.tolist()]
        every = np.concatenate([np.zeros(0, BOX), *boxes])
        arrays = {"count": np.array([len(each) for each in boxes], np.int64)}
        arrays |= {name: every[name] for name in BOX.names or ()}
        arrays |= {"size": self.size[records], "categories": np.array(self.categories, np.str_)}
        return {"boxes": arrays}


def annotated(
    root: Path, how: Listing, told: list[Told], known: Sequence[str], odd: Odd
) -> Annotated:
    """The pictures of a folder, each with the category of its largest box that is not `ignore` as its label.

    `how.categories` names some of the `known` categories: boxes of others are left out, and so are pictures without a
    box of these that is not `ignore`; "all" names each. Where it is None, all are meant, and all pictures. `odd`
    becomes notes.
    """
    asked = _asked(how.categories, known)
    categories = tuple(known if asked is None else asked)
    number = {name: i for i, name in enumerate(categories)}
    source = Source(root=root, classes=categories if how.labelled else ())
    wanted = []
    for each in told:
        mine = each._replace(boxes=[box for box in each.boxes if box.category in number])
        if asked is None or each.fault or _largest(mine.boxes):
            wanted.append(mine)
        else:  # its file is not looked for
            source.left_out.append(LeftOut(each.path, _OTHERS.reason))
    folder, boxes, sizes = PathFinder(os.path.abspath(root), how.by_name), [], []
    blocks = [wanted[at : at + _BLOCK] for at in range(0, len(wanted), _BLOCK)]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [_look(folder, each) for each in block], blocks)
        found = [*itertools.chain.from_iterable(looked)]
    for each, (path, verdict, real) in zip(wanted, found, strict=True):
        size, mine = real or each.size or (0, 0), []
        if verdict.kind == "picture" and size != (0, 0) and _alike(each.size or size, size):
            size = each.size or size
            mine = [*_sound(each.boxes, size, path, odd)]
        elif verdict.kind == "picture":
            odd[
                "pictures not of the shape that is told, or turned by EXIF, their boxes left out"
            ].append(path)
        largest = _largest(mine)
        if asked is not None and verdict.kind == "picture" and not largest:
            verdict = _OTHERS
        label = number[largest.category] if largest and how.labelled else -1
        if source.take(path, label, verdict):
            if not largest:
                odd[_NO_BOX].append(path)
            rows = [(box.edges, number[box.category], box.ignore, box.area) for box in mine]
            boxes.append(np.array(rows, BOX))
            sizes.append(size)
    source.notes += [f"{what}: {len(at):,}, the first {shown(at[0])}" for what, at in odd.items()]
    having = {categories[i] for each in boxes for i in each["category"].tolist()}
    if none := [name for name in categories if name not in having]:
        source.notes.append(f"no picture has a box of {some(none, 5)}")
    shapes = np.array(sizes, np.int64).reshape(-1, 2)
    return Annotated(**vars(source), boxes=boxes, size=shapes, categories=categories)


def _asked(categories: str | None, known: Sequence[str]) -> list[str] | None:
    """The names of --categories. Raises UsageError for one that is not known."""
    if categories in (None, "all"):
        return categories and [*known]
    names = [*dict.fromkeys(name.strip() for name in categories.split(","))]
    for name in names:
        if name not in known:
            raise UsageError(cli.choose("--categories got", known, name))
    return names


def _look(folder: PathFinder, told: Told) -> tuple[str, Verdict, tuple[int, int] | None]:
    """What a picture is called, the verdict on it, and its height and width where its header tells."""
    if told.fault:
        return told.path, rejected(told.fault), None
    path, _, verdict = folder.look(told.path, None)
    if verdict.kind == "picture":
        with contextlib.suppress(OSError, BadPicture):  # its conversion will say so
            file = os.path.join(folder.path, path)
            # boxes were drawn as it lies, or as it is seen: nobody says
            return path, verdict, (0, 0) if told.boxes and is_turned(file) else size_of(file)
    return path, verdict, None


def _alike(told: tuple[int, int], real: tuple[int, int]) -> bool:
    """Whether one is the other, shrunk or not."""
    (height, width), (h, w) = told, real
    return abs(height * w - width * h) <= height + width


def _largest(boxes: list[Box]) -> Box | None:
    return max((box for box in boxes if not box.ignore), key=lambda b: _area(b.edges), default=None)


def _area(edges: tuple[float, ...]) -> float:
    top, left, bottom, right = edges
    return (bottom - top) * (right - left)


def _sound(boxes: list[Box], size: tuple[int, int], path: str, odd: Odd) -> Iterator[Box]:
    """What of boxes lies in a picture of this size."""
    height, width = map(float, size)
    for box in boxes:
        top, left, bottom, right = box.edges
        if not (all(map(math.isfinite, box.edges)) and top < bottom and left < right):
            odd["boxes without an area, left out"].append(path)
            continue
        inside = max(top, 0.0), max(left, 0.0), min(bottom, height), min(right, width)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            odd["boxes outside of their picture, left out"].append(path)
            continue
        if max(abs(a - b) for a, b in zip(inside, box.edges, strict=True)) > _ROUNDING:
            odd["boxes that reach out of their picture, clipped"].append(path)
        known = box.area is not None and math.isfinite(box.area)
        yield box._replace(edges=inside, area=box.area if known else _area(inside))
