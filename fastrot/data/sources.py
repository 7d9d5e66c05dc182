"""Where pictures come from: lists of records (path, label) out of an image folder, a text list, CIFAR-10.

Archives, shards and parquet files have modules of their own. What reads a Source does not care where it came
from. Order and labels of an image folder are those of torchvision's ImageFolder. Every file is accounted for:

    len(records) + len(rejected) + skipped == seen

`skipped` are files that claim to be no picture, `rejected` those that claim to be one and cannot be. Each
file's first bytes tell which is which; with `by_name` its suffix is trusted, and no file is opened.
"""

import hashlib
import itertools
import os
import pickle
import re
import stat
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int8, Int64, UInt8, UInt64

from fastrot.config import UsageError
from fastrot.data.sampler import ShuffledSampler, hash64

TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SUFFIXES = (*TORCHVISION, ".gif", ".jpe", ".jfif", ".pbm", ".pnm")  # named like a picture
HEAD = 32  # bytes that `sniff` wants
MOST_BYTES = 2**31  # of a file: the largest picture that is decoded has 1.4 GB as 16-bit RGBA
MOST_LABELS = 2**20  # a number in a text list that counts further is no label
_OPENED_AT_ONCE = 16  # files; threads hide the latency of disks and networks
_HELD_OUT = 0x68656C64  # "held": keeps these draws apart from those of order and crops
_FOLD = 0x666F6C64  # "fold": and from these


@dataclass(frozen=True, slots=True)
class Record:
    """A picture of a source."""

    path: str  # relative to the source's root, "/" between; odd bytes as surrogates (os.fsdecode)
    label: int  # -1 where there is none


@dataclass(kw_only=True)
class Source:
    """Pictures in a fixed order, as encoded bytes or as pixels. Goes to worker processes by pickle."""

    root: Path
    records: list[Record]
    classes: tuple[str, ...]
    seen: int  # files
    skipped: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    numbers: Int64[np.ndarray, " n"] | None = None  # see `image_folder`; None: 0 ... n - 1
    keys: UInt64[np.ndarray, " n"] | None = None  # None: `path_keys` of the records

    def read(self, i: int) -> bytes | UInt8[np.ndarray, "h w 3"]:
        """Encoded bytes of record i, or its pixels."""
        path = os.path.join(self.root, self.records[i].path)
        with open(path, "rb", opener=without_waiting) as file:
            return file.read()

    def taken(self, rows: Int64[np.ndarray, " k"]) -> "Source":
        """The same source with these of its records, in this order."""
        return replace(self, **self._of_records(rows))

    def _of_records(self, rows: Int64[np.ndarray, " k"]) -> dict[str, Any]:
        """What it knows record by record, of these."""
        return {
            "records": [self.records[i] for i in rows.tolist()],
            "numbers": rows if self.numbers is None else self.numbers[rows],
            "keys": None if self.keys is None else self.keys[rows],
        }

    def shuffled(self, seed: int) -> "Source":
        """The same pictures in a random order, which `seed` and their number alone decide."""
        places = np.arange(len(self.records))
        return self.taken(ShuffledSampler(len(places), seed=seed, epoch=0)[places])

    def part(self, first: int, stop: int) -> "Source | None":
        """Records first ... stop - 1 and what reads them, for a worker process; None: only this one can."""
        part = self.taken(np.arange(first, stop))
        return replace(part, classes=(), seen=0, skipped=0, rejected=[], numbers=None, keys=None)


Layout = Literal["imagefolder", "list", "cifar10", "tar", "zip", "webdataset", "parquet", "beton"]


def open_source(
    kind: Layout,
    root: str | Path,
    *,
    split: str | None = None,
    label_from: Literal["folder", "none"] = "folder",
    by_name: bool = False,
) -> Source:
    """Open a source by the name of its layout: one of the table KINDS."""
    if kind not in KINDS:
        raise UsageError(f"the layout {kind!r} is not known: it is one of {', '.join(KINDS)}")
    if not os.path.exists(root) and not (KINDS[kind].patterns and "{" in str(root)):
        raise UsageError(f"{root} does not exist: give the path of {KINDS[kind].wants}")
    return KINDS[kind].open(Path(root), split=split, label_from=label_from, by_name=by_name)


