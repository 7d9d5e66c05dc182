"""Encoded bytes to pixels, upright: what a picture is, how large, and RGB out of every odd kind of it.

Pillow reads every header, and decodes the odd ones: CMYK and YCCK, palettes, 16 bits. Alpha is dropped, as
torchvision's ImageFolder does; 8 bits are kept (data/depth.py); of an animation the first frame. Plain JPEGs go
through simplejpeg, which gives the same bits in under two thirds of the time. Where it has a doubt, Pillow decides.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin

from fastrot.arrays import Bytes, Picture
from fastrot.data.depth import grey_of, is_deep, refuse_dim, tags_of
from fastrot.data.files import (
    EXTRAS,
    HEAD,
    BadPicture,
    CutShort,
    has_reader,
    one_line,
    picture_file,
    sniff,
)
from fastrot.data.mend import EOI, lacks_only_its_end, without_metadata

_Read = TypeVar("_Read")

MOST_PIXELS = 178_956_970  # what Pillow too calls a bomb: 0.5 GB of RGB

UPRIGHT = {  # EXIF orientation -> what brings the pixels upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF
_APP1, _PIXELS = 0xE1, 0xDA  # markers of JPEG
_LYING = (5, 6, 7, 8)  # orientations that swap height and width

# Pillow warns of damaged EXIF and the like without a file's name; what matters becomes a BadPicture.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes) -> Picture:
    """The first frame as RGB pixels, EXIF orientation applied. Raises BadPicture; CutShort where it lacks pixels."""
    return _sound(_decoded, io.BytesIO(data))


def decode_truncated(data: bytes) -> Picture:
    """`decode`, of what lacks pixels too: whatever its decoder gives stands for these, JPEG's grey, others' black.

    For where one thread decodes: Pillow's switch is the process's.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return decode(data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def size_of(picture: bytes | str | os.PathLike) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone. Raises BadPicture, or OSError of a path."""
    opened = io.BytesIO(picture) if isinstance(picture, bytes) else picture_file(picture)
    with opened as file:
        return _sound(_size, file)


def is_turned(file: str | os.PathLike) -> bool:
    """Whether EXIF says that the pixels do not lie as they are to be seen. Raises BadPicture, or OSError."""
    with picture_file(file) as opened:
        return _sound(_turned, opened)


def _turned(file: io.BytesIO | io.BufferedReader) -> bool:
    with _opened(file) as image:
        return orientation(image) != 1


def _sound(read: Callable[[Any], _Read], file: io.BytesIO | io.BufferedReader) -> _Read:
    """What `read` makes of a picture; where that is refused, of its bytes without metadata. Raises BadPicture."""
    try:
        return read(file)
    except BadPicture as e:
        refused = e
    for bare in without_metadata(file):
        try:
            return read(io.BytesIO(bare))
        except CutShort as e:
            refused = e
        except BadPicture:
            pass
    raise refused


def _decoded(file: io.BytesIO) -> Picture:
    data = file.getvalue()
    with _opened(file) as image:
        turn = 1 if image.format == "TIFF" else orientation(image)  # Pillow turns TIFF by itself
        pixels = _plain_jpeg(data, image)
        if pixels is None:
            try:
                pixels = _by_pillow(image)
            except CutShort:
                jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
                if not (jpeg and lacks_only_its_end(data, image.mode)):
                    raise
                return _decoded(io.BytesIO(data + EOI))
        return np.ascontiguousarray(UPRIGHT[turn](pixels)) if turn in UPRIGHT else pixels


def _size(file: io.BytesIO | io.BufferedReader) -> tuple[int, int]:
    with _opened(file) as image:
        width, height = image.size
        if tags := tags_of(image):  # some Pillows swap its sides already
            width, height = tags[_WIDTH], tags[_HEIGHT]
        return (width, height) if orientation(image) in _LYING else (height, width)


def is_upright_jpeg(data: Bytes, height: int, width: int) -> bool:
    """Whether its header says that any decoder of JPEG finds these pixels: colour or grey, of that size, not turned."""
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(data)
        if size != [height, width] or colours not in ("YCbCr", "Gray"):
            return False
        if not _has_exif(data.data):
            return True
        with _opened(io.BytesIO(data.tobytes())) as image:
            return orientation(image) == 1
    except ValueError:  # BadPicture too
        return False


def _has_exif(jpeg: memoryview) -> bool:
    """Whether a segment of EXIF, or of XMP, stands before the pixels; so too where the segments cannot be followed."""
    at = 2
    while at + 8 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, length = jpeg[at + 1], jpeg[at + 2] << 8 | jpeg[at + 3]
        if marker == _PIXELS or (marker == _APP1 and jpeg[at + 4 : at + 8] in (b"Exif", b"http")):
            return marker == _APP1
        at += 2 + length
    return True


def shrink(
    picture: UInt8[np.ndarray, "h w 3"], short_side: int | None = None, max_side: int | None = None
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The picture with at most these sides, by area; it never grows. Sides are rounded as torchvision's Resize does."""
    height, width = picture.shape[:2]
    short, long = sorted((height, width))
    new_short, new_long = short, long
    if short_side is not None and short > short_side:
        new_short, new_long = short_side, int(short_side * long / short)
    if max_side is not None and new_long > max_side:
        new_short, new_long = max(1, int(max_side * new_short / new_long)), max_side
    if (new_short, new_long) == (short, long):
        return picture
    size = (new_short, new_long) if width <= height else (new_long, new_short)  # (width, height)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def centre_square(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The largest square in the middle; where it cannot lie there, half a pixel up or left of it."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


@contextmanager
def _opened(file: io.BytesIO | io.BufferedReader) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header read; whatever Pillow raises at foreign bytes becomes a BadPicture."""
    head = file.read(HEAD)
    file.seek(0)
    kind = sniff(head)
    if kind is None:
        raise BadPicture("it is empty" if not head else "its first bytes are no picture's")
    if not has_reader(kind):
        raise BadPicture(EXTRAS[kind])
    try:
        # its plug-in of that name, never its others, one of which starts Ghostscript
        with Image.open(file, formats=[kind.upper()]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except (BadPicture, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise BadPicture(f"it claims more than {MOST_PIXELS // 10**6} megapixels") from e
    except Image.UnidentifiedImageError as e:
        odd = ", or of pixels that Pillow does not know" if kind == "tiff" else ""
        raise BadPicture(f"its {kind} header is damaged{odd}") from e
    except Exception as e:  # Pillow's decoders raise nearly every type there is
        raise BadPicture(f"its {kind} data is damaged ({one_line(e)})") from e


def orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation from what stands before the pixels; 1 where there is none, or none that can be read."""
    try:
        # not image.getexif(): PNG's would decode all pixels, in search of a block behind them
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return turn if turn in UPRIGHT else 1
    except Exception:  # a damaged block in a good picture
        return 1


def _plain_jpeg(data: bytes, image: ImageFile.ImageFile) -> Picture | None:
    """The pixels as stored, of a JPEG in which libjpeg finds nothing amiss; None: let Pillow decide."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("RGB", "L"):
        return None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    try:  # strict: a warning is an error; a JPEG larger than its header says does not fit
        found = simplejpeg.decode_jpeg(data, buffer=pixels, strict=True)
    except ValueError:
        return None
    return found if found.shape == pixels.shape else None


def _by_pillow(image: ImageFile.ImageFile) -> Picture:
    """The pixels as stored, decoded by Pillow."""
    deep = is_deep(image)
    try:
        image.load()
    except OSError as e:
        if "truncated" in str(e).lower():
            raise CutShort(f"its {str(image.format).lower()} data is cut short") from e
        raise
    if (grey := grey_of(image)) is not None:
        return np.repeat(grey[..., None], 3, axis=2)
    picture = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if deep:
        refuse_dim(picture)
    return picture
