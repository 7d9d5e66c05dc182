"""A folder of class folders, or of pictures, with the order and labels of torchvision's ImageFolder.

Each file's first bytes tell what it is; with `by_name` its suffix is trusted, and no file is opened.
"""

import os
import re
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from fastrot.config import UsageError
from fastrot.data.files import PICTURE, TORCHVISION, Verdict, counted, hidden, look, some
from fastrot.data.sources.records import Listing, Source, no_split, unless_counted

SPLITS = {"train", "training", "validation", "valid", "val", "test", "testing", "dev", "eval"}
SPLITS |= {"unlabeled", "unlabelled"}
_BESIDE = Verdict("left out", "beside the class folders", True)
_RUN = "in a run of fastrot"
_OF_RUN = {"config.yaml", "environment.json"}  # what a folder holds that is a run's
OPENED_AT_ONCE = 16  # files; threads hide the latency of disks and networks


def image_folder(root: Path, how: Listing) -> Source:
    """Pictures of a folder; their class is the folder right below `root`, in the order of names.

    Where all pictures are in one folder, and there in folders, that one is the root: as if it had been named. One
    that holds pictures alone is their one class, as in torchvision. A folder in which nothing claims to
    be a picture is no class; one whose pictures cannot be read is. Labels of folders that are called as splits are
    (train and val) are refused. A folder without pictures in folders is flat: labels are -1, as with `not
    how.labelled`. Symbolic links are followed, each folder is entered once, by its real place first. `numbers`
    are the indices in torchvision's ImageFolder, where these differ from 0 ... n - 1; -1 where it would not
    list the file.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is a file: give a folder of pictures, or its layout")
    root = root / split_folder(Disk(str(root)), root, how.split)
    return tree_source(Disk(str(root), how.by_name), root, how)


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

    def is_folder(self, path: str) -> bool: ...

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

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(os.path.join(self.root, path))

    def look(self, path: str, plain: bool) -> Verdict:
        return look(os.path.join(self.root, path), by_name=self.by_name, plain=plain)


def split_folder(tree: Tree, root: Path, split: str | None) -> str:
    """The path of a split's folder, which lies in the root or in the one folder there; `root` is for the sentence."""
    at = ""
    while split is not None and not tree.is_folder(join(at, split)):
        folders = [e for e in tree.entries(at) if e.folder and not hidden(e.name)]
        if len(folders) != 1 or folders[0].link:
            raise no_split(split, root / at, (e.name for e in folders))
        at = join(at, folders[0].name)
    return join(at, split or "")


def tree_source(tree: Tree, root: Path, how: Listing, *, wrapped: bool = True) -> Source:
    """The pictures of a tree, as `image_folder` says; perhaps none. `wrapped`: its root may be one folder in it."""
    folders, entered_twice = walk(tree)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = list(pool.map(lambda folder: (folder, folder.look(tree)), folders))
    claiming = {  # folders in which something claims to be a picture
        folder.path
        for folder, each in looked
        if folder.fault or any(verdict.kind != "left out" or verdict.mendable for verdict in each)
    }
    wrapping = _wrapping(claiming) if wrapped else ""
    root, notes = root / wrapping, [f"went through {wrapping}/"] if wrapping else []
    for folder in folders:
        folder.path = seen_from(wrapping, folder.path)
    looked.sort(key=lambda each: (each[0].top, each[0].path))  # as sorted(os.walk(class folder))
    tops = sorted({_top(seen_from(wrapping, path)) for path in claiming} - {""})
    labelled = how.labelled and any(PICTURE in each for folder, each in looked if folder.top)
    if wrapped and how.labelled:
        _refuse_splits(root, tops, join(how.split or "", wrapping), isinstance(tree, Disk))
    label_of = {name: label for label, name in enumerate(tops)} if labelled else {}
    source = Source(root=root, classes=tuple(label_of), notes=notes)
    numbers, number, beside = [], 0, 0
    for folder, each in looked:
        if folder.fault:
            source.rejected.append((folder.path, folder.fault))
        stray = labelled and not folder.top  # beside the class folders
        for (name, _, _), verdict in zip(folder.files, each, strict=True):
            listed = not stray and folder.top != ".." and name.lower().endswith(TORCHVISION)
            path, label = folder.inside(name), label_of.get(folder.top, -1)
            if stray and verdict == PICTURE and not how.loose:
                verdict, beside = _BESIDE, beside + 1
            if source.take(path, label, verdict):
                numbers.append(number if listed else -1)
            number += listed
    if entered_twice:  # torchvision lists such pictures again and again
        numbers = [-1] * len(numbers)
    source.numbers = unless_counted(numbers)
    if labelled:
        source.notes += _about_classes(folders, tops, beside)
    return source


def _wrapping(claiming: set[str]) -> str:
    """The folder that alone holds folders with pictures, however deep: the root of what was wrapped in others."""
    at = ""
    while at not in claiming:
        tops = {_top(path.removeprefix(f"{at}/")) for path in claiming}
        if len(tops) != 1 or claiming == {inside := join(at, *tops)}:
            break
        at = inside
    return at


