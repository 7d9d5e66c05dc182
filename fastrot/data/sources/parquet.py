"""Hugging Face parquet folders on disk as a Source: rows with a picture's bytes and a label.

The column of pictures is the one that the schema's Hugging Face metadata calls an Image, else the first that
holds bytes: `binary`, or a struct with a field `bytes`. Labels are the column called a ClassLabel there, else one
of the names LABELS; class names are ClassLabel's, else the words in the column, else numbers. Only labels are read
when a folder is opened: every row counts as a picture until it is read. Its path is its file's, without .parquet,
and its row in that file.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import NO_PICTURE, BadPicture, one_line, too_long
from fastrot.data.sources.archives import Archive, InFiles
from fastrot.data.sources.records import LeftOut, Listing, Record, Source, numbered
from fastrot.data.sources.shards import of_split

PLACE = np.dtype([("file", "<i8"), ("group", "<i8"), ("row", "<i8")])  # row: in the row group
ROWS_AT_ONCE = 16  # as many as a worker is given
LABELS = ("label", "labels", "fine_label", "cls", "class", "target")


# ---- reading ----


@dataclass(kw_only=True)
class Parquet(InFiles):
    """Pictures in rows of parquet files. `places` are PLACE."""

    column: str  # of the pictures' bytes

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
            if _of_the_machine(e):
                raise
            raise BadPicture(f"its row group is damaged ({one_line(e)})") from None
        reason = "its row has no bytes" if data is None else too_long(len(data))
        if data is None or reason:
            raise BadPicture(reason)
        return data


_held = threading.local()  # the rows that were last read


class _Rows:
    """Rows of a row group, forwards: so memory does not grow with the group, which each worker reads about once."""

    def __init__(self, archive: Archive, group: int, column: str):
        self.of, self.first, self._rows = (archive, group, column), 0, []
        os.close(archive.opened())  # it is as it was listed
        self._batches: Iterator[Any] = _opened(Path(archive.path)).iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False
        )

    def at(self, row: int) -> bytes | None:
        """The bytes of a row that is not before `first`."""
        while row >= self.first + len(self._rows):
            self.first += len(self._rows)
            values = next(self._batches).column(0)
            self._rows = values.field("bytes") if hasattr(values, "field") else values
        return self._rows[row - self.first].as_py()


def _opened(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises UsageError where it is none, or damaged."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        if e.name != "pyarrow":
            raise  # it is installed, but something inside it is broken: show that instead
        raise UsageError("--source parquet needs pyarrow: pip install 'fastrot[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        if _of_the_machine(e):
            raise
        raise _damaged(path, e) from None


def _of_the_machine(error: Exception) -> bool:
    """Whether a failed call or full memory is to blame; else what was read is."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def _damaged(path: Path, why: Exception | str) -> UsageError:
    with open(path, "rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            return UsageError(f"{path} is a Git LFS pointer, not the file: git lfs pull fetches it")
    return UsageError(f"{path} is no parquet file, or cut short ({one_line(why)}): fetch it anew")


# ---- listing ----


def parquet_files(root: Path, how: Listing) -> Source:
    """Pictures of a parquet file, or of those in a folder, in the order of names and rows; none of them is looked at."""
    found, first = of_split(root, ".parquet", how.split), None
    paths, places, values = [], [], []
    for number, (path, name) in enumerate(found.archives):
        file = _opened(path)
        columns = _columns(file.schema_arrow, path)
        first = first or columns
        if columns != first:
            raise UsageError(
                f"{path} has other columns or class names than {found.archives[0][0]}: give one data set at a time"
            )
        for group, rows in enumerate(_rows(file, path)):
            places.append(place := np.empty(rows, PLACE))
            place["file"], place["group"], place["row"] = number, group, np.arange(rows)
        if columns.label is not None and how.labelled:
            values += _values(file, path, columns.label)
        paths += [f"{name}/{row}" for row in range(file.metadata.num_rows)]
    assert first is not None
    labels, classes = _labels(values, first, root, paths) if values else ([-1] * len(paths), ())
    return Parquet(
        root=root,
        records=[*map(Record, paths, labels)],
        classes=classes,
        left_out=[LeftOut(path, NO_PICTURE.reason) for path in found.others],
        rejected=found.unreadable,
        files=[Archive.at(path) for path, _ in found.archives],
        column=first.picture,
        places=np.concatenate([np.empty(0, PLACE), *places]),
    )


def _rows(file: Any, path: Path) -> list[int]:
    """Rows of each row group."""
    said = file.metadata
    rows = [said.row_group(group).num_rows for group in range(said.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != said.num_rows:
        raise _damaged(path, "its row groups do not add up")
    return rows


class _Columns(NamedTuple):
    """Where in a file is what."""

    picture: str
    label: str | None
    names: list[str] | None  # of classes


def _columns(schema: Any, path: Path) -> _Columns:
    """The columns to read. Raises UsageError where none holds pictures."""
    from pyarrow import types  # it is there: see above

    features = _features(schema.metadata)

    def called(field: Any, kind: str) -> bool:
        return features.get(field.name, {}).get("_type") == kind

    def of_bytes(field: Any, name: str) -> list[str]:
        """The column with the bytes of a field's pictures, as parquet calls it; none where it holds none."""
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            field, name = field.type.field("bytes"), f"{name}.bytes"
        return [name] if types.is_binary(field.type) or types.is_large_binary(field.type) else []

    by_image = sorted(schema, key=lambda field: not called(field, "Image"))
    pictures = [name for field in by_image for name in of_bytes(field, field.name)]
    if not pictures:
        raise UsageError(
            f"{path} has no column of pictures, binary or with a field bytes: it has {', '.join(schema.names)}"
        )

    def rank(field: Any) -> tuple[bool, int]:
        named = LABELS.index(field.name) if field.name in LABELS else len(LABELS)
        return not called(field, "ClassLabel"), named

    label = min(schema, key=rank)
    if rank(label) == (True, len(LABELS)):
        return _Columns(pictures[0], None, None)
    names = features.get(label.name, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    return _Columns(pictures[0], label.name, names)


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What Hugging Face's datasets wrote of the columns; nothing where it did not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _values(file: Any, path: Path, column: str) -> list[Any]:
    """A column's values: whole numbers, words, None."""
    try:
        values = file.read(columns=[column]).column(0).to_pylist()
    except Exception as e:
        if _of_the_machine(e):
            raise
        raise _damaged(path, e) from None
    if len(values) != file.metadata.num_rows:
        raise _damaged(path, f"its column {column} ends early")
    if all(value is None or type(value) in (int, str) for value in values):
        return values
    raise UsageError(
        f"{path}: its column {column} holds neither whole numbers nor words; --label-from none ignores it"
    )


def _labels(
    values: list[Any], columns: _Columns, root: Path, paths: list[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class names."""
    words = sorted({value for value in values if isinstance(value, str)})
    if words:
        label_of = {None: -1} | {word: label for label, word in enumerate(words)}
        if not set(values) <= label_of.keys():
            raise UsageError(f"{root}: its column {columns.label} holds numbers and words")
        return [label_of[value] for value in values], tuple(words)
    labels = [-1 if value is None else value for value in values]
    classes = numbered(root, labels, lambda i: paths[i])
    if columns.names is None:
        return labels, classes
    if len(classes) > len(columns.names):
        raise UsageError(
            f"{root} has the label {len(classes) - 1}, but {len(columns.names)} classes; --label-from none ignores it"
        )
    return labels, tuple(columns.names)
