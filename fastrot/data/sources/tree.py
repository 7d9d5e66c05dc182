"""A folder of class folders, or of pictures, with the order and labels of torchvision's ImageFolder.

Each file's first bytes tell what it is; with `by_name` its suffix is trusted, and no file is opened.
"""

import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from fastrot.config import UsageError
from fastrot.data.files import NO_PICTURE, PICTURE, TORCHVISION, Verdict, hidden, look
from fastrot.data.sources.records import Listing, Source, no_split, unless_counted

_BESIDE = Verdict("left out", "beside the class folders: --label-from none takes it", True)
OPENED_AT_ONCE = 16  # files; threads hide the latency of disks and networks


def image_folder(root: Path, how: Listing) -> Source:
    """Pictures of a folder; their class is the folder right below `root`, in the order of names.

    A folder without pictures in folders is flat: labels are -1, as with `not how.labelled`. Symbolic links
    are followed, each folder is entered once, by its real place first. `numbers` are the indices in
    torchvision's ImageFolder, where these differ from 0 ... n - 1; -1 where it would not list the file.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is a file: give a folder of pictures, or its layout")
    if how.split is not None:
        if not (root / how.split).is_dir():
            raise no_split(how.split, root, (e.name for e in os.scandir(root) if e.is_dir()))
        root = root / how.split
    return tree_source(Disk(str(root), how.by_name), root, how.labelled)


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

    def look(self, path: str, plain: bool) -> Verdict:
        """The verdict of data/files.py on a file; `plain`: its entry's."""
        ...


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder as a `Tree`."""

    root: str
    by_name: bool = False  # whether suffixes are trusted

    def place(self, path: str) -> Hashable:
        found = os.stat(os.path.join(self.root, path))
        return found.st_dev, found.st_ino

    def entries(self, path: str) -> list[Entry]:
        found = []
        for entry in os.scandir(os.path.join(self.root, path)):
            link = entry.is_symlink()  # entry.is_dir() raises at links in a circle
            folder = os.path.isdir(entry.path) if link else entry.is_dir()
            found.append(Entry(entry.name, link, folder, entry.is_file(follow_symlinks=False)))
        return sorted(found)

    def look(self, path: str, plain: bool) -> Verdict:
        return look(os.path.join(self.root, path), by_name=self.by_name, plain=plain)


def tree_source(tree: Tree, root: Path, labelled: bool) -> Source:
    """The pictures of a tree, as `image_folder` says; perhaps none."""
    folders, unreadable, entered_twice = walk(tree)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        verdicts = list(pool.map(lambda folder: folder.look(tree), folders))

    looked = list(zip(folders, verdicts, strict=True))
    labelled = labelled and any(PICTURE in each for folder, each in looked if folder.top)
    paths = [folder.path for folder in folders] + [path for path, _ in unreadable]
    tops = sorted({_top(path) for path in paths if path and not hidden(_top(path))})
    label_of = {name: label for label, name in enumerate(tops)} if labelled else {}

    source = Source(root=root, classes=tuple(label_of), rejected=unreadable)
    numbers, number = [], 0
    for folder, each in looked:
        stray = labelled and not folder.top  # beside the class folders
        for (name, _), verdict in zip(folder.files, each, strict=True):
            listed = not stray and name.lower().endswith(TORCHVISION)
            path, label = folder.inside(name), label_of.get(folder.top, -1)
            if source.take(path, label, _BESIDE if stray and verdict == PICTURE else verdict):
                numbers.append(number if listed else -1)
            number += listed
    if entered_twice:  # torchvision lists such pictures again and again
        numbers = [-1] * len(numbers)
    source.numbers = unless_counted(numbers)
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

    def look(self, tree: Tree) -> list[Verdict]:
        """The verdict on each file."""
        return [
            NO_PICTURE if self.hidden or hidden(name) else tree.look(self.inside(name), plain)
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
            files = [(entry.name, entry.plain) for entry in entries if not entry.folder]
            folders.append(folder := Folder(path, files, below_hidden))
            for entry in entries:
                if entry.folder:
                    below = below_hidden or hidden(entry.name)
                    unhidden = linked if entry.link else within
                    later = concealed if below else unhidden
                    later.append((folder.inside(entry.name), below))
    folders.sort(key=lambda folder: (folder.top, folder.path))  # as sorted(os.walk(class folder))
    return folders, unreadable, entered_twice


# ---- archives in a folder ----


class Found(NamedTuple):
    """The archives at a path."""

    archives: list[tuple[Path, str]]  # and the folder that each would be unpacked into
    others: list[str]  # files beside them
    unreadable: list[tuple[str, str]]  # folders, and why


def archives_in(root: Path, suffix: str | tuple[str, ...]) -> Found:
    """A file, whatever its name; or all files of a folder, and of those in it, that are so named."""
    if root.is_file():
        return Found([(root, "")], [], [])
    folders, unreadable, _ = walk(Disk(str(root)))
    found = Found([], [], unreadable)
    for folder in folders:
        for name, _ in folder.files:
            path, lower = folder.inside(name), name.lower()
            taken = not folder.hidden and not hidden(name) and os.path.isfile(root / path)
            if taken and lower.endswith(suffix):
                found.archives.append((root / path, os.path.splitext(path)[0]))
                continue
            if taken and suffix == ".tar" and lower.endswith(COMPRESSED_TARS):
                raise UsageError(f"{root / path} is compressed: make it a .tar, or move it away")
            found.others.append(path)
    if not found.archives:
        names = suffix if isinstance(suffix, str) else " or *".join(suffix)
        raise UsageError(f"{root} holds no file named *{names}: look at the path, or at --source")
    return found


COMPRESSED_TARS = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst", ".tar.lz4", ".tar.lzma", ".tar.z"),
)
