"""iNaturalist's JSON files: COCO's form, with a category for each picture, and no boxes."""

import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastrot.data.files import shown
from fastrot.data.sources.annotated import Odd
from fastrot.data.sources.coco import (
    by_id,
    category_names,
    folder_of,
    json_file,
    of_pictures,
    read_lists,
)
from fastrot.data.sources.lists import PathFinder
from fastrot.data.sources.records import Listing, Source
from fastrot.data.sources.tree import OPENED_AT_ONCE

_WAY = "name a file as iNaturalist's train2018.json, or its folder and --split train2018"
_BLOCK = 256  # pictures a task


def inaturalist(root: Path, how: Listing) -> Source:
    """The pictures of a file such as train2018.json, in its order, where they lie around it.

    Classes are its categories by id. A picture with annotations of several categories has the label of the first.
    """
    file = json_file(Path(os.path.abspath(root)), how.split, "", _WAY)
    images, annotations, categories = read_lists(file, _WAY, ("annotations", "categories"))
    odd, said, number = Odd(list), dict[Any, Any](), dict[Any, int]()
    paths = {key: path for key, (path, _) in by_id(images, file, _WAY, odd).items()}
    source = Source(root=folder_of(paths.values(), file))
    labelled = how.labelled and bool(annotations)
    if labelled:
        names = category_names(categories, file, _WAY)
        often = Counter(names.values())
        source.classes = tuple(n if often[n] == 1 else f"{n} ({key})" for key, n in names.items())
        number = {key: n for n, key in enumerate(names)}
        for image, category, each in of_pictures(annotations, paths, number, odd):
            if said.setdefault(image, category) != category:
                of_another = "annotations of another category than the picture's first, left out"
                odd[of_another].append(f"id {each.get('id')}")
    elif how.labelled:
        source.notes.append(
            f"{file.name} has no annotations, as those of test pictures: labels are -1"
        )
    del images, annotations  # of millions
    named, folder = [*paths.items()], PathFinder(str(source.root), how.by_name)
    blocks = [named[at : at + _BLOCK] for at in range(0, len(named), _BLOCK)]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        looked = pool.map(lambda block: [folder.look(path, key) for key, path in block], blocks)
        for path, key, verdict in itertools.chain.from_iterable(looked):
            label = number[said[key]] if key in said else -1
            if source.take(path, label, verdict) and labelled and label < 0:
                odd["pictures without a category, their label is -1"].append(path)
    source.notes += [f"{what}: {len(at):,}, the first {shown(at[0])}" for what, at in odd.items()]
    return source
