"""Pictures that cost nothing: the ceiling of every loader, and data for trying where there is none."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastrot.core import CropRequest
from fastrot.data.keys import order_fingerprint

IMAGES = 1_281_167  # as many as ImageNet's, so that an epoch costs what one of ImageNet would
SIDE = 256  # pixels; the pictures' height and width
CLASSES = 1000


class Synthetic:
    """`core.Data` of random pixels: `synthetic`, or `synthetic:1000` for a thousand pictures.

    Crops are cut from one fixed strip of noise, at an offset that follows from row and box: equal boxes of
    equal rows give equal pixels, at the cost of one copy.
    """

    format = "synthetic"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __init__(self, images: int = IMAGES):
        self.rows = images
        self.labels = np.arange(images, dtype=np.int64) % CLASSES
        self.classes = tuple(f"class{i}" for i in range(CLASSES))
        self.keys = np.arange(images, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )  # spread evenly
        self.fingerprint = order_fingerprint(self.keys, self.labels)
        self._noise = np.random.default_rng(0).integers(0, 256, 2**22, dtype=np.uint8)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return np.full((len(rows), 2), SIDE, np.int32)

    def name(self, row: int) -> str:
        return f"noise {row}"

    def pictures(
        self, plan: Iterable[CropRequest], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, ...]]:
        pinned = device.type == "cuda"
        for request in plan:
            crops = []
            for rows, size in zip(request.rows, request.sizes, strict=True):
                out = torch.empty(len(rows), size, size, 3, dtype=torch.uint8, pin_memory=pinned)
                flat = out.numpy().reshape(len(rows), -1)
                length = flat.shape[1]
                starts = (rows @ np.array([7919, 31, 37, 41, 43, 47])) % (len(self._noise) - length)
                for i, start in enumerate(starts.tolist()):
                    flat[i] = self._noise[start : start + length]
                crops.append(out)
            yield tuple(crops)
