"""Parquet folders as Hugging Face's datasets writes them."""

import builtins
import decimal
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
    assert reasons["a/1"].startswith("its row has no bytes but a path, and 1.jpg is neither beside")
    assert reasons.keys() == {"a/1", "a/2", "a/3"}


# ---- which column ----


def column(path: Path, **columns) -> Path:
    """A table of such columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def listed(path: Path, **how) -> tuple:
    source = open_source("parquet", path, **how)
    assert accounted(source)
    return [record.label for record in source.records], source.classes


TYPES = [
    pa.binary_view(),
    pa.large_binary(),
    pa.binary(len(JPEG)),
    pa.dictionary(pa.int32(), pa.binary()),
    pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_the_column_of_pictures_is_known_by_its_bytes(tmp_path, kind):
    value = {"bytes": JPEG, "path": None} if pa.types.is_struct(kind) else JPEG
    path = column(
        tmp_path / "a.parquet",
        id=pa.array([bytes(16)] * 4, pa.binary()),
        uuid=pa.array([bytes(16)] * 4, pa.binary(16)),
        empty=pa.array([None] * 4, pa.binary()),
        late=pa.array(
            [None, value, b"damaged" if value == JPEG and kind != TYPES[2] else value, value], kind
        ),
    )
    source = open_source("parquet", path)
    assert source.column == "late"
    assert source.notes == [
        "no labels: columns are id, uuid, empty, late (--label-column names theirs)"
    ]
    assert source.read(1) == source.read(3) == JPEG
    with pytest.raises(BadPicture, match="its row has no bytes"):
        source.read(0)


def test_of_several_columns_of_pictures_the_first_is_taken_and_said(tmp_path):
    masks = pa.array([picture(i) for i in range(3)])
    path = column(
        tmp_path / "a.parquet", image=pa.array([JPEG] * 3), mask=masks, no=pa.array([b"x"] * 3)
    )
    source = open_source("parquet", path)
    assert source.read(0) == JPEG
    assert "a.parquet has pictures in the columns image, mask" in source.notes[0]
    chosen = open_source("parquet", path, image_column="mask")
    assert (chosen.read(2), len(chosen.notes)) == (picture(2), 1)
    assert open_source("parquet", path, image_column="no").read(0) == b"x"
    nested = written(tmp_path / "b.parquet", [(JPEG, 0)])
    for name in "image", "image.bytes":
        assert open_source("parquet", nested, image_column=name).read(0) == JPEG
    with pytest.raises(
        UsageError, match=r"--image-column x is none of bytes or paths: it has image, mask"
    ):
        open_source("parquet", path, image_column="x")
    with pytest.raises(UsageError, match=r"a.parquet has no --label-column x: it has image"):
        open_source("parquet", path, label_column="x")


def test_files_without_pictures_are_named_and_left(tmp_path):
    rows = pa.array([JPEG] * 2)
    column(tmp_path / "metadata.parquet", file_name=pa.array(["a.jpg"]), label=pa.array([7]))
    column(tmp_path / "other.parquet", a=pa.array([1]))
    column(tmp_path / "part-0.parquet", image=rows, label=pa.array([0, 1]))
    column(tmp_path / "part-1.parquet", extra=rows, image=rows, label=pa.array([1, 1], pa.int8()))
    column(tmp_path / "part-2.parquet", image=rows)
    column(tmp_path / "part-3.parquet", image=pa.array([], pa.binary()))
    column(tmp_path / "_temporary/0/part-0.parquet", image=rows)
    column(tmp_path / "_delta_log/00010.checkpoint.parquet", txn=pa.array([1]))
    tree(tmp_path, {".part-0.parquet.crc": b"crc", "_SUCCESS": b""})
    source = open_source("parquet", tmp_path)
    assert [record.label for record in source.records] == [0, 1, 1, 1, -1, -1]
    assert source.notes == ["1 of 3 files have no column label: their labels are -1"]
    left = {each.path: each.reason for each in source.left_out}
    assert left.pop("metadata.parquet") == left.pop("other.parquet") == "no column of pictures"
    assert left.pop("_temporary/0/part-0.parquet") == "Spark's own"
    assert left.pop("part-3.parquet") == "no rows"
    assert left.keys() == {"_delta_log/00010.checkpoint.parquet", ".part-0.parquet.crc", "_SUCCESS"}
    column(tmp_path / "part-4.parquet", photo=rows)
    with pytest.raises(UsageError, match=r"part-4.parquet has other columns .* than .*part-0"):
        open_source("parquet", tmp_path)
    assert len(open_source("parquet", tmp_path, image_column="photo").records) == 2


def test_configurations_of_one_data_set_are_not_mixed(tmp_path):
    for each in "160px", "full":
        written(tmp_path / "hub" / each / "train-00000-of-00001.parquet", [(JPEG, 0)])
        written(tmp_path / "converted" / each / "train" / "0000.parquet", [(JPEG, 0)])
    card = b"---\nconfigs:\n- config_name: 160px\n  data_files: x\n- config_name: full\n---\n"
    tree(tmp_path / "hub", {"README.md": card})
    for root in "hub", "converted":
        with pytest.raises(UsageError, match="has the configurations 160px, full: give the folder"):
            open_source("parquet", tmp_path / root, split="train")
    assert len(open_source("parquet", tmp_path / "hub" / "full").records) == 1


# ---- labels ----

NUMBERED = ("0", "1", "2")
LABELLED = {
    "bool": (pa.array([True, False, None]), [1, 0, -1], ("False", "True")),
    "true": (pa.array([True] * 3), [1, 1, 1], ("False", "True")),
    "float": (pa.array([2.0, float("nan"), None]), [2, -1, -1], NUMBERED),
    "half": (pa.array([2.0, 0.5, 1.0]), [2, -1, 1], NUMBERED),
    "decimal": (pa.array([decimal.Decimal(i) for i in (0, 2, 1)]), [0, 2, 1], NUMBERED),
    "int8": (pa.array([2, -1, 0], pa.int8()), [2, -1, 0], NUMBERED),
    "uint64": (pa.array([2, 1, 0], pa.uint64()), [2, 1, 0], NUMBERED),
    "category": (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
    "view": (pa.array(["b", "a", None], pa.string_view()), [1, 0, -1], ("a", "b")),
    "list": (pa.array([[2], [0, 1], []]), [2, -1, -1], NUMBERED),
    "numbers as words": (pa.array(["2", "10", "0"]), [2, 10, 0], tuple(map(str, range(11)))),
    "nothing as words": (pa.array(["", "nan", "cat"]), [-1, -1, 0], ("cat",)),
    "binary": (pa.array([b"b", b"a", b"b"]), [1, 0, 1], ("a", "b")),
    "ignored": (pa.array([-100, 2, 0]), [-1, 2, 0], NUMBERED),
    "high": (pa.array([2**40, 2, 0]), [-1, 2, 0], NUMBERED),
    "all below": (pa.array([-100] * 3), [-1, -1, -1], ()),
    "null": (pa.nulls(3), [-1, -1, -1], ()),
}


WORDS = {"category", "view", "nothing as words", "binary"}
UNREAD = {"half", "list", "ignored", "high", "all below"}


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_of_all_types_are_read(tmp_path, kind):
    labels, wanted, classes = LABELLED[kind]
    path = column(tmp_path / "a.parquet", image=pa.array([JPEG] * 3), label=labels)
    source = open_source("parquet", path)
    assert ([record.label for record in source.records], source.classes) == (wanted, classes)
    said = "; ".join(source.notes)
    assert ("could not be read, and the picture has none" in said) == (kind in UNREAD)
    assert ("labels are words" in said) == (kind in WORDS)


NAMED = {  # columns beside `image`, labels, classes
    "another case": ({"Label": ["b", "a", "b"]}, [1, 0, 1], ("a", "b")),
    "category": ({"category": [2, 0, 1]}, [2, 0, 1], NUMBERED),
    "class_id": ({"class_id": [2, 0, 1], "name": ["x"] * 3}, [2, 0, 1], NUMBERED),
    "target first": ({"category": ["x"] * 3, "target": [2, 0, 1]}, [2, 0, 1], NUMBERED),
    "unknown": ({"category2": [2, 0, 1]}, [-1] * 3, ()),
}


@pytest.mark.parametrize("kind", NAMED)
def test_the_column_of_labels_is_known_by_its_name(tmp_path, kind):
    columns, labels, classes = NAMED[kind]
    arrays = {name: pa.array(values) for name, values in columns.items()}
    path = column(tmp_path / "a.parquet", image=pa.array([JPEG] * 3), **arrays)
    assert listed(path) == (labels, classes)
    told = ["no labels: columns are image, category2 (--label-column names theirs)"]
    assert (open_source("parquet", path).notes == told) == (kind == "unknown")


def test_of_two_columns_of_one_name_the_first_is_read(tmp_path):
    columns = [pa.array([JPEG]), pa.array([0]), pa.array(["x"]), pa.array([1])]
    table = pa.Table.from_arrays(columns, ["image", "label", "image", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert listed(tmp_path / "a.parquet") == ([0], ("0",))
    assert open_source("parquet", tmp_path / "a.parquet").read(0) == JPEG


def test_the_column_of_labels_is_chosen(tmp_path):
    path = written(tmp_path / "a.parquet", [(JPEG, 2)])
    columns = {
        "image": pa.array([JPEG] * 2),
        "label": pa.array([0, 1]),
        "kind": pa.array(["b", "a"]),
    }
    column(path, **columns)
    assert listed(path) == ([0, 1], ("0", "1"))
    assert listed(path, label_column="kind") == ([1, 0], ("a", "b"))


# ---- pictures by path ----


def test_paths_are_looked_up_beside_the_file_and_in_the_root(tmp_path):
    tree(tmp_path, {"data/im/0.jpg": picture(0), "im/1.jpg": picture(1), "out/2.jpg": picture(2)})
    paths = [
        "im/0.jpg",
        "im/1.jpg",
        str(tmp_path / "out/2.jpg"),
        "..\\out\\2.jpg",
        "im/3.jpg",
        "/dev/zero",
        "a\0",
    ]
    structs = pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
    for name, values in {"words": pa.array(paths), "structs": structs}.items():
        path = column(
            tmp_path / "data" / f"{name}.parquet", file_name=values, label=pa.array(range(7))
        )
        if name == "structs":
            (tmp_path / "data" / "words.parquet").unlink()
        source = open_source("parquet", tmp_path)
        assert [record.label for record in source.records] == list(range(7))
        assert [source.read(i) for i in range(4)] == [
            picture(0),
            picture(1),
            picture(2),
            picture(2),
        ]
        for i, said in {4: "im/3.jpg", 5: "/dev/zero", 6: "a"}.items():
            with pytest.raises(
                BadPicture, match=f"no bytes but a path, and {said}.* is neither beside"
            ):
                source.read(i)
        assert open_source("parquet", path).read(0) == picture(0)


# ---- Arrow ----


def saved(path: Path, pictures: list[bytes], indexed: bool = False, rows: int = 3, **how) -> Path:
    """An Arrow file, as datasets saves it, or with an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array([{"bytes": data, "path": "x.jpg"} for data in pictures], STRUCT)
    words = pa.array([NAMES[i % 3] for i in range(len(pictures))]).dictionary_encode()
    table = pa.table({"image": structs, "label": words})
    kind = pa.ipc.new_file if indexed else pa.ipc.new_stream
    with kind(path, table.schema, options=pa.ipc.IpcWriteOptions(**how)) as file:
        file.write_table(table, max_chunksize=rows)
    return path


