"""Parquet and Arrow files on disk as a Source: rows with a picture's bytes, or its path, and a label.

The column of pictures is the one that the schema's Hugging Face metadata calls an Image, else the first whose first
values are pictures' bytes, or a struct with such a field `bytes`; else the first of pictures' paths. A row without
bytes, but with a path, stands for the file there: beside the table, or in the root. Labels are the column called a
ClassLabel there, else one of the names LABELS; class names are the words in the column, else ClassLabel's, else
numbers. Only labels and a few first rows are read when a folder is opened: every row counts as a picture until it is
read. Its path is its file's, without .parquet, and its row in that file.
"""

import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import (
    HEAD,
    NO_PICTURE,
    SUFFIXES,
    BadPicture,
    one_line,
    picture_file,
    shown,
    sniff,
    too_long,
)
from fastrot.data.sources.archives import Archive, InFiles
from fastrot.data.sources.labels import LABELS, rank, read_labels, said_of
from fastrot.data.sources.records import LeftOut, Listing, Record, Source
from fastrot.data.sources.shards import SPLITS, of_split
from fastrot.data.sources.tables import (
    ARROW,
    PARQUET,
    Table,
    lacks_codec,
    of_the_machine,
    opened,
    reading,
)

PLACE = np.dtype([("file", "<i8"), ("group", "<i8"), ("row", "<i8")])  # row: in the group
_LABELS_AT_ONCE = 2**16
_LOOKED_AT = 64  # values of a column that are there
_BYTES = re.compile(r"(large_)?binary(_view)?$|fixed_size_binary")  # types, in pyarrow's words
_TEXT = re.compile(r"(large_)?string(_view)?$")


# ---- reading ----


@dataclass(kw_only=True)
class Parquet(InFiles):
    """Pictures in rows of parquet or Arrow files. `places` are PLACE."""

    column: str  # of the pictures

    def read(self, i: int) -> bytes:
        """Encoded bytes of record i. Raises BadPicture where there are none, or damaged ones."""
        file, group, row = self.places[i].tolist()
        of = self.files[file], group, self.column
        try:
            rows: _Rows | None = vars(_held).get("rows")
            if rows is None or rows.of != of or row < rows.first:
                rows = _held.rows = _Rows(*of)
            data = rows.at(row)
        except Exception as e:  # a damaged page raises nearly every type there is
            vars(_held).clear()
            if of_the_machine(e):
                raise
            if lacks_codec(e):
                raise self.files[file].failed(one_line(e)) from None
            raise BadPicture(f"its row group is damaged ({one_line(e)})") from None
        if isinstance(data, str):
            return self._at_path(data, Path(self.files[file].path).parent)
        reason = "its row has no bytes" if data is None else too_long(len(data))
        if data is None or reason:
            raise BadPicture(reason)
        return data

    def _at_path(self, path: str, beside: Path) -> bytes:
        """What lies at a path that stands in a row."""
        root = self.root if self.root.is_dir() else beside
        for place, name in itertools.product((beside, root), (path, path.replace("\\", "/"))):
            if "\0" not in name and os.path.isfile(place / name):  # no pipe, no device
                with picture_file(place / name) as file:
                    return file.read()
        raise BadPicture(
            f"its row has no bytes but a path, and {shown(path)} is neither beside its file nor in --root"
        )


_held = threading.local()  # the rows that were last read


class _Rows:
    """Rows of a group, forwards, which each worker reads about once."""

    def __init__(self, archive: Archive, group: int, column: str):
        self.of, self.first, self._rows = (archive, group, column), 0, []
        os.close(archive.opened())  # it is as it was listed
        self._arrays = opened(Path(archive.path)).arrays(column, range(group, group + 1))

    def at(self, row: int) -> bytes | str | None:
        """What stands in a row that is not before `first`."""
        while row >= self.first + len(self._rows):
            self.first += len(self._rows)
            self._rows = next(self._arrays)
        return _bytes_or_path(self._rows[row - self.first].as_py())


def _bytes_or_path(value: Any) -> bytes | str | None:
    """A picture as a row has it: alone, or in a struct {bytes, path}."""
    if isinstance(value, dict):
        data = value.get("bytes")
        return value.get("path") or None if data is None else data
    return value


# ---- which files ----


