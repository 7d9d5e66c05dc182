"""The C++ extension: the bits of the Python libraries, whatever is asked of it, and no trust in what it is given."""

import io
import itertools
import os
import subprocess
import sys
import time
import zlib
from contextlib import closing
from pathlib import Path

import native_fuzz
import numpy as np
import pytest
import simplejpeg
from native_hostile import jpeg_crops, pack_crops
from packs import bc4, untiled
from PIL import Image
from truth import photo

from fastrot import native
from fastrot.ops.resample import resample

ROOT = Path(__file__).parents[1]
SIZES = [1, 3, 8, 15, 17, 64]  # one pixel, under one step of the wide loops, ragged, even
built = pytest.mark.skipif(native.load() is None, reason=native.why())
can_build = pytest.mark.skipif(not native_fuzz.possible(), reason="no compiler or no headers")


@pytest.fixture(params=["wide", "plain"])
def form(request):
    """The loops of the processor at hand, and those of any other."""
    library = native.load()
    library.fastrot_wide(request.param == "wide")
    yield request.param
    library.fastrot_wide(1)


def draw_boxes(sizes, seed: int, *, inside: bool = False) -> np.ndarray:
    """A box for each picture: a third of them over its border, some larger than it, unless all are to be inside."""
    draw = np.random.default_rng(seed)
    rows = np.zeros((len(sizes), 6), np.int64)
    for i, (h, w) in enumerate(np.asarray(sizes).tolist()):
        if i % 3 or inside:
            bh, bw = draw.integers(1, h + 1), draw.integers(1, w + 1)
            y, x = draw.integers(0, h - bh + 1), draw.integers(0, w - bw + 1)
        else:
            bh, bw = draw.integers(1, 2 * h + 5), draw.integers(1, 2 * w + 5)
            y, x = draw.integers(1 - bh, h), draw.integers(1 - bw, w)
        rows[i] = i, y, x, bh, bw, draw.integers(2)
    return rows


def resampled(pictures, boxes, size: int) -> np.ndarray:
    out = np.empty((len(pictures), size, size, 3), np.uint8)
    for picture, row, crop in zip(pictures, boxes, out, strict=True):
        resample(picture, row, crop)
    return out


# ---- built where it can be, missed by nobody where it cannot ----


def build(folder: Path, **environment: str) -> list[Path]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    done = subprocess.run(
        [*command, "--build-temp", str(folder / "objects")],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(folder.rglob("_native*.so"))


@can_build
def test_it_is_built_where_there_is_a_compiler(tmp_path, monkeypatch):
    (library,) = build(tmp_path)
    monkeypatch.setenv(native.SETTING, str(library))
    assert native.load() is not None, native.why()
    assert native.why().startswith("built with libjpeg-turbo ")


def test_without_a_compiler_the_install_goes_on(tmp_path):
    assert build(tmp_path, CC="false", CXX="false") == []


@pytest.mark.parametrize(
    ("setting", "words"), [("0", "FASTROT_NATIVE=0"), ("/nowhere/x.so", "could not be built")]
)
def test_it_says_why_it_does_not_run(monkeypatch, setting, words):
    monkeypatch.setenv(native.SETTING, setting)
    assert native.load() is None
    assert words in native.why()
    with pytest.raises(OSError, match=words):
        native.Pool(0)


@built
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    native._opened.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, "EDITION", -1)
        assert native.load() is None
        assert "other sources" in native.why()
    native._opened.cache_clear()


def test_what_is_no_library_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "x.so").write_bytes(b"no library")
    monkeypatch.setenv(native.SETTING, str(tmp_path / "x.so"))
    assert native.load() is None
    assert "cannot be loaded" in native.why()


# ---- packs ----


