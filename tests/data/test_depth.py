"""Deep, signed and floating-point greys: neither black nor negative nor wrapped, or refused with the reason."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from truth import photo

from fastrot.data import pictures
from fastrot.data.files import BadPicture

GREY = np.asarray(Image.fromarray(photo(5, 48, 64)).convert("L")).copy()
GREY.flat[:2] = 0, 255
WIDE = GREY.astype(np.int64)
RGB = np.repeat(GREY[..., None], 3, axis=2)
FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff(values: np.ndarray, *, white_is_zero=False, bits: int | None = None) -> bytes:
    """An uncompressed TIFF of [h, w], [h, w, 3], or, with its channels apart, [3, h, w]."""
    apart = values.ndim == 3 and len(values) == 3
    channels = values.size // (GREY.size)
    bits = bits or 8 * values.itemsize
    depths = (bits).to_bytes(2, "little") * channels
    kinds = FORMATS[values.dtype.kind].to_bytes(2, "little") * channels
    data = values.tobytes()
    at = 8 + 2 + 12 * 11 + 4  # of what does not fit into a tag
    more, strip = depths + kinds, len(data) // (channels if apart else 1)
    starts = [at + 100 + i * strip for i in range(channels if apart else 1)]
    longs = struct.pack(f"<{len(starts)}I", *starts), struct.pack("<I", strip) * len(starts)
    more += longs[0] + longs[1]

    def tag(number: int, kind: int, count: int, value: bytes) -> bytes:
        if len(value) > 4:
            value = struct.pack("<I", at + more.index(value))
        return struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0")

    def short(number: int, value: int) -> bytes:
        return tag(number, 3, 1, value.to_bytes(2, "little"))

    height, width = GREY.shape
    colours = 2 if channels == 3 else 0 if white_is_zero else 1
    tags = [
        *(short(256, width), short(257, height), tag(258, 3, channels, depths), short(259, 1)),
        *(short(262, colours), tag(273, 4, len(starts), longs[0]), short(277, channels)),
        *(short(278, height), tag(279, 4, len(starts), longs[1]), short(284, 2 if apart else 1)),
        tag(339, 3, channels, kinds),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(tags) + bytes(4)
    return head + more.ljust(100, b"\0") + data


def saved(values: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 64 48 %d\n" % white + values.astype(">u2").tobytes()


def packed_12(values: np.ndarray) -> np.ndarray:
    pairs = values.reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, axis=1).astype(np.uint8)


U16 = np.uint16
RIGHT = {
    "8": (tiff(GREY), GREY),
    "8-in-16": (tiff(WIDE.astype(U16)), GREY),
    "10-in-16": (tiff((WIDE * 4).astype(U16)), GREY),
    "12-in-16": (tiff((WIDE * 16).astype(U16)), GREY),
    "14-in-16": (tiff((WIDE * 64).astype(U16)), GREY),
    "16": (tiff((WIDE * 257).astype(U16)), GREY),
    "16-white-is-zero": (tiff((65_535 - WIDE * 257).astype(U16), white_is_zero=True), GREY),
    "12-white-is-zero": (tiff((4095 - WIDE * 16).astype(U16), white_is_zero=True), GREY),
    "12-packed": (tiff(packed_12(WIDE * 16), bits=12), GREY),
    "12-packed-dark": (tiff(packed_12(WIDE * 2), bits=12), GREY // 8),
    "signed-8-in-16": (tiff(WIDE.astype(np.int16)), GREY),
    "signed-12-in-16": (tiff((WIDE * 16).astype(np.int16)), GREY),
    "signed-ct": (tiff((WIDE * 16 - 1024).astype(np.int16)), GREY),
    "signed-8": (tiff((WIDE - 128).astype(np.int8)), GREY),
    "32": (tiff((WIDE * 16_843_009).astype(np.uint32)), GREY),
    "12-in-32": (tiff((WIDE * 16).astype(np.uint32)), GREY),
    "signed-32": (tiff(((WIDE - 128) * 10**7).astype(np.int32)), GREY),
    "float": (tiff((WIDE / 255).astype(np.float32)), GREY),
    "colours-16": (tiff(RGB.astype(U16) * 257), GREY),
    "png-16": (saved((WIDE * 257).astype(U16), "PNG"), GREY),
    "png-16-dark": (saved((WIDE * 20).astype(U16), "PNG"), (GREY.astype(U16) * 20) >> 8),
    "png-12-in-16": (saved((WIDE * 16).astype(U16), "PNG"), GREY),
    "png-8-in-16": (saved(WIDE.astype(U16), "PNG"), GREY),
    "pgm-12": (pgm(WIDE * 16 + 15, 4095), GREY),
    "pgm-12-in-16": (pgm(WIDE * 16, 65_535), GREY),
    "black": (tiff(np.zeros_like(GREY, U16)), np.zeros_like(GREY)),
    "one-negative-value": (tiff(np.full_like(GREY, -7, np.int16)), np.zeros_like(GREY)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_greys_are_scaled_by_where_their_white_is(kind):
    data, grey = RIGHT[kind]
    picture = pictures.decode(data)
    assert (picture == picture[..., :1]).all()
    np.testing.assert_array_equal(picture[..., 0], grey)
    assert pictures.size_of(data) == (48, 64)


REFUSED = {
    "float-255": (tiff(WIDE.astype(np.float32)), "floating-point pixels go from 0 to 255, not 0 to 1"),
    "float-dark": (tiff((WIDE / 25_500).astype(np.float32)), "from 0 to 0.01, not 0 to 1"),
    "float-negative": (tiff((WIDE / 255 - 0.5).astype(np.float32)), "from -0.5 to 0.5, not 0 to 1"),
    "float-nan": (tiff(np.where(GREY > 9, np.nan, 0).astype(np.float32)), "nan, not 0 to 1"),
    "double": (tiff(WIDE / 255), "of pixels that Pillow does not know"),
    "colours-apart": (tiff(np.moveaxis(RGB, 2, 0).astype(U16) * 257), "of more than 8 bits lie apart"),
    "colours-12-in-16": (tiff(RGB.astype(U16) * 16), "would be almost black"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_known_white_is_refused_with_the_reason(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(BadPicture, match=reason):
        pictures.decode(data)
