"""iNaturalist's JSON files: COCO's form, with a category for each picture, and no boxes."""

import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrot.data.files import shown
from fastrot.data.sources.annotated import Odd
from fastrot.data.sources.coco import category_names, json_file, key_of, own, read_lists
from fastrot.data.sources.lists import PathFinder
from fastrot.data.sources.records import Listing, Source
from fastrot.data.sources.tree import OPENED_AT_ONCE

_WAY = "name a file as iNaturalist's train2018.json, or its folder and --split train2018"
_BLOCK = 256  # pictures a task


def inaturalist(root: Path, how: Listing) -> Source:
    """The pictures of a file such as train2018.json, in its order; paths begin at its folder.

    Classes are its categories by id. A picture with annotations of several categories has the label of the first.
    """
    file = json_file(Path(os.path.abspath(root)), how.split, "", _WAY)
    images, annotations, categories = read_lists(file, _WAY, ("annotations", "categories"))
    labelled = how.labelled and bool(annotations)  # a file of test pictures has none
    odd, said, source = (
        Odd(list),
        dict[int | str | None, int | str | None](),
        Source(root=file.parent),
    )
    number: dict[int | str | None, int] = {}
    if labelled:
        names = category_names(categories, file, _WAY)
        often = Counter(names.values())
        source.classes = tuple(n if often[n] == 1 else f"{n} ({key})" for key, n in names.items())
        number = {key: n for n, key in enumerate(names)}
        ids = {key_of(each.get("id")) for each in images}
        for each in annotations:
            image, category = (key_of(each.get(name)) for name in ("image_id", "category_id"))
            if image not in ids:
                odd["annotations of no picture, left out"].append(f"id {each.get('id')}")
            elif category not in number:
                odd["annotations of no category, left out"].append(f"id {each.get('id')}")
            elif said.setdefault(image, category) != category:
                odd["annotations of another category than the picture's first, left out"].append(
                    f"id {each.get('id')}"
                )
    named = [
        (own(each, "id", file, _WAY), str(own(each, "file_name", file, _WAY))) for each in images
    ]
    folder = PathFinder(str(file.parent), how.by_name)
    blocks = [named[at : at + _BLOCK] for at in range(0, len(named), _BLOCK)]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [folder.look(path, key) for key, path in block], blocks)
        for path, key, verdict in itertools.chain.from_iterable(looked):
            label = number.get(said.get(key), -1)
            if source.take(path, label, verdict) and labelled and label < 0:
                odd["pictures without a category, their label is -1"].append(path)
    source.notes += [f"{what}: {len(at):,}, the first {shown(at[0])}" for what, at in odd.items()]
    return source
