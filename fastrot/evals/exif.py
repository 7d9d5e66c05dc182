"""Copies of pictures that open upright: JPEGs by their EXIF orientation alone, others by exact quarter turns."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastrot.data.depth import is_deep
from fastrot.data.files import one_line
from fastrot.data.pictures import UPRIGHT, orientation
from fastrot.disk import replace_bytes

EXIF, APP1, PIXELS = b"Exif\0\0", 0xE1, 0xDA
ORIENTATION, SHORT = 0x0112, 3  # tag and type of TIFF
LOSSLESS: dict[str, dict[str, Any]] = {  # formats that Pillow writes so, and how
    "PNG": {}, "BMP": {}, "GIF": {}, "PPM": {},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True, "exact": True},
}  # fmt: skip


def upright_copy(source: Path, to: Path, degrees: int) -> bool:
    """Write a copy that opens turned back by so many degrees counter-clockwise (90, 180 or 270); False: there is one.

    A format that cannot be written without loss becomes a PNG beside that name. Raises ValueError where a copy would lose
    something, or the picture is damaged, OSError where a file cannot be read or written.
    """
    data = source.read_bytes()
    try:
        made = _made(data, degrees)
    except OSError as error:
        raise ValueError(one_line(error)) from error
    except (SyntaxError, TypeError, KeyError, struct.error) as error:  # Pillow's
        raise ValueError(f"its data is damaged ({one_line(error)})") from error
    if isinstance(made, Image.Image):
        to = to.with_name(f"{to.name}.png")
        made.save(file := io.BytesIO(), "PNG", **_kept(made))
        made = file.getvalue()
    if to.exists():
        return False
    to.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(to, made)
    return True


def _made(data: bytes, degrees: int) -> bytes | Image.Image:
    """The bytes of the copy; the picture itself, where its format cannot be written without loss."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format in ("JPEG", "MPO"):
            return oriented(data, _turned_back(orientation(image), degrees))
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("it has several frames, of which a copy would keep one")
        if is_deep(image) and image.mode in ("RGB", "RGBA"):
            raise ValueError("it has 16 bits a colour, of which a copy would keep 8")
        upright = ImageOps.exif_transpose(image).rotate(-degrees, expand=True)
        upright.info["icc_profile"] = image.info.get("icc_profile")
        if image.format not in LOSSLESS:
            return upright
        how = LOSSLESS[image.format]
        upright.save(file := io.BytesIO(), image.format, **_kept(upright), **how)
        return file.getvalue()


def _kept(image: Image.Image) -> dict[str, Any]:
    return {"exif": image.getexif(), "icc_profile": image.info.get("icc_profile")}


def _turned_back(now: int, degrees: int) -> int:
    """The EXIF orientation that shows what `now` shows, turned back by so many degrees counter-clockwise."""
    pixels = np.arange(6).reshape(2, 3, 1)
    shown = {each: UPRIGHT.get(each, lambda same: same)(pixels) for each in range(1, 9)}
    wanted = np.rot90(shown[now], -degrees // 90)
    return next(each for each, seen in shown.items() if np.array_equal(seen, wanted))


def oriented(jpeg: bytes, value: int) -> bytes:
    """The same JPEG with this EXIF orientation: all other bytes stay, but for a directory that has no place for it."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != PIXELS:
        size = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == APP1 and jpeg[at + 4 : at + 10] == EXIF:
            block = _with_orientation(jpeg[at + 10 : at + 2 + size], value)
            return jpeg[:at] + _segment(block) + jpeg[at + 2 + size :]
        at += 2 + size
    at = 2  # behind JFIF's segment, which wants to be the first
    if jpeg[2:4] == b"\xff\xe0":
        at = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:at] + _segment(_with_orientation(b"", value)) + jpeg[at:]


def _segment(block: bytes) -> bytes:
    if len(block) + 8 > 0xFFFF:
        raise ValueError("its EXIF block is full")
    return bytes([0xFF, APP1]) + struct.pack(">H", len(block) + 8) + EXIF + block


def _with_orientation(block: bytes, value: int) -> bytes:
    """A TIFF block with this orientation; a new one where it has none, or cannot be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        entry = struct.pack("<HHIHH", ORIENTATION, SHORT, 1, value, 0)
        return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    entry = struct.pack(f"{order}HHIHH", ORIENTATION, SHORT, 1, value, 0)
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        entries = [block[start + 2 + 12 * k : start + 14 + 12 * k] for k in range(count)]
        rest = block[start + 2 + 12 * count : start + 6 + 12 * count]
        tags = [struct.unpack(f"{order}H", each[:2])[0] for each in entries]
    except struct.error:
        return _with_orientation(b"", value)
    if ORIENTATION in tags:
        at = start + 2 + 12 * tags.index(ORIENTATION)
        return block[:at] + entry + block[at + 12 :]
    # offsets count from the block's begin: a longer directory at its end leaves them as they are
    longer = sorted([*zip(tags, entries, strict=True), (ORIENTATION, entry)])
    block += bytes(len(block) % 2)
    directory = struct.pack(f"{order}H", count + 1) + b"".join(each for _, each in longer)
    return (
        block[:4]
        + struct.pack(f"{order}I", len(block))
        + block[8:]
        + directory
        + rest.ljust(4, b"\0")
    )