def _files(root: Path, split: str | None) -> tuple[list[tuple[Path, str]], list[LeftOut], list]:
    """Tables of a path, with their names in records' paths; what else lies there; folders that cannot be read."""
    found = of_split(root, (PARQUET, *ARROW), split)
    files, left = found.archives, [LeftOut(path, NO_PICTURE.reason) for path in found.others]
    parquet = any(path.name.lower().endswith(PARQUET) for path, _ in files)

    def why_not(path: Path, name: str) -> str:
        """Why a table is not of the data where others are."""
        if re.search(r"(^|/)_", name):
            return "Spark's own"  # _temporary, _delta_log
        if path.name.startswith("cache-") and path.name.endswith(".arrow"):
            return "a cache of datasets"
        return "Arrow beside parquet" if parquet and path.name.lower().endswith(ARROW) else ""

    reasons = [(why_not(*each), each) for each in files]
    if taken := [each for why, each in reasons if not why]:
        left += [LeftOut(_inside(root, path), why) for why, (path, _) in reasons if why]
    _one_configuration(root, [name for _, name in taken])
    return taken or files, left, found.unreadable


def _one_configuration(root: Path, names: list[str]) -> None:
    """Raises UsageError where a folder from Hugging Face's hub holds the same data in several ways."""
    card = root / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    named = set(re.findall(r"^[ -]*config_name: *[\"']?([^\s\"']+)", text, re.MULTILINE))
    folders = {folder for name in names for folder in name.split("/")[:-1]} & named
    converted = [re.fullmatch(r"([^/]+)/([^/]+)/\d{4}", name) for name in names]
    folders |= {each[1] for each in converted if each and each[2] in SPLITS}
    if len(folders) > 1:
        told = ", ".join(sorted(folders))
        raise UsageError(f"{root} has the configurations {told}: give the folder of one as --root")