def joined(sizes, side: int) -> np.ndarray:
    across = -(-np.asarray(sizes, np.int64) // side)
    return np.concatenate([[0], np.cumsum(across.prod(axis=1))])


@built
@pytest.mark.parametrize("encoding", ["ycc", "raw"])
@pytest.mark.parametrize("size", SIZES)
def test_crops_of_a_pack_are_those_of_the_whole_pictures(form, encoding, size):
    draw = np.random.default_rng(size)
    sizes = draw.integers(1, 80, (40, 2)).astype(np.int32)
    sizes[:2] = (8, 8), (300, 11)  # one tile; tall, so that it shrinks to a small part
    first = joined(sizes, 8 if encoding == "ycc" else 1)
    data = draw.integers(0, 256, (first[-1], 48 if encoding == "ycc" else 3), dtype=np.uint8)
    data[::5, :2] = 77  # end points that are equal, as of a flat block
    parts = [data[a:b] for a, b in itertools.pairwise(first)]
    pictures = [
        untiled(part, *size) if encoding == "ycc" else part.reshape(*size, 3)
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]
    order = draw.permutation(40)
    boxes = draw_boxes(sizes, size)[order]
    found = np.empty((40, size, size, 3), np.uint8)
    pack = dict(data=data, first=first, sizes=sizes)
    assert not pack_crops(2, **pack, boxes=boxes, out=found).any()
    assert np.array_equal(found, resampled([pictures[i] for i in order], boxes, size))


def test_the_reference_of_tiles_is_that_of_the_format():
    texture2ddecoder = pytest.importorskip("texture2ddecoder")
    blocks = np.random.default_rng(0).integers(0, 256, (64, 8), dtype=np.uint8)
    blocks[:8, 1] = blocks[:8, 0]
    decoded = texture2ddecoder.decode_bc4(blocks.tobytes(), 4, 4 * len(blocks))
    third = np.frombuffer(decoded, np.uint8).reshape(-1, 4, 4, 4)[..., 2]
    assert np.array_equal(third, bc4(blocks))


@built
@pytest.mark.parametrize(
    "box",
    [
        (9, 0, 4, 4),
        (0, -4, 4, 4),
        (0, 0, 0, 4),
        (0, 0, 4, -4),
        (0, 0, 2**60, 1),
        (-(2**63), 0, 2, 2),
    ],
)
def test_a_box_outside_its_picture_is_not_cut(box):
    pixels, sizes = np.zeros((9 * 20, 3), np.uint8), np.array([[9, 20]], np.int32)
    rows = np.array([[0, *box, 0]], np.int64)
    pack = dict(data=pixels, first=np.array([0, 180]), sizes=sizes)
    assert pack_crops(**pack, boxes=rows, out=np.empty((1, 8, 8, 3), np.uint8)) != native.FINE


# ---- JPEGs ----


def encoded(kind: str, picture: np.ndarray) -> bytes:
    """A JPEG of some kind: a chroma subsampling, grey, or a way to write it."""
    if kind == "grey":
        return simplejpeg.encode_jpeg(
            picture[..., :1].copy(), colorspace="GRAY", colorsubsampling="Gray"
        )
    if kind.isdigit():
        return simplejpeg.encode_jpeg(picture, quality=90, colorsubsampling=kind)
    file, image = io.BytesIO(), Image.fromarray(picture)
    how = {"progressive": {"progressive": True}, "stored as rgb": {"keep_rgb": True}}.get(kind, {})
    image.convert("CMYK" if kind == "cmyk" else "RGB").save(file, "JPEG", **how)
    return file.getvalue()


def records_of(each: list[bytes], sizes, *, checked: bool = True) -> native.Records:
    memory = np.frombuffer(b"".join(each), np.uint8)
    lengths = np.array([len(one) for one in each], np.int64)
    zeros = np.zeros(len(each), np.int64)
    crcs = np.array([zlib.crc32(one) for one in each], np.uint32) if checked else None
    return native.Records(
        native.Files([memory]),
        zeros,
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(sizes, np.int32),
        zeros.astype(bool),
        crcs,
    )


OURS = ("420", "422", "444", "grey")
LEFT = ("440", "411", "progressive", "cmyk", "stored as rgb")


@built
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "read-to-the-end"])
@pytest.mark.parametrize("kind", OURS)
def test_crops_of_jpegs_are_those_of_the_whole_pictures(form, kind, checked):
    draw = np.random.default_rng(len(kind))
    small = draw.integers(1, 24, (30, 2))  # where the smoothing of chroma meets all borders at once
    sizes = np.concatenate([small, draw.integers(20, 150, (50, 2))]).tolist()
    each = [encoded(kind, photo(i, *size)) for i, size in enumerate(sizes)]
    pictures = [simplejpeg.decode_jpeg(one) for one in each]
    boxes = [draw_boxes(sizes, 1), draw_boxes(sizes, 2, inside=True)]
    out = [np.empty((80, size, size, 3), np.uint8) for size in (17, 48)]
    records = records_of(each, sizes, checked=checked)
    assert not jpeg_crops(records, boxes, out, threads=2).any()
    for rows, found in zip(boxes, out, strict=True):
        assert np.array_equal(found, resampled(pictures, rows, found.shape[1]))


