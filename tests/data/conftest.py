"""Pictures of every kind that a folder may hold."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from truth import photo


@pytest.fixture(scope="session")
def odd(tmp_path_factory) -> Path:
    """Class folders of plain JPEGs, turned ones, grey, CMYK and progressive ones, and pictures that are no JPEGs."""
    root = tmp_path_factory.mktemp("odd")

    def save(name: str, picture: Image.Image, **how) -> None:
        file = root / f"class{len(name) % 2}" / name
        file.parent.mkdir(exist_ok=True)
        picture.save(file, **how)

    for i in range(8):
        save(f"plain{i}.jpg", Image.fromarray(photo(i, 40 + 3 * i, 60 - 2 * i)), quality=92)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"turn{orientation}.jpg", Image.fromarray(photo(orientation, 41, 58)), exif=exif)
    picture = Image.fromarray(photo(20, 45, 63))
    save("grey.jpg", picture.convert("L"))
    save("cmyk.jpg", picture.convert("CMYK"))
    save("progressive.jpg", picture, progressive=True)
    save("alpha.png", picture.convert("RGBA"))
    save("palette.png", picture.quantize(40))
    save("deep.png", Image.fromarray(photo(21, 45, 63)[..., 0].astype(np.uint16) * 257))
    for ending in ("gif", "webp", "bmp", "tiff", "ppm"):
        save(f"kind.{ending}", picture)
    return root


@pytest.fixture
def lasting_threads() -> Callable[[], set[threading.Thread]]:
    """The threads that live, when the one that computes the next epoch's order has ended with it."""

    def threads() -> set[threading.Thread]:
        for thread in threading.enumerate():
            if thread.name.startswith("order"):
                thread.join(timeout=10)
        return set(threading.enumerate())

    return threads