def test_a_saved_data_set_is_read_by_split(tmp_path):
    pictures = [picture(i) for i in range(8)]
    saved(tmp_path / "train" / "data-00000-of-00002.arrow", pictures[:5])
    saved(tmp_path / "train" / "data-00001-of-00002.arrow", pictures[5:])
    saved(tmp_path / "train" / "cache-0123456789abcdef.arrow", pictures)
    saved(tmp_path / "test" / "data-00000-of-00001.arrow", [])
    tree(tmp_path, {"dataset_dict.json": b"{}", "train/state.json": b"{}"})
    with pytest.raises(UsageError, match="has the splits test, train: name one with --split"):
        open_source("parquet", tmp_path)
    source = open_source("parquet", tmp_path, split="train")
    assert accounted(source)
    assert [record.path for record in source.records[3:6]] == [
        "train/data-00000-of-00002/3",
        "train/data-00000-of-00002/4",
        "train/data-00001-of-00002/0",
    ]
    assert [record.label for record in source.records] == [2, 0, 1, 2, 0, 2, 0, 1]
    assert source.classes == ("goldfish", "shark", "tench")
    draw = random.Random(0)
    for i in [*range(8), *draw.sample(range(8), 8)]:
        assert source.read(i) == pictures[i]
    far = pickle.loads(pickle.dumps(source.part(4, 7)))
    assert [far.read(i) for i in range(3)] == pictures[4:7]
    reasons = [each.reason for each in source.left_out if each.path.endswith(".arrow")]
    assert reasons == ["a cache of datasets"]
    column(tmp_path / "train" / "0.parquet", image=pa.array([JPEG]))
    assert len(open_source("parquet", tmp_path, split="train").records) == 1