@built
@pytest.mark.parametrize("kind", LEFT)
def test_odd_jpegs_are_left_to_others(kind):
    records = records_of([encoded(kind, photo(1))], [(60, 80)])
    out = np.empty((1, 8, 8, 3), np.uint8)
    assert jpeg_crops(records, [np.array([[0, 0, 0, 60, 80, 0]])], [out]) != native.FINE


@built
def test_what_is_wrong_with_one_record_is_its_own_affair():
    each = [encoded("420", photo(i)) for i in range(6)]
    good = records_of(each, [(60, 80)] * 6)
    assert good.crcs is not None
    crcs, sizes = good.crcs.copy(), good.sizes.copy()
    crcs[1] += 1
    sizes[2:4] = (59, 80), (60, 90)
    boxes = np.array([[i, 0, 0, 30, 30, 0] for i in range(6)])
    boxes[4, 1] = 60
    out = np.empty((6, 8, 8, 3), np.uint8)
    status = jpeg_crops(good._replace(crcs=crcs, sizes=sizes), [boxes], [out])
    assert (status != native.FINE).tolist() == [False, True, True, True, True, False]


@built
def test_what_does_not_fit_is_refused_before_c_sees_it():
    hostile = Path(__file__).with_name("native_hostile.py")
    done = subprocess.run([sys.executable, str(hostile)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@built
def test_checksums_are_those_of_zlib(form):
    library, draw = native.load(), np.random.default_rng(0)
    assert library is not None
    for length in (0, 1, 7, 63, 64, 65, 79, 80, 127, 128, 1000, 30_001):
        data = draw.integers(0, 256, length, dtype=np.uint8)
        assert library.fastrot_crc32(data.ctypes.data, length) == zlib.crc32(data.data)


# ---- threads ----


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@built
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_pool_makes_many_batches_and_ends_at_once(number):
    each = [encoded("420", photo(i)) for i in range(4)]
    records, before = records_of(each, [(60, 80)] * 4), threads()
    boxes = [np.array([[i, 0, 0, 60, 80, 0] for i in range(4)])]
    whole = resampled([simplejpeg.decode_jpeg(one) for one in each], boxes[0], 40)
    with closing(native.Pool(number)) as pool:
        assert threads() == before + number
        out = [np.zeros((4, 40, 40, 3), np.uint8) for _ in range(30)]
        work = [pool.jpeg_crops(records, boxes, [to]) for to in out]
        for k in (3, 0, 29, 1):  # in any order
            assert not work[k].wait().any()
            assert np.array_equal(out[k], whole)
        assert not work[3].wait().any()  # again
    until = time.monotonic() + 10  # the system sees a joined thread end a little later
    while threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == before
    with pytest.raises(ValueError, match="closed"):
        work[7].wait()


# ---- damage, under sanitizers; `make fuzz` does this 6,000 times ----


@can_build
@pytest.mark.soak
def test_no_corruption_reads_or_writes_where_it_may_not(tmp_path):
    done = native_fuzz.fuzz(tmp_path, times=150, threads=2, sanitizer="address,undefined")
    assert done.returncode == 0, done.stderr
    assert "150 records corrupted" in done.stdout
