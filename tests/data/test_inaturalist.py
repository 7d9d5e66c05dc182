"""iNaturalist's JSON files, and Places205's lists: linear probes' data sets as they are handed out."""

import json

import numpy as np
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


def test_test_pictures_have_no_label(folder):
    source = opened(folder, told(annotations=None, categories=None))
    assert [each.label for each in source.records] == [-1] * 5
    assert source.classes == ()
    source = opened(folder, told(), label_from="none")
    assert (source.classes, {each.label for each in source.records}) == ((), {-1})


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


def test_places205_lists_are_read(tmp_path):
    """trainvalsplit_places205/train_places205.csv: a path and a number by a space, from the folder of the pictures."""
    for n, kind in enumerate(("a/abbey", "a/airport_terminal", "y/yard")):
        (tmp_path / kind).mkdir(parents=True)
        Image.fromarray(photo(n, 40, 60)).save(tmp_path / kind / f"gsun_{n}.jpg")
    lines = ["a/abbey/gsun_0.jpg 0", "a/airport_terminal/gsun_1.jpg 1", "y/yard/gsun_2.jpg 204"]
    (tmp_path / "train_places205.csv").write_text("\n".join(lines) + "\n")
    source = open_source("list", tmp_path / "train_places205.csv")
    assert [each.label for each in source.records] == [0, 1, 204]
    assert len(source.classes) == 205
    assert np.all(
        [each.path == line.split()[0] for each, line in zip(source.records, lines, strict=True)]
    )