@pytest.mark.parametrize("how", [{}, {"indexed": True}, {"indexed": True, "compression": "lz4"}])
def test_arrow_files_of_all_kinds_convert_as_folders_do(tmp_path, how):
    files = sorted(CLASSES.items())
    path = saved(tmp_path / "a.feather", [data for _, data in files], **how)
    ours = convert("parquet", path, tmp_path / "a.beton", label_from="none")
    flat = tree(tmp_path / "tree", {f"{i:02}.jpg": data for i, (_, data) in enumerate(files)})
    assert ours == convert("imagefolder", flat, tmp_path / "b.beton", label_from="none")


@pytest.mark.parametrize("indexed", [False, True])
def test_no_damaged_arrow_file_is_short_without_a_word(tmp_path, indexed):
    path = saved(tmp_path / "a.arrow", [picture(i) for i in range(12)], indexed)
    data, draw = path.read_bytes(), random.Random(2)
    for cut in {
        len(data) - 8,
        *(draw.randrange(len(data)) for _ in range(30)),
    }:  # behind the last batch
        path.write_bytes(data[:cut])
        with pytest.raises(UsageError, match="is no parquet or Arrow file, or cut short"):
            open_source("parquet", path)
    bad = 0
    for _ in range(30):
        changed = bytearray(data)
        for _ in range(3):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(changed))
        try:
            source = open_source("parquet", path)
            for i in range(len(source.records)):
                source.read(i)
            assert len(source.records) == 12
        except (UsageError, BadPicture):
            bad += 1
    assert bad


