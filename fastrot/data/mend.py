"""A PNG or JPEG whose pixels are whole, without what keeps Pillow from them: it then decodes the bits of a sound file."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import simplejpeg

from fastrot.data.files import HEAD, sniff

EOI = b"\xff\xd9"  # a JPEG's end marker
_EXIF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # of segments that may turn a JPEG
_TURNING = (b"eXIf", b"iTXtXML:com.adobe.xmp\0", b"tEXtRaw profile type", b"zTXtRaw profile type")
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
# JFIF's and Adobe's segments, where libjpeg finds them long enough to tell colours
_COLOURS = re.compile(rb"\xff(\xe0..JFIF\0.{9}|\xee..Adobe.{7})", re.DOTALL)
_BARE = re.compile(rb"\xff[\x01\xd0-\xd8]")  # markers without a segment
_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")
_LAST = re.compile(rb"\xff[\xda\xd9]")  # of the header: pixels follow, or nothing

_Piece = tuple[bytes, Literal["pixels", "orientation", "other"]]


def without_metadata(file: io.BytesIO | io.BufferedReader) -> Iterator[bytes]:
    """A PNG or JPEG with nothing beside its pixels but what may turn them, then without that; nothing for other kinds."""
    file.seek(0)
    pieces = {"png": _chunks, "jpeg": _segments}.get(sniff(head := file.read(HEAD)) or "")
    if pieces is None:
        return
    data = head + file.read()
    for kept in (("pixels", "orientation"), ("pixels",)):
        yield b"".join(piece for piece, use in pieces(data) if use in kept)


def _chunks(png: bytes) -> Iterator[_Piece]:
    """What a PNG consists of, and what for. What is critical stays as it is: Pillow has its say on that."""
    yield png[:8], "pixels"
    at = 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        chunk, at = png[at : at + 12 + length], at + 12 + length
        if chunk[4:5].isupper():
            yield chunk, "pixels"
        else:
            whole = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
            yield chunk, "orientation" if whole and chunk[4:].startswith(_TURNING) else "other"
    yield png[at:], "pixels"


def _segments(jpeg: bytes) -> Iterator[_Piece]:
    """What a JPEG consists of, and what for. Where a segment is not as long as it says, the next marker is sought."""
    yield jpeg[:2], "pixels"
    at = 2
    while (found := _MARKER.search(jpeg, at)) and not _LAST.match(jpeg, found.start()):
        start = found.start()
        at = start + 2
        if not _BARE.match(jpeg, start):
            at += max(2, int.from_bytes(jpeg[at : at + 2], "big"))
        segment = jpeg[start:at]
        if not (0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE) or _COLOURS.match(segment):
            yield segment, "pixels"
        else:
            yield segment, "orientation" if segment[4:].startswith(_EXIF) else "other"
    yield jpeg[found.start() if found else at :], "pixels"


def lacks_only_its_end(jpeg: bytes, mode: str) -> bool:
    """Whether libjpeg finds nothing amiss in a JPEG of that mode of Pillow's, once it has an end marker."""
    try:
        colours = "CMYK" if mode == "CMYK" else "RGB"
        simplejpeg.decode_jpeg(jpeg + EOI, colorspace=colours, strict=True)
    except ValueError:
        return False
    return not jpeg.endswith(EOI) and _has_all_scans(jpeg)


def _has_all_scans(jpeg: bytes) -> bool:
    """Whether each coefficient of each component came to its last bit: libjpeg does not miss a scan."""
    *header, scans = (piece for piece, _ in _segments(jpeg))
    components = next(piece[9] for piece in header if _FRAME.match(piece))
    exact = set()
    for scan in (scans[found.end() :] for found in re.finditer(rb"\xff\xda..", scans, re.DOTALL)):
        ids, (first, last, bits) = scan[1 : 2 * scan[0] : 2], scan[2 * scan[0] + 1 :][:3]
        if bits & 15 == 0:
            exact |= {(component, at) for component in ids for at in range(first, last + 1)}
    return len(exact) == 64 * components
