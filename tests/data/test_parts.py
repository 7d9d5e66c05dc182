"""A set of parts that --keep-parts leaves is read as the one file that they would be merged into."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrot import disk
from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError
from fastrot.core import DamagedRecord, View
from fastrot.data.beton import write
from fastrot.data.beton.read import Beton
from fastrot.data.prepare.convert import convert

PARTS = ("0000000000.beton", "0000000010.beton", "0000000020.beton", "0000000030.beton")
VIEW = View(crops=(RandomResized(size=24), Shifted(size=24)))


def options(root: Path, out: Path, **how) -> write.BetonOptions:
    return write.BetonOptions(
        source="imagefolder", root=root, out=out, workers=0, **{"keep_parts": True, **how}
    )


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    """A merged file, `one.beton`, and a set of four parts, `four.beton.set`."""
    folder = tmp_path_factory.mktemp("made")
    convert(options(pictures, folder / "one.beton", keep_parts=False), part=10)
    told = convert(options(pictures, folder / "four.beton"), part=10)
    assert told.out == folder / "four.beton.set"
    assert f"--data {told.out}" in "".join(told.lines())
    assert {p.name for p in folder.iterdir() if p.name.startswith("four")} == {"four.beton.set"}
    return folder


@pytest.fixture
def four(made, tmp_path) -> Path:
    """The set, to be spoilt."""
    return Path(shutil.copytree(made / "four.beton.set", tmp_path / "four.beton.set"))


# ---- the same data ----


def test_a_set_is_the_data_of_the_merged_file(made):
    one, four = open_data(made / "one.beton"), open_data(made / "four.beton.set")
    assert isinstance(four, Beton)
    assert four.rows == one.rows == 37
    for name in ("labels", "keys"):
        assert np.array_equal(getattr(four, name), getattr(one, name))
    for name in ("classes", "mean", "std", "fingerprint", "numbers"):
        assert getattr(four, name) == getattr(one, name)
    rows = np.arange(37)
    assert np.array_equal(four.sizes(rows), one.sizes(rows))
    for row in rows.tolist():
        assert four.name(row) == one.name(row)
        assert four.record(row).tobytes() == one.record(row).tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_of_a_set_are_those_of_the_merged_file(made, workers):
    for epoch in range(2):
        of = {
            name: [
                (batch.index, batch.label, *batch.crops)
                for batch in open_loader(made / name, VIEW, batch=5, workers=workers).epoch(epoch)
            ]
            for name in ("one.beton", "four.beton.set")
        }
        assert len(of["one.beton"]) == 7
        for ours, theirs in zip(*of.values(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_set_may_be_moved_and_renamed(four, tmp_path):
    four.rename(tmp_path / "elsewhere")
    assert open_data(tmp_path / "elsewhere").rows == 37


def test_more_parts_than_a_process_may_open_at_first(made, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        disk.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(612, hard)
        disk.allow_open_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(612, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- a set that is not whole is refused by the part's name ----


def cut(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 30)


def change(part: Path) -> None:
    """The label of its first row."""
    data = bytearray(part.read_bytes())
    data[3147 + 16] ^= 1
    part.write_bytes(data)


def replace(part: Path) -> None:
    shutil.copy(part.with_name(PARTS[0]), part)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (os.unlink, "cannot be read"),
        (cut, "is cut short or damaged"),
        (change, "has changed since it was written"),
        (replace, "has changed since it was written"),
    ],
)
def test_a_part_that_is_not_as_it_was_is_named(four, spoil, words):
    spoil(four / PARTS[2])
    with pytest.raises(UsageError, match=rf"{PARTS[2]} {words}") as error:
        open_data(four)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["set.json", "set.crc.npy", "set.keys.npy"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x93NUMPY\1\0"], ids=repr)
def test_what_lies_beside_the_parts_is_needed_whole(four, name, content):
    (four / name).unlink()
    if content is not None:
        (four / name).write_bytes(content)
    words = (
        f"{name} is missing" if content is None else "set.json, .crc.npy or .keys.npy is damaged"
    )
    with pytest.raises(UsageError, match=words):
        open_data(four)


@pytest.mark.parametrize("name", ["set.crc.npy", "set.keys.npy"])
def test_arrays_of_another_set_are_refused(four, name):
    np.save(four / name, np.load(four / name)[::-1][:30])
    with pytest.raises(UsageError, match="is damaged"):
        open_data(four)


def test_a_flipped_byte_of_set_json_is_refused(four):
    data = bytearray((four / "set.json").read_bytes())
    at = data.index(b'"mean"') + 20
    data[at] ^= 1
    (four / "set.json").write_bytes(data)
    assert json.loads(data)
    with pytest.raises(UsageError, match=r"set\.json"):
        open_data(four)


def test_an_unfinished_set_is_told_from_a_folder_of_pictures(four):
    parts = four.with_suffix(".parts")
    four.rename(parts)
    (parts / "set.json").unlink()
    with pytest.raises(
        UsageError, match=r"set\.json is missing: .* run the same fastrot convert command"
    ):
        open_data(parts)


def test_a_damaged_record_is_named_with_its_part(four):
    data = open_data(four)
    at = int(data.contents.ptr[13]) + 200
    with open(four / PARTS[1], "r+b") as file:
        file.seek(at)
        file.write(b"\0\0\0\0\0\0\0")
    with pytest.raises(DamagedRecord, match=rf"row 13 of .*{PARTS[1]} .{data.name(13)}.*checksum"):
        data.picture(13)
    data.picture(12)


# ---- later starts ----


def test_a_finished_set_is_there_already_merged_later_and_mended(made, pictures, tmp_path):
    out = tmp_path / "four.beton"
    kept = Path(shutil.copytree(made / "four.beton.set", tmp_path / "four.beton.set"))
    whole = {p.name: p.read_bytes() for p in kept.iterdir()}
    assert convert(options(pictures, out), part=10).already
    for spoil in (os.unlink, cut, change):
        spoil(kept / PARTS[1])
        told = convert(options(pictures, out), part=10)
        assert (told.converted, told.resumed) == (10, 27)
        assert {p.name: p.read_bytes() for p in kept.iterdir()} == whole
    (kept / "set.keys.npy").unlink()
    assert convert(options(pictures, out), part=10).converted == 0
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == whole
    told = convert(options(pictures, out, keep_parts=False))  # with parts of another size
    assert (told.converted, told.resumed) == (0, 37)
    assert {p.name for p in tmp_path.iterdir()} == {
        "four.beton",
        *(f"four.beton.{name}" for name in write.NEEDED),
        "four.beton.json",
    }
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (made / file.name.replace("four", "one")).read_bytes()
    assert convert(options(pictures, out)).already  # the merged file holds all


def test_a_record_that_changed_in_a_kept_part_is_found_by_the_merge(four, pictures, tmp_path):
    with open(four / PARTS[3], "r+b") as file:
        file.seek(6000)
        file.write(b"changed")
    merging = options(pictures, tmp_path / "four.beton", keep_parts=False)
    with pytest.raises(UsageError, match=f"{PARTS[3]} has changed"):
        convert(merging, part=10)
    told = convert(merging, part=10)
    assert (told.converted, told.resumed) == (7, 30)


def test_a_set_of_other_options_is_refused_and_overwritten(four, pictures, tmp_path):
    out = tmp_path / "four.beton"
    for keep in (True, False):
        with pytest.raises(UsageError, match=r"four\.beton\.set is there, made with --quality 90"):
            convert(options(pictures, out, quality=50, keep_parts=keep), part=10)
    told = convert(options(pictures, out, quality=50, overwrite=True), part=10)
    assert told.converted == 37
    assert open_data(four).manifest["options"]["quality"] == 50
    told = convert(options(pictures, out, quality=60, overwrite=True, keep_parts=False), part=10)
    assert not four.exists()
    assert open_data(out).manifest["options"]["quality"] == 60


def test_a_folder_of_something_else_is_left_alone(pictures, tmp_path):
    other = tmp_path / "four.beton.set"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is no set of ours"):
            convert(options(pictures, tmp_path / "four.beton", overwrite=overwrite))
    assert (other / "mine.txt").read_text() == "keep"
