"""What a source knows of its pictures lies beside the prepared ones, by row, in every format: here COCO's boxes."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from truth import photo

from fastrot.assemble import open_data
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.tars.write import TarsOptions


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """Six pictures; number i has i % 3 boxes, which say so; number 4 is damaged."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for i in range(6):
        images.append({"id": 10 + i, "file_name": f"{i}.png"})
        annotations += [
            {"image_id": 10 + i, "bbox": [i, k, 8, 9], "category_id": i} for k in range(i % 3)
        ]
        Image.fromarray(photo(i, 30, 40)).save(root / f"{i}.png")
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:200])
    file = root / "instances.json"
    told = {"images": images, "annotations": annotations[::-1]}
    told["categories"] = [{"id": i, "name": str(i)} for i in range(6)]
    file.write_text(json.dumps(told))
    return file


OUT = {
    "beton": (BetonOptions, "a.beton", "a.beton.boxes.npz", "a.beton.json"),
    "set": (BetonOptions, "a.beton", "a.beton.set/set.boxes.npz", "a.beton.set/set.json"),
    "pack": (PackOptions, "a.pack", "a.pack/boxes.npz", "a.pack/meta.json"),
    "tars": (TarsOptions, "tars", "tars/boxes.npz", "tars/shards.json"),
}


@pytest.mark.parametrize("shuffle", [None, 1])
@pytest.mark.parametrize("form", OUT)
def test_boxes_go_with_their_rows(annotated, tmp_path, form, shuffle):
    kind, name, beside, manifest = OUT[form]
    how = {"keep_parts": True} if form == "set" else {}
    given = dict(source="coco", root=annotated, out=tmp_path / name, workers=0, shuffle=shuffle)
    done = convert(kind(**given, **how), part=2)
    data = open_data(done.out)
    boxes = np.load(tmp_path / beside)
    told = np.column_stack([boxes["box"][:, 1], boxes["categories"][boxes["category"]].astype(int)])
    of_row = np.split(told, np.cumsum(boxes["count"])[:-1])
    assert data.rows == len(of_row) == 5
    for row in range(5):
        number = int(data.name(row)[0])
        assert of_row[row].shape == (number % 3, 2)
        assert (of_row[row] == number).all()
    told = json.loads((tmp_path / manifest).read_bytes())
    assert told["beside"] == {"boxes.npz": zlib.crc32((tmp_path / beside).read_bytes())}
    # another source in its place leaves none of them
    assert convert(kind(**given, **how)).already
    (tmp_path / beside).unlink()
    if form != "set":
        with pytest.raises(ValueError, match="whole"):
            convert(kind(**given, **how))
    new = {**given, "source": "imagefolder", "root": annotated.parent, "overwrite": True}
    assert convert(kind(**new, **how)).manifest["rows"] == 5
    assert not (tmp_path / beside).exists()