# ---- a folder of class folders, or of pictures ----


def image_folder(
    root: Path,
    *,
    split: str | None = None,
    label_from: Literal["folder", "none"] = "folder",
    by_name: bool = False,
) -> Source:
    """Pictures of a folder; their class is the folder right below `root`, in the order of names.

    A folder without pictures in folders is flat: labels are -1, as with `label_from="none"`. Symbolic links
    are followed, each folder is entered once, by its real place first. `numbers` are the indices in
    torchvision's ImageFolder, where these differ from 0 ... n - 1; -1 where it would not list the file.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is a file: give a folder of pictures, or its layout")
    if split is not None:
        if not (root / split).is_dir():
            names = sorted(e.name for e in os.scandir(root) if e.is_dir())
            more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            there = ", ".join(names[:10]) + more or "none"
            raise UsageError(
                f"--split {split} got no folder of that name in {root}; there are: {there}"
            )
        root = root / split
    return not_empty(tree_source(Disk(str(root)), root, label_from, by_name=by_name), root)


class Entry(NamedTuple):
    """What a folder holds under one name."""

    name: str
    link: bool  # symbolic
    folder: bool  # or a link to one
    plain: bool  # a file, and no link


@runtime_checkable
class Tree(Protocol):
    """Folders and files, on a disk or as an archive would be unpacked. Paths are relative to its root."""

    def place(self, path: str) -> Hashable:
        """What is the same for two paths of one folder. Raises OSError."""
        ...

    def entries(self, path: str) -> list[Entry]:
        """What a folder holds, in the order of names. Raises OSError."""
        ...

    def look(self, path: str, *, by_name: bool, plain: bool) -> tuple[str, str]:
        """What a file is: ("picture" | "skip" | "reject", reason)."""
        ...


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder as a `Tree`."""

    root: str

    def place(self, path: str) -> Hashable:
        found = os.stat(os.path.join(self.root, path))
        return found.st_dev, found.st_ino

    def entries(self, path: str) -> list[Entry]:
        found = []
        for entry in sorted(
            os.scandir(os.path.join(self.root, path)), key=lambda entry: entry.name
        ):
            link = entry.is_symlink()  # entry.is_dir() raises at links in a circle
            folder = os.path.isdir(entry.path) if link else entry.is_dir()
            found.append(Entry(entry.name, link, folder, entry.is_file(follow_symlinks=False)))
        return found

    def look(self, path: str, *, by_name: bool, plain: bool) -> tuple[str, str]:
        return _look(os.path.join(self.root, path), by_name=by_name, plain=plain)


def tree_source(
    tree: Tree, root: Path, label_from: Literal["folder", "none"], *, by_name: bool = False
) -> Source:
    """The pictures of a tree, as `image_folder` says; perhaps none."""
    folders, unreadable, entered_twice = walk(tree)
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        verdicts = list(pool.map(lambda folder: folder.look(tree, by_name), folders))

    pictures_in_classes = any(
        kind == "picture"
        for folder, each in zip(folders, verdicts, strict=True)
        for kind, _ in each
        if folder.top
    )
    labelled = label_from == "folder" and pictures_in_classes
    paths = [folder.path for folder in folders] + [path for path, _ in unreadable]
    tops = sorted({_top(path) for path in paths if path and not hidden(_top(path))})
    label_of = {name: label for label, name in enumerate(tops)} if labelled else {}

    source = Source(root=root, records=[], classes=tuple(label_of), seen=len(unreadable))
    source.rejected += unreadable
    numbers, number = [], 0
    for folder, each in zip(folders, verdicts, strict=True):
        stray = labelled and not folder.top  # beside the class folders
        for (name, _), (kind, reason) in zip(folder.files, each, strict=True):
            source.seen += 1
            listed = not stray and name.lower().endswith(TORCHVISION)
            path = folder.inside(name)
            if kind == "skip" or stray:
                source.skipped += 1
            elif kind == "reject":
                source.rejected.append((path, reason))
            else:
                source.records.append(Record(path, label_of.get(folder.top, -1)))
                numbers.append(number if listed else -1)
            number += listed
    if entered_twice:  # torchvision lists such pictures again and again
        numbers = [-1] * len(numbers)
    source.numbers = _unless_counted(numbers)
    return source


