import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_beton import write_beton
from truth import photo

from fastrot.assemble import open_loader
from fastrot.config import RandomResized, UsageError, Whole
from fastrot.core import DamagedRecord, View
from fastrot.data import reader
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.reader import AHEAD

PHOTOS = [photo(i, 40 + 3 * i, 90 - 4 * i) for i in range(11)]
LABELS = np.array([3, 1, 0, 2, 2, 1, 0, 3, 1, 1, 0])
IMAGE_AND_LABEL = {"image": "image", "label": ("int", LABELS)}


@pytest.fixture(scope="session")
def written(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("beton") / "train.beton"
    convert(BetonOptions(source="imagefolder", root=pictures, out=out, workers=0))
    return out


@pytest.fixture
def ours(written, tmp_path) -> Path:
    """A file of our writer with all that lies beside it, to be spoilt."""
    for file in written.parent.glob("train.beton*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "train.beton"


def alone(path: Path) -> Path:
    """The same file without what lies beside it."""
    return Path(shutil.copy(path, path.with_name("alone.beton")))


def read_all(path: Path, workers: int = 0) -> list[torch.Tensor]:
    view = View(crops=(Whole(size=16),), shuffled=False)
    return [
        batch.images.clone() for batch in open_loader(path, view, batch=4, workers=workers).epoch(0)
    ]


def regions(path: Path) -> dict[str, range]:
    """Bytes of the parts of a file of our writer."""
    fields, rows, table = (
        int.from_bytes(path.read_bytes()[at : at + size], "little")
        for at, size in ((2, 2), (8, 8), (16, 8))
    )
    start = 24 + 1041 * fields
    return {
        "header": range(0, 24),
        "fields": range(24, start),
        "rows": range(start, start + 32 * rows),
        "table": range(table, path.stat().st_size),
    }


def flip_bit(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


# ---- files of FFCV's own writer ----

FIELDS = {
    "image-label": IMAGE_AND_LABEL,
    "label-first": {"label": ("int", LABELS), "image": "image"},
    "label-behind-other-ints": {
        "index": ("int", range(11)),
        "camera": ("int", 7),
        "photo": "image",
        "target": ("int", LABELS),
    },
    "first-int-is-the-label": {"score": ("float", 0.5), "x": "image", "y": ("int", LABELS)},
}


@pytest.mark.parametrize("modes", ["jpg", "raw", ["raw", "jpg", "jpg"] * 4], ids=str)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_file_of_ffcvs_writer_is_read(tmp_path, fields, modes):
    modes = modes if isinstance(modes, str) else modes[: len(PHOTOS)]
    data = Beton(write_beton(tmp_path / "a.beton", PHOTOS, fields, modes=modes))
    assert (data.labels == LABELS).all()
    assert data.classes == ("0", "1", "2", "3")
    assert (data.keys == np.arange(11)).all()
    assert (data.mean, data.std, data.numbers) == (None, None, None)
    assert data.sizes(np.arange(11)).tolist() == [list(p.shape[:2]) for p in PHOTOS]
    for row, picture in enumerate(PHOTOS):
        apart = np.abs(data.picture(row).astype(int) - picture)
        assert apart.max() == 0 if data.contents.raw[row] else apart.mean() < 5


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "image"},
        {"image": "image", "w": ("float", 1)},
        {"image": "image", "id": ("int", 3)},
    ],
    ids=["image-only", "float", "number"],
)
def test_without_a_label_it_is_minus_one(tmp_path, fields):
    data = Beton(write_beton(tmp_path / "a.beton", PHOTOS, fields))
    assert (data.labels == -1).all()
    assert data.classes == ()


def test_records_of_small_pages_are_found(tmp_path):
    small = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL, page=2**14, modes="raw")
    large = write_beton(tmp_path / "b.beton", PHOTOS, IMAGE_AND_LABEL, seed=1, modes="raw")
    for row, picture in enumerate(PHOTOS):
        assert np.array_equal(Beton(small).picture(row), picture)
        assert np.array_equal(Beton(large).picture(row), picture)


