"""Pixels of more than 8 bits, signed or floating-point, as 8 bits: by where their white is, so that none comes out black.

PNG, PNM and JPEG 2000 say that white is 65,535: the upper 8 bits are kept. TIFF rarely tells, and holds what a
sensor gave: white is the largest number of the fewest bits, of 8, 10, 12, 14 and 16, that hold the picture. So
too in the other formats where the upper 8 bits would be below 16, almost black: they were given 12 bits or fewer.
What is negative or beyond 16 bits (CT, counts) has no white: its least is black, its most is white.
Floating-point is taken from 0 to 1. Other numbers are refused, and so is colour that would be almost black.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ImageFile, TiffImagePlugin

from fastrot.data.files import BadPicture

_BITS, _PHOTOMETRIC, _PLANES, _SAMPLES = 258, 262, 284, 339  # tags of TIFF
_WHITE_IS_ZERO, _APART, _UNSIGNED, _SIGNED = 0, 2, 1, 2
_DIM = 16  # of 256: below it all is almost black


def tags_of(image: ImageFile.ImageFile) -> Mapping[int, Any]:
    """A TIFF's tags; none of other kinds."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether colours that are not loaded yet have 16 bits, of which Pillow keeps 8. Raises BadPicture where it errs."""
    bits, planes = tags_of(image).get(_BITS, ()), tags_of(image).get(_PLANES)
    if planes == _APART and len(bits) > 1 and max(bits) > 8:
        raise BadPicture("its channels of more than 8 bits lie apart")
    return ";16" in str(image.tile[:1])


def grey_of(image: ImageFile.ImageFile) -> UInt8[np.ndarray, "h w"] | None:
    """A loaded grey picture that `convert` would spoil; None of another. Raises BadPicture."""
    tags = tags_of(image)
    sample, bits = tags.get(_SAMPLES, (_UNSIGNED,))[0], tags.get(_BITS, (16,))[0]
    if image.mode == "L" and sample == _SIGNED:
        return _narrowed(np.asarray(image).view(np.int8), None)
    if image.mode == "F":
        grey = _unit(np.asarray(image))
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        values = values.view(np.uint32) if (sample, bits) == (_UNSIGNED, 32) else values
        grey = _narrowed(values, bits if not tags or bits in (10, 12, 14) else None)
    else:
        return None
    # Pillow has inverted what has 8 bits alone
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def refuse_dim(picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Raises BadPicture for the upper 8 bits of colours that hold 12 or fewer."""
    if picture.max() < _DIM:
        raise BadPicture("its colours use 12 bits of 16 or fewer, and would be almost black")


def _unit(values: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and _DIM / 256 <= most <= 1):  # not numbers too
        raise BadPicture(f"its floating-point pixels go from {least:g} to {most:g}, not 0 to 1")
    return (values * 255 + 0.5).astype(np.uint8)


def _narrowed(values: np.ndarray, said: int | None) -> UInt8[np.ndarray, "h w"]:
    """Whole numbers as 8 bits; `said`: of how many bits they are, where that is known."""
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65_535:
        scale = np.float32(255 / max(1, most - least))
        return ((values.astype(np.float32) - least) * scale + 0.5).astype(np.uint8)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 1 << bits)
    if said and most >> (said - 8) >= _DIM:
        bits = said
    return (values >> (bits - 8)).astype(np.uint8)
