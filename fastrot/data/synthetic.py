"""Pictures that cost nothing: the ceiling of every loader, and data for trying where there is none."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastrot.arrays import Boxes, Bytes, Picture, Rows, RowSizes
from fastrot.core import CropRequest, Data
from fastrot.data.keys import order_fingerprint
from fastrot.data.reader import Errors, ThreadedReader
from fastrot.data.sampler import GOLDEN

IMAGES = 1_281_167  # as many as ImageNet's, so that an epoch costs what one of ImageNet would
SIDE = 256  # pixels; the pictures' height and width
CLASSES = 1000


class Synthetic(Data):
    """`core.Data` of random pixels: `synthetic`, or `synthetic:1000` for a thousand pictures.

    Crops are cut from one fixed strip of noise, at an offset that follows from row and box: equal boxes of
    equal rows give equal pixels, at the cost of one copy.
    """

    format = "synthetic"

    def __init__(self, images: int = IMAGES):
        self.rows = images
        self.labels = np.arange(images, dtype=np.int64) % CLASSES
        self.classes = tuple(f"class{i}" for i in range(CLASSES))
        self.keys = np.arange(images, dtype=np.uint64) * np.uint64(GOLDEN)  # spread evenly
        self.fingerprint = order_fingerprint(self.keys, self.labels)
        self._noise = np.random.default_rng(0).integers(0, 256, 2**22, dtype=np.uint8)

    def sizes(self, rows: Rows) -> RowSizes:
        return np.full((len(rows), 2), SIDE, np.int32)

    def name(self, row: int) -> str:
        return f"noise {row}"

    def record(self, row: int) -> Bytes:
        return self.picture(row).reshape(-1)

    def picture(self, row: int) -> Picture:
        out = np.empty((1, SIDE, SIDE, 3), np.uint8)
        self._cut(np.array([[row, 0, 0, SIDE, SIDE, 0]]), out)
        return out[0]

    def open_reader(self, device: torch.device, workers: int) -> ThreadedReader:
        return ThreadedReader(self._fill, device, 0)

    def _fill(self, request: CropRequest, out: tuple[Tensor, ...], places: Iterable[int]) -> Errors:
        for rows, crop in zip(request.rows, out, strict=True):
            self._cut(rows, crop.numpy())
        return []

    def _cut(self, rows: Boxes, out: np.ndarray) -> None:
        flat = out.reshape(len(rows), -1)
        length = flat.shape[1]
        starts = (rows @ np.array([7919, 31, 37, 41, 43, 47])) % (len(self._noise) - length)
        for i, start in enumerate(starts.tolist()):
            flat[i] = self._noise[start : start + length]