# ---- our own ----


def test_what_lies_beside_is_read(ours, pictures):
    data, facts = Beton(ours), json.loads(Path(f"{ours}.json").read_bytes())
    assert data.classes == ("class0", "class1", "class2")
    assert data.fingerprint == facts["fingerprint"] != Beton(alone(ours)).fingerprint
    assert (list(data.mean), list(data.std)) == (facts["mean"], facts["std"])
    for row in (0, 5, data.rows - 1):
        assert (pictures / data.name(row)).is_file()
        assert data.name(row).startswith(data.classes[data.labels[row]])
    assert Beton(alone(ours)).name(3) == "path unknown"


def test_numbers_of_the_source_are_read(ours):
    assert Beton(ours).numbers is None
    facts = json.loads(Path(f"{ours}.json").read_bytes()) | {"numbers": list(range(0, 74, 2))}
    facts.pop("crc")  # as before the .json was sealed
    Path(f"{ours}.json").write_text(json.dumps(facts))
    assert Beton(ours).numbers.tolist() == list(range(0, 74, 2))


# ---- hostile files: refused in one sentence, or the record is named; never zeros in silence ----


def test_a_file_cut_short_is_refused(ours):
    whole, bare = ours.read_bytes(), alone(ours)
    cuts = np.random.default_rng(0).integers(0, len(whole), 60).tolist()
    for cut in [0, 1, 23, 24, 25, len(whole) - 1, len(whole) - 24, *cuts]:
        bare.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"cut short|empty"):
            Beton(bare)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\0\0", "never finished"),
        (b"\1\0", "version 2 .its first bytes say 1"),
        (b"PK", "no .beton"),
    ],
)
def test_what_is_no_beton_is_refused(ours, start, words):
    bare = alone(ours)
    bare.write_bytes(start + ours.read_bytes()[2:])
    with pytest.raises(UsageError, match=words):
        Beton(bare)


def test_other_fields_are_refused(tmp_path):
    path = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL)
    for kind, words in [(1, "no image field"), (255, "field of type 255"), (0, "no image field")]:
        data = bytearray(path.read_bytes())
        data[24] = kind
        (tmp_path / "b.beton").write_bytes(data)
        with pytest.raises(UsageError, match=words):
            Beton(tmp_path / "b.beton")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        Beton(tmp_path / "none.beton")


@pytest.mark.parametrize("region", ["header", "fields", "rows", "table"])
def test_one_flipped_bit_in_a_file_of_ours_is_refused(ours, region):
    draw = np.random.default_rng(1)
    for at in draw.choice(regions(ours)[region], 20):
        bit = int(draw.integers(8))
        flip_bit(ours, at, bit)
        with pytest.raises(UsageError):
            Beton(ours)
        flip_bit(ours, at, bit)
    Beton(ours)


