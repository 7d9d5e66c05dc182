"""The reader's two forms, the C++ extension and the Python libraries: no bit differs, and no sentence."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from asked import asked
from plain_beton import write_beton
from truth import photo

from fastrot import native
from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, Whole, Within
from fastrot.core import CropRequest, View
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.why())
PHOTOS = [photo(i, 40 + 3 * i, 90 - 4 * i) for i in range(11)]
VIEWS = {
    "two-crops": View(crops=(RandomResized(size=24), RandomResized(size=40))),
    "over-the-border": View(crops=(Shifted(size=32, pad=6),)),
    "within": View(crops=(Within(size=24, short=28, random=False, flip=False),), shuffled=False),
    "much-smaller": View(crops=(Whole(size=7),), shuffled=False),
}


@pytest.fixture(scope="session")
def files(pictures, tmp_path_factory) -> dict[str, Path]:
    """Of our writer, whole and in parts, and of FFCV's, without checksums."""
    at = tmp_path_factory.mktemp("betons")
    options = {"source": "imagefolder", "root": pictures, "workers": 0}
    found = {
        "jpg": convert(BetonOptions(out=at / "jpg.beton", **options)).out,
        "raw": convert(BetonOptions(out=at / "raw.beton", encoding="raw", **options)).out,
        "parts": convert(BetonOptions(out=at / "p.beton", keep_parts=True, **options), part=9).out,
    }
    fields = {"image": "image", "label": ("int", range(11))}
    modes = ["raw", "jpg", "jpg"] * 4
    found["ffcv"] = write_beton(at / "ffcv.beton", PHOTOS, fields, modes=modes[:11])
    return found


def both(path: Path) -> list[Beton]:
    found: list[Beton] = [open_data(path), open_data(path)]
    found[1].native = False
    assert found[0].native
    return found


def drawn(data, view, start=0, **how):
    loader = open_loader(data, view, **{"batch": 5, "enlarge": True, **how})
    return [(b.index, b.label, *(c.clone() for c in b.crops)) for b in loader.epoch(1, start)]


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("kind", ["jpg", "raw", "parts", "ffcv"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_both_forms_give_the_same_bits(files, kind, view):
    quick, plain = both(files[kind])
    wanted = drawn(plain, view)
    assert len(wanted) > 1
    for workers in (0, 1, 3):
        assert same(drawn(quick, view, workers=workers), wanted)
    assert same(drawn(quick, view, start=1, workers=2), wanted[1:])


def test_the_extension_makes_the_crops(files, monkeypatch):
    """Not the Python form behind its back: healthy pictures never get there."""
    monkeypatch.setattr(Beton, "fill", lambda *_: pytest.fail("decoded in Python"))
    for path in files.values():
        assert drawn(open_data(path), VIEWS["within"], workers=2)


def test_odd_jpegs_are_decoded_all_the_same(tmp_path, monkeypatch):
    import cv2

    how = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    encode = cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda kind, picture, _: encode(kind, picture, how))
    path = write_beton(tmp_path / "a.beton", PHOTOS, {"image": "image"})
    quick, plain = both(path)
    assert same(drawn(quick, VIEWS["within"], workers=2), drawn(plain, VIEWS["within"]))


def damaged_copies(path: Path, folder: Path, count: int):
    """Copies of a file with one record spoilt in some way; which row."""
    whole, contents, draw = path.read_bytes(), Beton(path).contents, np.random.default_rng(3)
    for _ in range(count):
        row = int(draw.integers(len(contents.ptr)))
        start, size = int(contents.ptr[row]), int(contents.size[row])
        data, at = bytearray(whole), start + int(draw.integers(size))
        match int(draw.integers(4)):
            case 0:
                data[at] ^= 1 << int(draw.integers(8))
            case 1:
                data[at : start + size] = bytes(start + size - at)
            case 2:
                data[start + int(draw.integers(min(size, 600)))] ^= 1 << int(draw.integers(8))
            case _:
                end = min(at + 40, start + size)
                data[at:end] = draw.integers(0, 256, end - at, dtype=np.uint8).tobytes()
        (folder / path.name).write_bytes(data)
        yield row


@pytest.mark.parametrize("kind", ["jpg", "ffcv"])
def test_both_forms_find_the_same_damage(files, tmp_path, kind):
    """With checksums all of it; without, what a decoder says that reads to the end: the same pictures, the same words."""
    for beside in files[kind].parent.glob(f"{files[kind].name}*"):
        shutil.copy(beside, tmp_path)
    # a small box at the top: what lies below is not decoded, and must be looked at all the same
    rows = np.array([[i, 0, 0, 9, 9, 0] for i in range(11)], np.int64)
    found = 0
    for row in damaged_copies(files[kind], tmp_path, 60):
        told = []
        for data in both(tmp_path / files[kind].name):
            request = CropRequest((rows[row : row + 1].copy(),) if row < 11 else (rows[:1],), (8,))
            request.rows[0][:, 0] = row
            (((crop,), errors),) = asked(data, [request])
            told.append((errors, None if errors else crop.numpy().tobytes()))
        assert told[0] == told[1]
        found += bool(told[0][0])
    assert found == 60 if kind == "jpg" else 20 < found < 60


@pytest.mark.parametrize("quick", [True, False])
def test_an_epoch_that_is_broken_off_ends_its_threads(files, quick):
    before = set(Path("/proc/self/task").iterdir())
    data = both(files["jpg"])[0 if quick else 1]
    loader = open_loader(data, VIEWS["two-crops"], batch=4, workers=3, enlarge=True)
    for number in range(5):
        batches = loader.epoch(number)
        next(batches)
        batches.close()
    until = time.monotonic() + 10  # the system sees a joined thread end a little later
    while set(Path("/proc/self/task").iterdir()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert set(Path("/proc/self/task").iterdir()) <= before


def test_a_box_outside_its_picture_is_an_error_in_both_forms(files):
    request = CropRequest((np.array([[0, 500, 0, 4, 4, 0]], np.int64),), (8,))
    for data in both(files["jpg"]):
        with pytest.raises(ValueError, match="lies outside the picture"):
            asked(data, [request], 1)


def test_which_form_runs_is_said(files, monkeypatch):
    assert "C++ extension, built with libjpeg-turbo" in open_data(files["jpg"]).describe()[0]
    monkeypatch.setenv(native.SETTING, "0")
    (line,) = open_data(files["jpg"]).describe()
    assert "simplejpeg" in line
    assert "FASTROT_NATIVE=0" in line
