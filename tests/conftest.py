"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU; nothing is downloaded."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(os.environ.get("FASTROT_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays that the original codes computed; see tests/golden/README.md."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def photo(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A picture with a clear up and left, smooth enough for JPEG: uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = draw.uniform(0, 6, 3)
    planes = [
        200 - 150 * y / height + 20 * np.sin(x / 9 + phase[0]),
        60 + 120 * x / width + 20 * np.cos((x + y) / 13 + phase[1]),
        40 + 160 * (y > height / 2) + 20 * np.sin(y / 7 + phase[2]),
    ]
    noise = draw.normal(0, 4, (height, width, 3))
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """An image folder of three classes and 37 JPEGs and PNGs of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(37):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray(photo(i, 40 + i % 7 * 5, 48 + i % 5 * 9))
        if i % 6 == 5:
            picture.save(folder / f"{i:03d}.png")
        else:
            picture.save(folder / f"{i:03d}.jpg", quality=92)
    return root
