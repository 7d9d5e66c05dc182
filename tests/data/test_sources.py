"""What is a picture, in which order, under which key; and how it is decoded."""

import io
import os
import pickle
import struct
import warnings

import numpy as np
import pytest
from PIL import Image
from truth import DATA, photo

from fastrot.config import UsageError
from fastrot.data import pictures
from fastrot.data.files import HEAD, BadPicture, sniff, some
from fastrot.data.keys import held_out, order_fingerprint, path_key, path_keys
from fastrot.data.sources.cifar10 import CIFAR_SPLITS
from fastrot.data.sources.open import open_source
from fastrot.data.sources.records import Source

JPEG = io.BytesIO()
Image.fromarray(photo(0, 24, 32)).save(JPEG, "JPEG", quality=90)
JPEG = JPEG.getvalue()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tree(root, files: dict[str, bytes]):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def accounted(source: Source) -> bool:
    return len(source.records) + len(source.rejected) + len(source.left_out) == source.seen


# ---- image folders ----


def torchvision_lists(root) -> list[tuple[str, int]]:
    from torchvision.datasets import ImageFolder

    listed = ImageFolder(str(root), allow_empty=True).samples
    return [(os.path.relpath(path, root), label) for path, label in listed]


PLAIN = [
    "b/2.jpg",
    "b/10.jpg",
    "a/x.jpeg",
    "a/deep/er/1.JPG",
    "a/deep-er/1.jpg",
    "a-b/0.jpg",
    "c/é.jpg",
]


@pytest.mark.parametrize("by_name", [False, True], ids=["by-bytes", "by-name"])
def test_index_and_label_are_torchvisions(tmp_path, by_name):
    tree(tmp_path, dict.fromkeys(PLAIN, JPEG))
    source = open_source("imagefolder", tmp_path, by_name=by_name)
    assert [(r.path, r.label) for r in source.records] == torchvision_lists(tmp_path)
    assert source.numbers is None
    assert source.classes == ("a", "a-b", "b", "c")
    assert accounted(source)


def test_numbers_are_torchvisions_where_the_listing_differs(tmp_path):
    odd = {"a/._x.jpg": JPEG, "a/text.jpg": b"hello", "b/0.gif": JPEG, "b/plain": JPEG}
    tree(tmp_path, dict.fromkeys(PLAIN, JPEG) | odd)
    source = open_source("imagefolder", tmp_path)
    theirs = [path for path, _ in torchvision_lists(tmp_path)]
    assert source.numbers is not None
    for record, number in zip(source.records, source.numbers.tolist(), strict=True):
        assert number == (theirs.index(record.path) if record.path in theirs else -1)
    assert {"b/0.gif", "b/plain"} <= {record.path for record in source.records}
    assert accounted(source)


FATES = {  # file -> what becomes of it: by its bytes, by its name
    "a/good.jpg": (JPEG, "picture", "picture"),
    "a/png_named.JPEG": (encoded(Image.new("RGB", (4, 4)), "PNG"), "picture", "picture"),
    "a/no_suffix": (JPEG, "picture", "skip"),
    "a/cut.jpg.tmp": (JPEG[:40], "picture", "skip"),
    "a/text.jpg": (b"no picture at all", "reject", "picture"),
    "a/empty.png": (b"", "reject", "picture"),
    "a/double.jpg": (b"\0\5\26\7" + bytes(60), "skip", "picture"),
    "a/notes.txt": (b"BM, he wrote, is short for P1 ", "skip", "skip"),
    "a/.hidden.jpg": (JPEG, "skip", "skip"),
    "a/._good.jpg": (b"\0\5\26\7" + bytes(60), "skip", "skip"),
    ".hidden/x.jpg": (JPEG, "skip", "skip"),
    "__MACOSX/a/good.jpg": (JPEG, "skip", "skip"),
    "a/__MACOSX/good.jpg": (JPEG, "skip", "skip"),
    "beside.jpg": (JPEG, "skip", "skip"),
}


