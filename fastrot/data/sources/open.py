"""The table of sources, by the names of their layouts: `open_source` is the one door to all of them."""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastrot.config import UsageError
from fastrot.data.files import counted, shown
from fastrot.data.sources.archives import archives
from fastrot.data.sources.cifar10 import cifar10
from fastrot.data.sources.cityscapes import cityscapes
from fastrot.data.sources.coco import coco
from fastrot.data.sources.inaturalist import inaturalist
from fastrot.data.sources.lfw import lfw
from fastrot.data.sources.lists import text_list
from fastrot.data.sources.members import tar_members, zip_members
from fastrot.data.sources.parquet import parquet_files
from fastrot.data.sources.prepared import beton_rows
from fastrot.data.sources.records import Listing, Source
from fastrot.data.sources.shards import webdataset
from fastrot.data.sources.tree import image_folder
from fastrot.data.sources.voc import voc


@dataclass(frozen=True)
class Kind:
    open: Callable[[Path, Listing], Source]
    wants: str
    patterns: bool = False  # whether --root may stand for many names
    splits: bool = True
    columns: bool = False
    folder: bool = False
    categories: bool = False


KINDS = {
    "imagefolder": Kind(image_folder, "a folder of class folders, or of pictures"),
    "list": Kind(
        text_list, "a text file that names pictures", splits=False, columns=True, folder=True
    ),
    "cifar10": Kind(cifar10, "the folder cifar-10-batches-py"),
    "beton": Kind(beton_rows, "a .beton file, or the folder of its parts", splits=False),
    "tar": Kind(partial(archives, ".tar", tar_members), "a tar, or of a folder of tars"),
    "zip": Kind(partial(archives, ".zip", zip_members), "a zip, or of a folder of zips"),
    "webdataset": Kind(webdataset, "WebDataset shards: a tar, a folder, NAME-{000..146}.tar", True),
    "parquet": Kind(parquet_files, "a folder of parquet or Arrow files", columns=True),
    "coco": Kind(coco, "COCO's folder, or an instances file of it", categories=True),
    "voc": Kind(voc, "VOCdevkit/VOC2007", categories=True),
    "inaturalist": Kind(inaturalist, "iNaturalist's folder, or a train2018.json of it"),
    "cityscapes": Kind(cityscapes, "the folder that holds leftImg8bit"),
    "lfw": Kind(lfw, "a folder of people's folders", splits=False),
}


if TYPE_CHECKING:
    Layout = str
else:  # the command line's choices
    Layout = Literal[tuple(KINDS)]


def open_source(
    kind: str,
    root: str | Path,
    *,
    split: str | None = None,
    label_from: Literal["folder", "none"] = "folder",
    by_name: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    loose: bool = False,
    categories: str | None = None,
    folder: Path | None = None,
) -> Source:
    """Open a source by the name of its layout, one of the table KINDS. Raises UsageError where it has no picture."""
    if kind not in KINDS:
        raise UsageError(f"the layout {kind!r} is not known: it is one of {', '.join(KINDS)}")
    layout = KINDS[kind]
    if not os.path.exists(root) and not (layout.patterns and re.search(r"[{*?]|::", str(root))):
        raise UsageError(f"{root} does not exist: give the path of {layout.wants}")
    if split is not None and not layout.splits:
        raise UsageError(f"--split {split}: {layout.wants} has no splits; name the file of one")
    for name, column in {"--image-column": image_column, "--label-column": label_column}.items():
        if column is not None and not layout.columns:
            raise UsageError(f"{name} {column}: {layout.wants} has no columns; parquet has")
    if categories is not None and not layout.categories:
        raise UsageError(
            f"--categories {categories}: {layout.wants} has no boxes; coco and voc have"
        )
    if folder is not None and not (layout.folder and folder.is_dir()):
        why = "it is no folder" if layout.folder else f"{layout.wants} names no paths; a list does"
        raise UsageError(f"--folder {folder}: {why}")
    columns = image_column, label_column
    how = Listing(split, label_from == "folder", by_name, *columns, loose, categories, folder)
    source = layout.open(Path(root), how)
    if source.records:
        return source
    where = source.root if os.path.isdir(root) else root
    if not source.seen:
        raise UsageError(f"{where} is empty: give a path with pictures in it")
    why = [f"{shown(path) or 'the root'}: {reason}" for path, reason in source.rejected[:1]]
    groups = Counter(each.group() for each in source.left_out).most_common(3)
    why = why or [f"{count:,} {group}" for group, count in groups]
    way = ", or say with --folder where its paths begin" if layout.folder else ", or at the path"
    raise UsageError(
        f"{where} has {counted(source.seen, 'file')} and no picture among them ({', '.join(why)}): look at "
        f"them{way}"
    )
