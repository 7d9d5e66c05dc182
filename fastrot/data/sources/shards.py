"""WebDataset shards as a Source: tars in which KEY.jpg lies beside KEY.cls or KEY.json.

A picture's label is what KEY.cls says (or .label, .class ...: LABELS), else the field of one of these names in
KEY.json: a number or a word. KEY is a member's name up to the first dot behind its folder, as WebDataset has it: so
KEY.jpg is a sample's picture, and KEY.mask.png beside it is none. Where neither a KEY.jpg is nor KEY.cls or
KEY.json, or a label's file of the same name, a picture with dots in its name is that of a sample named up to the
last dot, and noted. Of several pictures of one sample the first by KINDS and FIRST is taken. The order is that of
the shards and of the members in each; a picture's path is its member's, below a folder of the shard's name without
.tar.
"""

import glob
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import PICTURE, SUFFIXES, Verdict, counted, shown, without_waiting
from fastrot.data.sources.archives import Members
from fastrot.data.sources.labels import LABELS, rank, read_labels, said_of
from fastrot.data.sources.members import Member, tar_members
from fastrot.data.sources.records import Listing, Record, Source, no_split
from fastrot.data.sources.tree import SPLITS, Entry, Found, archives_in, join
from fastrot.disk import named

# KEY.rgb.png before KEY.depth.png
KINDS = ("rgb", "color", "image", "img", "picture", "photo", "input")
FIRST = (".jpg", ".jpeg", ".png", ".webp")  # of several pictures of a sample
MOST_SHARDS = 2**20  # that a pattern may stand for
MOST_JSON = 2**22  # bytes of a sample's .json


def webdataset(root: Path, how: Listing) -> Source:
    """Pictures of a shard, of the shards in a folder, or of those that a pattern names: see `expanded`."""
    tree, found = Samples(how.labelled), _shards(root, how.split)
    for shard, folder in found.archives:
        tree.unpack(shard, folder, tar_members(shard, nested=False))
    tree.choose()
    source = tree.source(root, how._replace(labelled=False), found, wrapped=False)
    source = source.taken(np.lexsort((source.places["offset"], source.places["file"])))
    paths = [record.path for record in source.records]
    labels, source.classes, notes = read_labels([tree.label(path) for path in paths], paths)
    source.records = [*map(Record, paths, labels)]
    if again := tree.replaced:
        source.notes.append(f"{counted(again, 'picture')} left for a later one of the same name")
    if dotted := [path for path in paths if tree.sample(path) != _key(path)]:
        kinds = list(dict.fromkeys(path.removeprefix(_key(path)) for path in dotted))
        source.notes.append(
            f"{counted(len(dotted), 'picture')} with dots in the name, first {shown(dotted[0])}: "
            f"such a sample is named up to the last dot; names end in {shown(', '.join(kinds[:4]))}"
        )
    source.notes += notes
    source.numbers = None
    return source


# ---- samples ----


class Samples(Members):
    """Members of shards, of which one that lies beside a picture may hold its label."""

    def __init__(self, labelled: bool):
        super().__init__()
        self._labelled, self.replaced = labelled, 0
        # what is said of the label, by members' names without suffix; samples by their pictures, and the other way
        self._said, self._samples, self._taken = dict[str, str](), {}, {}

    def unpack(self, archive: Path, folder: str, members: Iterator[Member]) -> None:
        with named(archive), open(archive, "rb", opener=without_waiting) as self._shard:
            super().unpack(archive, folder, members)

    def add(self, folder: str, path: str, member: Member) -> str | None:
        if reason := super().add(folder, path, member):
            return reason
        (stem, suffix), file = os.path.splitext(path), member.kind == "file"
        if file and rank(suffix, LABELS):
            self._said[stem] = member.head.decode("utf-8-sig", "replace").strip()
        elif file and suffix.lower() == ".json":
            wanted = self._labelled or stem != _key(path)  # whose sample a picture is
            said = _in_json(member, self._shard.fileno()) if wanted else ""
            self._said[stem] = self._said.get(stem) or said
        elif suffix.lower() in SUFFIXES or (file and self._by_bytes[-1]):
            self.replaced += path in self._samples
            self._samples[path] = stem
        return None

    def choose(self) -> None:
        """Find each picture's sample, and the picture of each, once all members are there."""
        keys = self._said.keys() | set(self._samples.values())
        for path, stem in self._samples.items():
            shared = not self._said.get(stem) and _key(path) in keys
            self._samples[path] = sample = _key(path) if shared else stem
            rival = self._taken.setdefault(sample, path)
            if rival != path and self._order(path) < self._order(rival):
                self._taken[sample] = path

    def _order(self, path: str) -> tuple[bool, int, bool, int]:
        (stem, suffix), key = os.path.splitext(path), _key(path)
        suffix, kind = suffix.lower(), rank(stem.removeprefix(key), KINDS)
        place = FIRST.index(suffix) if suffix in FIRST else len(FIRST)
        return stem != self.sample(path), -kind, super().look(path, True) != PICTURE, place

    def entries(self, path: str) -> list[Entry]:
        """Without what tells the labels of pictures."""
        return [each for each in super().entries(path) if not self._tells(join(path, each.name))]

    def _tells(self, path: str) -> bool:
        stem, suffix = os.path.splitext(path)
        label = suffix.lower() == ".json" or rank(suffix, LABELS)
        return bool(label) and stem in self._said and stem in self._taken

    def look(self, path: str, plain: bool) -> Verdict:
        verdict = super().look(path, plain)
        if verdict != PICTURE or self._taken.get(self.sample(path), path) == path:
            return verdict
        return Verdict("left out", "its sample has another picture")

    def sample(self, path: str) -> str:
        return self._samples.get(path, path)

    def label(self, path: str) -> str:
        """What is said of a picture's label; "" where nothing is."""
        said = self._said.get(os.path.splitext(path)[0]) or self._said.get(self.sample(path), "")
        return said if self._labelled else ""


def _key(path: str) -> str:
    """What WebDataset calls a member's sample."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _in_json(member: Member, shard: int) -> str:
    """What a sample's .json says of its label, "" where it says nothing."""
    text = member.head
    if len(text) < member.length <= MOST_JSON:
        text = os.pread(shard, member.length, member.offset)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return "{damaged JSON}"
    fields = fields if isinstance(fields, dict) else {}
    names = sorted(fields, key=lambda name: rank(name, LABELS))
    known = (fields[name] for name in reversed(names) if rank(name, LABELS))
    return said_of(next((value for value in known if value is not None), None))


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
