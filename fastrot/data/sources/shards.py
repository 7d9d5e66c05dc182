"""WebDataset shards as a Source: tars in which KEY.jpg lies beside KEY.cls or KEY.json.

A picture's label is the whole number in KEY.cls, or `label` (or `cls`) in KEY.json; -1 where there is neither.
KEY is a member's name up to the first dot behind its folder, as WebDataset has it. So KEY.jpg is a sample's
picture, and KEY.mask.png is none: it is skipped. The order is that of the shards and of the members in each;
a picture's path is its member's, below a folder of the shard's name without .tar.
"""

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import PICTURE, Verdict, rejected
from fastrot.data.sources.archives import Members
from fastrot.data.sources.members import Member, tar_members
from fastrot.data.sources.records import Listing, Record, Source, no_split, numbered
from fastrot.data.sources.tree import SPLITS, Found, archives_in

MOST_SHARDS = 2**20  # that a pattern may stand for
MOST_JSON = 2**22  # bytes of a sample's .json


def webdataset(root: Path, how: Listing) -> Source:
    """Pictures of a shard, of the shards in a folder, or of those that a pattern NAME-{000..146}.tar names."""
    tree, found = Samples(how.labelled), _shards(root, how.split)
    for shard, folder in found.archives:
        tree.unpack(shard, folder, tar_members(shard, nested=False))
    source = tree.source(root, how._replace(labelled=False), found, wrapped=False)
    source = source.taken(np.lexsort((source.places["offset"], source.places["file"])))
    paths = [record.path for record in source.records]
    labels = [int(tree.label(path)) for path in paths]
    source.records = [*map(Record, paths, labels)]
    source.classes = numbered(root, labels, lambda i: paths[i])
    source.numbers = None
    return source


# ---- labels ----


class Samples(Members):
    """Members of shards, of which one that lies beside a picture may hold its label."""

    def __init__(self, labelled: bool):
        super().__init__()
        self._labelled = labelled
        # by samples' keys: a label, or why there is none
        self._cls, self._json = dict[str, int | str](), dict[str, int | str]()

    def add(self, folder: str, path: str, member: Member) -> str | None:
        reason = super().add(folder, path, member)
        if self._labelled and reason is None and member.kind == "file":
            key, kind = _key_and_kind(path)
            if kind == "cls":
                self._cls[key] = _whole(member.head[:64].decode("ascii", "replace").strip(), "cls")
            elif kind == "json":
                self._json[key] = _said_in_json(member, self._archives[-1].path)
        return reason

    def label(self, path: str) -> int | str:
        """A picture's label, or why it has none that is right."""
        key, _ = _key_and_kind(path)
        return self._cls.get(key, self._json.get(key, -1))

    def look(self, path: str, plain: bool) -> Verdict:
        verdict, label = super().look(path, plain), self.label(path)
        if verdict != PICTURE:
            return verdict
        if "." in _key_and_kind(path)[1]:
            return Verdict("left out", "not its sample's picture")
        return rejected(label) if isinstance(label, str) else PICTURE


def _key_and_kind(path: str) -> tuple[str, str]:
    """What a member's sample is called, and what of the sample it is: ("a/0001", "seg.png")."""
    folder, slash, name = path.rpartition("/")
    key, _, kind = name.partition(".")
    return folder + slash + key, kind.lower()


def _said_in_json(member: Member, shard: str) -> int | str:
    """The label in a sample's .json, -1 where it has none; or what is wrong with it."""
    if member.length > MOST_JSON:
        return f"its .json has {member.length:,} bytes"
    text = member.head
    if len(text) < member.length:
        with open(shard, "rb") as file:
            text = os.pread(file.fileno(), member.length, member.offset)
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        return "its .json cannot be read"
    words = words if isinstance(words, dict) else {}
    return _whole(words.get("label", words.get("cls", -1)), "json")


def _whole(said: Any, where: str) -> int | str:
    if isinstance(said, str) and re.fullmatch(r"-1|\d{1,9}", said, re.ASCII):
        return int(said)
    if isinstance(said, int) and not isinstance(said, bool) and -1 <= said < 10**9:
        return said
    return f"its label in the .{where} is no whole number from -1 on"


# ---- which shards ----


def _shards(root: Path, split: str | None) -> Found:
    """Shards, with the folders that they would be unpacked into."""
    if root.exists():
        return of_split(root, ".tar", split)
    if split is not None:
        raise UsageError(f"--split {split}: {root} names its shards; give those of the split")
    paths = [Path(path) for path in expanded(str(root))]
    missing = [path for path in paths if not path.is_file()]
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
    """The names that a pattern with {000..146} or {a,b} in it stands for."""
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