def _inside(root: Path, path: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


# ---- listing ----


def parquet_files(root: Path, how: Listing) -> Source:
    """Pictures of a table, or of those in a folder, in the order of names and rows; a few are looked at."""
    files, left, unreadable = _files(root, how.split)
    listed = list[_Listed]()
    for path, name in files:
        known = next((each.pictures[0] for each in listed if each.holds == "bytes"), "")
        listed.append(_listed(path, name, how, known))
    left += [LeftOut(_inside(root, one.path), "no rows") for one in listed if not sum(one.groups)]
    listed = [one for one in listed if sum(one.groups)]
    taken = _of_one_set(listed, how) if listed else []
    places = [np.empty(0, PLACE)]
    for number, each in enumerate(taken):
        for group, rows in enumerate(each.groups):
            places.append(place := np.empty(rows, PLACE))
            place["file"], place["group"], place["row"] = number, group, np.arange(rows)
    paths = [f"{each.name}/{row}" for each in taken for row in range(sum(each.groups))]
    labels, classes, notes = _labels(taken, how, paths)
    chosen = set(taken)
    others = [each.path for each in listed if each not in chosen]
    return Parquet(
        root=root,
        records=[*map(Record, paths, labels)],
        classes=classes,
        left_out=left + [LeftOut(_inside(root, path), "no column of pictures") for path in others],
        rejected=unreadable,
        notes=notes,
        files=[Archive.at(each.path) for each in taken],
        column=taken[0].pictures[0] if taken else "",
        places=np.concatenate(places),
    )


@dataclass(frozen=True, eq=False)
class _Listed:
    """A table, and where in it is what."""

    path: Path
    name: str  # in records' paths
    schema: Any
    pictures: list[str]  # columns that hold them: the first is taken
    label: str | None
    names: list[str] | None  # of classes
    groups: list[int]  # rows of each
    values: list[str]  # what is said of each row's label, where there is a column

    @property
    def holds(self) -> str:
        return _holds(_field(self.schema, self.pictures[0]).type) if self.pictures else ""


def _listed(path: Path, name: str, how: Listing, known: str) -> _Listed:
    """What a table has. `known`: the column that holds another table's pictures."""
    table = opened(path)
    schema, features, values = table.schema, _features(table.schema.metadata), []
    with reading(path):
        label = _label(schema, features, how.label_column) if how.labelled else None
        groups = table.groups()
        rows = range(len(groups))
        pictures = _pictures(table, rows, features, how.image_column, known)
        boolean = label is not None and str(_field(schema, label).type) == "bool"
        if label is not None:
            arrays = table.arrays(label, rows, _LABELS_AT_ONCE)
            arrays = (array.cast("int8") if boolean else array for array in arrays)
            values = [said_of(value) for array in arrays for value in array.to_pylist()]
            if len(values) != sum(groups):
                raise ValueError(f"its column {label} ends early")
    names = features.get(label or "", {}).get("names")
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        names = ["False", "True"] if boolean else None
    return _Listed(path, name, schema, pictures, label, names, groups, values)


def _of_one_set(listed: list[_Listed], how: Listing) -> list[_Listed]:
    """Those that hold pictures, all in one column. Raises UsageError where there are none, or they do not agree."""
    first, having = listed[0], [each for each in listed if each.pictures]
    taken = [each for each in having if each.holds == "bytes"] or having  # metadata may lie beside
    labelled = [each for each in taken if each.label is not None]
    there = f"it has {', '.join(first.schema.names)}"
    if not taken:
        why = "none that begins with a picture's bytes or path; --image-column takes one as it is"
        if how.image_column is not None:
            why = f"--image-column {how.image_column} is none of bytes or paths"
        raise UsageError(f"{first.path} has no column of pictures, {why}: {there}")
    if how.labelled and how.label_column is not None and not labelled:
        raise UsageError(f"{first.path} has no --label-column {how.label_column}: {there}")
    for each in taken:
        as_first = labelled[0] if each.label is not None else each
        said = each.pictures[0], each.label, each.names
        if said != (taken[0].pictures[0], as_first.label, as_first.names):
            others = as_first.path if as_first is not each else taken[0].path
            raise UsageError(
                f"{each.path} has other columns or class names than {others}: give one data set at a time"
            )
    return taken


# ---- columns ----


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What Hugging Face's datasets wrote of the columns; nothing where it did not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _field(schema: Any, name: str) -> Any:
    """The first column called so."""
    return schema.field(schema.names.index(name))


def _called(features: dict[str, dict[str, Any]], name: str) -> str | None:
    return features.get(name, {}).get("_type")


def _holds(kind: Any) -> str:
    """What a column of a type may hold of pictures: "bytes", "path", or "" for nothing."""
    from pyarrow import types  # it is there: see `opened`

    if types.is_struct(kind):
        within = {field.name: _holds(field.type) for field in kind}
        return within.get("bytes") or within.get("path", "")
    kind = str(kind.value_type if types.is_dictionary(kind) else kind)
    return "bytes" if _BYTES.match(kind) else "path" if _TEXT.match(kind) else ""


def _pictures(
    table: Table, groups: range, features: dict[str, dict], asked: str | None, known: str
) -> list[str]:
    """The columns that hold pictures: the one that is asked for; or those called so; or whose first values are so."""
    holds = dict[str, str]()
    for field in table.schema:
        holds.setdefault(field.name, _holds(field.type))
    if asked is not None:
        return [name for name in (asked, asked.removesuffix(".bytes")) if holds.get(name)][:1]
    called = [name for name in holds if holds[name] and _called(features, name) == "Image"]
    if called or holds.get(known) == "bytes":
        return called or [known]
    for kind in "bytes", "path":
        columns = [name for name in holds if holds[name] == kind]
        if found := [name for name in columns if _begins_so(table.arrays(name, groups))]:
            return found
    return []


def _begins_so(arrays: Iterator[Any]) -> bool:
    """Whether there are pictures' bytes or paths among a column's first values."""
    values = (_bytes_or_path(value.as_py()) for array in arrays for value in array)
    for value in itertools.islice((value for value in values if value), _LOOKED_AT):
        if isinstance(value, bytes) and sniff(value[:HEAD]):
            return True
        if isinstance(value, str) and value.lower().endswith(SUFFIXES) and "://" not in value:
            return True
    return False


# ---- labels ----


def _label(schema: Any, features: dict[str, dict[str, Any]], asked: str | None) -> str | None:
    """The column of labels."""

    def ranks(name: str) -> tuple[bool, int]:
        return _called(features, name) == "ClassLabel", rank(name, LABELS)

    label = max(schema.names, key=ranks, default="") if asked is None else asked
    return label if label in schema.names and (asked or any(ranks(label))) else None


def _labels(
    taken: list[_Listed], how: Listing, paths: list[str]
) -> tuple[list[int], tuple[str, ...], list[str]]:
    """Labels, class names, and what is to be said of the columns taken."""
    notes = [
        f"{each.path.name} has pictures in the columns {', '.join(each.pictures)}: the first is taken; "
        "--image-column names another"
        for each in taken[:1]
        if each.pictures[1:]
    ]
    labelled = [each for each in taken if each.label is not None]
    if not labelled:
        if taken and how.labelled:
            columns = shown(", ".join(taken[0].schema.names))
            notes.append(f"no labels: columns are {columns} (--label-column names theirs)")
        return [-1] * len(paths), (), notes
    first = labelled[0]
    if few := len(taken) - len(labelled):
        notes.append(
            f"{few:,} of {len(taken):,} files have no column {first.label}: their labels are -1"
        )
    said = [value for each in taken for value in each.values or [""] * sum(each.groups)]
    labels, classes, about = read_labels(said, paths)
    if how.label_column is not None and about and max(labels) < 0:
        raise UsageError(f"{first.path}: --label-column {first.label}: {about[0]}")
    if first.names is not None and classes == tuple(map(str, range(len(classes)))):  # no words
        if len(classes) > len(first.names):
            raise UsageError(
                f"{first.path} has the label {len(classes) - 1}, but {len(first.names)} classes; "
                "--label-from none ignores it"
            )
        classes = tuple(first.names)
    return labels, classes, notes + about
