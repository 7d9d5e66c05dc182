"""Parquet folders as Hugging Face's datasets writes them."""

import builtins
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from test_archives import CLASSES, convert, picture
from test_sources import JPEG, accounted, tree
from test_write import main

from fastrot.config import RunError, UsageError
from fastrot.data.beton import write
from fastrot.data.files import BadPicture
from fastrot.data.prepare.convert import convert as convert_pictures
from fastrot.data.prepare.encode import Chunk, EncodeSpec, encode_chunk
from fastrot.data.sources import parquet
from fastrot.data.sources.open import open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("tench", "goldfish", "shark")
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": list(NAMES), "_type": "ClassLabel"},
}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def written(
    path: Path, rows: list[tuple], features=FEATURES, group: int = 3, image="image", label="label"
) -> Path:
    """Rows (bytes, label) as datasets writes them, `group` of them in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": data, "path": f"{i}.jpg"} for i, (data, _) in enumerate(rows)]
    arrays = {image: pa.array(pictures, STRUCT), label: pa.array([label for _, label in rows])}
    table = pa.table(arrays)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=group)
    return path


def folder_of(root: Path) -> Path:
    """Two training files and one to validate, in data/, as on the hub; and what lies beside."""
    rows = [(picture(i), i % 3) for i in range(14)]
    written(root / "data" / "train-00000-of-00002.parquet", rows[:7])
    written(root / "data" / "train-00001-of-00002-1a2b3c4d5e6f.parquet", rows[7:])
    written(root / "data" / "validation-00000-of-00001.parquet", [(picture(50), 1)])
    tree(root, {"README.md": b"x", ".git/config": b"x"})
    return root


def test_a_split_of_a_folder_keeps_order_labels_and_names(tmp_path):
    root = folder_of(tmp_path / "set")
    source = open_source("parquet", root, split="train")
    assert [record.label for record in source.records] == [i % 3 for i in range(14)]
    assert [source.read(i) for i in range(14)] == [picture(i) for i in range(14)]
    assert source.records[2].path == "data/train-00000-of-00002/2"
    assert source.records[9].path == "data/train-00001-of-00002-1a2b3c4d5e6f/2"
    assert source.classes == NAMES
    assert (source.seen, len(source.left_out)) == (16, 2)
    assert accounted(source)
    assert len(open_source("parquet", root, split="validation").records) == 1
    none = open_source("parquet", root, split="train", label_from="none")
    assert ({record.label for record in none.records}, none.classes) == ({-1}, ())
    one = open_source("parquet", root / "data" / "train-00000-of-00002.parquet")
    assert one.records[2].path == "train-00000-of-00002/2"


def test_splits_are_named_and_never_mixed(tmp_path):
    root = folder_of(tmp_path / "set")
    with pytest.raises(UsageError, match="has the splits train, validation: name one with --split"):
        open_source("parquet", root)
    with pytest.raises(UsageError, match=r"--split val is none of .*there are: train, validation"):
        open_source("parquet", root, split="val")
    file = root / "data" / "train-00000-of-00002.parquet"
    with pytest.raises(UsageError, match=r"--split train: .*is one file"):
        open_source("parquet", file, split="train")
    written(tmp_path / "hub" / "default" / "train" / "0000.parquet", [(JPEG, 0)])
    written(tmp_path / "hub" / "default" / "test" / "0000.parquet", [(JPEG, -1), (JPEG, None)])
    source = open_source("parquet", tmp_path / "hub", split="test")
    assert [(r.path, r.label) for r in source.records] == [
        ("default/test/0000/0", -1),
        ("default/test/0000/1", -1),
    ]


@pytest.mark.parametrize("group", [1, 5, 1000])
def test_rows_are_read_in_any_order(tmp_path, group):
    rows = [(picture(i), 0) for i in range(40)]
    source = open_source("parquet", written(tmp_path / "a.parquet", rows, group=group))
    draw = random.Random(group)
    for i in [*range(40), *draw.sample(range(40), 40), 39, 0]:
        assert source.read(i) == rows[i][0]


COLUMNS = {
    "binary": (pa.array([JPEG] * 3, pa.binary()), "image", (0, 1, 2), ("0", "1", "2")),
    "large": (pa.array([JPEG] * 3, pa.large_binary()), "img", (0, 1, 2), ("0", "1", "2")),
    "words": (pa.array([JPEG] * 3, pa.binary()), "jpg", ("dog", "cat", None), ("cat", "dog")),
    "none": (pa.array([JPEG] * 3, pa.binary()), "x.y", None, ()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_are_found_without_metadata(tmp_path, kind):
    pictures, name, labels, classes = COLUMNS[kind]
    columns = {"id": pa.array([7, 8, 9]), name: pictures}
    if labels:
        columns["label"] = pa.array(labels)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source("parquet", tmp_path / "a.parquet")
    wanted = {"words": [1, 0, -1], "none": [-1] * 3}.get(kind, [0, 1, 2])
    assert [record.label for record in source.records] == wanted
    assert source.classes == classes
    assert [source.read(i) for i in range(3)] == [JPEG] * 3


def test_metadata_says_which_column_is_which(tmp_path):
    table = {
        "mask": pa.array([b"mask"] * 2, pa.binary()),
        "photo": pa.array([{"bytes": JPEG, "path": None}] * 2, STRUCT),
        "label": pa.array([5, 6]),
        "breed": pa.array([1, 0]),
    }
    features = {
        "photo": {"_type": "Image"},
        "breed": {"names": ["pug", "husky"], "_type": "ClassLabel"},
        "others": [{"_type": "Image"}],
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(table).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source("parquet", tmp_path / "a.parquet")
    assert source.classes == ("pug", "husky")
    assert [record.label for record in source.records] == [1, 0]
    assert source.read(1) == JPEG


def test_rows_without_pictures_are_rejected_when_read(tmp_path):
    rows = [(JPEG, 0), (None, 1), (b"", 1), (b"text", 2), (JPEG, 2)]
    out = tmp_path / "a.beton"
    path = written(tmp_path / "a.parquet", rows)
    given = write.BetonOptions(source="parquet", root=path, out=out, workers=0)
    summary = convert_pictures(given)
    assert (summary.manifest["rows"], summary.manifest["seen"]) == (2, 5)
    reasons = dict(summary.rejects)
    assert reasons["a/1"] == "its row has no bytes"
    assert reasons.keys() == {"a/1", "a/2", "a/3"}


# ---- conversion ----


def test_two_workers_read_by_themselves_and_bytes_are_the_folders(tmp_path):
    files = sorted(CLASSES.items())
    rows = [(data, int(path[2])) for path, data in files]
    root = tmp_path / "set"
    written(root / "train-00000-of-00002.parquet", rows[:5])
    written(root / "train-00001-of-00002.parquet", rows[5:])
    source = open_source("parquet", root)
    chunk = Chunk(3, source.part(3, 9))
    assert len(pickle.dumps(chunk)) < 2500  # places, not pictures
    far = pickle.loads(pickle.dumps(chunk)).source
    assert [far.read(i) for i in range(6)] == [data for _, data in files[3:9]]
    ours = convert("parquet", root, tmp_path / "ours.beton", workers=2)
    folder = tree(tmp_path / "tree", CLASSES)
    assert ours == convert("imagefolder", folder, tmp_path / "theirs.beton")


def test_a_shuffled_source_reads_the_pictures_that_it_names(tmp_path):
    root = folder_of(tmp_path / "set")
    plain = open_source("parquet", root, split="train")
    bytes_of = {record.path: plain.read(i) for i, record in enumerate(plain.records)}
    source = plain.shuffled(3)
    assert source.records != plain.records
    assert [source.read(i) for i in range(14)] == [bytes_of[r.path] for r in source.records]
    part = source.part(5, 9)
    assert [part.read(i) for i in range(4)] == [source.read(i) for i in range(5, 9)]


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_file_that_changes_underway_stops_the_conversion(tmp_path, how):
    path = written(tmp_path / "a.parquet", [(JPEG, 0)] * 4)
    source = open_source("parquet", path)
    if how == "gone":
        path.unlink()
    else:
        written(path, [(JPEG, 0)] * 5)
    with pytest.raises(RunError, match=r"a/0 cannot be read: .*a.parquet"):
        encode_chunk(EncodeSpec(write.Coder()), Chunk(0, source.part(0, 4)))


def test_the_script_takes_it(tmp_path, capsys):
    root, out = folder_of(tmp_path / "set"), tmp_path / "a.beton"
    given = ["--source", "parquet", "--root", root, "--out", out, "--workers", 0]
    assert main(*given) == 2
    assert "name one with --split" in capsys.readouterr().err
    assert main(*given, "--split", "train") == 0
    assert "14 written + 0 rejected + 2 left out = 16 files seen" in capsys.readouterr().out


# ---- what is refused ----


def test_no_cut_makes_a_listing_short_without_a_word(tmp_path):
    path = written(tmp_path / "a.parquet", [(picture(i), i % 3) for i in range(12)])
    data, draw = path.read_bytes(), random.Random(0)
    for cut in {draw.randrange(len(data)) for _ in range(200)}:
        path.write_bytes(data[:cut])
        with pytest.raises(UsageError, match=r"a.parquet is no parquet file, or cut short"):
            open_source("parquet", path)


def test_changed_bytes_are_no_traceback(tmp_path):
    path = written(tmp_path / "a.parquet", [(picture(i), i % 3) for i in range(12)])
    data, draw = path.read_bytes(), random.Random(1)
    refused = bad = 0
    for _ in range(150):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(changed))
        try:
            source = open_source("parquet", path)
        except UsageError:
            refused += 1
            continue
        assert accounted(source)
        for i in range(len(source.records)):
            try:
                source.read(i)
            except BadPicture:
                bad += 1
    assert refused
    assert bad


def wrong(path: Path, kind: str) -> Path:
    table = {"image": pa.array([JPEG], pa.binary()), "label": pa.array([0])}
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        return path
    if kind == "no-pictures":
        table = {"words": pa.array(["x"]), "label": pa.array([0])}
    if kind == "floats":
        table["label"] = pa.array([0.5])
    if kind == "high":
        table["label"] = pa.array([2**40])
    if kind == "low":
        table["label"] = pa.array([-5])
    if kind == "empty":
        table = {name: values[:0] for name, values in table.items()}
    pq.write_table(pa.table(table), path)
    if kind == "names":
        written(path, [(JPEG, 3)])
    if kind == "text":
        path.write_text("hello" * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pointer", "is a Git LFS pointer, not the file: git lfs pull fetches it"),
        ("no-pictures", "has no column of pictures, .*: it has words, label"),
        ("floats", "its column label holds neither whole numbers nor words"),
        ("high", "has the label 1099511627776"),
        ("low", "has the label -5"),
        ("names", "has the label 3, but 3 classes"),
        ("text", "is no parquet file, or cut short"),
        ("empty", "is empty"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, kind, says):
    path = wrong(tmp_path / "a.parquet", kind)
    with pytest.raises(UsageError, match=says) as told:
        open_source("parquet", path)
    assert "\n" not in str(told.value)


def test_files_of_two_data_sets_are_refused(tmp_path):
    written(tmp_path / "a.parquet", [(JPEG, 0)])
    written(tmp_path / "b.parquet", [(JPEG, 0)], features=None)
    with pytest.raises(
        UsageError, match=r"b.parquet has other columns or class names than .*a.parq"
    ):
        open_source("parquet", tmp_path)


def test_without_pyarrow_it_says_how_to_get_it(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", [(JPEG, 0)])
    there = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'fastrot\[parquet\]'"):
        open_source("parquet", path)


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    data = np.random.default_rng(0).bytes(100_000)
    path = written(tmp_path / "a.parquet", [(data, 0)] * 400, group=1000)
    source = open_source("parquet", path)
    before = pa.total_allocated_bytes()
    assert source.read(390) == data
    assert pa.total_allocated_bytes() - before < 12_000_000  # of 40 MB
    parquet._held.__dict__.clear()
