"""Boxes of prepared pictures, as COCO or VOC told them: what lies in boxes.npz."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from fastrot.arrays import Numbers
from fastrot.config import UsageError
from fastrot.core import Data
from fastrot.data.beside import read_beside


class Annotations(NamedTuple):
    """Boxes of all rows, in the order of rows. A picture of `size` has them, before --short-side."""

    first: Numbers  # the number of each row's first box; and of all boxes
    box: Float64[np.ndarray, "n 4"]  # top, left, bottom, right in pixels, half open
    category: Int64[np.ndarray, " n"]  # in `categories`
    ignore: Bool[np.ndarray, " n"]  # of a crowd, or difficult
    area: Float64[np.ndarray, " n"]  # COCO's own, of the outline; VOC's of the box
    size: Int64[np.ndarray, "rows 2"]  # height and width
    categories: np.ndarray  # names

    def squashed(
        self, row: int, side: int, categories: Collection[str] | None = None
    ) -> Int64[np.ndarray, "k 4"]:
        """Top, left, bottom, right of a row's boxes that are not `ignore`, in a crop `config.Whole(size=side)`.

        Pixels that a box covers in part are in it. `categories`: only boxes of these.
        """
        mine = slice(self.first[row], self.first[row + 1])
        kept = ~self.ignore[mine]
        if categories is not None:
            kept &= np.isin(self.categories[self.category[mine]], [*categories])
        box = self.box[mine][kept] * side / np.tile(self.size[row], 2)
        edges = np.hstack([np.floor(box[:, :2]), np.ceil(box[:, 2:])])
        return edges.clip(0, side).astype(np.int64)


def read_boxes(data: Data, name: str = "the data") -> Annotations:
    """The boxes beside prepared pictures; `name`: of the data, for the sentence where there are none."""
    arrays = read_beside(data, "boxes")
    if arrays is None:
        way = "prepare it with fastrot convert --source coco, or voc"
        raise UsageError(f"{name} has no boxes beside it: {way}")
    return Annotations(np.append(0, np.cumsum(arrays.pop("count"))), **arrays)