@pytest.mark.parametrize("by_name", [False, True], ids=["by-bytes", "by-name"])
def test_every_file_has_one_fate(tmp_path, by_name):
    tree(tmp_path, {path: data for path, (data, *_) in FATES.items()})
    source = open_source("imagefolder", tmp_path, by_name=by_name)
    fate = dict.fromkeys(FATES, "skip")
    fate |= {record.path: "picture" for record in source.records}
    fate |= {path: "reject" for path, _ in source.rejected}
    assert fate == {path: wanted[by_name] for path, (_, *wanted) in FATES.items()}
    assert source.seen == len(FATES)
    assert accounted(source)
    assert source.classes == ("a",)


@pytest.mark.parametrize("by_name", [False, True], ids=["by-bytes", "by-name"])
def test_links_are_followed_once_and_broken_ones_named(tmp_path, by_name):
    root = tree(tmp_path / "root", {"b/0.jpg": JPEG, "c/1.jpg": JPEG})
    tree(tmp_path / "elsewhere", {"2.jpg": JPEG})
    (root / "b" / "link.jpg").symlink_to("0.jpg")
    (root / "b" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "b" / "gone.txt").symlink_to("nowhere.txt")
    (root / "b" / "self.jpg").symlink_to("self.jpg")
    (root / "c" / "parent").symlink_to("..")
    (root / "a_link").symlink_to("c")  # sorts before the real folder, and must not take its place
    (root / "d").symlink_to(tmp_path / "elsewhere")
    tree(root, {".store/e/3.jpg": JPEG})
    (root / "e").symlink_to(".store/e")
    os.mkfifo(root / "c" / "pipe.jpg")
    source = open_source("imagefolder", root, by_name=by_name)
    paths = ["b/0.jpg", "b/link.jpg", "c/1.jpg", "d/2.jpg", "e/3.jpg"]
    assert [record.path for record in source.records] == paths
    assert sorted(path for path, _ in source.rejected) == ["b/gone.jpg", "b/self.jpg"]
    assert source.classes == ("b", "c", "d", "e")
    assert source.numbers is not None  # torchvision would list c twice: nothing is claimed
    assert (source.numbers == -1).all()
    assert accounted(source)


@pytest.mark.parametrize(
    ("files", "label_from", "paths"),
    [
        (["2.jpg", "10.jpg"], "folder", ["10.jpg", "2.jpg"]),
        (["2.jpg", "a/1.jpg"], "none", ["2.jpg", "a/1.jpg"]),
        (["2.jpg", "sub/notes.txt"], "folder", ["2.jpg"]),
    ],
    ids=["flat", "labels-not-wanted", "flat-with-papers"],
)
def test_flat_folders_have_no_labels(tmp_path, files, label_from, paths):
    tree(tmp_path, {path: JPEG if path.endswith("jpg") else b"text" for path in files})
    source = open_source("imagefolder", tmp_path, label_from=label_from)
    assert [record.path for record in source.records] == paths
    assert {record.label for record in source.records} == {-1}
    assert source.classes == ()
    assert accounted(source)


# ---- roots as people have them ----

