import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plain_beton import write_beton
from truth import photo

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


def test_the_sheet_turns_counter_clockwise(look, tmp_path):
    path = write_beton(tmp_path / "a.beton", [photo(0, 50, 50)], {"image": "image"}, page=2**14)
    assert look.main([str(path), "--size", "40"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "a-look.png"))
    top, left, size, step = 84, look.MARGIN, 40, 40 + look.GAP
    turned = [sheet[top : top + size, left + t * step :][:, :size, 0] for t in range(4)]
    for turn in range(4):
        assert np.array_equal(turned[turn], np.rot90(turned[0], turn))
    assert not np.array_equal(turned[1], turned[3])


def test_every_damaged_record_is_named(look, beton, capsys):
    from fastrot.data.beton.load import Beton

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


def test_it_runs_as_a_script_from_anywhere(beton, tmp_path):
    done = subprocess.run(
        [sys.executable, LOOK, beton, "--out", "a.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
