"""PNG and JPEG with whole pixels are read, whatever stands beside these; what lacks pixels is not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from truth import photo

from fastrot.data import pictures
from fastrot.data.files import BadPicture, CutShort
from fastrot.data.mend import without_metadata

PHOTO = Image.fromarray(photo(5, 48, 64))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def segment(marker: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2 if length is None else length) + data


def before(part: bytes, data: bytes) -> bytes:
    """Put in front of the pixels."""
    at = 33 if data.startswith(b"\x89PNG") else 2
    return data[:at] + part + data[at:]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PNG, JPEG = encoded(PHOTO, "PNG"), encoded(PHOTO, quality=95)
PROGRESSIVE, CMYK = encoded(PHOTO, progressive=True), encoded(PHOTO.convert("CMYK"))
LONG = zlib.compress(bytes(5_000_000))
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
EXIF = turned().tobytes()
WHOLE = {  # what Pillow refuses, and the sound picture
    "long-text": (before(chunk(b"zTXt", b"k\0\0" + LONG), PNG), PNG),
    "long-utf8": (before(chunk(b"iTXt", b"k\0\1\0\0\0" + LONG), PNG), PNG),
    "long-profile": (before(chunk(b"iCCP", b"k\0\0" + LONG), PNG), PNG),
    "long-text-behind": (PNG[:-12] + chunk(b"zTXt", b"k\0\0" + LONG) + PNG[-12:], PNG),
    "much-text": (before(chunk(b"tEXt", b"k\0" + bytes(10**6)) * 70, PNG), PNG),
    "crc-of-gamma": (before(chunk(b"gAMA", b"\0\0\1\0", crc=1), PNG), PNG),
    "crc-of-transparency": (before(chunk(b"tRNS", bytes(6), crc=1), PNG), PNG),
    "short-gamma": (before(chunk(b"gAMA", b""), PNG), PNG),
    "short-frame": (before(chunk(b"acTL", b"1"), PNG), PNG),
    "cut-behind-the-pixels": (PNG[:-12] + chunk(b"tEXt", b"k\0" + bytes(900))[:-500], PNG),
    "interlaced": (before(chunk(b"pHYs", b""), PNG), PNG),
    "short-jfif": (before(segment(0xE0, b"JFIF\0"), JPEG), JPEG),
    "no-profile": (before(segment(0xE2, b"ICC_PROFILE\0"), JPEG), JPEG),
    "photoshop": (before(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4"), JPEG), JPEG),
    "wrong-lengths": (
        before(segment(0xFE, b"words", 4) + segment(0xFE, b"", 0) + segment(0xE0, b"JFIF\0"), JPEG),
        JPEG,
    ),
    **{
        f"no-end-{name}": (data[:-2], data)
        for name, data in {
            "baseline": JPEG,
            "progressive": PROGRESSIVE,
            "grey": encoded(PHOTO.convert("L")),
            "cmyk": CMYK,
            "rgb": encoded(PHOTO, keep_rgb=True),
        }.items()
    },
    "half-an-end": (JPEG[:-1], JPEG),
    "no-end-rubbish": (JPEG[:-2] + b"abc", JPEG),
    "two-faults": (before(segment(0xE0, b"JFIF\0"), JPEG)[:-2], JPEG),
}
TURNED = {
    "jpeg-no-end": encoded(PHOTO, exif=turned())[:-2],
    "jpeg-short-jfif": before(segment(0xE0, b"JFIF\0"), encoded(PHOTO, exif=turned())),
    "png-exif": before(chunk(b"gAMA", b"", crc=1) + chunk(b"eXIf", EXIF[6:]), PNG),
    "png-xmp": before(chunk(b"zTXt", b"k\0\0" + LONG) + chunk(b"iTXt", XMP), PNG),
}
CUT = {
    "baseline": JPEG[:-22],
    "progressive": PROGRESSIVE[: len(PROGRESSIVE) * 2 // 3],
    "cmyk": CMYK[: len(CMYK) // 2],
    "png": PNG[: len(PNG) // 2],
    "png-two-faults": before(chunk(b"gAMA", b""), PNG)[: len(PNG) // 2],
    **{kind: encoded(PHOTO, kind)[:5000] for kind in ("BMP", "PPM", "TIFF")},
    "gif": encoded(PHOTO, "GIF")[:1500],
}


def pillows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_pixels_are_read_whatever_stands_beside_them(kind):
    data, sound = WHOLE[kind]
    with pytest.raises(Exception, match=r"."):
        pillows(data)  # else there is nothing to mend
    np.testing.assert_array_equal(pictures.decode(data), pillows(sound))
    assert pictures.size_of(data) == (48, 64)


@pytest.mark.parametrize("kind", TURNED)
def test_a_mended_picture_is_still_upright(kind):
    picture = pictures.decode(TURNED[kind])
    assert picture.shape == (64, 48, 3)
    assert pictures.size_of(TURNED[kind]) == (64, 48)
    truth = np.rot90(np.asarray(PHOTO), -1)
    assert np.abs(picture.astype(int) - truth).mean() < 6


@pytest.mark.parametrize("kind", CUT)
def test_what_lacks_pixels_is_refused_unless_it_is_asked_for(kind):
    with pytest.raises(CutShort, match="data is cut short"):
        pictures.decode(CUT[kind])
    assert pictures.decode_truncated(CUT[kind]).shape == (48, 64, 3)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_truncated_picture_keeps_what_is_there():
    picture = pictures.decode_truncated(JPEG[: len(JPEG) // 2])
    np.testing.assert_array_equal(picture[:8, :24], pillows(JPEG)[:8, :24])
    assert (picture[-16:] == 128).all()


@pytest.mark.parametrize("progressive", [False, True])  # whose scans end in many a place
def test_no_cut_of_a_jpeg_passes_for_the_whole(progressive):
    data = encoded(PHOTO.resize((24, 20)), progressive=progressive)
    truth = pillows(data)
    for end in range(len(data) - 2):
        try:
            picture = pictures.decode(data[:end])
        except BadPicture:
            continue
        assert (picture == truth).all(), end


def test_what_pixels_hang_on_is_not_mended():
    at = PNG.index(b"IHDR") + 4 + 13
    palette = encoded(PHOTO.quantize(16), "PNG")
    colours = palette.index(b"PLTE") + 4
    for data in (
        PNG[:at] + bytes(4) + PNG[at + 4 :],
        palette[:colours] + b"x" + palette[colours + 1 :],
    ):
        with pytest.raises(BadPicture, match="its png header is damaged"):
            pictures.decode(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_metadata_decides_no_bit_of_a_png(mode):
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    image = Image.fromarray(grey) if mode == "I;16" else PHOTO.convert(mode)
    data = encoded(image, "PNG", save_all=mode == "RGB", append_images=[PHOTO.rotate(180)])
    *_, bare = without_metadata(io.BytesIO(data))
    np.testing.assert_array_equal(pictures.decode(bare), pictures.decode(data))