NO_CLASS = "1 folder without pictures makes no class: {}".format
BESIDE = (
    "{} beside the class folders, without a label: --label-from none takes all pictures, as do methods that "
    "need no labels"
).format
SYNOLOGY = ["@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"]
SYSTEMS = {
    *(
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "FOUND.000",
    ),
    *(
        "@eaDir",
        "@Recycle",
        ".@__thumb",
        ".Trash-1000",
        ".Spotlight-V100",
        "__MACOSX",
        "__pycache__",
    ),
    *(".ipynb_checkpoints", ".thumbnails", ".git", ".picasaoriginals", "Catalog Previews.lrdata"),
}
TREES = {  # files -> the folder that was gone through, classes, pictures and labels, left out by kind, notes
    "synology": (
        ["cat/1.jpg", "dog/2.jpg", *SYNOLOGY],
        *("", "cat dog", {"cat/1.jpg": 0, "dog/2.jpg": 1}, {"in @eaDir": 2}, []),
    ),
    "systems": (
        ["a/1.jpg", "b/2.jpg", *(f"{name}/x.jpg" for name in SYSTEMS)],
        *("", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}, {f"in {name}": 1 for name in SYSTEMS}, []),
    ),
    "system-files": (
        ["a/1.jpg", "b/2.jpg", "Thumbs.db", "a/desktop.ini", "a/._1.jpg", "a/.DS_Store", "b/.x"],
        *("", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}),
        {
            **{"Thumbs.db": 1, "desktop.ini": 1, ".DS_Store": 1, ".jpg (hidden)": 1},
            "without a suffix (hidden)": 1,
        },
        [],
    ),
    "papers": (
        ["cat/1.jpg", "dog/2.jpg", "annotations/a.json", "$RECYCLE.BIN/$R.jpg"],
        *("", "cat dog", {"cat/1.jpg": 0, "dog/2.jpg": 1}, {".json": 1, "in $RECYCLE.BIN": 1}),
        [NO_CLASS("annotations")],
    ),
    "loose": (
        ["0.jpg", "1.jpg", "x/2.jpg"],
        *("", "x", {"x/2.jpg": 0}, {".jpg (beside the class folders)": 2}),
        [BESIDE("2 pictures lie")],
    ),
    "suffixes": (
        [
            "a/1.JPG",
            "a/b.c.jpg",
            "b/2.jpeg",
            "b/README",
            "b/1.2.840.11361911",
            "b/x.json.gz",
            "X.TXT",
        ],
        *("", "a b", {"a/1.JPG": 0, "a/b.c.jpg": 0, "b/2.jpeg": 1}),
        {"without a suffix": 2, ".gz": 1, ".txt": 1},
        [],
    ),
    "one-folder": (["photos/1.jpg"], "", "photos", {"photos/1.jpg": 0}, {}, []),
    "wrapped": (
        ["data/a/1.jpg", "data/b/2.jpg", "README.md", "__MACOSX/data/a/._1.jpg", "docs/x.txt"],
        *("data", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}, {".md": 1, "in __MACOSX": 1, ".txt": 1}),
        ["went through data/"],
    ),
    "wrapped-deep": (
        ["I/Data/CLS/a/1.jpg", "I/Data/CLS/b/2.jpg", "I/Annotations/a.xml"],
        *("I/Data/CLS", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}, {".xml": 1}),
        ["went through I/Data/CLS/"],
    ),
    "wrapped-flat": (
        ["data/1.jpg", "data/x/2.jpg"],
        *("data", "x", {"x/2.jpg": 0}, {".jpg (beside the class folders)": 1}),
        ["went through data/", BESIDE("1 picture lies")],
    ),
    "train-alone": (
        ["train/a/1.jpg", "train/b/2.jpg"],
        *("train", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}, {}, ["went through train/"]),
    ),
    "a-run": (
        ["1.jpg", "runs/x/config.yaml", "runs/x/environment.json", "runs/x/plots/loss.png"],
        *("", "", {"1.jpg": -1}, {"in a run of fastrot": 3}, []),
    ),
    "a-run-in-the-root": (
        ["1.jpg", "config.yaml", "environment.json", "plots/loss.png"],
        *("", "", {"1.jpg": -1}, {".yaml": 1, ".json": 1, "in a run of fastrot": 1}, []),
    ),
    "a-run-beside-classes": (
        ["a/1.jpg", "b/2.jpg", "runs/x/config.yaml", "runs/x/environment.json", "runs/x/p/l.png"],
        *("", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}, {"in a run of fastrot": 3}, []),
    ),
    "sheets": (
        ["data/a/1.jpg", "data/b/2.jpg", "data-look.png", "c.beton", "c-look.png"],
        *("data", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}),
        {".png (a sheet of fastrot look)": 2, ".beton": 1},
        ["went through data/"],
    ),
    "icons": (
        [
            "a/1.jpg",
            "b/2.jpg",
            "favicon.ico",
            "docs/logo.svg",
            "docs/a.eps",
            "docs/b.icns",
            "env.hdr",
        ],
        *("", "a b", {"a/1.jpg": 0, "b/2.jpg": 1}),
        {".ico": 1, ".hdr": 1, ".eps": 1, ".icns": 1, ".svg": 1},
        ["1 folder without pictures makes no class: docs"],
    ),
    "no-sheet": (["new.png", "new-look.png"], "", "", {"new-look.png": -1, "new.png": -1}, {}, []),
}


def content(path: str) -> bytes:
    return JPEG if path.lower().endswith((".jpg", ".jpeg", ".png")) else b"text"