@dataclass(slots=True)
class Folder:
    """A folder that was walked through."""

    path: str  # relative to the root; "" is the root
    files: list[tuple[str, bool]]  # (name, whether it is a plain file) of all that is no folder
    hidden: bool

    @property
    def top(self) -> str:
        return _top(self.path)

    def inside(self, name: str) -> str:
        """The path of what it holds under a name."""
        return f"{self.path}/{name}" if self.path else name

    def look(self, tree: Tree, by_name: bool) -> list[tuple[str, str]]:
        """For each file ("picture" | "skip" | "reject", reason)."""
        return [
            ("skip", "")
            if self.hidden or hidden(name)
            else tree.look(self.inside(name), by_name=by_name, plain=plain)
            for name, plain in self.files
        ]


def _top(path: str) -> str:
    """The folder right below the root, which names the class."""
    return path.split("/", 1)[0]


def walk(tree: Tree) -> tuple[list[Folder], list[tuple[str, str]], bool]:
    """Folders in torchvision's order; folders that cannot be read; whether one was met a second time.

    Links to folders wait until all real folders are entered, hidden folders until all others are: else a
    link could stand for a class, or a hidden folder hide what a class links to.
    """
    folders, unreadable, entered_twice = [], [], False
    entered, linked, concealed = set(), [("", False)], []
    while linked or concealed:
        within = [(linked or concealed).pop(0)]
        while within:
            path, below_hidden = within.pop()
            try:
                place = tree.place(path)
                if place in entered:
                    entered_twice = True
                    continue
                entered.add(place)
                entries = tree.entries(path)
            except OSError as e:
                if not below_hidden:
                    unreadable.append((path, f"the folder cannot be read ({e.strerror})"))
                continue
            folder = Folder(path, [], below_hidden)
            for entry in entries:
                if not entry.folder:
                    folder.files.append((entry.name, entry.plain))
                    continue
                below = below_hidden or hidden(entry.name)
                later = concealed if below else linked if entry.link else within
                later.append((folder.inside(entry.name), below))
            folders.append(folder)
    folders.sort(key=lambda folder: (folder.top, folder.path))  # as sorted(os.walk(class folder))
    return folders, unreadable, entered_twice


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # AppleDouble too: ._name


def _look(path: str, *, by_name: bool, plain: bool) -> tuple[str, str]:
    """What a file is: ("picture" | "skip" | "reject", reason)."""
    named = path.lower().endswith(SUFFIXES)
    taken = ("picture", "") if named else ("skip", "")
    if by_name and plain:
        return taken
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return "skip", ""
        if by_name:
            return taken
        file = without_waiting(path, os.O_RDONLY)
        try:
            head = os.read(file, HEAD)
        finally:
            os.close(file)
    except OSError as e:
        what = "it is a broken link" if os.path.islink(path) else "it cannot be read"
        return ("reject", f"{what} ({e.strerror})") if named else ("skip", "")
    return judged(named, head, found.st_size)


def judged(named: bool, head: bytes, length: int) -> tuple[str, str]:
    """What a file of so many bytes is that begins so: ("picture" | "skip" | "reject", reason).

    `named`: its name ends as a picture's.
    """
    if sniff(head):
        reason = too_long(length)
        return ("reject", reason) if reason else ("picture", "")
    if not named or head.startswith(_APPLEDOUBLE):
        return "skip", ""
    return "reject", "its first bytes are no picture's" if head else "it is empty"


