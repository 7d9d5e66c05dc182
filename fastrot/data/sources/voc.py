"""Pascal VOC: JPEGImages/NAME.jpg, Annotations/NAME.xml, and lists of names in ImageSets/Main."""

import math
from pathlib import Path
from xml.etree import ElementTree

from fastrot.config import UsageError
from fastrot.data.files import one_line, some
from fastrot.data.sources.annotated import Annotated, Box, Odd, Told, annotated, size_told
from fastrot.data.sources.records import Listing, no_split

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def voc(root: Path, how: Listing) -> Annotated:
    """The pictures of VOCdevkit/VOC2007 that a split names; without a split, those with an XML file.

    Difficult objects are `ignore`. A picture whose XML cannot be read is rejected; without XML it has no box.
    """
    years = [each for each in sorted(root.glob("VOC*")) if (each / "JPEGImages").is_dir()]
    if not (root / "JPEGImages").is_dir():
        if len(years) != 1:
            listed = some([each.name for each in years], 10) or "no folder with JPEGImages"
            raise UsageError(f"{root} has {listed}: give one such folder, as VOCdevkit/VOC2007")
        (root,) = years
    odd = Odd(list)
    told = [_told(root, name, odd) for name in _names(root, how.split)]
    used = sorted({box.category for each in told for box in each.boxes})
    known = VOC_CLASSES if {*used} <= {*VOC_CLASSES} else used
    return annotated(root / "JPEGImages", how, told, known, odd)


def _names(root: Path, split: str | None) -> list[str]:
    """Of pictures, in order; in the list of a class, as train of cat_train, those of its others have -1."""
    if split is None:
        return sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
    lists = {path.stem: path for path in (root / "ImageSets" / "Main").glob("*.txt")}
    if split not in lists:
        raise no_split(split, root, [name for name in lists if "_" not in name])
    lines = lists[split].read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.split()[0] for line in lines if line.strip() and line.split()[-1] != "-1"]


def _told(root: Path, name: str, odd: Odd) -> Told:
    """What the XML of a picture says."""
    path = f"{name}.jpg"
    try:
        xml = ElementTree.fromstring((root / "Annotations" / f"{name}.xml").read_bytes())
    except FileNotFoundError:
        odd["pictures without XML"].append(path)
        return Told(path, None, [])
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return Told(path, None, [], f"its XML cannot be read ({one_line(error)})")
    named = (xml.findtext("filename") or "").strip()
    path = named if Path(named).stem == name else path  # else a copy of another's
    size = size_told(_number(xml, "size/height"), _number(xml, "size/width"))
    boxes = []
    for each in xml.iterfind("object"):
        edges = [_number(each, f"bndbox/{edge}") for edge in ("ymin", "xmin", "ymax", "xmax")]
        half_open = edges[0] - 1, edges[1] - 1, *edges[2:]
        difficult = _number(each, "difficult") == 1
        if category := (each.findtext("name") or "").strip():
            boxes.append(Box(half_open, category, difficult))
        else:
            odd["objects without a name, left out"].append(path)
    return Told(path, size, boxes)


def _number(xml: ElementTree.Element, path: str) -> float:
    """What stands there; nan where it is no number."""
    try:
        return float(xml.findtext(path) or "")
    except ValueError:
        return math.nan
