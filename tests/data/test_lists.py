"""Text lists: every way in which people name pictures line by line, and what is read there."""

import json

import pytest
from test_sources import JPEG, accounted, tree

from fastrot.config import UsageError
from fastrot.data.sources.open import open_source

LINES = {
    "a.jpg 3": ("a.jpg", 3),
    "with space.jpg 1": ("with space.jpg", 1),
    "with space.jpg": ("with space.jpg", -1),
    "comma,in.jpg,2": ("comma,in.jpg", 2),
    "a.jpg, 0": ("a.jpg", 0),
    "a.jpg\t7": ("a.jpg", 7),
    "a.jpg -1": ("a.jpg", -1),
    "sub/a.jpg\r": ("sub/a.jpg", -1),
    "-1 2.jpg": ("-1 2.jpg", -1),
}


def test_lines_of_a_text_list(tmp_path):
    tree(tmp_path, {path: JPEG for path, _ in LINES.values()})
    file = tmp_path / "list.txt"
    file.write_bytes("\n\n".join(["\ufeff", *LINES]).encode())
    source = open_source("list", file)
    assert [(r.path, r.label) for r in source.records] == list(LINES.values())
    assert source.classes == tuple("01234567")
    assert source.numbers is None
    assert source.read(0) == JPEG
    unlabelled = open_source("list", file, label_from="none")
    assert {record.label for record in unlabelled.records} == {-1}


def test_a_text_list_names_what_it_cannot_take(tmp_path):
    tree(tmp_path, {"a.jpg": JPEG, "b.jpg": b"text", "c.txt": b"text"})
    (tmp_path / "list.txt").write_text("/gone/a.jpg 1\ngone.jpg 1\nb.jpg 1\nc.txt 1\na.jpg 1\n")
    source = open_source("list", tmp_path / "list.txt")
    assert [record.path for record in source.records] == ["a.jpg"]
    assert [path for path, _ in source.rejected] == [
        "/gone/a.jpg",
        "gone.jpg",
        "b.jpg",
        "c.txt",
    ]
    assert source.numbers is not None
    assert source.numbers.tolist() == [4]
    assert accounted(source)


# ---- tables, and lines as other tools write them ----