def too_long(length: int) -> str | None:
    """Why a file of so many bytes is no picture, whatever it begins with."""
    if length > MOST_BYTES:
        return f"it has {length:,} bytes: a picture may have {MOST_BYTES:,}"


def without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that took its place would block whoever waits for it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def sniff(head: bytes) -> str | None:
    """What a picture's first HEAD bytes say it is; None: no picture."""
    for kind, pattern in _FIRST_BYTES.items():
        if pattern.match(head):
            return kind
    return None


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
}


# ---- a text list ----


def text_list(
    root: Path,
    *,
    split: str | None = None,
    label_from: Literal["folder", "none"] = "folder",
    by_name: bool = False,
) -> Source:
    """Pictures named line by line: `path label`, `path,label` or `path`, relative to the list's folder.

    Paths may hold spaces: what stands last is a label if it is a whole number. `numbers` count the lines that
    are not blank, where one of them is rejected.
    """
    if split is not None:
        raise UsageError(f"--split {split}: a text list has no splits; give one list for each")
    if root.is_dir():
        raise UsageError(f"{root} is a folder: give the text file that names the pictures")
    lines = (line.strip() for line in _text(root).split("\n"))  # not at odd separators in names
    named = [_path_and_label(line) for line in lines if line]
    paths = [path for path, _ in named]
    labels = [label if label_from == "folder" else -1 for _, label in named]
    classes = numbered(root, labels, lambda i: paths[i])

    def look(path: str) -> tuple[str, str]:
        if os.path.isabs(path):
            return "reject", "its path is absolute: name it relative to the list's folder"
        at = os.path.join(root.parent, path)
        if not os.path.lexists(at):
            return "reject", "there is no such file"
        kind, reason = _look(at, by_name=by_name, plain=False)
        return ("reject", "it is no picture") if kind == "skip" else (kind, reason)

    blocks = [paths[at : at + _BLOCK] for at in range(0, len(paths), _BLOCK)]
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [look(path) for path in block], blocks)
        verdicts = list(itertools.chain.from_iterable(looked))
    source = Source(root=root.parent, records=[], classes=classes, seen=len(paths))
    numbers = []
    for number, (path, label, (kind, reason)) in enumerate(
        zip(paths, labels, verdicts, strict=True)
    ):
        if kind == "reject":
            source.rejected.append((path, reason))
        else:
            source.records.append(Record(path, label))
            numbers.append(number)
    source.numbers = _unless_counted(numbers)
    return not_empty(source, root)


def numbered(root: Path, labels: list[int], name: Callable[[int], str]) -> tuple[str, ...]:
    """Class names where there are numbers alone: these. `name(i)`: the picture of label i, for people."""
    highest = max(labels, default=-1)
    if highest >= MOST_LABELS:
        raise UsageError(
            f"{root} has the label {highest} ({shown(name(labels.index(highest)))}): a label is below "
            f"{MOST_LABELS:,}; --label-from none ignores all labels"
        )
    return tuple(map(str, range(highest + 1)))


_BLOCK = 256  # lines a task: one task a line would hold 2 kB of each at once
_LABEL = re.compile(r"(\d{1,9}|-1)$")


def _path_and_label(line: str) -> tuple[str, int]:
    """`path label`, `path,label` or `path`; -1 where there is no label. In one pass: a line may be long."""
    label = _LABEL.search(line)
    if label is None:
        return line, -1
    before = line[: label.start()]
    path = before.rstrip().removesuffix(",").rstrip()
    return (line, -1) if path == before else (path, int(label[1]))


def _text(file: Path) -> str:
    """A text file's words, odd bytes as surrogates; what is no text is refused at its beginning."""
    with open(file, "rb") as lines:
        text = lines.read(_BEGINNING)
        if b"\0" not in text:
            text += lines.read()
    if b"\0" in text:
        raise UsageError(f"{file} is no text list: it holds zero bytes; write it as UTF-8")
    return os.fsdecode(text.removeprefix(b"\xef\xbb\xbf"))  # a byte order mark


