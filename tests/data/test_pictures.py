"""Plain JPEGs take another way than Pillow's: to the same bits, and to the same refusals."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from truth import DATA, photo

from fastrot.data import files, pictures
from fastrot.data.files import BadPicture


def encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def pillows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(ODD_SIDES, exif=exif)


PHOTO, ODD_SIDES = Image.fromarray(photo(1, 48, 64)), Image.fromarray(photo(2, 37, 61))
PLAIN = {
    "444": encoded(PHOTO, subsampling=0, quality=95),
    "422": encoded(PHOTO, subsampling=1, quality=60),
    "420": encoded(PHOTO, subsampling=2, quality=90),
    "odd-sides-444": encoded(ODD_SIDES, subsampling=0),
    "odd-sides-422": encoded(ODD_SIDES, subsampling=1),
    "odd-sides-420": encoded(ODD_SIDES, subsampling=2),
    "one-pixel": encoded(PHOTO.resize((1, 1))),
    "thin": encoded(PHOTO.resize((1, 700))),
    "grey": encoded(PHOTO.convert("L")),
    "progressive": encoded(ODD_SIDES, progressive=True),
    "progressive-grey": encoded(ODD_SIDES.convert("L"), progressive=True),
    "restarts": encoded(PHOTO, restart_marker_rows=1),
    "optimised": encoded(PHOTO, optimize=True),
    "stored-as-rgb": encoded(PHOTO, keep_rgb=True),
    "colour-profile": encoded(PHOTO, icc_profile=bytes(150_000)),
    "rubbish-behind": encoded(PHOTO) + bytes(range(256)) * 9,
    "second-behind": encoded(PHOTO) + encoded(ODD_SIDES),
    **{f"turned-{o}": turned(o) for o in range(10)},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_jpegs_have_pillows_bits(kind, monkeypatch):
    truth = pillows(PLAIN[kind])
    monkeypatch.setattr(pictures, "_by_pillow", None)  # not needed
    picture = pictures.decode(PLAIN[kind])
    np.testing.assert_array_equal(picture, truth)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.flags.writeable
    assert picture.shape[:2] == pictures.size_of(PLAIN[kind])


def quarter_chroma() -> bytes:
    """4:1:0, for which TurboJPEG has no name: chroma of the 4:2:0 picture said to be a quarter as wide."""
    data = bytearray(PLAIN["420"])
    data[data.index(b"\xff\xc0") + 11] = 0x42
    return bytes(data)


ODD = {
    "cmyk": encoded(PHOTO.convert("CMYK")),
    "410": quarter_chroma(),
    "end-in-the-middle": PLAIN["420"][:-200] + b"\xff\xd9",  # libjpeg warns, and Pillow takes it
}


def modern(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "HEIF"])
def test_newer_formats_are_read_upright(kind, mode):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    if not files.has_reader(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned_too = {} if kind == "JPEG2000" else {"exif": exif.tobytes()}
    data = modern(ODD_SIDES.convert(mode), kind, quality_mode="rates", **turned_too)
    assert files.sniff(data[: files.HEAD]) == kind.lower()
    truth = np.asarray(ODD_SIDES.convert(mode).convert("RGB"))
    truth = np.rot90(truth, -1) if turned_too else truth
    picture = pictures.decode(data)
    assert picture.shape == truth.shape == (*pictures.size_of(data), 3)
    assert np.abs(picture.astype(int) - truth).mean() < 12


def test_a_brand_that_names_no_coding_is_known_by_those_that_follow():
    box = b"\0\0\0\x20ftypmif1\0\0\0\0"
    assert files.sniff(box + b"miafavifMA1B" + bytes(4)) == "avif"
    assert files.sniff(box + b"miafheicMA1B" + bytes(4)) == "heif"
    assert files.sniff(b"\0\0\0\x20ftypisom\0\0\0\0avif" + bytes(12)) is None  # a video


def test_a_jpeg_turned_by_xmp_is_not_taken_for_upright():
    words = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="3"/>'
    data = (
        PLAIN["420"][:2]
        + struct.pack(">BBH", 0xFF, 0xE1, len(words) + 2)
        + words
        + PLAIN["420"][2:]
    )
    np.testing.assert_array_equal(pictures.decode(data), pillows(PLAIN["420"])[::-1, ::-1])
    assert not pictures.is_upright_jpeg(np.frombuffer(data, np.uint8), 48, 64)


@pytest.mark.parametrize("kind", ODD)
def test_odd_jpegs_are_left_to_pillow(kind):
    np.testing.assert_array_equal(pictures.decode(ODD[kind]), pillows(ODD[kind]))


def test_damaged_jpegs_are_taken_or_refused_as_pillow_does():
    draw, fates = np.random.default_rng(0), {True: 0, False: 0}
    for data in (PLAIN["420"], PLAIN["progressive"], PLAIN["restarts"], PLAIN["grey"]):
        for trial in range(60):
            damaged = bytearray(data)
            at = draw.integers(0, len(data), 3)
            if trial % 3 == 0:
                del damaged[at[0] :]
            elif trial % 3 == 1:
                damaged[at[0]] ^= 1 << draw.integers(8)
            else:
                damaged[at[0] : at[0] + 20] = bytes(20)
            try:
                truth = pillows(bytes(damaged))
            except (OSError, SyntaxError):
                truth = None
            fates[truth is not None] += 1
            if truth is None:
                with pytest.raises(BadPicture, match=r"its (jpeg|first bytes)"):
                    pictures.decode(bytes(damaged))
            else:
                np.testing.assert_array_equal(pictures.decode(bytes(damaged)), truth)
    assert min(fates.values()) > 40


def test_no_size_is_believed_before_it_is_compared(monkeypatch):
    """Of two frame headers Pillow goes by the second; libjpeg refuses them."""
    data = PLAIN["420"]
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 19]
    for height, width in ((8, 8), (48, 65), (480, 640)):
        other = frame[:5] + struct.pack(">HH", height, width) + frame[9:]
        for pair in (other + frame, frame + other):
            twice = data[:at] + pair + data[at + 19 :]
            with pytest.raises(BadPicture):
                pictures.decode(twice)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(pictures.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    bomb = data[: at + 5] + struct.pack(">HH", 65_500, 65_500) + data[at + 9 :]
    with pytest.raises(BadPicture, match="178 megapixels"):
        pictures.decode(bomb)


@pytest.mark.soak
def test_real_jpegs_have_pillows_bits():
    sample = DATA / "imagenet-sample"
    if not sample.is_dir():
        pytest.skip("no real pictures here")
    for line in (sample / "core.txt").read_text().splitlines():
        data = (sample / line.split()[0]).read_bytes()
        np.testing.assert_array_equal(pictures.decode(data), pillows(data), line)


def test_a_want_of_memory_is_no_fault_of_the_picture(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pictures.simplejpeg, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        pictures.decode(PLAIN["420"])


def test_a_file_too_long_for_a_picture_has_no_size(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(PLAIN["420"])
        file.truncate(files.MOST_BYTES)
    assert pictures.size_of(tmp_path / "a.jpg") == (48, 64)
    os.truncate(tmp_path / "a.jpg", files.MOST_BYTES + 1)
    with pytest.raises(BadPicture, match=r"it has 2,147,483,649 bytes"):
        pictures.size_of(tmp_path / "a.jpg")
