"""A text list: pictures named line by line, or row by row of a table.

Of the ways to read a list (_WAYS) that one is taken by which the most of some lines, spread evenly over it, name a
file; of equal ways the one whose first line names its column of paths (PATHS), else the first. The first takes a
line as a path but for a last number: so names may hold spaces, commas and quotes.

A table's first line is a header where it names no file and has no dot in the place of the path: LABELS in it name
the column of labels. Without a header they stand behind the path, else before it, unless these count the lines.
How a table is read is noted.
"""

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrot.config import UsageError
from fastrot.data.files import Verdict, counted, look, one_line, rejected, shown
from fastrot.data.keys import path_keys
from fastrot.data.sources.labels import LABELS, rank, read_labels, said_of
from fastrot.data.sources.records import Listing, Source, unless_counted
from fastrot.data.sources.tree import OPENED_AT_ONCE

PATHS = (
    *("path", "file_path", "file_name", "file", "image_path", "img_path", "image_file", "img_file"),
    *("image_name", "img_name", "image", "img", "picture", "photo"),
)
_BLOCK = 256  # lines a task: one task a line would hold 2 kB of each at once
_TRIED = 16  # lines, at least, by which a way is chosen
_NUMBER = re.compile(r"[-+.\d]+")
_LABEL = re.compile(r"(\d{1,9}|-1)$")
_BEGINNING = 2**16  # bytes: an archive or a picture has a zero among them


def text_list(root: Path, how: Listing) -> Source:
    """Pictures named in a list, by paths that are absolute or relative to `how.folder`, else the list's own.

    A line that begins with # and names no file is a comment. `numbers` count the lines that are neither blank, nor
    a comment, nor a header, where one of them is rejected.
    """
    if root.is_dir():
        raise UsageError(f"{root} is a folder: give the text file that names the pictures")
    at = how.folder or root.parent
    folder, source = PathFinder(os.path.abspath(at), how.by_name), Source(root=at)
    named = _named(root, folder, how, source.notes)
    blocks = [named[at : at + _BLOCK] for at in range(0, len(named), _BLOCK)]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [folder.look(*each) for each in block], blocks)
        found = list(itertools.chain.from_iterable(looked))
    del named, blocks  # a list may be longer than half of the memory
    said = [label if how.labelled else "" for _, label, _ in found]
    labels, source.classes, notes = read_labels(said, [path for path, _, _ in found])
    taken = [
        source.take(path, label, verdict)
        for (path, _, verdict), label in zip(found, labels, strict=True)
    ]
    del found, said, labels
    source.notes += notes
    source.keys = path_keys(record.path for record in source.records)
    if again := len(source.records) - len(np.unique(source.keys)):
        source.notes.append(
            f"{counted(again, 'line')} with a picture of another line: it is taken as often"
        )
    source.numbers = unless_counted([number for number, was in enumerate(taken) if was])
    return source


class PathFinder(NamedTuple):
    """Finds pictures by what a list in a folder calls them."""

    path: str  # absolute
    by_name: bool

    def find(self, path: str, there: Callable[[str], bool]) -> str | None:
        """The first spelling that is there: as it stands, of a home, of Windows, without the / that it begins with."""
        spelt = path, os.path.expanduser(path), path.replace("\\", "/"), path.lstrip("/")
        at = (
            each for each in dict.fromkeys(spelt) if each and there(os.path.join(self.path, each))
        )
        return next(at, None)

    def has(self, path: str) -> bool:
        return self.find(path.strip(), os.path.isfile) is not None

    def look(self, path: str, said: Any) -> tuple[str, Any, Verdict]:
        """What a line's picture is called, what is said of its label, and the verdict on it."""
        found = self.find(path, os.path.lexists)
        for separator in (None, ",", ";") if found is None and said == "" else ():
            first, *last = path.rsplit(separator, 1)  # a label that is no number
            if last and (found := self.find(first, os.path.lexists)):
                said = last[0]
                break
        if found is None:
            return path, said, rejected("there is no such file")
        verdict = look(os.path.join(self.path, found), by_name=self.by_name)
        if verdict.kind == "left out":
            verdict = rejected(verdict.reason if verdict.mendable else "it is no picture")
        return found.removeprefix(f"{self.path}/").removeprefix("./"), said, verdict


# ---- ways to read lines ----


def _path_and_label(line: str) -> tuple[str, int | str]:
    """`path label`, `path,label` or `path`; "" where there is no label. In one pass: a line may be long."""
    line = line.strip()
    label = _LABEL.search(line)
    before = line[: label.start()] if label else line
    path = before.rstrip().removesuffix(",").rstrip()
    return (path, int(label[1])) if label and path != before else (line, "")


def _table(separator: str, lines: list[str]) -> list[list[str]]:
    """Rows as the csv module reads them; where quotes do not close, they are characters like others."""
    try:
        return list(csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error:
        return list(csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE))


def _json_lines(lines: list[str]) -> list[list[str]]:
    """The names in the first object, and what each object has under them."""
    names = list(json.loads(lines[0]))
    return [names, *(_values(line, names) for line in lines)]


def _values(line: str, names: list[str]) -> list[str]:
    try:
        values = json.loads(line)
        return [said_of(values.get(name)) for name in names]
    except (ValueError, AttributeError, RecursionError):
        return [line]  # which names no file