def seen_from(folder: str, path: str) -> str:
    """A path as one that is relative to a folder: ../README.md for what is beside it."""
    if not folder or path == folder:
        return path.removeprefix(folder)
    inside = path.removeprefix(f"{folder}/")
    return inside if inside != path else os.path.relpath(path or ".", folder)


def _refuse_splits(root: Path, tops: list[str], inside: str, on_disk: bool) -> None:
    """Raises UsageError where folders with pictures are splits: their names would be classes. `inside`: of --root.

    They are where all hold a split's name, as train2017, or where two are so named, whatever lies beside them.
    """
    splits = [top for top in tops if set(re.split(r"[^a-z]+", top.lower())) & SPLITS]
    if len(splits) < len(tops):
        splits = [top for top in splits if top.lower() in SPLITS]
    if len(splits) < 2:
        return
    train, val = sorted(splits, key=lambda top: "train" not in top.lower())[:2]
    runs = f" (in a run: --data {root / train} --val {root / val})" if on_disk else ""
    raise UsageError(
        f"{root} has the splits {', '.join(splits)}: name one with --split {join(inside, train)}{runs}; "
        "--label-from none takes all"
    )


def _about_classes(folders: list["Folder"], tops: list[str], beside: int) -> Iterator[str]:
    """What is to be said of classes: folders that make none, pictures beside them."""
    runs = {folder.top for folder in folders if folder.why == _RUN}
    others = {folder.top for folder in folders if not folder.why} - {*tops, *runs, "", ".."}
    if none := sorted(others):
        make = "makes no class" if len(none) == 1 else "make no class"
        yield f"{counted(len(none), 'folder')} without pictures {make}: {some(none, 5)}"
    if beside:
        lie = "picture lies" if beside == 1 else "pictures lie"
        yield (
            f"{beside:,} {lie} beside the class folders, without a label: --label-from none takes all "
            "pictures, as do methods that need no labels"
        )


@dataclass(slots=True)
class Folder:
    """A folder that was walked through."""

    path: str  # relative to the root; "" is the root
    files: list[tuple[str, bool, str]]  # what is no folder: name, whether a plain file, and `why`
    why: str  # it is left out; "" where it is not
    fault: str = ""  # why it cannot be read

    @property
    def top(self) -> str:
        return _top(self.path)

    def inside(self, name: str) -> str:
        """The path of what it holds under a name."""
        return join(self.path, name)

    def look(self, tree: Tree) -> list[Verdict]:
        """The verdict on each file."""
        return [
            Verdict("left out", why) if why else tree.look(self.inside(name), plain)
            for name, plain, why in self.files
        ]


def join(folder: str, name: str) -> str:
    """A path below a folder; either may be ""."""
    return f"{folder}/{name}" if folder and name else folder or name


def _top(path: str) -> str:
    """The folder right below the root, which names the class."""
    return path.split("/", 1)[0]


def walk(tree: Tree) -> tuple[list[Folder], bool]:
    """All folders; whether one was met a second time.

    Links to folders wait until all real folders are entered, hidden folders until all others are: else a
    link could stand for a class, or a hidden folder hide what a class links to.
    """
    folders, entered_twice = [], False
    entered, linked, concealed = set(), [("", "")], []
    while linked or concealed:
        within = [(linked or concealed).pop(0)]
        while within:
            path, why = within.pop()
            try:
                place = tree.place(path)
                if place in entered:
                    entered_twice = True
                    continue
                entered.add(place)
                entries = tree.entries(path)
            except OSError as e:
                if not why:
                    fault = f"the folder cannot be read ({e.strerror})"
                    folders.append(Folder(path, [], why, fault))
                continue
            names = {entry.name for entry in entries}
            run = _RUN if names >= _OF_RUN or names == {"lock"} else ""  # or one that begins
            why = why or (run if path else "")  # pictures lie beside a run that is the root
            files = [
                (entry.name, entry.plain, why or _why(entry.name, names))
                for entry in entries
                if not entry.folder
            ]
            folders.append(folder := Folder(path, files, why))
            for entry in entries:
                if entry.folder:
                    plots = run if entry.name == "plots" else ""
                    below = why or plots or (f"in {entry.name}" if hidden(entry.name) else "")
                    unhidden = linked if entry.link else within
                    later = concealed if below else unhidden
                    later.append((folder.inside(entry.name), below))
    return folders, entered_twice


def _why(name: str, names: set[str]) -> str:
    """Why a file is left out by its name alone; `names`: all of its folder. "" where it is not."""
    about = name.removesuffix("-look.png")  # where fastrot look draws what lies beside it
    if about != name and not names.isdisjoint((about, f"{about}.beton")):
        return "a sheet of fastrot look"
    return "hidden" if hidden(name) else ""


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
    folders, _ = walk(Disk(str(root)))
    found = Found([], [], [(each.path, each.fault) for each in folders if each.fault])
    for folder in sorted(folders, key=lambda folder: (folder.top, folder.path)):
        for name, _, why in folder.files:
            path, lower = folder.inside(name), name.lower()
            taken = not why and os.path.isfile(root / path)
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
