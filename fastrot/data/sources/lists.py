"""A text list: pictures named line by line."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrot.config import UsageError
from fastrot.data.files import Verdict, look, rejected
from fastrot.data.sources.records import Listing, Source, numbered, unless_counted
from fastrot.data.sources.tree import OPENED_AT_ONCE

_BLOCK = 256  # lines a task: one task a line would hold 2 kB of each at once
_LABEL = re.compile(r"(\d{1,9}|-1)$")
_BEGINNING = 2**16  # bytes: an archive or a picture has a zero among them


def text_list(root: Path, how: Listing) -> Source:
    """Pictures named line by line: `path label`, `path,label` or `path`, relative to the list's folder.

    Paths may hold spaces: what stands last is a label if it is a whole number. `numbers` count the lines that
    are not blank, where one of them is rejected.
    """
    if root.is_dir():
        raise UsageError(f"{root} is a folder: give the text file that names the pictures")
    lines = (line.strip() for line in _text(root).split("\n"))  # not at odd separators in names
    named = [_path_and_label(line) for line in lines if line]
    paths = [path for path, _ in named]
    labels = [label if how.labelled else -1 for _, label in named]
    classes = numbered(root, labels, lambda i: paths[i])

    def verdict(path: str) -> Verdict:
        if os.path.isabs(path):
            return rejected("its path is absolute: name it relative to the list's folder")
        at = os.path.join(root.parent, path)
        if not os.path.lexists(at):
            return rejected("there is no such file")
        said = look(at, by_name=how.by_name)
        return rejected("it is no picture") if said.kind == "left out" else said

    blocks = [paths[at : at + _BLOCK] for at in range(0, len(paths), _BLOCK)]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [verdict(path) for path in block], blocks)
        verdicts = itertools.chain.from_iterable(looked)
        source = Source(root=root.parent, classes=classes)
        taken = [source.take(*each) for each in zip(paths, labels, verdicts, strict=True)]
    source.numbers = unless_counted([number for number, was in enumerate(taken) if was])
    return source


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
