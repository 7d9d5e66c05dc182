"""COCO, VOC, LFW and Cityscapes: boxes and pairs stay with their rows, and what is odd is told, not taken."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from truth import DATA, photo

from fastrot import config
from fastrot.assemble import open_data, open_loader
from fastrot.config import UsageError
from fastrot.core import View
from fastrot.data.beside import read_beside
from fastrot.data.beton.write import BetonOptions
from fastrot.data.boxes import read_boxes
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.sources.open import open_source
from fastrot.data.tars.write import TarsOptions

SIDE = 64
NAMES = {17: "cat", 18: "dog", 10: "traffic light", 99: "unicorn"}
FORMS = {
    "beton": (BetonOptions, "a.beton", {"encoding": "raw"}),
    "set": (BetonOptions, "a.beton", {"encoding": "raw", "keep_parts": True}),
    "pack": (PackOptions, "a.pack", {"encoding": "raw"}),
    "tars": (TarsOptions, "tars", {}),
}
PICTURES = [  # height, width, and boxes: top, left, bottom, right, and what
    (128, 256, [(32, 64, 96, 128, "cat")]),
    (64, 64, [(5, 0, 64, 64, "dog")]),
    (256, 128, [(0, 0, 12, 10, "dog"), (100, 50, 200, 128, "cat")]),
    (100, 90, [(33, 17, 71, 54, "traffic light")]),
    (192, 320, []),
    (120, 77, [(3, 9, 119, 40, "cat")]),
]


def white(height: int, width: int, boxes) -> Image.Image:
    """White where a box is, else black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for top, left, bottom, right, _ in boxes:
        pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def draw_all(folder: Path, ending: str, pictures=PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (height, width, boxes) in enumerate(pictures):
        white(height, width, boxes).save(folder / f"{i:06}.{ending}")


def coco_told(pictures=PICTURES) -> dict:
    number = {name: key for key, name in NAMES.items()}
    images, annotations = [], []
    for i, (height, width, boxes) in enumerate(pictures):
        size = {"height": height, "width": width}
        images.append({"id": 500 - i, "file_name": f"{i:06}.png", **size})
        for top, left, bottom, right, name in boxes:
            box = {"bbox": [left, top, right - left, bottom - top], "category_id": number[name]}
            at = {"id": len(annotations), "image_id": 500 - i, "iscrowd": 0, "area": 7.5}
            annotations.append({**at, **box, "segmentation": [[0] * 8]})
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    return {"images": images, "annotations": annotations[::-1], "categories": categories}


def write_coco(root: Path, told: object = None, at: str = "val") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    file = root / "annotations" / f"instances_{at}.json"
    file.write_text(told if isinstance(told, str) else json.dumps(told or coco_told()))
    return root


def coco_set(root: Path) -> Path:
    draw_all(root / "images" / "val", "png")
    return write_coco(root)


def voc_xml(height, width, boxes, *, difficult=0, name="x.jpg") -> str:
    objects = "".join(
        f"<object><name>{what}</name><difficult>{difficult}</difficult><bndbox><xmin>{left + 1}</xmin>"
        f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for top, left, bottom, right, what in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def voc_set(root: Path) -> Path:
    year = root / "VOC2007"
    draw_all(year / "JPEGImages", "png")
    (year / "Annotations").mkdir()
    for i, picture in enumerate(PICTURES):
        file = year / "Annotations" / f"{i:06}.xml"
        file.write_text(voc_xml(*picture, name=f"{i:06}.png"))
    (year / "ImageSets" / "Main").mkdir(parents=True)
    lists = {"train": "000005\n000001\n", "cat_train": "000005  1\n000001 -1\n"}
    for name, lines in lists.items():
        (year / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    return root


SETS = {"coco": coco_set, "voc": voc_set}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in SETS.items()}


def convert_all(out: Path, form: str, **given):
    kind, name, how = FORMS[form]
    return convert(kind(out=out / name, workers=0, **how, **given), part=2)


def crops(data) -> np.ndarray:
    """All rows as the loader gives them, squashed."""
    view = View(crops=(config.Whole(size=SIDE),), shuffled=False)
    loader = open_loader(data, view, batch=4, workers=0, enlarge=True)
    batches = [(batch.index, batch.crops[0]) for batch in loader.epoch(0)]
    rows = np.concatenate([rows.numpy() for rows, _ in batches])
    assert (rows == np.arange(data.rows)).all()
    return np.concatenate([crop.numpy() for _, crop in batches])


# ---- boxes go with their rows ----


@pytest.mark.parametrize("how", [{}, {"shuffle": 3}, {"short_side": 50}, {"limit": 4}], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SETS)
def test_a_box_covers_what_is_white(sets, tmp_path, source, form, how):
    done = convert_all(tmp_path, form, source=source, root=sets[source], **how)
    data = open_data(done.out)
    assert data.rows == how.get("limit", len(PICTURES))
    boxes = read_boxes(data)
    for row, crop in enumerate(crops(data)):
        height, width, given = PICTURES[int(Path(data.name(row)).stem)]
        assert boxes.size[row].tolist() == [height, width]
        mine = slice(*boxes.first[row : row + 2])
        found = zip(boxes.box[mine].tolist(), boxes.category[mine].tolist(), strict=True)
        told = sorted((*box, str(boxes.categories[category])) for box, category in found)
        assert told == sorted(given)
        bright = crop.min(axis=2) > 127
        inner, outer = np.zeros_like(bright), np.zeros_like(bright)
        exact = (
            height % SIDE == width % SIDE == 0 and "short_side" not in how
        )  # edges too: see PICTURES
        for top, left, bottom, right in boxes.squashed(row, SIDE).tolist():
            outer[top:bottom, left:right] = True
            inner[top + 1 : bottom - 1, left + 1 : right - 1] = True
        assert (bright == outer).all() if exact else (bright <= outer).all()
        assert (inner <= bright).all()
    if not how:
        largest = [
            max(b, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))[4] if b else None
            for *_, b in PICTURES
        ]
        assert [data.classes[i] if i >= 0 else None for i in data.labels] == largest
        assert boxes.area.tolist() == [7.5] * 6 if source == "coco" else boxes.area.min() > 0


def test_squashed_is_exact_where_the_scale_divides(sets, tmp_path):
    data = open_data(convert_all(tmp_path, "beton", source="coco", root=sets["coco"]).out)
    boxes = read_boxes(data)
    assert boxes.squashed(0, SIDE).tolist() == [[16, 16, 48, 32]]
    assert boxes.squashed(1, SIDE).tolist() == [[5, 0, 64, 64]]
    assert boxes.squashed(2, SIDE, ["dog"]).tolist() == [[0, 0, 3, 5]]
    assert boxes.squashed(3, SIDE).tolist() == [[21, 12, 46, 39]]  # 21.12 12.09 45.44 38.4
    assert boxes.squashed(4, SIDE).shape == (0, 4)
    white = crops(data).min(axis=3) > 127
    assert (np.argwhere(white[0]).min(axis=0) == [16, 16]).all()
    assert (np.argwhere(white[0]).max(axis=0) == [47, 31]).all()


def test_boxes_that_are_not_there_or_not_its_own_are_refused(sets, tmp_path):
    given = {"source": "coco", "root": sets["coco"]}
    for form in ("beton", "pack", "tars"):
        done = convert_all(tmp_path, form, **given)
        file, _ = open_data(done.out).beside["boxes.npz"]
        whole = file.read_bytes()
        file.write_bytes(whole[:-100] + bytes(100))
        with pytest.raises(UsageError, match="has changed since it was written"):
            read_boxes(open_data(done.out))
        file.unlink()
        with pytest.raises(UsageError, match=r"boxes\.npz cannot be read"):
            read_boxes(open_data(done.out))
    plain = convert_all(tmp_path / "plain", "beton", source="imagefolder", root=sets["coco"])
    with pytest.raises(
        UsageError, match="x has no boxes beside it: prepare it with fastrot convert"
    ):
        read_boxes(open_data(plain.out), "x")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_there_is_of_the_annotations_that_are_listed(tmp_path, form):
    root, out = coco_set(tmp_path / "coco"), tmp_path / "out"
    given = {"source": "coco", "root": root, "label_from": "none"}
    convert_all(out, form, **given)
    assert convert_all(out, form, **given).already
    told = coco_told()
    told["annotations"][0]["bbox"][0] += 0.25
    write_coco(root, told)
    with pytest.raises(UsageError, match="from other pictures, labels or annotations"):
        convert_all(out, form, **given)
    assert not convert_all(out, form, **given, overwrite=True).already


# ---- --categories ----


def test_categories_choose_boxes_and_pictures(sets, tmp_path):
    for name, root in sets.items():
        source = open_source(name, root, categories="traffic light, cat")
        assert [record.path[:6] for record in source.records] == [
            "000000",
            "000002",
            "000003",
            "000005",
        ]
        assert [record.label for record in source.records] == [1, 1, 0, 1]
        assert source.classes == source.categories == ("traffic light", "cat")
        assert [each.reason for each in source.left_out] == ["no box of --categories"] * 2
        assert source.seen == len(PICTURES)
        assert [len(each) for each in source.boxes] == [1, 1, 1, 1]
    given = {"source": "coco", "root": sets["coco"]}
    done = convert_all(tmp_path, "beton", **given, categories="dog")
    assert read_boxes(open_data(done.out)).categories.tolist() == ["dog"]
    with pytest.raises(UsageError, match="made with --categories dog, not cat"):
        convert_all(tmp_path, "beton", **given, categories="cat")


def test_categories_that_cannot_be_had(sets):
    for asked, says in {
        "cat,trafic light": "--categories got 'trafic light': did you mean traffic light?",
        "zzz": "--categories got 'zzz': choose one of traffic light, cat, dog, unicorn",
        "": "--categories got '': choose one of",
    }.items():
        with pytest.raises(UsageError, match=says.replace("?", r"\?")):
            open_source("coco", sets["coco"], categories=asked)
    with pytest.raises(UsageError, match="has no boxes; coco and voc have"):
        open_source("imagefolder", sets["coco"], categories="cat")
    source = open_source("coco", sets["coco"], categories="all")
    assert [record.path[:6] for record in source.records] == [f"{i:06}" for i in (0, 1, 2, 3, 5)]
    assert (len(source.left_out), source.classes) == (1, ("traffic light", "cat", "dog", "unicorn"))
    source = open_source("coco", sets["coco"], categories="dog,unicorn")
    assert "no picture has a box of unicorn" in source.notes
    assert source.classes == ("dog", "unicorn")


def test_boxes_of_pictures_that_are_cut_are_refused(sets, tmp_path):
    cut = {"source": "voc", "root": sets["voc"], "center_crop": True}
    with pytest.raises(UsageError, match="--center-crop cuts pictures to which boxes"):
        convert_all(tmp_path, "pack", **cut)


def test_boxes_that_stay_behind_are_named(sets, tmp_path):
    """They do not come along where the prepared file itself is prepared again."""
    done = convert_all(tmp_path / "a.beton", "beton", source="coco", root=sets["coco"])
    (note,) = open_source("beton", done.out).notes
    assert note.startswith("boxes.npz beside it stay behind: prepare the pictures anew")


def test_without_labels_boxes_stay(sets):
    source = open_source("coco", sets["coco"], label_from="none")
    assert {record.label for record in source.records} == {-1}
    assert source.classes == ()
    assert source.categories == ("traffic light", "cat", "dog", "unicorn")  # by id
    assert sum(map(len, source.boxes)) == 6


def test_pictures_of_other_categories_need_not_be_there(tmp_path):
    root = coco_set(tmp_path)
    for i in (0, 3, 4, 5):
        (root / "images" / "val" / f"{i:06}.png").unlink()
    source = open_source("coco", root, categories="dog")
    assert [record.path for record in source.records] == ["000001.png", "000002.png"]
    assert source.rejected == []
    assert len(open_source("coco", root).rejected) == 4


# ---- oddities ----


def changed(change) -> dict:
    told = coco_told()
    change(told["images"], told["annotations"], told["categories"])
    return told


def box_of(told: list[dict], key: int) -> dict:
    return next(each for each in told if each["id"] == key)


ODD = {  # what is changed in the file; what a note says of it; boxes that are left
    "over the border": (
        lambda i, a, c: box_of(a, 0).update(bbox=[-9, -3, 500, 500]),
        "boxes that reach out of their picture, clipped: 1, the first 000000.png",
        6,
    ),
    "outside": (
        lambda i, a, c: box_of(a, 0).update(bbox=[256, 3, 5, 5]),
        "boxes outside of their picture, left out: 1, the first 000000.png",
        5,
    ),
    "no width": (
        lambda i, a, c: box_of(a, 0).update(bbox=[3, 3, 0, 5]),
        "boxes without an area, left out: 1, the first 000000.png",
        5,
    ),
    "not finite": (
        lambda i, a, c: box_of(a, 0).update(bbox=[3, float("nan"), float("inf"), 5]),
        "boxes without an area, left out: 1, the first 000000.png",
        5,
    ),
    "of three numbers, of words, of none": (
        lambda i, a, c: [box_of(a, k).update(bbox=b) for k, b in enumerate(([1, 2, 3], "abcd", 7))],
        "boxes without an area, left out: 3, the first 000000.png",
        3,
    ),
    "beyond floats": (
        lambda i, a, c: box_of(a, 0).update(bbox=[1, 1, 10**400, 5], area=10**400),
        "boxes without an area, left out: 1, the first 000000.png",
        5,
    ),
    "no bbox": (
        lambda i, a, c: box_of(a, 0).pop("bbox"),
        "boxes without an area, left out: 1, the first 000000.png",
        5,
    ),
    "a picture twice": (
        lambda i, a, c: i.append({**i[0], "height": 9}),
        "pictures listed again, ignored: 1, the first 000000.png",
        6,
    ),
    "a picture under two ids": (
        lambda i, a, c: i.append({**i[0], "id": "new"}),
        "pictures with several ids, taken for each: 1, the first 000000.png",
        6,
    ),
    "an annotation's id twice": (
        lambda i, a, c: a.append({**box_of(a, 0)}),
        "annotations with the id of another, taken too: 1, the first id 0",
        7,
    ),
    "no such picture": (
        lambda i, a, c: box_of(a, 0).update(image_id=[3]),
        "annotations of no picture, left out: 1, the first id 0",
        5,
    ),
    "no such category": (
        lambda i, a, c: box_of(a, 0).update(category_id=3),
        "annotations of no category, left out: 1, the first id 0",
        5,
    ),
    "a crowd": (
        lambda i, a, c: box_of(a, 0).update(iscrowd=1),
        "pictures without a box that counts, their label is -1 (--categories all leaves them out): 2, the first 000000.png",
        6,
    ),
    "a crowd in words, and ids as a table writes them": (
        lambda i, a, c: [
            each.update(iscrowd="1", image_id=float(each["image_id"])) for each in a[-1:]
        ],
        "pictures without a box that counts, their label is -1 (--categories all leaves them out): 2, the first 000000.png",
        6,
    ),
    "a category without pictures": (lambda i, a, c: None, "no picture has a box of unicorn", 6),
    "another shape": (
        lambda i, a, c: i[0].update(height=256, width=128),
        "pictures not of the shape that is told, or turned by EXIF, their boxes left out: 1, the first 000000.png",
        5,
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_in_coco_is_told(sets, tmp_path, odd):
    change, note, left = ODD[odd]
    write_coco(tmp_path, changed(change))
    (tmp_path / "val").symlink_to(sets["coco"] / "images" / "val")
    source = open_source("coco", tmp_path)
    assert note in source.notes
    assert sum(map(len, source.boxes)) == left
    assert source.seen == len(source.records) == 6 + ("two ids" in odd)
    for each, size in zip(source.boxes, source.size, strict=True):
        assert (each["box"] >= 0).all()
        assert (each["box"][:, 2:] <= size).all()
        assert (each["area"] > 0).all()


ODD_WIDTHS = None, float("nan"), 10**400, [], 0


def test_a_copy_of_another_size_has_its_boxes(tmp_path):
    """And a picture without a told size is of its own."""
    root = write_coco(
        tmp_path,
        changed(
            lambda i, a, c: [
                each.update(width=w) for each, w in zip(i[1:], ODD_WIDTHS, strict=True)
            ]
        ),
    )
    draw_all(root / "val", "png")
    Image.open(root / "val" / "000000.png").resize((63, 31)).save(root / "val" / "000000.png")
    source = open_source("coco", root)
    assert source.size.tolist() == [[h, w] for h, w, _ in PICTURES]
    assert sum(map(len, source.boxes)) == 6


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_boxes_of_a_picture_that_exif_turns_are_left_out(tmp_path, turn):
    """Upside down it keeps its shape, and its boxes would lie where nothing is."""
    root, (height, width, boxes) = tmp_path, PICTURES[0]
    (root / "images").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    white(height, width, boxes).save(root / "images" / "000000.png", exif=exif)
    write_coco(root, coco_told(PICTURES[:1]))
    source = open_source("coco", root)
    assert [len(each) for each in source.boxes] == [int(turn == 1)]
    assert any("turned by EXIF" in note for note in source.notes) == (turn != 1)


def test_pictures_that_are_not_there_are_rejected(tmp_path):
    root = coco_set(tmp_path)
    (root / "images" / "val" / "000000.png").unlink()
    (root / "images" / "val" / "000001.png").write_text("no picture")
    source = open_source("coco", root)
    assert source.rejected[0] == ("000000.png", "there is no such file")
    assert source.rejected[1][0] == "000001.png"
    assert len(source.records) == 4


@pytest.mark.parametrize(
    "place", ["annotations", ".", "images", "minival", "images/minival"], ids=str
)
def test_pictures_are_found_around_the_file(tmp_path, place):
    draw_all(tmp_path / place, "png")
    root = write_coco(tmp_path, at="minival")
    for source in (
        open_source("coco", root),
        open_source("coco", root, split="minival"),
        open_source("coco", root / "annotations" / "instances_minival.json"),
    ):
        assert source.root == tmp_path / place
        assert len(source.records) == 6


def test_paths_of_coco_may_have_folders_or_be_absolute(tmp_path):
    draw_all(tmp_path / "val2014", "png")
    told = coco_told()
    for each in told["images"]:
        each["file_name"] = f"val2014/{each['file_name']}"
    told["images"][0]["file_name"] = str(tmp_path / "val2014" / "000000.png")
    told["images"][2]["file_name"] = "annotations/../val2014/000002.png"
    source = open_source("coco", write_coco(tmp_path, told))
    assert [record.path for record in source.records][:2] == [
        "val2014/000000.png",
        "val2014/000001.png",
    ]
    assert len(source.records) == 6
    assert source.root == tmp_path


def test_no_instances_get_one_sentence(sets, tmp_path):
    draw_all(tmp_path / "images", "png")
    wrong = {
        "{": "is no JSON, or cut short",
        "[" * 100_000: "is no JSON, or cut short",
        "[]": "has no list of images",
        '{"images": [3]}': "has no list of images",
        '{"images": []}': "has no list of annotations",
        '{"images": [], "annotations": []}': "has no list of categories",
        '{"images": [], "annotations": [], "categories": []}': "is empty",
    }
    for key, word in {
        "caption": "captions",
        "keypoints": "keypoints",
        "segments_info": "panoptic",
    }.items():
        wrong[json.dumps({"images": [], "annotations": [{key: [1]}]})] = f"is of {word}"
    for change, says in (
        (lambda i, a, c: i[1].pop("file_name"), "without file_name"),
        (lambda i, a, c: i[1].update(id=[3]), "without id"),
        (lambda i, a, c: c[1].pop("name"), "without name"),
        (
            lambda i, a, c: i[1].update(id=i[0]["id"]),
            "has the id 500 for 000000.png and 000001.png",
        ),
        (lambda i, a, c: c[1].update(id=c[0]["id"]), "has the id 17 for cat and dog"),
        (lambda i, a, c: [each.update(file_name="x.png") for each in i], "no picture of"),
    ):
        wrong[json.dumps(changed(change))] = says
    for text, says in wrong.items():
        write_coco(tmp_path, text)
        with pytest.raises(UsageError, match=says) as told:
            open_source("coco", tmp_path)
        assert "\n" not in str(told.value)


def test_the_file_of_a_split_is_named(sets, tmp_path):
    with pytest.raises(UsageError, match=r"has no instances_\*.json"):
        open_source("coco", tmp_path)
    write_coco(tmp_path, at="val2017")
    write_coco(tmp_path, at="train2017")
    with pytest.raises(UsageError, match="has train2017, val2017: name one with --split"):
        open_source("coco", tmp_path)
    with pytest.raises(UsageError, match="there are: train2017, val2017"):
        open_source("coco", tmp_path, split="val")
    file = tmp_path / "annotations" / "instances_val2017.json"
    with pytest.raises(UsageError, match="is the file of one; leave --split out"):
        open_source("coco", file, split="val2017")


def test_what_is_odd_in_voc_is_told(tmp_path):
    year = voc_set(tmp_path) / "VOC2007"
    xml = [year / "Annotations" / f"{i:06}.xml" for i in range(6)]
    xml[0].write_text("<annotation><object>")
    xml[1].unlink()
    (year / "JPEGImages" / "000001.png").rename(year / "JPEGImages" / "000001.jpg")
    (year / "JPEGImages" / "000002.png").unlink()
    xml[3].write_text(voc_xml(*PICTURES[3], difficult=1, name="000003.png"))
    odd = voc_xml(
        120, 77, [(2.5, 8.25, 119, 40.5, "cat"), (3, 9, "x", 40, "dog"), (1, 1, 5, 5, " ")]
    )
    xml[5].write_text(odd.replace("x.jpg", "000005.png").replace("<height>120</height>", ""))
    (year / "ImageSets" / "Main" / "all.txt").write_text("".join(f"{i:06}\n" for i in range(6)))
    source = open_source("voc", tmp_path, split="all")
    reasons = dict(source.rejected)
    assert reasons.pop("000002.png") == "there is no such file"
    assert "its XML cannot be read" in reasons.pop("000000.jpg")
    assert [record.path for record in source.records] == [
        "000001.jpg",
        "000003.png",
        "000004.png",
        "000005.png",
    ]
    assert [record.label for record in source.records] == [-1, -1, -1, source.classes.index("cat")]
    assert source.boxes[3]["box"].tolist() == [[2.5, 8.25, 119, 40.5]]
    assert source.boxes[1]["ignore"].tolist() == [True]
    assert source.size[3].tolist() == [120, 77]
    for note in (
        "pictures without XML: 1, the first 000001.jpg",
        "objects without a name, left out: 1, the first 000005.png",
        "boxes without an area, left out: 1, the first 000005.png",
        "pictures without a box that counts, their label is -1 (--categories all leaves them out): 3, the first 000001.jpg",
    ):
        assert note in source.notes


def test_a_picture_whose_xml_is_broken_is_rejected(tmp_path):
    year = voc_set(tmp_path) / "VOC2007"
    draw_all(year / "JPEGImages", "jpg")
    for text in ("", "<a>", "<a/>" + "x", '<?xml version="1.0" encoding="klingon"?><a/>'):
        (year / "Annotations" / "000000.xml").write_text(text)
        source = open_source("voc", year)
        assert source.rejected[0][0] == "000000.jpg"
        assert "its XML cannot be read" in source.rejected[0][1]


def test_splits_and_classes_of_voc(sets, tmp_path):
    root = sets["voc"]
    train = open_source("voc", root / "VOC2007", split="train")
    assert [record.path for record in train.records] == ["000005.png", "000001.png"]
    cats = open_source("voc", root, split="cat_train")
    assert [record.path for record in cats.records] == ["000005.png"]
    assert len(train.classes) == 20
    assert train.classes == tuple(sorted(train.classes))
    assert open_source("voc", root).classes == ("cat", "dog", "traffic light")
    with pytest.raises(UsageError, match="there are: train"):
        open_source("voc", root, split="val")
    (tmp_path / "VOC2012" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC2007").symlink_to(root / "VOC2007")
    with pytest.raises(UsageError, match="has VOC2007, VOC2012: give one such folder"):
        open_source("voc", tmp_path)
    with pytest.raises(UsageError, match="has no folder with JPEGImages"):
        open_source("voc", root / "VOC2007" / "Annotations")


# ---- people and cities ----


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lfw")
    for name, count in {"Ann_A": 3, "Bob_B": 2, "Cy": 1}.items():
        (root / "lfw-deepfunneled" / name).mkdir(parents=True)
        for n in range(1, count + 1):
            Image.fromarray(photo(n)).save(root / "lfw-deepfunneled" / name / f"{name}_{n:04}.jpg")
    pairs = "2\t1\nAnn_A\t1\t2\nAnn_A\t2\tCy\t1\nBob_B\t1\t2\nBob_B\t2\tAnn_A\t3\n"
    (root / "pairs_small.txt").write_text(pairs)
    return root


@pytest.mark.parametrize("how", [{}, {"shuffle": 1}, {"limit": 5}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_pairs_go_with_their_rows(people, tmp_path, form, how):
    done = convert_all(tmp_path, form, source="lfw", root=people, **how)
    data = open_data(done.out)
    arrays = read_beside(data, "pairs")
    tag = [data.name(row)[-8:-4] + data.name(row)[0] for row in range(data.rows)]
    named = [(tag[a], tag[b]) for a, b in arrays["pair"]]
    wanted = [("0001A", "0002A"), ("0002A", "0001C"), ("0001B", "0002B"), ("0002B", "0003A")]
    if "limit" in how:  # Cy is the last
        del wanted[1]
        assert arrays["fold"].tolist() == [0, 1, 1]
    assert named == wanted
    assert arrays["same"].tolist() == [a[-1] == b[-1] for a, b in wanted]
    assert data.classes == ("Ann_A", "Bob_B", "Cy")


def test_which_pairs(people, tmp_path):
    faces = people / "lfw-deepfunneled"
    assert open_source("lfw", faces).pairs is not None
    (tmp_path / "lfw").symlink_to(faces)
    assert open_source("lfw", tmp_path).beside(np.arange(6)) == {}
    for name in ("pairsDevTest.txt", "pairsDevTrain.txt"):
        (tmp_path / name).write_text("Ann_A 1 2\nAnn_A 2 Zoe 9\nAnn_A 2 Cy 1\n")
    with pytest.raises(UsageError, match=r"has pairsDevTest.txt, pairsDevTrain.txt: call the one"):
        open_source("lfw", tmp_path)
    (tmp_path / "pairs.txt").write_text("Ann_A 1 2\nAnn_A 2 Zoe 9\nAnn_A 2 Cy 1\n")
    source = open_source("lfw", tmp_path)
    assert "1 pair of pairs.txt without a picture, left out" in source.notes
    (tmp_path / "pairs.txt").write_text("Zoe 1 2\nZoe 2 Cy 1\n")
    with pytest.raises(UsageError, match=r"no pair of .* is among the pictures"):
        open_source("lfw", tmp_path)
    (tmp_path / "pairs.txt").write_text("Zoe\n")
    with pytest.raises(
        UsageError, match=r"pairs.txt has 'Zoe' in line 1: it wants Name 1 4"
    ) as told:
        open_source("lfw", tmp_path)
    assert "--pairs" not in str(told.value)


@pytest.mark.parametrize("form", FORMS)
def test_cities_are_classes(tmp_path, form):
    for n, at in enumerate(
        ("train/ulm/ulm_0", "train/bonn/bonn_0", "train/bonn/bonn_1", "val/ulm/ulm_2")
    ):
        for part, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_color")):
            file = tmp_path / part / f"{at}_{ending}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(n)).save(file)
    Image.fromarray(photo(1)).save(tmp_path / "leftImg8bit" / "train" / "bonn" / "x.png")
    with pytest.raises(UsageError, match="has the splits train, val: name one with --split"):
        open_source("cityscapes", tmp_path)
    for root in (tmp_path, tmp_path / "leftImg8bit"):
        source = open_source("cityscapes", root, split="train")
        assert [each.group() for each in source.left_out] == [".png (no leftImg8bit.png)"]
    done = convert_all(tmp_path, form, source="cityscapes", root=tmp_path, split="train")
    data = open_data(done.out)
    assert [data.name(row) for row in range(3)] == [
        *("bonn/bonn_0_leftImg8bit.png", "bonn/bonn_1_leftImg8bit.png", "ulm/ulm_0_leftImg8bit.png")
    ]
    assert data.classes == ("bonn", "ulm")
    assert data.labels.tolist() == [0, 0, 1]


# ---- the real ones ----


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"there is no {DATA / name}")
    return DATA / name


def test_real_coco(tmp_path):
    root = real("coco_catdog")
    told = json.loads((root / "annotations" / "instances_all.json").read_bytes())
    of = {each["id"]: [] for each in told["images"]}
    for each in told["annotations"]:
        of[each["image_id"]].append(each)
    done = convert_all(tmp_path, "tars", source="coco", root=root, split="all", shuffle=1)
    data, name = open_data(done.out), {e["file_name"]: e for e in told["images"]}
    boxes = read_boxes(data)
    assert data.classes == ("cat", "dog")
    assert data.rows == 291
    assert done.manifest["notes"] == []
    for row in range(data.rows):
        image = name[data.name(row)]
        found = boxes.box[boxes.first[row] : boxes.first[row + 1]]
        wanted = np.array(
            [[y, x, y + h, x + w] for x, y, w, h in (e["bbox"] for e in of[image["id"]])]
        )
        assert np.allclose(found, wanted.reshape(-1, 4), atol=0.01)
        assert (data.sizes(np.array([row]))[0] == boxes.size[row]).all()
    assert len(boxes.box) == 314


def test_real_voc(tmp_path):
    root = real("voc")
    done = convert_all(
        tmp_path, "pack", source="voc", root=root / "VOCdevkit", split="trainval", limit=30
    )
    data = open_data(done.out)
    row = next(row for row in range(30) if data.labels[row] >= 0)
    assert len(data.classes) == 20
    assert read_boxes(data).squashed(row, SIDE).shape[1] == 4
    source = open_source("voc", root / "VOCdevkit")
    assert len(source.records) == 162
    at = [record.path for record in source.records].index("000005.jpg")
    assert source.boxes[at]["box"][0].tolist() == [210, 262, 339, 324]
    assert source.boxes[at]["ignore"].tolist() == [False, False, True, False, True]
    assert source.classes[source.records[at].label] == "chair"


def test_real_people_and_cities(tmp_path):
    done = convert_all(tmp_path, "beton", source="lfw", root=real("lfw"))
    arrays = read_beside(open_data(done.out), "pairs")
    assert (len(arrays["pair"]), arrays["same"].sum()) == (400, 200)
    counts = {
        split: len(open_source("cityscapes", real("cityscapes-like"), split=split).records)
        for split in ("train", "val", "test")
    }
    assert counts == {"train": 48, "val": 16, "test": 10}