def as_expected(source: Source, root, name: str) -> None:
    _, inside, classes, records, groups, notes = TREES[name]
    assert source.root == root / inside
    assert source.classes == tuple(classes.split())
    assert {record.path: record.label for record in source.records} == records
    told = source.account(np.array([record.label for record in source.records], np.int64))
    assert told["left_out"] == groups
    beside = (count for group, count in groups.items() if "beside the class" in group)
    assert told["mendable"] == sum(beside)
    assert told["notes"] == notes
    assert (
        source.numbers is None or not inside
    )  # torchvision's, of the folder that was gone through
    assert told["class_counts"] == [
        [*records.values()].count(i) for i in range(len(source.classes))
    ]
    assert not source.rejected
    assert accounted(source)


@pytest.mark.parametrize("by_name", [False, True], ids=["by-bytes", "by-name"])
@pytest.mark.parametrize("name", TREES)
def test_roots_as_people_have_them(tmp_path, name, by_name):
    files = TREES[name][0]
    source = open_source(
        "imagefolder", tree(tmp_path, {f: content(f) for f in files}), by_name=by_name
    )
    as_expected(source, tmp_path, name)
    assert source.seen == len(files)
    assert all(source.read(i) == JPEG for i in range(len(source.records)))


SPLIT_ROOTS = {
    "plain": (
        ["train/a/1.jpg", "val/a/2.jpg", "README.md", "notes/x.txt"],
        "",
        "train, val",
        "train",
    ),
    "flat": (["Train/1.jpg", "Test/2.jpg"], "", "Test, Train", "Train"),
    "words": (["train2017/1.jpg", "val2017/1.jpg"], "", "train2017, val2017", "train2017"),
    "and-another": (
        ["train/a/1.jpg", "Val/a/2.jpg", "samples/3.jpg", "test_tube/4.jpg"],
        "",
        "Val, train",
        "train",
    ),
    "wrapped": (["d/e/train/a/1.jpg", "d/e/val/a/2.jpg"], "/d/e", "train, val", "d/e/train"),
}


@pytest.mark.parametrize("name", SPLIT_ROOTS)
def test_a_root_of_splits_is_refused(tmp_path, name):
    files, inside, splits, way = SPLIT_ROOTS[name]
    tree(tmp_path, {file: content(file) for file in files})
    said = f"{tmp_path}{inside} has the splits {splits}: name one with --split {way} .in a run: --data {tmp_path}/{way}"
    for run in ({}, {"by_name": True, "loose": True}):
        with pytest.raises(UsageError, match=said):
            open_source("imagefolder", tmp_path, **run)
    whole = open_source("imagefolder", tmp_path, label_from="none")  # no name becomes a label
    assert {record.label for record in whole.records} == {-1}
    assert len(whole.records) == sum(file.endswith(".jpg") for file in files)
    first = open_source("imagefolder", tmp_path, split=way)
    assert [record.path.rpartition("/")[2] for record in first.records] == ["1.jpg"]
    if inside:  # the folder that wraps it need not be named
        assert open_source("imagefolder", tmp_path, split="train").records == first.records


WRAPPED = ["cat/c.jpg", "dog/x.jpg", "dog/sub/y.jpg", "dog bed/z.jpg", "dog/sub-b/v.jpg"]


@pytest.mark.parametrize("label_from", ["folder", "none"])
@pytest.mark.parametrize("wrapping", ["w", "w/v"])
def test_a_wrapping_folder_changes_no_order(tmp_path, wrapping, label_from):
    root = tree(tmp_path / wrapping / "data", dict.fromkeys(WRAPPED, JPEG))
    (root / "cat" / "c.jpg").write_bytes(b"text")
    for known in (open_source("imagefolder", at, label_from=label_from) for at in (root, tmp_path)):
        listed = torchvision_lists(root)
        numbers = [i for i, (path, _) in enumerate(listed) if path != "cat/c.jpg"]
        assert [record.path for record in known.records] == [listed[i][0] for i in numbers]
        labels = [listed[i][1] if label_from == "folder" else -1 for i in numbers]
        assert [record.label for record in known.records] == labels
        assert numbers_of(known) == numbers


