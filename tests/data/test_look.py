import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packs import write_pack
from PIL import Image
from plain_beton import write_beton
from truth import photo

from fastrot.data.beton import write
from fastrot.data.prepare.convert import convert
from fastrot.look import GAP, MARGIN

LOOK = Path(__file__).parents[2] / "dataprep" / "look.py"


@pytest.fixture(scope="module")
def look():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("look", LOOK)
    module = sys.modules["look"] = module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def beton(tmp_path) -> Path:
    photos = [photo(i, 40, 50) for i in range(9)]
    fields = {"image": "image", "label": ("int", np.arange(9) % 3)}
    return write_beton(tmp_path / "few.beton", photos, fields, page=2**14)


def test_a_beton_is_told_and_drawn(look, beton, capsys):
    assert look.main([str(beton), "--size", "40", "--verify"]) == 0
    said = capsys.readouterr().out
    for words in (
        "9 pictures",
        "9 jpg, 0 raw",
        "nothing: no checksums",
        "3 with 3 / 3 / 3",
        "all whole",
    ):
        assert words in said
    with Image.open(beton.parent / "few-look.png") as sheet:
        assert min(sheet.size) > 4 * 40


def test_a_folder_is_told_and_drawn(look, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    assert look.main([str(pictures), "--out", str(tmp_path / "new" / "a.png"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "37 pictures" in said
    assert "class0" in said
    assert (tmp_path / "new" / "a.png").exists()
    shutil.copytree(pictures, tmp_path / "root")
    (tmp_path / "root" / "class0" / "bad.jpg").write_bytes(b"text")
    assert look.main([str(tmp_path / "root"), "--out", str(tmp_path / "b.png")]) == 0
    assert "rejected    1, the first 'class0/bad.jpg'" in capsys.readouterr().out


def test_the_sheet_turns_counter_clockwise(look, tmp_path):
    path = write_beton(tmp_path / "a.beton", [photo(0, 50, 50)], {"image": "image"}, page=2**14)
    assert look.main([str(path), "--size", "40"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "a-look.png"))
    top, left, size, step = 84, MARGIN, 40, 40 + GAP
    rotated = [sheet[top : top + size, left + t * step :][:, :size, 0] for t in range(4)]
    for rotation in range(4):
        assert np.array_equal(rotated[rotation], np.rot90(rotated[0], rotation))
    assert not np.array_equal(rotated[1], rotated[3])


def test_every_damaged_record_is_named(look, beton, capsys):
    from fastrot.data.beton.read import Beton

    contents = Beton(beton).contents
    data = bytearray(beton.read_bytes())
    for row in (2, 5):
        start, size = int(contents.ptr[row]), int(contents.size[row])
        data[start + 100 : start + size] = bytes(size - 100)
    beton.write_bytes(data)
    assert look.main([str(beton), "--verify"]) == 1
    said = capsys.readouterr()
    assert [line.split(" of ")[0] for line in said.err.splitlines()] == ["row 2", "row 5"]
    assert "2 DAMAGED" in said.out
    assert look.main([str(beton)]) == 1  # the sheet meets them too


@pytest.fixture(params=["file", "set"])
def ours(request, pictures, tmp_path) -> Path:
    """A prepared file, or a set of four parts, with checksums."""
    keep = request.param == "set"
    options = write.BetonOptions(
        source="imagefolder", root=pictures, out=tmp_path / "a.beton", workers=0, keep_parts=keep
    )
    return convert(options, part=10).out


def test_prepared_data_of_ours_is_told(look, ours, capsys):
    assert look.main([str(ours), "--size", "32", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "37 records read and decoded" in said
    assert "all whole" in said
    assert ("in 4 parts" in said) == ours.is_dir()
    assert (ours.parent / f"{ours.stem if ours.is_file() else ours.name}-look.png").exists()


def test_records_damaged_in_three_ways_are_all_named(look, ours, capsys):
    """A flipped bit, a tail of zeros, bytes of another picture: each by row and path, and no other."""
    from fastrot.data.beton.read import Beton

    data = Beton(ours)
    names, c = [data.name(row) for row in range(37)], data.contents
    for row, how in {3: "bit", 14: "cut", 36: "other"}.items():
        file = data._file_of(row).path
        whole = bytearray(file.read_bytes())
        start, size = int(c.ptr[row]), int(c.size[row])
        if how == "bit":
            whole[start + size // 2] ^= 16
        elif how == "cut":
            whole[start + size // 2 : start + size] = bytes(size - size // 2)
        else:
            other = whole[int(c.ptr[row - 1]) :][:size]
            whole[start : start + len(other)] = other
        file.write_bytes(whole)
    assert look.main([str(ours), "--verify"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["row 3", "row 14", "row 36"]
    assert all(names[row] in line for row, line in zip((3, 14, 36), lines, strict=True))
    assert "3 DAMAGED" in said.out


def test_a_wrong_size_in_a_row_is_named_without_checksums(look, ours, capsys, tmp_path):
    if ours.is_dir():
        pytest.skip("a set has checksums, or is refused")
    alone = Path(shutil.copy(ours, tmp_path / "alone.beton"))
    data = bytearray(alone.read_bytes())
    at = 24 + 3 * 1041 + 32 * 8 + 1  # the width of row 8
    data[at] ^= 1
    alone.write_bytes(data)
    assert look.main([str(alone), "--verify"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("row 8 of ")
    assert "its row says" in said.err
    assert said.err.count("\n") == 1


def test_a_set_without_one_part_is_refused(look, ours, capsys):
    part = ours / "0000000020.beton" if ours.is_dir() else ours
    with open(part, "r+b") as file:
        file.truncate(9000)
    assert look.main([str(ours), "--verify"]) == 2
    assert f"{part} is cut short" in capsys.readouterr().err


@pytest.fixture
def pack(tmp_path) -> Path:
    photos = [photo(i, 60, 70 + i) for i in range(20)]
    return write_pack(
        tmp_path / "a.pack", photos, [i % 3 for i in range(20)], classes=["cat", "dog", "fox"]
    )


def test_a_pack_is_told_and_drawn(look, pack, capsys):
    assert look.main([str(pack), "--size", "40", "--verify"]) == 0
    said = capsys.readouterr().out
    for words in (
        "20 pictures",
        f"of ycc: {sum(8 * -(-(70 + i) // 8) for i in range(20)):,} tiles of 8x8 pixels",
        "encoding ycc",
        "20 seen, 0 rejected, 0 left out, 20 written",
        "fox",
        "all whole",
    ):
        assert words in said
    with Image.open(pack.parent / "a.pack-look.png") as sheet:
        assert min(sheet.size) > 4 * 40


def test_damaged_stretches_of_a_pack_are_named(look, pack, capsys):
    """With the pictures in them: here all of the only one."""
    data = bytearray((pack / "tiles.npy").read_bytes())
    data[1000] ^= 1
    (pack / "tiles.npy").write_bytes(data)
    assert look.main([str(pack), "--verify"]) == 1
    said = capsys.readouterr()
    assert "bytes 0 to 67,108,864 of tiles.npy: row 0 (00000000) to row 19 (00000019)" in said.err
    assert "1 stretch DAMAGED" in said.out
    assert look.main([str(pack)]) == 1  # the sheet meets it too
    (pack / "first.npy").unlink()
    assert look.main([str(pack)]) == 2
    assert "first.npy cannot be read (No such file" in capsys.readouterr().err


def test_names_of_rows_are_those_of_their_lines(ours):
    from fastrot.data.beton.read import Beton

    data = Beton(ours)
    lines = data.path / "set.paths.jsonl" if ours.is_dir() else Path(f"{ours}.paths.jsonl")
    paths = [json.loads(line)["path"] for line in lines.read_text().splitlines()]
    assert [data.name(row) for row in range(37)] == paths
    for content in (b"", b"[]\n" * 40, b"no json\n" * 40):
        lines.write_bytes(content)
        assert Beton(ours).name(0) == Beton(ours).name(36) == "path unknown"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none.beton"], "does not exist"),
        (["few.beton", "--size", "0"], "--size got 0"),
        (["few.beton", "--pictures", "-1"], "--pictures got -1"),
        (["few.txt"], "is not a known format"),
    ],
)
def test_wrong_use_is_one_sentence(look, beton, capsys, monkeypatch, args, words):
    monkeypatch.chdir(beton.parent)
    shutil.copy(beton, "few.txt")
    assert look.main(args) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.soak
def test_it_runs_as_a_script_from_anywhere(beton, tmp_path):
    done = subprocess.run(
        [sys.executable, LOOK, beton, "--out", "a.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
