"""What a file is, by its name and first bytes: a picture, to be left out, or to be rejected; the latter with a reason."""

import functools
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SUFFIXES = (  # named like a picture
    *(*TORCHVISION, ".gif", ".jpe", ".jfif", ".pbm", ".pnm", ".apng", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
RAW = (  # of cameras: begins as a TIFF, in which Pillow would find a thumbnail
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".raf", ".orf", ".rw2"),
    *(".pef", ".srw", ".3fr", ".iiq", ".erf", ".kdc", ".mrw", ".x3f"),
)
UNREAD = (  # pictures too, for which nothing here has a reader; drawings and icons are no data
    *(".tga", ".psd", ".xcf", ".exr", ".pfm", ".dcm", ".jxl", ".jxr", ".bpg", ".qoi", ".pcx"),
    ".dds",
)
EXTRAS = {  # kinds that not everyone has a reader for
    "heif": "no reader: pip install pillow-heif",
    "avif": "no reader: Pillow 11.3 has one",
    "jpeg2000": "no reader in this Pillow",
}
HEAD = 32  # bytes that `sniff` wants
MOST_BYTES = 2**31  # of a file: the largest picture that is decoded has 1.4 GB as 16-bit RGBA

SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".ds_store"}  # in lower case
_SYSTEM_FOLDERS = {  # beside those that begin with a dot
    *("__macosx", "lost+found", "$recycle.bin", "system volume information", "found.000"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
    *("_gsdata_", "__pycache__"),
}
_APPLEDOUBLE = b"\x00\x05\x16\x07"
_FIRST_BYTES = {
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    # "BM" and "P1" begin many a text: so also the reserved zeros and the length of the second header, and
    # whitespace and a number or comment
    "bmp": re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}", re.DOTALL),
    "tiff": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "ppm": re.compile(rb"P[1-6]\s+[#0-9]"),
    # "mif1" and "msf1" name none: one of the brands that follow does
    "avif": re.compile(rb".{4}ftyp(avi[fs]|m[is]f1.{4}(.{4})*?avi[fs])", re.DOTALL),
    "heif": re.compile(rb".{4}ftyp(he[iv][cmsx]|m[is]f1)", re.DOTALL),
    "jpeg2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
}


class Verdict(NamedTuple):
    """What becomes of a file. One that is left out claims to be no picture, or is not meant to be one."""

    kind: Literal["picture", "left out", "rejected"]
    reason: str = ""  # a short phrase
    mendable: bool = False  # left out, where its owner may have wanted it and can do something


PICTURE = Verdict("picture")
NO_PICTURE = Verdict("left out", "no picture")  # counted by suffix
NO_READER = Verdict("left out", "no reader", mendable=True)


def rejected(reason: str) -> Verdict:
    return Verdict("rejected", reason)


class BadPicture(ValueError):
    """A picture that cannot be decoded: the reason in one short phrase."""


class CutShort(BadPicture):
    """A picture that lacks pixels: `pictures.decode_truncated` takes it."""


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's, and nobody's data."""
    lower = name.lower()  # Lightroom's previews end so; AppleDouble begins with a dot: ._name
    system = lower in _SYSTEM_FOLDERS or lower in SYSTEM_FILES or lower.endswith(".lrdata")
    return system or name.startswith(".")


def look(path: str, *, by_name: bool, plain: bool = False) -> Verdict:
    """The verdict on a file of a disk. `by_name`: its suffix is trusted; `plain`: it is known to be no link or pipe."""
    named = path.lower().endswith(SUFFIXES)
    taken = PICTURE if named else judged_by_name(path, NO_PICTURE)
    if by_name and plain:
        return taken
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Verdict("left out", "no file")
        if by_name:
            return taken
        with open(path, "rb", buffering=0, opener=without_waiting) as file:
            head = file.read(HEAD)
    except OSError as e:
        what = "it is a broken link" if os.path.islink(path) else "it cannot be read"
        return Verdict("rejected" if named else "left out", f"{what} ({e.strerror})")
    return judged_by_name(path, judged(named, head, found.st_size))


def judged(named: bool, head: bytes, length: int) -> Verdict:
    """The verdict on a file of so many bytes that begins so. `named`: its name ends as a picture's."""
    if kind := sniff(head):
        if not has_reader(kind):
            return Verdict("left out", EXTRAS[kind], mendable=True)
        return rejected(reason) if (reason := too_long(length)) else PICTURE
    if head.startswith(_APPLEDOUBLE):
        return Verdict("left out", "AppleDouble")
    if not named:
        return NO_PICTURE
    return rejected("its first bytes are no picture's" if head else "it is empty")


def judged_by_name(path: str, by_bytes: Verdict) -> Verdict:
    """The verdict on a file, of which its first bytes told something: some pictures only their names tell."""
    unread = path.lower().endswith(RAW if by_bytes.kind == "picture" else (*RAW, *UNREAD))
    return NO_READER if unread else by_bytes


@functools.cache
def has_reader(kind: str) -> bool:
    """Whether a picture of that kind (`sniff`) can be read here."""
    if kind == "heif":
        try:
            import pillow_heif  # pyright: ignore[reportMissingImports]
        except ImportError:
            return False
        pillow_heif.register_heif_opener()
    elif kind in EXTRAS:
        from PIL import features

        name = {"jpeg2000": "jpg_2000"}.get(kind, kind)
        known = {*features.modules, *features.codecs}  # Pillow warns of other names
        return name in known and bool(features.check(name))
    return True


def too_long(length: int) -> str:
    """Why a file of so many bytes is no picture, whatever it begins with; "" where it may be one."""
    if length <= MOST_BYTES:
        return ""
    return f"it has {length:,} bytes: a picture may have {MOST_BYTES:,}"


def sniff(head: bytes) -> str | None:
    """What a picture's first HEAD bytes say it is; None: no picture."""
    return next((kind for kind, pattern in _FIRST_BYTES.items() if pattern.match(head)), None)


def without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that took its place would block whoever waits for it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def picture_file(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """A file, opened. Raises OSError, and BadPicture where it is too long for a picture."""
    with open(path, "rb", opener=without_waiting) as file:
        if reason := too_long(os.fstat(file.fileno()).st_size):
            raise BadPicture(reason)
        yield file


def counted(count: int, noun: str, ending: str = "s") -> str:
    """`1 picture`, `2 pictures`."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def some(words: Sequence[str], most: int) -> str:
    """The first words, and how many more there are."""
    more = f", and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def one_line(error: object) -> str:
    """What a library says of damaged data, as a sentence may hold it."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def shown(path: str) -> str:
    """A path as a sentence may hold it: a line of a text list has any length."""
    return path if len(path) <= 200 else f"{path[:100]} ... {path[-50:]}"
