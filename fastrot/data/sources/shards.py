"""WebDataset shards as a Source: tars in which KEY.jpg lies beside KEY.cls or KEY.json.

A picture's label is what KEY.cls says (or .label, .class ...: LABELS), else the field of one of these names in
KEY.json: a number or a word. KEY is a member's name up to the first dot behind its folder, as WebDataset has it: so
KEY.jpg is a sample's picture, and KEY.mask.png beside it is none. Where no KEY.jpg is, or a label's file of the same
name, a picture with dots in its name is that of a sample named up to the last dot, and noted. Of several pictures
of one sample the first by FIRST is taken. The order is that of the shards and of the members in each; a picture's
path is its member's, below a folder of the shard's name without .tar.
"""

import glob
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import PICTURE, SUFFIXES, Verdict, counted, shown
from fastrot.data.sources.archives import Members
from fastrot.data.sources.labels import LABELS, rank, read_labels
from fastrot.data.sources.members import Member, tar_members
from fastrot.data.sources.records import Listing, Record, Source, no_split
from fastrot.data.sources.tree import SPLITS, Found, archives_in

FIRST = (".jpg", ".jpeg", ".png", ".webp")  # of several pictures of a sample
LONGEST = 200  # bytes of a .cls
MOST_SHARDS = 2**20  # that a pattern may stand for
MOST_JSON = 2**22  # bytes of a sample's .json


def webdataset(root: Path, how: Listing) -> Source:
    """Pictures of a shard, of the shards in a folder, or of those that a pattern names: see `expanded`."""
    tree, found = Samples(how.labelled), _shards(root, how.split)
    for shard, folder in found.archives:
        tree.unpack(shard, folder, tar_members(shard, nested=False))
    source = tree.source(root, how._replace(labelled=False), found, wrapped=False)
    source = source.taken(np.lexsort((source.places["offset"], source.places["file"])))
    paths = [record.path for record in source.records]
    labels, source.classes, notes = read_labels(root, [tree.label(path) for path in paths], paths)
    source.records = [*map(Record, paths, labels)]
    if again := tree.replaced:
        source.notes.append(f"{counted(again, 'picture')} left for a later one of the same name")
    if dotted := [path for path in paths if os.path.splitext(path)[0] != _key(path)]:
        named = f"{counted(len(dotted), 'picture')} with dots in the name, first {shown(dotted[0])}"
        source.notes.append(f"{named}: such a sample is named up to the last dot")
    source.notes += notes
    source.numbers = None
    return source


# ---- samples ----


class Samples(Members):
    """Members of shards, of which one that lies beside a picture may hold its label."""

    def __init__(self, labelled: bool):
        super().__init__()
        self._labelled, self.replaced = labelled, 0
        # by members' names without suffix: what is said of the label, and the picture that is taken
        self._said, self._pictures = dict[str, str | bytes](), dict[str, str]()

    def add(self, folder: str, path: str, member: Member) -> str | None:
        if reason := super().add(folder, path, member):
            return reason
        (stem, suffix), file = os.path.splitext(path), member.kind == "file"
        if file and rank(suffix, LABELS):
            self._said[stem] = _in_cls(member)
        elif file and suffix.lower() == ".json":
            self._said[stem] = self._said.get(stem) or _in_json(member, self._archives[-1].path)
        elif suffix.lower() in SUFFIXES or (file and self._by_bytes[-1]):
            rival = self._pictures.get(stem, "")
            self.replaced += rival == path
            if not rival or self._order(path) < self._order(rival):
                self._pictures[stem] = path
        return None

    def _order(self, path: str) -> tuple[bool, int]:
        suffix = os.path.splitext(path)[1].lower()
        place = FIRST.index(suffix) if suffix in FIRST else len(FIRST)
        return super().look(path, True) != PICTURE, place

    def look(self, path: str, plain: bool) -> Verdict:
        verdict, (stem, _), key = super().look(path, plain), os.path.splitext(path), _key(path)
        if verdict != PICTURE:
            return verdict
        if stem != key and key in self._pictures and not self._said.get(stem):
            return Verdict("left out", "not its sample's picture")
        if path != self._pictures.get(stem, path):
            return Verdict("left out", "its sample has another picture")
        return PICTURE

    def label(self, path: str) -> str | bytes:
        """What is said of a picture's label; "" where nothing is."""
        stem = os.path.splitext(path)[0]
        said = self._said.get(stem) or self._said.get(_key(path), "")
        return said if self._labelled else ""


