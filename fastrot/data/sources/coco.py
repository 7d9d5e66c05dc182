"""COCO's instances: a JSON file of pictures, boxes and categories, with the pictures around it."""

import json
import math
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastrot.config import UsageError
from fastrot.data.files import one_line, shown, some
from fastrot.data.sources.annotated import Annotated, Box, Odd, Told, annotated, size_told
from fastrot.data.sources.lists import PathFinder
from fastrot.data.sources.records import Listing, no_split

_PREFIX = "instances_"
_WAY = "name a file as COCO's annotations/instances_val2017.json"
_OTHERS = {"caption": "captions", "keypoints": "keypoints", "segments_info": "panoptic segments"}


def coco(root: Path, how: Listing) -> Annotated:
    """The pictures of an instances file, in its order, or of COCO's folder, where the split names the file.

    Crowds are `ignore`. Of pictures with the same id the first counts.
    """
    file = json_file(Path(os.path.abspath(root)), how.split, _PREFIX, _WAY)
    images, annotations, categories = read_lists(file, _WAY)
    odd, told = Odd(list), dict[int | str, Told]()
    for key, (path, each) in by_id(images, file, _WAY, odd).items():
        size = size_told(*_numbers([each.get("height"), each.get("width")], 2))
        told[key] = Told(path, size, [])
    names = category_names(categories, file, _WAY)
    for image, category, each in of_pictures(annotations, told, names, odd):
        x, y, width, height = _numbers(each.get("bbox"), 4)
        edges, area = (y, x, y + height, x + width), _numbers([each.get("area")], 1)[0]
        crowd = _numbers([each.get("iscrowd")], 1)[0] == 1
        told[image].boxes.append(Box(edges, names[category], crowd, area))
    known = [*dict.fromkeys(names.values())]
    folder = folder_of([each.path for each in told.values()], file)
    return annotated(folder, how, [*told.values()], known, odd)


def json_file(root: Path, split: str | None, prefix: str, way: str) -> Path:
    """The file that --root and --split mean: root itself, or in it, or in its annotations/, PREFIX + SPLIT.json; `way` out where there is none."""
    if not root.is_dir():
        if split is not None:
            raise UsageError(f"--split {split}: {root} is the file of one; leave --split out")
        return root
    folder = root / "annotations"
    folder = folder if folder.is_dir() else root
    there = {path.stem.removeprefix(prefix): path for path in folder.glob(f"{prefix}*.json")}
    if not there:
        raise UsageError(f"{folder} has no {prefix}*.json: {way}")
    if split is None and len(there) > 1:
        raise UsageError(f"{folder} has {some(sorted(there), 10)}: name one with --split")
    split = split or min(there)
    if split not in there:
        raise no_split(split, folder, there)
    return there[split]


def read_lists(file: Path, way: str, optional: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    """Images, annotations and categories; a list that is `optional` may be missing. Raises UsageError with the `way` out."""
    try:
        told = json.loads(file.read_bytes(), object_hook=_without_outline)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no JSON, or cut short ({one_line(error)}): {way}") from None
    found = []
    for name in ("images", "annotations", "categories"):
        each = told.get(name) if isinstance(told, dict) else None
        each = [] if name in optional and each is None and isinstance(told, dict) else each
        if not isinstance(each, list) or not all(isinstance(one, dict) for one in each):
            raise UsageError(f"{file} has no list of {name}: {way}")
        for key, word in _OTHERS.items():
            if name == "annotations" and each and each[0].get(key):
                raise UsageError(f"{file} is of {word}: {way}")
        found.append(each)
    return found


def _without_outline(read: dict[str, Any]) -> dict[str, Any]:
    """An object of the file; outlines are most of it."""
    read.pop("segmentation", None)
    return read


def by_id(
    images: list[dict[str, Any]], file: Path, way: str, odd: Odd
) -> dict[int | str, tuple[str, dict[str, Any]]]:
    """Paths and pictures by id, in their order; of those with the same id the first counts."""
    found, paths = dict[int | str, tuple[str, dict[str, Any]]](), set()
    for each in images:
        key, path = own(each, "id", file, way), str(own(each, "file_name", file, way))
        first, same = found.setdefault(key, (path, each))
        if first != path:
            both = f"{first} and {path}"
            raise UsageError(f"{file} has the id {key} for {both}: give each picture its own")
        if same is not each:
            odd["pictures listed again, ignored"].append(path)
        elif path in paths:
            odd["pictures with several ids, taken for each"].append(path)
        paths.add(path)
    return found


def of_pictures(
    annotations: list[dict[str, Any]], images: Container[Any], categories: Container[Any], odd: Odd
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """The ids of picture and category, and the annotation, where both are known."""
    ids = set()
    for each in annotations:
        key, image, category = (key_of(each.get(k)) for k in ("id", "image_id", "category_id"))
        if key is not None and key in ids:
            odd["annotations with the id of another, taken too"].append(f"id {key}")
        ids.add(key)
        if image not in images:
            odd["annotations of no picture, left out"].append(f"id {key}")
        elif category not in categories:
            odd["annotations of no category, left out"].append(f"id {key}")
        else:
            yield image, category, each


def folder_of(paths: Iterable[str], file: Path) -> Path:
    """Where the first picture is that is anywhere: one of the folders around the file."""
    above, split = file.parent.parent, file.stem.removeprefix(_PREFIX)
    places = [file.parent, above, above / "images", above / split, above / "images" / split]
    folders = {place: PathFinder(str(place), True) for place in places}
    for path in sorted(paths, key=os.path.isabs):  # absolute ones do not tell where others are
        for place, folder in folders.items():
            if folder.has(path):
                return place
    if not paths:
        return file.parent
    where = ", ".join(map(str, places))
    raise UsageError(f"no picture of {file} is in {where}: move the pictures, or the file")


def category_names(categories: list[dict[str, Any]], file: Path, way: str) -> dict[int | str, str]:
    """Names by id, in the order of ids."""
    names: dict[int | str, str] = {}
    for each in categories:
        key, name = own(each, "id", file, way), str(own(each, "name", file, way))
        if names.setdefault(key, name) != name:
            both = f"{names[key]} and {name}"
            raise UsageError(f"{file} has the id {key} for {both}: give each category its own")
    return {key: names[key] for key in sorted(names, key=lambda key: (isinstance(key, str), key))}


def own(each: dict[str, Any], name: str, file: Path, way: str) -> int | str:
    """What a picture or category has under a name."""
    if (found := key_of(each.get(name))) is None:
        raise UsageError(f"{file} has {shown(str(each))} without {name}: mend it, or {way}")
    return found


def key_of(value: Any) -> int | str | None:
    """A value that may be an id or a name; a table may have made numbers of it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, str)) else None


def _numbers(values: Any, count: int) -> list[float]:
    """So many numbers; not finite where they are none."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        found = []
    return found if len(found) == count else [math.nan] * count