PICTURES = [f"im/q{i}.jpg" for i in range(6)]
ODD = ["im/a 0 1.jpg", "im/b,2.jpg", 'im/"c".jpg', "im/d;3.jpg", "#5.jpg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("lists"), dict.fromkeys([*PICTURES, *ODD], JPEG))


def lines(line: str, *, head: str = "", end: str = "\n") -> str:
    """A list of the six pictures: {p} the path, {i} its number, {m} 0 or 1, {w} dog or cat."""
    each = [
        line.format(p=p, i=i, m=i % 2, w=("dog", "cat")[i % 2], b=p.replace("/", "\\"))
        for i, p in enumerate(PICTURES)
    ]
    return end.join([head, *each] if head else each)


PARITY, NONE = [0, 1] * 3, [-1] * 6
WORDS = [1, 0] * 3  # dog, cat, dog ... in the order of names
READ = {  # text, labels, classes, what is said
    "words": (
        lines("{p},{w}"),
        WORDS,
        "cat dog",
        "by commas: paths from column 1, labels from column 2",
    ),
    "quoted": (lines('"{p}","{m}"'), PARITY, "0 1", "by commas"),
    "header": (
        lines("{p},{m}", head="file_name,label"),
        PARITY,
        "0 1",
        "from file_name, labels from label",
    ),
    "trailing": (lines("{p},{m},"), PARITY, "0 1", "labels from column 2"),
    "backslash": (lines("{b}"), NONE, "", ""),
    "backslash label": (lines("{b} {m}"), PARITY, "0 1", ""),
    "one-indexed": (
        "".join(f"{p} {i + 1}\n" for i, p in enumerate(PICTURES)),
        [1, 2, 3, 4, 5, 6],
        "0 1 2 3 4 5 6",
        "",  # the account names the class without pictures
    ),
    "numbers as words": (
        lines("{p},{w}{m}").replace("dog0", "1e3").replace("cat1", "infinity"),
        [0, 1] * 3,
        "1e3 infinity",
        "labels are words: 2",
    ),
    "numbers as people pad them": (lines("{p},00{m}."), PARITY, "0 1", "labels from column 2"),
    "fractions and large numbers": (
        lines("{p},{m}").replace("q2.jpg,0", "q2.jpg,0.5").replace("q4.jpg,0", "q4.jpg,1048576"),
        [0, 1, -1, 1, -1, 1],
        "0 1",
        "2 labels could not be read, and the picture has none: first 0.5 of im/q2.jpg",
    ),
    "JSON lines with lists": (
        "\n".join(
            json.dumps({"file_name": p, "label": [[i % 2], [0, 1]][i == 4]})
            for i, p in enumerate(PICTURES)
        ),
        [0, 1, 0, 1, -1, 1],
        "0 1",
        "1 label could not be read, and the picture has none: first [0, 1] of im/q4.jpg",
    ),
    "negative": (
        "".join(f"{p} {i - 3}\n" for i, p in enumerate(PICTURES)),
        [-1, -1, -1, 0, 1, 2],
        "0 1 2",
        "2 labels could not be read, and the picture has none: first -3 of im/q0.jpg",
    ),
    "label first": (lines("{m} {p}"), PARITY, "0 1", "paths from column 2, labels from column 1"),
    "word first": (lines("{w} {p}"), WORDS, "cat dog", "labels are words: 2 classes"),
    "lines end in CRLF": (lines("{p},{m}", head="path,label", end="\r\n"), PARITY, "0 1", ""),
    "lines end in CR": (lines("{p},{m}", head="path,label", end="\r"), PARITY, "0 1", ""),
    "blank lines": (
        lines("{p};{w}", head="Image Path;Class Name", end="\n\n"),
        WORDS,
        "cat dog",
        "by semicolons: paths from Image Path, labels from Class Name",
    ),
    "pandas": (
        lines("{i},{p},{w},7", head=",path,label,age"),
        WORDS,
        "cat dog",
        "not read: column 1, age",
    ),
    "pandas by tabs": (lines("{i}\t{p}\t{w}", head="\tpath\tlabel"), WORDS, "cat dog", "by tabs"),
    "an index": (lines("{i},{p}"), NONE, "", "no labels"),
    "index and label": (
        lines("{i},{p},{m}"),
        PARITY,
        "0 1",
        "labels from column 3; not read: column 1",
    ),
    "floats": (lines("{p},{m}.0", head="path,label"), PARITY, "0 1", ""),
    "floats and nothing": (
        "path,label\nim/q0.jpg,1.0\nim/q1.jpg,\nim/q2.jpg,nan\nim/q3.jpg,0.0",
        [1, -1, -1, 0],
        "0 1",
        "",
    ),
    "quotes that do not close": (
        lines('{p}\t"a {w}\t{m}', head="path\tcaption\tlabel"),
        PARITY,
        "0 1",
        "not read: caption",
    ),
    "captions over lines": (
        lines('{p},"a {w},\n sitting"', head="file_name,text"),
        NONE,
        "",
        "no labels (--label-column names theirs); not read: text",
    ),
    "a column of an unknown name": (
        lines("{p},{w}", head="where,breed"),
        NONE,
        "",
        "paths from where, no labels",
    ),
    "a column alone": (lines("{p}", head="path"), NONE, "", "taken for a header: path"),
    "words behind spaces": (lines("{p}   {w}"), WORDS, "cat dog", "by spaces"),
    "numbers before names of classes": (
        lines("{w},{m},{p}", head="class_name,class_id,file"),
        PARITY,
        "0 1",
        "labels from class_id; not read: class_name",
    ),
    "comments": (
        "# by hand\n#5.jpg 1\n" + lines("{p} {m}"),
        [1, *PARITY],
        "0 1",
        "1 comment: they begin with #",
    ),
    "some words": (
        lines("{p} {m}").replace("q2.jpg 0", "q2.jpg x"),
        [0, 1, -1, 1, 0, 1],
        "0 1",
        "1 label could not be read, and the picture has none: first x of im/q2.jpg",
    ),
    "twice": (
        lines("{p} {m}") + "\nim/q0.jpg 0",
        [*PARITY, 0],
        "0 1",
        "1 line with a picture of another line",
    ),
    "hexadecimal": (
        "".join(f"im/q{i % 6}.jpg,{i:x}\n" for i in range(16)),
        [*range(16)],
        " ".join("0123456789abcdef"),
        "labels are words: 16",
    ),
    "dots and homes": (
        "./im/q0.jpg 1\n~/im/q1.jpg 0\n/im/q2.jpg 1\nHERE/im/q3.jpg 0",
        [1, 0, 1, 0],
        "0 1",
        "",
    ),
    "JSON lines": (
        "\n".join(
            json.dumps({"file_name": p, "label": i % 2, "text": 'a, "b"'})
            for i, p in enumerate(PICTURES)
        ),
        PARITY,
        "0 1",
        "JSON lines: paths from file_name, labels from label; not read: text",
    ),
    "JSON lines in words": (
        "\n".join(
            json.dumps({"label": [None, "a", 0][i % 3], "image": p}) for i, p in enumerate(PICTURES)
        ),
        [-1, 1, 0] * 2,
        "0 a",
        "labels are words",
    ),
    "UTF-8 with its mark": (
        "\ufeff" + lines("{p},{m}", head="path,label"),
        PARITY,
        "0 1",
        "from path",
    ),
    "Latin-1": (lines("{p},caf\udce9", head="path,label"), [0] * 6, "caf\udce9", ""),
}


@pytest.mark.parametrize("case", READ)
def test_lists_as_people_have_them(folder, monkeypatch, case):
    text, labels, classes, said = READ[case]
    monkeypatch.setenv("HOME", str(folder))
    file = folder / "list.csv"
    file.write_bytes(text.replace("HERE", str(folder)).encode("utf-8", "surrogateescape"))
    source = open_source("list", file)
    paths = [record.path for record in source.records]
    assert [path for path in paths if path in PICTURES][:6] == PICTURES[: min(6, len(labels))]
    assert [record.label for record in source.records] == labels
    assert source.classes == tuple(classes.split())
    assert said in "; ".join(source.notes)
    assert bool(source.notes) >= bool(said)
    assert (source.rejected, source.left_out, source.numbers) == ([], [], None)
    assert source.read(1) == JPEG
    assert {r.label for r in open_source("list", file, label_from="none").records} == {-1}


def test_excels_unicode_text(folder):
    file = folder / "excel.txt"
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        text = lines("{p}\t{w}", head="file\tclass", end="\r\n")
        file.write_bytes(mark + text.encode(encoding))
        source = open_source("list", file)
        assert [record.label for record in source.records] == WORDS


@pytest.mark.parametrize("label", ["", " 3", ",3"])
def test_odd_names_of_plain_lists_stay_whole(folder, label):
    (folder / "odd.txt").write_text("\n".join(f"{path}{label}" for path in ODD))
    source = open_source("list", folder / "odd.txt")
    assert [(r.path, r.label) for r in source.records] == [(p, 3 if label else -1) for p in ODD]


def test_a_label_that_is_none_costs_no_picture_wherever_it_stands(folder):
    text = "\n".join(f"im/q{i % 6}.jpg {-7 if i == 777 else i % 2}" for i in range(1000))
    (folder / "long.txt").write_text(text)
    source = open_source("list", folder / "long.txt", by_name=True)
    assert [r.label for r in source.records] == [-1 if i == 777 else i % 2 for i in range(1000)]
    assert "1 label could not be read, and the picture has none: first -7" in source.notes[0]


def test_an_absolute_path_elsewhere_stays_absolute(folder, tmp_path):
    (tmp_path / "list.csv").write_text(f"path,label\n{folder}/im/q0.jpg,dog\n../gone.jpg,cat\n")
    source = open_source("list", tmp_path / "list.csv")
    assert [record.path for record in source.records] == [f"{folder}/im/q0.jpg"]
    assert source.rejected == [("../gone.jpg", "there is no such file")]
    assert source.classes == ("cat", "dog")
    assert source.read(0) == JPEG


def test_places205_as_it_is_handed_out(tmp_path):
    """Its csv files have a space between path and number, and lie apart from the pictures."""
    places = {"a/abbey/gsun_0.jpg": 0, "a/airport_terminal/gsun_1.jpg": 1, "y/yard/gsun_2.jpg": 204}
    pictures = tmp_path / "data/vision/torralba/deeplearning/images256"
    tree(pictures, dict.fromkeys(places, JPEG))
    text = "".join(f"{path} {label}\n" for path, label in places.items())
    tree(tmp_path / "trainvalsplit_places205", {"train_places205.csv": text.encode()})
    file = tmp_path / "trainvalsplit_places205" / "train_places205.csv"
    (pictures / file.name).symlink_to(file)
    for at, folder in ((file, pictures), (pictures / file.name, None)):
        source = open_source("list", at, folder=folder)
        assert {record.path: record.label for record in source.records} == places
        assert source.classes == tuple(map(str, range(205)))
        assert (source.notes, source.rejected, source.read(2)) == ([], [], JPEG)
    for kind, at, folder, said in (
        ("list", file, None, "no such file.: look at them, or say with --folder where its paths"),
        ("list", file, tmp_path / "gone", "--folder .*gone: it is no folder"),
        ("imagefolder", pictures, pictures, "--folder .*images256: .* names no paths; a list does"),
    ):
        with pytest.raises(UsageError, match=said):
            open_source(kind, at, folder=folder)


def test_columns_may_be_named(folder):
    (folder / "named.csv").write_text(lines("gone.jpg,{p},{w},{m}", head="image,where,breed,label"))
    how = {"image_column": "where", "label_column": "breed"}
    source = open_source("list", folder / "named.csv", **how)
    assert [record.path for record in source.records] == PICTURES
    assert [record.label for record in source.records] == WORDS
    assert source.classes == ("cat", "dog")
    assert len(open_source("list", folder / "named.csv", image_column="where").classes) == 2
    for option in ("image_column", "label_column"):
        with pytest.raises(
            UsageError, match=r"named.csv has no column x: its first line is image,"
        ):
            open_source("list", folder / "named.csv", **{option: "x"})


def test_lists_that_cannot_be_read_say_why(folder):
    for text, said in [
        ("path,label\n", "is empty"),
        ("path,label\nim/gone.jpg,1\n", r"im/gone.jpg: there is no such file"),
    ]:
        (folder / "bad.csv").write_text(text)
        with pytest.raises(UsageError, match=said):
            open_source("list", folder / "bad.csv")
    damaged = lines('{{"file_name": "{p}"}}') + "\n{oops"
    (folder / "bad.csv").write_text(damaged)
    source = open_source("list", folder / "bad.csv")
    assert ([r.path for r in source.records], source.rejected) == (
        PICTURES,
        [("{oops", "there is no such file")],
    )
