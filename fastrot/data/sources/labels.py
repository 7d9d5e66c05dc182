"""Labels of pictures as people write them: numbers, words, or nothing."""

import functools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastrot.data.files import counted, shown

LABELS = (
    *("label", "fine_label", "cls", "class", "target", "category", "label_id", "class_id"),
    *("category_id", "label_idx", "class_idx", "label_index", "class_index", "label_name"),
    *("class_name", "category_name"),
)
MOST_LABELS = 2**20  # a number that counts further is no label
LONGEST = 200  # characters of a word
_WORDS = 4  # one label of so many, at the least, is a word where words are classes
_WHOLE = re.compile(r"[+-]?(\d{1,99})(\.0*)?", re.ASCII)
_FRACTION = re.compile(r"[+-]?\d*\.?\d+(e[+-]\d+)?", re.ASCII | re.IGNORECASE)


@functools.lru_cache(2**10)
def rank(name: str, names: tuple[str, ...]) -> int:
    """How early in `names` a column's or field's name stands; 0: nowhere. Case, signs and a plural do not count."""
    plain = _plain(name)
    return next((len(names) - i for i, each in enumerate(names) if _plain(each) == plain), 0)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold().rstrip("s")


def said_of(value: Any) -> str:
    """A value of a table or of JSON, as `read_labels` takes it."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return "" if value is None else sys.intern(str(value))


def read_labels(
    said: Sequence[int | str], paths: Sequence[str]
) -> tuple[list[int], tuple[str, ...], list[str]]:
    """Labels, class names and notes, of what is said of each picture: a number, a word; "", null or nan is no label.

    Words are classes in their sorted order, numbers among them too. Where few are words these cannot be read, as
    fractions, lists and numbers below -1 or from MOST_LABELS on never can: such a label is -1, and noted.
    """
    counts = Counter(said)
    meant = {each: _meant(each) for each in counts}
    known = {each: value for each, value in meant.items() if value not in (-1, None)}
    words = sum(counts[each] for each, value in known.items() if isinstance(value, str))
    notes, classes = list[str](), ()
    if words * _WORDS > sum(counts[each] for each, value in meant.items() if value != -1):
        text = {each: str(each).strip() for each in known}
        number = {word: label for label, word in enumerate(sorted(set(text.values())))}
        label_of, classes = {each: number[word] for each, word in text.items()}, tuple(number)
        each = counted(len(classes), "class", "es")
        notes.append(f"labels are words: {each}, numbered in their sorted order")
    else:
        label_of = {
            each: value
            for each, value in known.items()
            if isinstance(value, int) and value < MOST_LABELS
        }
    labels = [label_of.get(each, -1) for each in said]
    if odd := {each for each, value in meant.items() if value != -1} - label_of.keys():
        path, first = next(
            (path, each) for path, each in zip(paths, said, strict=True) if each in odd
        )
        each = counted(sum(counts[each] for each in odd), "label")
        notes.append(
            f"{each} could not be read, and the picture has none: first {shown(str(first)[:40])} of {shown(path)}; "
            f"labels are whole numbers from 0 on, below {MOST_LABELS:,}, or words"
        )
    return labels, classes or tuple(map(str, range(max(labels, default=-1) + 1))), notes


def _meant(said: int | str) -> int | str | None:
    """A number from -1 on, -1 where there is no label, or a word; None: nothing that could be a label."""
    text = str(said).strip()
    if text.casefold() in ("", "null", "nan"):
        return -1
    if whole := _WHOLE.fullmatch(text):
        number = -int(whole[1]) if text[0] == "-" else int(whole[1])
        return number if number >= -1 else None
    odd = text[0] in "[{" or min(text) < " " or "\ufffd" in text or len(text) > LONGEST
    return None if odd or _FRACTION.fullmatch(text) else text