def _key(path: str) -> str:
    """What WebDataset calls a member's sample."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _in_cls(member: Member) -> str | bytes:
    """The number or word in a label's file; bytes where it is none."""
    said = member.head[:LONGEST].decode("utf-8-sig", "replace").strip()
    word = member.length <= LONGEST and said.isprintable() and "\ufffd" not in said
    return said if word else member.head[:40]


def _in_json(member: Member, shard: str) -> str | bytes:
    """What a sample's .json says of its label, "" where it says nothing; bytes where that is no number or word."""
    text = member.head
    if len(text) < member.length <= MOST_JSON:
        with open(shard, "rb") as file:
            text = os.pread(file.fileno(), member.length, member.offset)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return text[:40]
    fields = fields if isinstance(fields, dict) else {}
    names = sorted(fields, key=lambda name: rank(name, LABELS))
    known = (fields[name] for name in reversed(names) if rank(name, LABELS))
    said = next((value for value in known if value is not None), "")
    return str(said) if isinstance(said, str | int | float) else json.dumps(said)[:40].encode()


# ---- which shards ----


def _shards(root: Path, split: str | None) -> Found:
    """Shards, with the folders that they would be unpacked into."""
    if root.exists():
        return of_split(root, ".tar", split)
    if split is not None:
        raise UsageError(f"--split {split}: {root} names its shards; give those of the split")
    paths = [Path(path) for path in expanded(str(root))]
    missing = [path for path in paths if not path.is_file()]
    if not paths:
        raise UsageError(f"{root} names no shard that is there: look at the path")
    if missing:
        raise UsageError(
            f"{root} names {len(paths):,} shards, of which {len(missing):,} do not exist; first {missing[0]}"
        )
    names = [path.name.removesuffix(".tar") for path in paths]
    if len(set(names)) < len(names):  # in several folders
        names = [str(path).removesuffix(".tar").lstrip("/") for path in paths]
    return Found(list(zip(paths, names, strict=True)), [], [])


def of_split(root: Path, suffix: str | tuple[str, ...], split: str | None) -> Found:
    """A file; or those of a folder that end so and have the split, where one is asked for, as a word in their names."""
    if not root.is_dir():
        if split is not None:
            raise UsageError(f"--split {split}: {root} is one file; give the folder of all")
        return Found([(root, root.stem if root.name.endswith(suffix) else root.name)], [], [])
    found = archives_in(root, suffix)
    words = [_words(name) for _, name in found.archives]
    there = sorted(set().union(*words) & SPLITS)
    if split is None:
        if len(there) > 1:
            raise UsageError(f"{root} has the splits {', '.join(there)}: name one with --split")
        return found
    chosen = [each for each, of in zip(found.archives, words, strict=True) if split in of]
    if not chosen:
        raise no_split(split, root, there)
    return found._replace(archives=chosen)


def _words(name: str) -> set[str]:
    """What a name may call its split: folders, and words between signs or digits."""
    folders = set(name.split("/")[:-1])
    return folders | set(re.split(r"[^A-Za-z0-9_]+", name)) | set(re.split(r"[^A-Za-z]+", name))


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for: {000..146} or {a,b} in it, * and ? for what is there, :: between patterns."""
    names = [name for each in pattern.split("::") for name in _braces(each)]
    found = (
        sorted(glob.glob(name.replace("[", "[[]"))) if "*" in name or "?" in name else [name]
        for name in names
    )
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _braces(pattern: str) -> list[str]:
    """Names with one of what stands between braces in the place of each."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece, pattern) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MOST_SHARDS:,} shards")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(within: str, pattern: str) -> list[str]:
    """What stands between braces, one by one."""
    if "," in within:
        return within.split(",")
    ends = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", within, re.ASCII)
    if ends is None or not 0 <= int(ends[2]) - int(ends[1]) < MOST_SHARDS:
        raise UsageError(
            f"{pattern}: between braces it wants {{000..146}} or {{a,b}}, at most {MOST_SHARDS:,}, not {within}"
        )
    return [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
