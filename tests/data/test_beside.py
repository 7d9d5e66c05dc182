"""A newcomer's source of pictures with boxes: they lie beside the prepared pictures, by row, in every format."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from truth import photo

from fastrot.assemble import open_data
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.sources import open as table
from fastrot.data.sources.records import Listing, Record, Source
from fastrot.data.tars.write import TarsOptions

# ---- what the newcomer writes: one class, one function, one line in the table ----


@dataclass(kw_only=True)
class Coco(Source):
    """Pictures of a COCO file, with their boxes."""

    boxes: list[np.ndarray]  # of each record: int64 [k, 5], x, y, width, height, category

    def _of_records(self, rows):
        return {**super()._of_records(rows), "boxes": [self.boxes[i] for i in rows.tolist()]}

    def beside(self, records):
        boxes = [self.boxes[i] for i in records.tolist()]
        return {"boxes": {"count": np.array([*map(len, boxes)]), "box": np.concatenate(boxes)}}


def coco(root: Path, how: Listing) -> Source:
    """`root`: a file as COCO's instances_val2017.json; the pictures lie beside it."""
    told = json.loads(root.read_bytes())
    of = {image["id"]: [] for image in told["images"]}
    for each in told["annotations"]:
        of[each["image_id"]].append([*each["bbox"], each["category_id"]])
    records = [Record(image["file_name"], -1) for image in told["images"]]
    boxes = [np.array(of[image["id"]], np.int64).reshape(-1, 5) for image in told["images"]]
    return Coco(root=root.parent, records=records, boxes=boxes)


@pytest.fixture(autouse=True)
def line(monkeypatch):
    monkeypatch.setitem(table.KINDS, "coco", table.Kind(coco, "a file of COCO's annotations"))


# ---- and what that gives ----


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """Six pictures; number i has i % 3 boxes, which say so; number 4 is damaged."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for i in range(6):
        images.append({"id": 10 + i, "file_name": f"{i}.png"})
        annotations += [
            {"image_id": 10 + i, "bbox": [i, k, 8, 9], "category_id": 100 + i} for k in range(i % 3)
        ]
        Image.fromarray(photo(i, 30, 40)).save(root / f"{i}.png")
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:200])
    file = root / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    return file


OUT = {
    "beton": (BetonOptions, "a.beton", "a.beton.boxes.npz", "a.beton.json"),
    "set": (BetonOptions, "a.beton", "a.beton.set/set.boxes.npz", "a.beton.set/set.json"),
    "pack": (PackOptions, "a.pack", "a.pack/boxes.npz", "a.pack/meta.json"),
    "tars": (TarsOptions, "tars", "tars/boxes.npz", "tars/shards.json"),
}


def options(kind: type, **given):
    """Options of the new source: their type was made of the table when it was imported."""
    made = kind(**given | {"source": "imagefolder"})
    object.__setattr__(made, "source", given["source"])
    return made


@pytest.mark.parametrize("shuffle", [None, 1])
@pytest.mark.parametrize("form", OUT)
def test_boxes_go_with_their_rows(annotated, tmp_path, form, shuffle):
    kind, name, beside, manifest = OUT[form]
    how = {"keep_parts": True} if form == "set" else {}
    given = dict(source="coco", root=annotated, out=tmp_path / name, workers=0, shuffle=shuffle)
    done = convert(options(kind, **given, **how), part=2)
    data = open_data(done.out)
    boxes = np.load(tmp_path / beside)
    of_row = np.split(boxes["box"], np.cumsum(boxes["count"])[:-1])
    assert data.rows == len(of_row) == 5
    for row in range(5):
        number = int(data.name(row)[0])
        assert of_row[row].shape == (number % 3, 5)
        assert (of_row[row][:, [0, 4]] == [number, 100 + number]).all()
    told = json.loads((tmp_path / manifest).read_bytes())
    assert told["beside"] == {"boxes.npz": zlib.crc32((tmp_path / beside).read_bytes())}
    # another source in its place leaves none of them
    assert convert(options(kind, **given, **how)).already
    (tmp_path / beside).unlink()
    if form != "set":
        with pytest.raises(ValueError, match="whole"):
            convert(options(kind, **given, **how))
    new = {**given, "source": "imagefolder", "root": annotated.parent, "overwrite": True}
    assert convert(options(kind, **new, **how)).manifest["rows"] == 5
    assert not (tmp_path / beside).exists()