@pytest.mark.parametrize("region", ["header", "rows", "table"])
def test_one_flipped_bit_without_checksums_never_crashes(tmp_path, region):
    """It is refused, or a record is named, or it hit what only a checksum could guard: a label, a padding byte."""
    path = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL, page=2**14)
    at, draw = {"header": (0, 24), "rows": (24 + 2 * 1041, 24 * 11)}, np.random.default_rng(2)
    at["table"] = (path.stat().st_size - 24 * 11, 24 * 11)
    found, tries = 0, 40
    for _ in range(tries):
        place, bit = at[region][0] + int(draw.integers(at[region][1])), int(draw.integers(8))
        flip_bit(path, place, bit)
        try:
            read_all(path)
        except (UsageError, DamagedRecord):
            found += 1
        flip_bit(path, place, bit)
    assert found > tries / 3


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("how", ["bit", "zeros", "cut"])
def test_a_damaged_record_is_named(ours, how, workers):
    data = Beton(ours)
    row = 17
    start, size = int(data.contents.ptr[row]), int(data.contents.size[row])
    whole = bytearray(ours.read_bytes())
    if how == "bit":
        whole[start + size // 2] ^= 4
    else:
        at = start + (0 if how == "zeros" else size * 2 // 3)
        whole[at : start + size] = bytes(start + size - at)
    ours.write_bytes(whole)
    with pytest.raises(DamagedRecord, match=f"row 17 of .*{data.name(row)}.* checksum") as error:
        read_all(ours, workers)
    assert "\n" not in str(error.value)
    assert np.array_equal(Beton(ours).picture(16), data.picture(16))  # the others are whole


@pytest.mark.parametrize("how", ["zeros", "cut"])
def test_a_damaged_record_is_named_without_checksums_too(tmp_path, how):
    path = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL)
    contents = Beton(path).contents
    start, size = int(contents.ptr[4]), int(contents.size[4])
    data = bytearray(path.read_bytes())
    at = start + (0 if how == "zeros" else size // 2)
    data[at : start + size] = bytes(start + size - at)
    path.write_bytes(data)
    with pytest.raises(DamagedRecord, match="row 4 of"):
        read_all(path)


@pytest.mark.parametrize("larger", [True, False])
def test_a_jpeg_of_another_size_than_its_row_is_damaged(tmp_path, larger):
    path = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL)
    height = 24 + 2 * 1041 + 24 * 2 + 3  # of row 2, as 2 bytes: mode, width, height, ptr, label
    data = bytearray(path.read_bytes())
    data[height : height + 2] = (30 if larger else 99).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedRecord, match="row 2 of"):
        read_all(path)


@pytest.mark.parametrize("part", ["json", "crc.npy", "keys.npy"])
def test_a_set_of_another_file_is_refused(ours, pictures, tmp_path, part):
    other = tmp_path / "other.beton"
    convert(
        BetonOptions(
            source="imagefolder", root=pictures, out=other, workers=0, quality=80, limit=30
        )
    )
    shutil.copy(f"{other}.{part}", f"{ours}.{part}")
    with pytest.raises(UsageError, match="of another file"):
        Beton(ours)


@pytest.mark.parametrize("part", ["json", "crc.npy", "keys.npy"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\x93NUMPY\1\0", b"{}"], ids=repr)
def test_a_set_in_pieces_is_refused(ours, part, content):
    side = Path(f"{ours}.{part}")
    side.unlink()
    if content is not None:
        side.write_bytes(content)
    with pytest.raises(UsageError, match="missing" if content is None else "damaged"):
        Beton(ours)


# ---- buffers ----


def test_buffers_are_used_again_and_stay_few(ours, monkeypatch):
    made = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *a: made.append(a[0]) or empty(*a))
    loader = open_loader(ours, View(crops=(RandomResized(size=24),)), batch=2, workers=2)
    for number in range(5):
        for _ in loader.epoch(number):
            pass
    assert 0 < made.count(2 * 24 * 24 * 3) <= AHEAD + 6  # in 5 epochs of 18 batches


def test_a_buffer_is_given_back_when_the_last_reader_is_gone():
    first = reader._buffer(2, 8)
    at, part = first.data_ptr(), first[1, :4]
    del first
    assert reader._buffer(2, 8).data_ptr() != at
    pixels = part.numpy()[:, 2:]
    del part
    assert reader._buffer(2, 8).data_ptr() != at
    del pixels
    assert at in {t.data_ptr() for t in [reader._buffer(2, 8) for _ in range(3)]}


def test_a_burst_of_buffers_goes_back_to_the_system():
    burst = [reader._buffer(1, 4) for _ in range(3 * reader.KEPT)]
    del burst
    assert len(reader._free[1 * 4 * 4 * 3]) == reader.KEPT


def test_a_raw_picture_of_another_size_than_its_row_is_refused(tmp_path):
    path = write_beton(tmp_path / "a.beton", PHOTOS, IMAGE_AND_LABEL, modes="raw")
    data = bytearray(path.read_bytes())
    data[24 + 2 * 1041 + 24 * 2 + 3] += 1  # the height of row 2
    path.write_bytes(data)
    with pytest.raises(UsageError, match="raw picture is not"):
        Beton(path)