_BEGINNING = 2**16  # bytes: an archive or a picture has a zero among them


# ---- CIFAR-10 ----


@dataclass(kw_only=True)
class Cifar10(Source):
    """The official Python batches. Pixels are read when a process first wants them, and never pickled."""

    _pixels: dict[str, UInt8[np.ndarray, "n 32 32 3"]] = field(default_factory=dict, repr=False)

    def read(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        batch, place = self.records[i].path.split("/")
        if batch not in self._pixels:
            self._pixels[batch], _ = _cifar_batch(self.root / batch)
        return np.ascontiguousarray(self._pixels[batch][int(place)])

    def part(self, first: int, stop: int) -> None:
        """Workers would each read whole batches."""

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": {}}


def cifar10(
    root: Path,
    *,
    split: str | None = None,
    label_from: Literal["folder", "none"] = "folder",
    by_name: bool = False,
) -> Source:
    """CIFAR-10 as its authors hand it out: splits train (also where none is named) and test."""
    inner = root / "cifar-10-batches-py"
    root = inner if inner.is_dir() else root
    names = CIFAR_SPLITS.get(split or "train")
    if names is None:
        raise UsageError(f"--split {split} is none of CIFAR-10's: {', '.join(CIFAR_SPLITS)}")
    source = Cifar10(root=root, records=[], classes=CIFAR_CLASSES, seen=0)
    for name in names:
        if not (root / name).is_file():
            raise UsageError(f"{root} has no {name}: give the folder cifar-10-batches-py, unpacked")
        source._pixels[name], labels = _cifar_batch(root / name)
        for place, label in enumerate(labels):
            known = label if label_from == "folder" else -1
            source.records.append(Record(f"{name}/{place:05d}", known))
    source.seen = len(source.records)
    if label_from == "none":
        source.classes = ()
    return not_empty(source, root)


CIFAR_SPLITS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def _cifar_batch(path: Path) -> tuple[UInt8[np.ndarray, "n 32 32 3"], list[int]]:
    """Pixels and labels of a batch."""
    with open(path, "rb") as file:
        try:
            batch = _CifarUnpickler(file, encoding="bytes").load()
            pixels, labels = batch[b"data"].pixels(), batch[b"labels"]
            fits = pixels.ndim == 2 and pixels.shape[1] == 3072 and len(labels) == len(pixels)
            known = all(type(label) is int and 0 <= label < 10 for label in labels)
        except Exception as e:  # a damaged pickle raises nearly every type there is
            said = f"it has no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:120]
            raise UsageError(
                f"{path} is no CIFAR-10 batch ({said or type(e).__name__}): unpack it anew"
            ) from e
    if not fits or not known:
        raise UsageError(
            f"{path} is no CIFAR-10 batch: it holds pixels {list(pixels.shape)} and {len(labels)} labels "
            "instead of n x 3072 and n labels from 0 to 9; unpack it anew"
        )
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _CifarUnpickler(pickle._Unpickler):
    """Admits the four names that the official batches hold, and runs none of them: stand-ins take their place.

    In Python, for 40 ms a batch: the one in C makes a table as long as a pickle of nine bytes asks for.
    """

    def find_class(self, module: str, name: str):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")
        return _ADMITTED[module, name]


class _Array:
    """What a pickle says of a numpy array."""

    state: tuple

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state

    def pixels(self) -> UInt8[np.ndarray, "..."]:
        _version, shape, dtype, by_columns, data = self.state
        if dtype.name not in (b"u1", "u1"):
            raise ValueError(f"its data is of type {dtype.name!r}, not u1")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Type:
    """What a pickle says of a numpy dtype."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, _):
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in Python 2's pickles."""
    return text.encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


# ---- prepared pictures ----


def _beton(root: Path, **how) -> Source:
    if root.is_dir() and not (root / "set.json").exists():
        raise UsageError(
            f"{root} is no .beton, nor the parts of one: name what dataprep/to_ffcv.py wrote"
        )
    from fastrot.data.beton.source import beton_rows  # which needs torch

    return beton_rows(root, **how)


# ---- layouts, by name ----


@dataclass(frozen=True)
class _Kind:
    open: Callable[..., Source]
    wants: str
    patterns: bool = False  # whether --root may stand for many names


def _tar(root: Path, **how) -> Source:
    from fastrot.data.archives import tar_archives  # it imports this file

    return tar_archives(root, **how)


def _zip(root: Path, **how) -> Source:
    from fastrot.data.archives import zip_archives

    return zip_archives(root, **how)


def _webdataset(root: Path, **how) -> Source:
    from fastrot.data.shards import webdataset

    return webdataset(root, **how)


def _parquet(root: Path, **how) -> Source:
    from fastrot.data.parquet import parquet_files

    return parquet_files(root, **how)


KINDS = {
    "imagefolder": _Kind(image_folder, "a folder of class folders, or of pictures"),
    "list": _Kind(text_list, "a text file that names pictures"),
    "cifar10": _Kind(cifar10, "the folder cifar-10-batches-py"),
    "beton": _Kind(_beton, "a .beton file, or the folder of its parts"),
    "tar": _Kind(_tar, "a tar, or of a folder of tars"),
    "zip": _Kind(_zip, "a zip, or of a folder of zips"),
    "webdataset": _Kind(
        _webdataset, "WebDataset shards: a tar, a folder, NAME-{000..146}.tar", True
    ),
    "parquet": _Kind(_parquet, "a folder of parquet files with pictures in them"),
}


def _unless_counted(numbers: list[int]) -> Int64[np.ndarray, " n"] | None:
    """Numbers as an array; None where they are 0 ... n - 1."""
    array = np.array(numbers, np.int64)
    return None if (array == np.arange(len(array))).all() else array


def not_empty(source: Source, root: Path) -> Source:
    if source.records:
        return source
    if not source.seen:
        raise UsageError(f"{root} is empty: give a path with pictures in it")
    first = source.rejected[:1]
    why = "".join(f" ({shown(path) or 'the root'}: {reason})" for path, reason in first)
    raise UsageError(
        f"{root} has {source.seen} file(s) and no picture among them{why}: look at the path, or at the files"
    )


def shown(path: str) -> str:
    """A path as a sentence may hold it: a line of a text list has any length."""
    return path if len(path) <= 200 else f"{path[:100]} ... {path[-50:]}"


# ---- keys: a picture's name in prepared data ----


def path_key(path: str) -> int:
    """64 bits that stand for a path relative to the source's root, in every format the same."""
    raw = path.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def path_keys(paths: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    return np.fromiter((path_key(path) for path in paths), np.uint64)


def order_fingerprint(keys: UInt64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"]) -> str:
    """Which picture is which row, in 32 hex digits: equal for a folder and for files prepared from it."""
    raw = keys.astype("<u8", copy=False).tobytes() + labels.astype("<i8", copy=False).tobytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def held_out(keys: UInt64[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Rows set aside to validate, chosen by the key alone: other pictures come and go, a choice stays.

    At least one row and never all, where 0 < share < 1; of a single row none.
    """
    draw = hash64(_HELD_OUT, keys)  # keys of synthetic data are row numbers: scatter them
    aside = (draw >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share
    if 0 < share < 1 and len(keys):
        aside[draw.argmin()] = True
        aside[draw.argmax()] = False
    return aside


def fold_of(keys: UInt64[np.ndarray, " n"], folds: int) -> Int8[np.ndarray, " n"]:
    """Each row's fold, by the key alone; folds are about equal, and apart from what is held out."""
    return (hash64(_FOLD, keys) % np.uint64(folds)).astype(np.int8)