def test_of_many_names_the_first_are_told():
    assert some(["a", "b", "c"], 3) == "a, b, c"
    assert some(["a", "b", "c"], 2) == "a, b, and 1 more"


def test_classes_that_are_called_like_a_split_among_others_are_classes(tmp_path):
    tree(tmp_path, dict.fromkeys(["test_tube/1.jpg", "train/2.jpg", "bus/3.jpg"], JPEG))
    assert open_source("imagefolder", tmp_path).classes == ("bus", "test_tube", "train")


def test_a_class_of_which_no_picture_can_be_read_keeps_its_place(tmp_path):
    tree(tmp_path, {"a/1.jpg": JPEG, "b/2.jpg": b"text", "c/3.jpg": JPEG, "d/4.txt": b"text"})
    (tmp_path / "e").mkdir()
    source = open_source("imagefolder", tmp_path)
    assert source.classes == ("a", "b", "c")
    assert [record.label for record in source.records] == [0, 2]
    assert source.notes == ["2 folders without pictures make no class: d, e"]


@pytest.mark.parametrize("loose", [False, True])
def test_loose_pictures_are_taken_where_no_label_is_needed(tmp_path, loose):
    tree(tmp_path, dict.fromkeys(["0.jpg", "x/1.jpg", "y/2.jpg"], JPEG))
    source = open_source("imagefolder", tmp_path, by_name=True, loose=loose)
    taken = [(record.path, record.label) for record in source.records]
    assert taken == [("0.jpg", -1)] * loose + [("x/1.jpg", 0), ("y/2.jpg", 1)]
    assert [each.mendable for each in source.left_out] == [True] * (not loose)
    assert numbers_of(source) == [-1] * loose + [0, 1]  # torchvision does not list it
    assert accounted(source)


def numbers_of(source: Source) -> list[int]:
    return [*range(len(source.records))] if source.numbers is None else source.numbers.tolist()


def test_a_source_goes_to_workers_and_reads_odd_names(tmp_path):
    names = ["new\nline.jpg", "back\\slash.jpg", os.fsdecode(b"not_utf8_\xff\xfe.jpg"), "日本.jpg"]
    tree(tmp_path, {f"a/{name}": JPEG for name in names})
    source = pickle.loads(pickle.dumps(open_source("imagefolder", tmp_path)))
    assert {record.path for record in source.records} == {f"a/{name}" for name in names}
    assert all(source.read(i) == JPEG for i in range(4))
    assert len(set(path_keys(r.path for r in source.records).tolist())) == 4


# ---- CIFAR-10 ----


