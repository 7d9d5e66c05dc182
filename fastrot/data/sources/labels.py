"""Labels of pictures as people write them: numbers, words, or nothing."""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrot.data.files import counted, shown
from fastrot.data.sources.records import numbered

LABELS = (
    *("label", "class", "cls", "category", "target", "label_id", "class_id", "category_id"),
    *("label_idx", "class_idx", "label_index", "class_index", "label_name", "class_name"),
    *("category_name", "fine_label"),
)
_WORDS = 4  # one label of so many, at the least, is a word where words are classes


@functools.lru_cache(2**10)
def rank(name: str, names: tuple[str, ...]) -> int:
    """How early in `names` a column's or field's name stands; 0: nowhere. Case, signs and a plural do not count."""
    plain = _plain(name)
    return next((len(names) - i for i, each in enumerate(names) if _plain(each) == plain), 0)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold().rstrip("s")


def read_labels(
    root: Path, said: Sequence[int | str | bytes], paths: Sequence[str]
) -> tuple[list[int], tuple[str, ...], list[str]]:
    """Labels, class names and notes, of what is said of each picture: a number, a word; "", null or nan is no label.

    Words are classes in their sorted order, numbers among them too. Where few are words these cannot be read, as
    bytes, fractions and numbers below -1 never can: such a label is -1, and noted.
    """
    counts = Counter(said)
    meant = {each: _meant(each) for each in counts}
    words = sum(counts[each] for each, value in meant.items() if isinstance(value, str))
    notes, classes, values = list[str](), (), set(meant.values()) - {-1, None}
    label_of: dict[Any, int] = {value: value for value in values if isinstance(value, int)}
    if words * _WORDS > sum(counts[each] for each, value in meant.items() if value != -1):
        label_of = {value: label for label, value in enumerate(sorted(values, key=str))}
        classes = tuple(map(str, label_of))
        each = counted(len(classes), "class", "es")
        notes.append(f"labels are words: {each}, numbered in their sorted order")
    label_of[-1] = -1
    odd = {each for each, value in meant.items() if value not in label_of}
    labels = [label_of.get(meant[each], -1) for each in said]
    if odd:
        path, first = next(
            (path, each) for path, each in zip(paths, said, strict=True) if each in odd
        )
        each = counted(sum(counts[each] for each in odd), "label")
        notes.append(
            f"{each} could not be read, and the picture has none: first {shown(str(first))} of {shown(path)}; "
            "labels are whole numbers from 0 on, or words"
        )
    lowest = min((label for label in labels if label >= 0), default=0)
    if lowest:
        notes.append(f"labels begin at {lowest}: no picture is of a class below")
    return labels, classes or numbered(root, labels, lambda i: paths[i]), notes


def _meant(said: int | str | bytes) -> int | str | None:
    """A number from -1 on, -1 where there is no label, or a word; None: nothing that could be a label."""
    if isinstance(said, bytes):
        return None
    text = str(said).strip()
    if text.casefold() in ("", "null", "nan"):
        return -1
    try:
        number = float(text.replace("_", "x"))
    except ValueError:
        return text
    return int(number) if number >= -1 and number.is_integer() else None
