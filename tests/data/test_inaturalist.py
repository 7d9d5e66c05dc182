"""iNaturalist's JSON files: a label a picture, whatever is odd is told."""

import json

import pytest
from PIL import Image
from truth import photo

from fastrot.config import UsageError
from fastrot.data.sources.open import open_source

NAMES = {11: "Abies alba", 3: "Bufo bufo", 7: "Abies alba"}


def told(**other):
    """Three categories, of which two share a name; pictures 0 ... 4 of categories 3, 11, 7, 3, 11."""
    kinds = [3, 11, 7, 3, 11]
    found = {
        "info": {"year": 2018},
        "images": [
            {"id": n, "file_name": f"train_val2018/x/{n}.jpg", "width": 60, "height": 40}
            for n in range(5)
        ],
        "categories": [{"id": k, "name": v, "supercategory": "x"} for k, v in NAMES.items()],
        "annotations": [
            {"id": 9 + n, "image_id": n, "category_id": k} for n, k in enumerate(kinds)
        ],
    }
    return {k: v for k, v in {**found, **other}.items() if v is not None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train_val2018" / "x").mkdir(parents=True)
    for n in range(5):
        Image.fromarray(photo(n, 40, 60)).save(tmp_path / "train_val2018" / "x" / f"{n}.jpg")
    return tmp_path


def opened(folder, what, split="train2018", **how):
    (folder / "train2018.json").write_text(json.dumps(what))
    return open_source("inaturalist", folder, split=split, **how)


def test_classes_are_categories_by_id_and_names_are_made_unique(folder):
    source = opened(folder, told())
    assert source.classes == ("Bufo bufo", "Abies alba (7)", "Abies alba (11)")
    assert [(each.path[-5:], each.label) for each in source.records] == [
        ("0.jpg", 0), ("1.jpg", 2), ("2.jpg", 1), ("3.jpg", 0), ("4.jpg", 2)
    ]  # fmt: skip
    assert source.notes == []
    assert source.read(2)[:2] == b"\xff\xd8"
    file = open_source("inaturalist", folder / "train2018.json")
    assert [each.label for each in file.records] == [0, 2, 1, 0, 2]


def test_ids_may_be_numbers_of_any_kind(folder):
    what = told()
    for each in what["annotations"]:
        each["image_id"] = float(each["image_id"])
    assert [each.label for each in opened(folder, what).records] == [0, 2, 1, 0, 2]


def test_ids_and_fields_of_other_editions(folder):
    """2021 tells more of each, in its own folder; ids that are words are in the order of words."""
    what = told()
    for each in what["images"]:
        each.update(id=f"p{each['id']}", license=0, rights_holder="x", latitude=None)
    for each in what["annotations"]:
        each.update(image_id=f"p{each['image_id']}", category_id=f"k{each['category_id']}")
    for each in what["categories"]:
        each.update(id=f"k{each['id']}", kingdom="Plantae", image_dir_name=f"{each['id']}_x")
    source = opened(folder, what)
    assert source.classes == ("Abies alba (k11)", "Bufo bufo", "Abies alba (k7)")
    assert [each.label for each in source.records] == [1, 0, 2, 1, 0]


def test_pictures_are_found_around_the_file(folder):
    (folder / "annotations").mkdir()
    (folder / "annotations" / "val2018.json").write_text(json.dumps(told()))
    source = open_source("inaturalist", folder, split="val2018")
    assert (source.root, len(source.records), source.rejected) == (folder, 5, [])
    for each in sorted((folder / "train_val2018" / "x").iterdir()):
        each.unlink()
    with pytest.raises(UsageError, match=r"no picture of .*val2018.json is in .*: move the"):
        open_source("inaturalist", folder, split="val2018")


def test_pictures_that_come_again(folder):
    what = told()
    first = what["images"][0]
    what["images"] += [{**first, "width": 9}, {**first, "id": "again"}]
    what["annotations"] += [{"id": 9, "image_id": "again", "category_id": 7}]
    source = opened(folder, what)
    assert [each.label for each in source.records] == [0, 2, 1, 0, 2, 1]
    path = first["file_name"]
    assert source.notes == [
        f"pictures listed again, ignored: 1, the first {path}",
        f"pictures with several ids, taken for each: 1, the first {path}",
        "annotations with the id of another, taken too: 1, the first id 9",
    ]
    what["images"][1]["id"] = 0
    with pytest.raises(UsageError, match=r"has the id 0 for .*0\.jpg and .*1\.jpg: give each"):
        opened(folder, what)


def test_test_pictures_have_no_label(folder):
    source = opened(folder, told(annotations=None, categories=None))
    assert [each.label for each in source.records] == [-1] * 5
    assert source.classes == ()
    (note,) = source.notes
    assert note == "train2018.json has no annotations, as those of test pictures: labels are -1"
    source = opened(folder, told(), label_from="none")
    assert (source.classes, {each.label for each in source.records}) == ((), {-1})
    assert source.notes == []


def test_what_is_odd_is_counted_and_named(folder):
    what = told()
    what["annotations"] += [
        {"id": 90, "image_id": 77, "category_id": 3},
        {"id": 91, "image_id": 1, "category_id": 3},
        {"id": 92, "image_id": 1, "category_id": 5},
    ]
    what["annotations"] = what["annotations"][1:]
    (folder / "train_val2018" / "x" / "4.jpg").unlink()
    (folder / "train_val2018" / "x" / "3.jpg").write_text("no picture")
    source = opened(folder, what)
    assert [each.label for each in source.records] == [-1, 2, 1]
    assert [reason for _, reason in source.rejected][1] == "there is no such file"
    assert source.seen == 5
    assert source.notes == [
        "annotations of no picture, left out: 1, the first id 90",
        "annotations of another category than the picture's first, left out: 1, the first id 91",
        "annotations of no category, left out: 1, the first id 92",
        "pictures without a category, their label is -1: 1, the first train_val2018/x/0.jpg",
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "has no list of images"),
        ("", "is no JSON, or cut short"),
        ('{"images": [{"id": 1', "is no JSON, or cut short"),
        ('{"images": [{"id": 1}]}', "without file_name"),
        ('{"images": [{"file_name": "a.jpg"}]}', "without id"),
        ('{"images": {}}', "has no list of images"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder, text, match):
    (folder / "train2018.json").write_text(text)
    with pytest.raises(UsageError, match=f"{match}.*train2018"):
        open_source("inaturalist", folder, split="train2018")


def test_a_split_that_is_not_there_is_named_with_those_that_are(folder):
    (folder / "val2018.json").write_text("{}")
    with pytest.raises(UsageError, match="there are: train2018, val2018"):
        opened(folder, told(), split="test")
    with pytest.raises(UsageError, match="name one with --split"):
        opened(folder, told(), split=None)