_PLAIN = "paths with labels"
_WAYS: dict[str, Callable[[list[str]], list[Any]]] = {
    _PLAIN: lambda lines: [_path_and_label(line) for line in lines],
    "a table, by commas": partial(_table, ","),
    "a table, by tabs": partial(_table, "\t"),
    "a table, by semicolons": partial(_table, ";"),
    "a table, by bars": partial(_table, "|"),
    "a table, by spaces": partial(_table, " "),
    "labels before paths": lambda lines: [line.split(None, 1) for line in lines],
    "JSON lines": _json_lines,
}
_UNREADABLE = (csv.Error, ValueError, RecursionError, TypeError)


def _named(root: Path, folder: PathFinder, how: Listing, notes: list[str]) -> list[tuple[str, Any]]:
    """Each line's path, and what it says of the label."""
    lines = [line for line in _text(root).split("\n") if line.strip()]  # not at odd separators
    filled = len(lines)
    lines = [line for line in lines if line[0] != "#" or folder.has(_path_and_label(line)[0])]
    if comments := filled - len(lines):
        notes.append(f"{counted(comments, 'comment')}: they begin with # and name no file")
    if not lines:
        return []
    way, column = _way(lines, folder, how.image_column)
    try:
        rows = _WAYS[way](lines)
    except _UNREADABLE as e:
        raise UsageError(f"{root} cannot be read as {way} ({one_line(e)}): mend it") from None
    first, cell = rows[0], rows[0][column]
    known = way != _PLAIN or any(rank(word, PATHS) for word in re.split(r"[\s,;|]+", cell))
    header = known and not set("./\\") & set(cell) and not folder.has(cell)
    for column_asked in filter(None, (how.image_column, how.label_column)):
        if not header or not any(rank(str(name), (column_asked,)) for name in first):
            raise UsageError(
                f"{root} has no column {column_asked}: its first line is {shown(lines[0])}"
            )
    rows = rows[header:]
    if way == _PLAIN:
        if header:
            notes.append(f"the first line is taken for a header: {shown(lines[0])}")
        return rows
    said, labels = _columns(rows, column, first if header else [], how.label_column)
    notes.append(shown(f"it is read as {way}: {said}"))
    return [(_cell(row, column) or " ".join(row), _cell(row, labels)) for row in rows]


def _cell(row: Sequence[Any], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _way(lines: list[str], folder: PathFinder, asked: str | None) -> tuple[str, int]:
    """How lines are to be read, and in which column paths stand then. `asked`: its name, if it has to be that."""
    best, chosen = (-1, 0, 0), (_PLAIN, 0)
    for way, read in _WAYS.items():
        try:
            first, *rows = read([lines[0], *lines[1 :: max(1, len(lines) // _TRIED)]])
        except _UNREADABLE:
            continue
        for column in range(1 if way == _PLAIN else len(first)):
            cells = [_cell(row, column) for row in rows or [first]]
            if _NUMBER.fullmatch(cells[0]) and not folder.has(cells[0]):
                cells = []  # of numbers there may be thousands of columns
            there = sum(map(folder.has, cells))
            known = rank(first[column], (asked,) if asked else PATHS)
            if (score := (known if asked else 0, there, known)) > best:
                best, chosen = score, (way, column)
    return chosen


def _columns(
    rows: list[list[str]], path: int, header: list[str], asked: str | None
) -> tuple[str, int | None]:
    """What columns are read, in words, and in which labels stand; paths stand in `path`. `asked`: its name."""
    filled = sorted({i for row in rows for i, cell in enumerate(row) if cell.strip() and i != path})
    names = {i: f"column {i + 1}" for i in [path, *filled]}
    names |= {i: name for i, name in enumerate(header) if name}
    if header:
        ranks = {i: rank(names[i], (asked,) if asked else LABELS) for i in filled}
        known = sorted((i for i in filled if ranks[i]), key=lambda i: -ranks[i])
    else:
        known = [i for i in filled if i > path] or [
            i
            for i in filled
            if not any(
                all(_cell(row, i) == str(n) for n, row in enumerate(rows, k)) for k in (0, 1)
            )
        ]
    label = known[0] if known else None
    labels = (
        f"labels from {names[known[0]]}" if known else "no labels (--label-column names theirs)"
    )
    other = ", ".join(names[i] for i in filled if i != label)
    return f"paths from {names[path]}, {labels}{other and f'; not read: {other}'}", label


# ---- the text ----


def _text(file: Path) -> str:
    """A text file's words, odd bytes as surrogates; what is no text is refused at its beginning."""
    with open(file, "rb") as lines:
        text = lines.read(_BEGINNING)
        wide = text.startswith((b"\xff\xfe", b"\xfe\xff"))  # Excel's "Unicode text" is UTF-16
        if wide or b"\0" not in text:
            text += lines.read()
    if b"\0" in text and not wide:
        raise UsageError(f"{file} is no text list: it holds zero bytes; write it as UTF-8")
    mark = b"\xef\xbb\xbf"  # of UTF-8
    words = text.decode("utf-16", "replace") if wide else os.fsdecode(text.removeprefix(mark))
    return words if "\n" in words else words.replace("\r", "\n")  # old Macs' lines