def test_a_codec_that_pyarrow_lacks_is_named(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", [(JPEG, 0)])
    source = open_source("parquet", path)

    def lacking(*_, **__):
        raise pa.ArrowNotImplementedError("Support for codec 'brotli' not built")

    monkeypatch.setattr("fastrot.data.sources.tables.ParquetTable.arrays", lacking)
    with pytest.raises(UsageError, match=r"a.parquet wants another build of pyarrow .*'brotli'"):
        open_source("parquet", path)
    with pytest.raises(
        RunError, match=r"a/0 cannot be read: .*a.parquet: Support for codec 'brotli'"
    ):
        encode_chunk(EncodeSpec(write.Coder()), Chunk(0, source.part(0, 1)))


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
    again = [*given, "--split", "train", "--label-column", "image"]  # another plan
    assert main(*again) == 2
    assert "--label-column image: 14 labels could not be read" in capsys.readouterr().err
    assert main(*given, "--split", "train", "--image-column", "image") == 2
    assert "without --image-column" in capsys.readouterr().err


def test_other_sources_have_no_columns(tmp_path):
    tree(tmp_path, {"a.jpg": JPEG})
    for name in "image", "label":
        with pytest.raises(
            UsageError, match=f"--{name}-column x: a folder of .* has no columns; parquet has"
        ):
            open_source("imagefolder", tmp_path, **{f"{name}_column": "x"})


# ---- what is refused ----


def test_no_cut_makes_a_listing_short_without_a_word(tmp_path):
    path = written(tmp_path / "a.parquet", [(picture(i), i % 3) for i in range(12)])
    data, draw = path.read_bytes(), random.Random(0)
    for cut in {draw.randrange(len(data)) for _ in range(200)}:
        path.write_bytes(data[:cut])
        with pytest.raises(
            UsageError, match=r"a.parquet is no parquet or Arrow file, or cut short"
        ):
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
        ("names", "has the label 3, but 3 classes"),
        ("text", "is no parquet or Arrow file, or cut short"),
        ("empty", "no picture among them \\(1 .parquet \\(no rows\\)\\)"),
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
