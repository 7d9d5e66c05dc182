"""Cityscapes: leftImg8bit/SPLIT/CITY/CITY_..._leftImg8bit.png; classes are cities."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastrot.data.sources.records import LeftOut, Listing, Source
from fastrot.data.sources.tree import image_folder

_FOLDER = "leftImg8bit"


def cityscapes(root: Path, how: Listing) -> Source:
    """The pictures of a split of leftImg8bit, or of the folder that holds it; as `image_folder` lists them."""
    inside = root / _FOLDER
    source = image_folder(inside if inside.is_dir() else root, how)
    ours = np.array([each.path.endswith(f"_{_FOLDER}.png") for each in source.records], bool)
    others = [
        LeftOut(source.records[i].path, f"no {_FOLDER}.png") for i in np.flatnonzero(~ours).tolist()
    ]
    source = source if ours.all() else source.taken(np.flatnonzero(ours))
    return replace(source, left_out=[*source.left_out, *others])
