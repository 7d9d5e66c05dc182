"""What tests compare with: arrays of the original codes, and pictures that are made here."""

import os
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(os.environ.get("FASTROT_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays that the original codes computed; see tests/golden/README.md."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def photo(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A picture with a clear up and left, smooth enough for JPEG: uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)  # of float32 numpys differ
    phase = draw.uniform(0, 6, 3)
    planes = [
        200 - 150 * y / height + 20 * np.sin(x / 9 + phase[0]),
        60 + 120 * x / width + 20 * np.cos((x + y) / 13 + phase[1]),
        40 + 160 * (y > height / 2) + 20 * np.sin(y / 7 + phase[2]),
    ]
    noise = draw.normal(0, 4, (height, width, 3))
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)