def cifar(root, **changes):
    """Five batches and a test batch of four pictures each, as Python 3 and numpy write them."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    for i, name in enumerate([*CIFAR_SPLITS["train"], "test_batch"]):
        batch = {b"labels": [i, 1, 2, 3], b"data": pixels[i], **changes}
        tree(root, {f"cifar-10-batches-py/{name}": pickle.dumps(batch, 2)})
    return pixels


def test_cifar10_is_read_in_its_own_order(tmp_path):
    pixels = cifar(tmp_path)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        source = open_source("cifar10", root)
        assert [r.label for r in source.records[::4]] == [0, 1, 2, 3, 4]
        assert source.records[5].path == "data_batch_2/00001"
        far = pickle.loads(pickle.dumps(source.part(5, 7)))
        for picture in (source.read(5), far.read(0)):
            assert (picture == pixels[1, 1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert open_source("cifar10", tmp_path, split="test").records[0].label == 5


class Evil:
    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


@pytest.mark.parametrize(
    "changes",
    [
        {b"labels": Evil()},
        {b"data": np.array([Evil()], object)},
        {b"labels": np.dtype("u1")},
        {b"labels": [1]},
        {b"labels": [10] * 4},
        {b"labels": [True] * 4},
        {b"data": np.zeros((4, 3000), np.uint8)},
        {b"data": np.zeros((4, 3072), np.float32)},
        {b"data": []},
    ],
    ids=["evil", "evil-array", "type", "few", "range", "bool", "narrow", "float", "list"],
)
def test_a_strange_cifar_batch_is_refused_and_runs_nothing(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, **{})
    good = pickle.loads((tmp_path / "cifar-10-batches-py/data_batch_3").read_bytes())
    bad = tree(tmp_path, {"cifar-10-batches-py/data_batch_3": pickle.dumps(good | changes, 2)})
    with pytest.raises(UsageError, match="data_batch_3 is no CIFAR-10 batch"):
        open_source("cifar10", bad)
    assert not (tmp_path / "EXECUTED").exists()


# ---- wrong use ----


def test_wrong_use_gets_one_sentence(tmp_path):
    tree(tmp_path, {"train/a/0.jpg": JPEG, "val/a/0.jpg": JPEG, "list.txt": b"train/a/0.jpg"})
    tree(tmp_path, {"papers/a.txt": b"text", "cut/a/0.jpg": b"", "system/@eaDir/x.jpg": JPEG})
    (tmp_path / "empty").mkdir()
    cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    for kind, path, options, said in [
        ("imagefolder", "gone", {}, "gone does not exist"),
        ("imagefolder", "empty", {}, "empty is empty"),
        ("imagefolder", "papers", {}, r"1 file and no picture among them \(1 \.txt\)"),
        ("imagefolder", "cut", {}, "a/0.jpg: it is empty"),
        ("imagefolder", "list.txt", {}, "is a file"),
        ("imagefolder", "system", {}, r"no picture among them \(1 in @eaDir\)"),
        ("imagefolder", "", {"split": "test"}, "there are: .*train, val"),
        ("list", "train", {}, "is a folder"),
        ("list", "list.txt", {"split": "val"}, "no splits"),
        ("cifar10", "", {"split": "val"}, "train, test"),
        ("cifar10", "", {}, "has no data_batch_4"),
    ]:
        with pytest.raises(UsageError, match=said) as told:
            open_source(kind, tmp_path / path, **options)
        assert "\n" not in str(told.value)
    assert len(open_source("imagefolder", tmp_path, split="val").records) == 1


# ---- keys ----


def test_keys_are_what_they_were():
    # stored beside prepared files: another value would lose hold-outs and fingerprints
    assert path_key("n01440764/n01440764_10026.JPEG") == KEY
    keys = path_keys(["a", "b"])
    assert order_fingerprint(keys, np.array([0, 1])) == FINGERPRINT
    assert order_fingerprint(keys[::-1], np.array([0, 1])) != FINGERPRINT


KEY = 3201564428367291821
FINGERPRINT = "44442093cbeadbca9ed474713ac939d1"


@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("rows", [2, 10, 5000])
def test_the_hold_out_is_never_none_and_never_all(rows, share):
    for keys in (path_keys(map(str, range(rows))), np.arange(rows, dtype=np.uint64)):
        aside = held_out(keys, share)
        assert 0 < aside.sum() < rows
        if rows == 5000:
            assert abs(aside.mean() - share) < 0.02


def test_the_hold_out_knows_pictures_by_their_key():
    keys = path_keys(map(str, range(2000)))
    aside = held_out(keys, 0.1)
    assert (held_out(keys[::-1], 0.1) == aside[::-1]).all()
    assert (held_out(keys[:1000], 0.1) == aside[:1000]).all()
    assert not held_out(keys, 0.0).any()
    assert not held_out(keys[:1], 0.5).any()


# ---- pixels ----

SMOOTH = Image.fromarray(photo(3, 24, 32))
KINDS = {
    "jpeg": encoded(SMOOTH, "JPEG", quality=95),
    "png": encoded(SMOOTH, "PNG"),
    "gif": encoded(SMOOTH.quantize(256), "GIF"),
    "webp": encoded(SMOOTH, "WEBP", lossless=True),
    "bmp": encoded(SMOOTH, "BMP"),
    "tiff": encoded(SMOOTH, "TIFF"),
    "ppm": encoded(SMOOTH, "PPM"),
}
MODES = {
    "cmyk": encoded(SMOOTH.convert("CMYK"), "JPEG", quality=95),
    "grey": encoded(SMOOTH.convert("L"), "PNG"),
    "palette": encoded(SMOOTH.quantize(256), "PNG", transparency=3),
    "alpha": encoded(Image.merge("RGBA", (*SMOOTH.split(), SMOOTH.convert("L"))), "PNG"),
    "grey-alpha": encoded(Image.merge("LA", (SMOOTH.convert("L"),) * 2), "PNG"),
    "grey-16": encoded(Image.fromarray(np.array(SMOOTH.convert("L"), np.uint16) * 257), "PNG"),
    "grey-16-tiff": encoded(
        Image.fromarray(np.array(SMOOTH.convert("L"), np.uint16) * 257), "TIFF"
    ),
    "bilevel": encoded(SMOOTH.convert("1"), "PNG"),
    "animated": encoded(SMOOTH, "PNG", save_all=True, append_images=[SMOOTH.rotate(180)]),
}


@pytest.mark.parametrize("kind", [*KINDS, *MODES])
def test_every_kind_becomes_rgb(kind):
    data = KINDS[kind] if kind in KINDS else MODES[kind]
    picture = pictures.decode(data)
    truth = np.asarray(SMOOTH, np.int16)
    if "grey" in kind or kind == "bilevel":
        truth = np.repeat(np.asarray(SMOOTH.convert("L"), np.int16)[..., None], 3, axis=2)
    assert pictures.size_of(data) == picture.shape[:2] == (24, 32)
    if kind != "bilevel":
        assert np.abs(picture - truth).mean() < 6
    if kind in KINDS:
        assert sniff(data[:HEAD]) == kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_applied_to_pixels_and_size(kind, orientation):
    upright = np.asarray(SMOOTH)
    stored = {  # what a camera that is held so writes down
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(
        kind, {}
    )
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **lossless)
    picture = pictures.decode(data)
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    assert pictures.size_of(data) == (24, 32)


def claims(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"text", "first bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "first bytes"),
        (JPEG[: len(JPEG) * 3 // 4], "cut short"),
        (KINDS["png"][: len(KINDS["png"]) // 2], "cut short"),
        (KINDS["png"][:8], "header is damaged"),
        (claims(65500, 65500), "178 megapixels"),
        (claims(0, 10), "header is damaged"),
        (encoded(Image.fromarray(np.full((4, 4), 2, np.float32)), "TIFF"), "floating-point"),
    ],
    ids=[
        "empty",
        "text",
        "postscript",
        "cut-jpeg",
        "cut-png",
        "signature",
        "bomb",
        "no-width",
        "floats",
    ],
)
def test_a_bad_picture_has_one_reason(data, reason):
    with pytest.raises(BadPicture, match=reason) as told:
        pictures.decode(data)
    assert "\n" not in str(told.value)


def test_damaged_exif_does_not_cost_a_good_picture():
    block = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + b"\x12\x01\3"
    data = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pictures.decode(data).shape == (24, 32, 3)
        assert pictures.size_of(data) == (24, 32)


@pytest.mark.parametrize("shape", [(24, 33), (33, 24), (333, 500), (7, 400), (20, 20)])
@pytest.mark.parametrize(("short", "long"), [(16, None), (None, 25), (16, 20), (300, 350), (1, 1)])
def test_sides_shrink_as_torchvisions_resize_rounds_them(shape, short, long):
    from torchvision.transforms.functional import _compute_resized_output_size

    picture = np.zeros((*shape, 3), np.uint8)
    small = pictures.shrink(picture, short, long)
    first = min(shape) if short is None else min(short, min(shape))
    expected = _compute_resized_output_size(shape, [first])
    if long is not None and max(expected) > long:
        ratio = min(expected), max(expected)
        sides = max(1, int(long * ratio[0] / ratio[1])), long
        expected = sides if shape[0] <= shape[1] else sides[::-1]
    assert small.shape[:2] == tuple(expected)
    assert (small is picture) == (tuple(expected) == shape)


def test_real_pictures_keep_their_places():
    sample = DATA / "imagenet-sample"
    if not sample.is_dir():
        pytest.skip("no real pictures here")
    source = open_source("imagefolder", sample)
    mine = [(record.path, record.label) for record in source.records]
    assert mine == torchvision_lists(sample)
    assert source.numbers is None
    for i in range(0, len(mine), 25):
        data = source.read(i)
        assert pictures.decode(data).shape[:2] == pictures.size_of(data)
