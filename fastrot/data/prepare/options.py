"""The options that all conversions share, and the plan: what of them decides the bytes."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastrot.config import UsageError, knob
from fastrot.data.sources.open import KINDS, Layout, open_source
from fastrot.data.sources.records import Source

WAYS = "add --overwrite or choose another --out"
# these change no byte
NOT_IN_PLAN = (
    *("root", "folder", "out", "workers", "allow_rejects", "overwrite", "dry_run", "estimate"),
    "keep_parts",
)


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """Where pictures come from, how large they stay, where the prepared file goes."""

    source: Layout  # how --root is laid out
    root: Path  # folder (or list, archive, prepared file) of the pictures
    out: Path  # the prepared file, or folder
    split: str | None = None  # train, val, ...: which part of the source
    label_from: Literal["folder", "none"] = "folder"  # none: every label is -1
    image_column: str | None = None  # of parquet or a list; default: the first with pictures
    label_column: str | None = None  # of parquet or a list; default: a ClassLabel, label, class...
    folder: Path | None = None  # of a list: where its paths begin; default: the list's own
    categories: str | None = None  # of coco and voc: take boxes of "cat,traffic light" alone
    short_side: int | None = None  # pixels; shrink pictures whose short side is longer
    max_side: int | None = None  # pixels; shrink pictures whose long side is longer
    limit: int | None = None  # convert the first N records only
    shuffle: int | None = None  # a seed: write the pictures in random order, for --order blocks
    allow_truncated: bool = False  # take pictures that are cut short, with what is there of them
    workers: int | None = None  # processes of a rank; 0: only itself; default: the cores at hand
    allow_rejects: bool = False  # exit with status 0 even if pictures were rejected or left out
    overwrite: bool = False  # replace a finished --out, and parts made with other options
    dry_run: bool = False  # list the source, tell what would be taken and left out; convert nothing
    estimate: bool = False  # try 200 pictures in memory: tell bytes, time, PSNR; write nothing

    @abstractmethod
    def writer(self) -> Any:
        """The FormatWriter of these options."""

    def check(self) -> None:
        """Raises UsageError for a value that makes no sense."""
        for name, least in {"short_side": 1, "max_side": 1, "limit": 1, "workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{knob(name)} got {value}: it wants at least {least}")
        if self.short_side is not None and self.max_side is not None:
            raise UsageError(
                f"--short-side {self.short_side} and --max-side {self.max_side} both set the size: give one"
            )
        if KINDS[self.source].categories and self.writer().encode_spec.center_crop:
            told = f"--center-crop cuts pictures to which boxes of --source {self.source} belong"
            raise UsageError(f"{told}: leave it out")

    def open_source(self) -> Source:
        """The source, in the order in which it is to be written."""
        names = ("split", "label_from", "image_column", "label_column", "categories", "folder")
        how = {name: getattr(self, name) for name in names}
        source = open_source(self.source, self.root, **how)
        return source if self.shuffle is None else source.shuffled(self.shuffle)


def plan_of(options: Options, source: Source) -> dict[str, Any]:
    """What decides the bytes of a conversion: parts and finished files made from another plan are not ours."""
    listing = hashlib.blake2b(digest_size=16)
    records = source.records[: options.limit]
    for record in records:
        listing.update(record.path.encode("utf-8", "surrogateescape") + b"\0%d\n" % record.label)
    for name, arrays in source.beside(np.arange(len(records))).items():
        for of, array in arrays.items():
            listing.update(f"{name} {of} {array.dtype} {array.shape}".encode() + array.tobytes())
    knobs = {k: v for k, v in dataclasses.asdict(options).items() if k not in NOT_IN_PLAN}
    knobs["allow_truncated"] = options.allow_truncated or None  # as before it was an option
    return {**knobs, "listing": listing.hexdigest()}


def plan_hash(plan: dict[str, Any]) -> str:
    """The same for plans without a `difference`: an option that is not in use is one that is not there."""
    used = {name: value for name, value in plan.items() if value is not None}
    return hashlib.blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=16).hexdigest()


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first thing in which two plans differ, as words: what theirs has, and ours."""
    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (name == "listing", name))
    for name in names:  # another split lists other pictures: the split is what to tell
        was, now = theirs.get(name), ours.get(name)
        if was != now:
            if name == "listing":
                return "from other pictures, labels or annotations than the source lists now"
            if was is None:
                return f"without {knob(name)}"
            value = "" if was is True else f" {was}"
            return f"with {knob(name)}{value}, not {'without' if now is None else now}"
    return None


def same_pictures(plans: list[dict[str, Any]], root: Path) -> None:
    """Raises UsageError where a rank would convert other pictures than rank 0."""
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise UsageError(
                f"--root {root} holds other pictures or labels for rank {rank} than for rank 0: "
                "all machines must see the same pictures there"
            )
