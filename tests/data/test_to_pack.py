"""What dataprep/to_pack.py promises: the source's pictures and names, the same bytes however made, nothing lost."""

import importlib.util
import json
import os
import pickle
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from packs import write_pack
from plain_beton import write_beton
from truth import photo

from fastrot import entry
from fastrot.config import UsageError
from fastrot.data.beton import write as beton_write
from fastrot.data.beton.read import Beton
from fastrot.data.folder import Folder
from fastrot.data.pack import write
from fastrot.data.pack.read import Pack
from fastrot.data.pictures import decode, shrink
from fastrot.data.prepare.convert import convert
from fastrot.data.prepare.ranks import Ranks
from fastrot.data.sources.open import open_source

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "dataprep" / "to_pack.py"
PART = 10
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def options(root: Path, out: Path, **how) -> write.PackOptions:
    given = {"source": "imagefolder", "root": root, "out": out, "workers": 0, **how}
    return write.PackOptions(**given)


def packed(root: Path, out: Path, part: int = PART, **how):
    return convert(options(root, out, **how), part=part)


def main(*args) -> int:
    spec = importlib.util.spec_from_file_location("to_pack", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(script)
        return script.main([str(arg) for arg in args])
    finally:
        sys.path[:] = path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def upright(root: Path, **how) -> list[np.ndarray]:
    source = open_source("imagefolder", root)
    return [shrink(decode((root / r.path).read_bytes()), **how) for r in source.records]


@pytest.fixture(scope="module")
def mixed(pictures, tmp_path_factory) -> Path:
    """The pictures, and two that are rejected: one while they are listed, one while they are decoded."""
    root = tmp_path_factory.mktemp("mixed") / "pictures"
    shutil.copytree(pictures, root)
    whole = (root / "class0" / "000.jpg").read_bytes()
    (root / "class1" / "020cut.jpg").write_bytes(whole[:700])
    (root / "class2" / "empty.png").touch()
    return root


@pytest.fixture(scope="module")
def unbroken(mixed, tmp_path_factory) -> dict[str, bytes]:
    """All files of a conversion by one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "a.pack"
    packed(mixed, out, part=100)
    assert [p.name for p in out.parent.iterdir()] == ["a.pack"]
    assert {*files(out)} == write.NAMES - {"pixels.npy", "skipped.jsonl"}
    return files(out)


# ---- what is in it ----


@pytest.mark.parametrize("how", [{}, {"short_side": 36}, {"max_side": 50}], ids=str)
def test_raw_gives_back_every_bit(pictures, tmp_path, how):
    told = packed(pictures, tmp_path / "a.pack", encoding="raw", **how)
    pack, source = Pack(tmp_path / "a.pack"), open_source("imagefolder", pictures)
    for row, wanted in enumerate(upright(pictures, **how)):
        np.testing.assert_array_equal(pack.picture(row), wanted)
    assert pack.labels.tolist() == [record.label for record in source.records]
    assert pack.classes == source.classes
    assert [pack.name(row) for row in range(37)] == [record.path for record in source.records]
    assert (told.manifest["rows"], told.resumed, told.out) == (37, 0, tmp_path / "a.pack")
    assert told.manifest["bytes"] == sum(
        len(b) for n, b in files(told.out).items() if n != "meta.json"
    )


def test_tiles_are_those_of_the_pictures(pictures, tmp_path):
    """What comes of a conversion is what comes of pictures in memory."""
    packed(pictures, tmp_path / "a.pack")
    source, labels = open_source("imagefolder", pictures), []
    labels = [record.label for record in source.records]
    names = [record.path for record in source.records]
    write_pack(tmp_path / "b.pack", upright(pictures), labels, paths=names, classes=source.classes)
    a, b = files(tmp_path / "a.pack"), files(tmp_path / "b.pack")
    facts = [json.loads(each.pop("meta.json")) for each in (a, b)]
    assert a == b
    for each in facts:
        del each["crc"], each["options"], each["seen"]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("short", [None, 32])
def test_centre_squares(pictures, tmp_path, short):
    out = tmp_path / "a.pack"
    packed(pictures, out, encoding="raw", short_side=short, center_crop=True)
    pack = Pack(out)
    for row, whole in enumerate(upright(pictures, short_side=short)):
        side = min(whole.shape[:2])
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        np.testing.assert_array_equal(
            pack.picture(row), whole[top : top + side, left : left + side]
        )
    assert short is None or (pack.sizes(np.arange(pack.rows)) == 32).all()
    values = pack.tiles.astype(np.float64) / 255
    np.testing.assert_allclose(pack.mean, values.mean(axis=0))  # of what is kept


def test_it_is_the_folder_in_all_but_pixels(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    packed(mixed, tmp_path / "a.pack", short_side=40)
    pack, folder = Pack(tmp_path / "a.pack"), Folder(mixed)
    rows = [i for i, name in enumerate(map(folder.name, range(folder.rows))) if "cut" not in name]
    assert pack.keys.tolist() == folder.keys[rows].tolist()
    assert pack.numbers.tolist() == [i for i in range(39) if i not in (20, 38)]


def test_shuffled(pictures, tmp_path):
    for name, seed in {"a": None, "b": 5, "c": 5}.items():
        packed(pictures, tmp_path / f"{name}.pack", encoding="raw", shuffle=seed)
    a, b, c = (Pack(tmp_path / f"{name}.pack") for name in "abc")
    assert files(b.path) == files(c.path)
    assert sorted(b.numbers) == [*range(37)] != b.numbers.tolist()
    for row, number in enumerate(b.numbers.tolist()):
        np.testing.assert_array_equal(b.picture(row), a.picture(number))
        assert (b.keys[row], b.labels[row]) == (a.keys[number], a.labels[number])
        assert b.name(row) == a.name(number)


# ---- however made ----


@pytest.mark.parametrize(("workers", "part"), [(0, 3), pytest.param(2, 16, marks=pytest.mark.soak)])
def test_bytes_depend_on_neither_workers_nor_parts(mixed, unbroken, tmp_path, workers, part):
    packed(mixed, tmp_path / "a.pack", part=part, workers=workers)
    assert files(tmp_path / "a.pack") == unbroken


def test_a_part_that_has_changed_is_made_anew(mixed, unbroken, tmp_path, monkeypatch):
    """By a bit of a tile, of a size, or its end; told once, and mended by the next start."""
    out, parts = tmp_path / "a.pack", tmp_path / "a.pack.parts"
    with monkeypatch.context() as broken:
        broken.setattr(write, "write_folder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed(mixed, out)
    harms = {
        "a tile": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        "a height": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "a large height": lambda data: data[:2] + bytes([70]) + data[3:],
        "a negative height": lambda data: data[:3] + bytes([200]) + data[4:],
    }
    for harm in harms.values():
        file = parts / "0000000010.tiles"
        file.write_bytes(harm(file.read_bytes()))
        with pytest.raises(UsageError, match=r"0000000010.tiles has changed since it was written"):
            packed(mixed, out)
        with monkeypatch.context() as broken:
            broken.setattr(write, "write_folder", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                packed(mixed, out)
    told = packed(mixed, out)
    assert (told.converted, told.resumed) == (0, 38)
    assert files(out) == unbroken
    assert [p.name for p in tmp_path.iterdir()] == ["a.pack"]


def test_a_full_disk_harms_nothing(mixed, unbroken, tmp_path, capsys):
    """It is met while the parts are put together: they stay, and what was half made makes room."""
    out, (soft, hard) = tmp_path / "a.pack", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        assert entry.status(lambda: packed(mixed, out)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "tiles.npy: File too large; nothing written before is harmed" in capsys.readouterr().err
    names = {path.suffix for path in (tmp_path / "a.pack.parts").iterdir()}
    assert names == {".tiles", ".json", ""}  # parts, their facts and the plan, the lock
    told = packed(mixed, out)
    assert (told.converted, told.resumed) == (0, 38)
    assert files(out) == unbroken


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def all_gather(self, value):
        values, barrier = TABLE
        values[self.rank] = value
        barrier.wait(30)
        found = [values[rank] for rank in range(self.world)]
        barrier.wait(30)
        return found


TABLE: tuple[dict, threading.Barrier]


@pytest.mark.parametrize(("world", "part"), [(2, 10), (3, 7)])
def test_ranks_share_the_parts(mixed, unbroken, tmp_path, world, part):
    global TABLE
    TABLE = ({}, threading.Barrier(world))
    told = [None] * world

    def work(rank: int) -> None:
        given = options(mixed, tmp_path / "a.pack")
        told[rank] = convert(given, Threads(rank, world), part=part)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "a.pack") == unbroken
    assert {(t.manifest["rows"], t.converted, len(t.rejects)) for t in told} == {(37, 38, 2)}


# ---- from a .beton ----


@pytest.mark.parametrize("kind", ["jpg", "raw", "set"])
def test_a_beton_keeps_its_rows(mixed, tmp_path, kind):
    """Labels, classes, names, numbers, keys: so the fingerprint; and its pixels, to the bit."""
    given = {"encoding": "raw" if kind == "raw" else "jpg", "keep_parts": kind == "set"}
    source = beton_write.BetonOptions(
        source="imagefolder", root=mixed, out=tmp_path / "a.beton", workers=0, shuffle=4, **given
    )
    root = convert(source, part=9).out
    out = tmp_path / "a.pack"
    told = packed(root, out, source="beton", encoding="raw")
    pack, beton = Pack(out), Beton(root)
    assert (told.manifest["rows"], told.manifest["seen"], told.rejects) == (37, 37, [])
    assert pack.fingerprint == beton.fingerprint
    assert pack.keys.tolist() == beton.keys.tolist()
    assert pack.labels.tolist() == beton.labels.tolist()
    assert pack.classes == beton.classes
    assert pack.numbers.tolist() == beton.numbers.tolist()
    for row in range(37):
        assert pack.name(row) == beton.name(row)
        np.testing.assert_array_equal(pack.picture(row), beton.picture(row))
    paths = f"{root}.paths.jsonl" if root.is_file() else root / "set.paths.jsonl"
    assert (out / "paths.jsonl").read_bytes() == Path(paths).read_bytes()


def test_a_beton_of_ffcv_itself_is_a_source_too(tmp_path):
    """Nothing lies beside it: its rows have numbers for names, and keep them when they are shuffled."""
    photos = [photo(i, 30 + i, 44) for i in range(13)]
    fields = {"image": "image", "label": ("int", np.arange(13) % 4)}
    root = write_beton(tmp_path / "a.beton", photos, fields, page=2**14, modes="raw")
    packed(root, tmp_path / "a.pack", source="beton", encoding="raw")
    pack, beton = Pack(tmp_path / "a.pack"), Beton(root)
    assert pack.fingerprint == beton.fingerprint
    assert pack.name(7) == "00000007"
    for row, picture in enumerate(photos):
        np.testing.assert_array_equal(pack.picture(row), picture)
    packed(root, tmp_path / "b.pack", source="beton", encoding="raw", shuffle=1)
    mixed_up = Pack(tmp_path / "b.pack")
    assert mixed_up.keys.tolist() == mixed_up.numbers.tolist() != [*range(13)]
    for row, number in enumerate(mixed_up.numbers.tolist()):
        np.testing.assert_array_equal(mixed_up.picture(row), photos[number])


def test_damaged_records_of_a_beton_are_rejects(pictures, tmp_path):
    """By their checksum; where nothing lies beside the file, by what the decoder says."""
    source = beton_write.BetonOptions(
        source="imagefolder", root=pictures, out=tmp_path / "a.beton", workers=0
    )
    root = convert(source).out
    whole, data = Beton(root), bytearray(root.read_bytes())
    at, size = int(whole.contents.ptr[5]), int(whole.contents.size[5])
    data[at + size // 2] ^= 16
    at = int(whole.contents.ptr[8])
    data[at : at + 20] = bytes(20)
    root.write_bytes(data)
    told = packed(root, tmp_path / "a.pack", source="beton")
    assert [path for path, _ in told.rejects] == [whole.name(5), whole.name(8)]
    assert {why for _, why in told.rejects} == {"its checksum does not agree"}
    pack = Pack(tmp_path / "a.pack")
    rows = [row for row in range(37) if row not in (5, 8)]
    assert pack.keys.tolist() == whole.keys[rows].tolist()
    assert pack.numbers.tolist() == rows
    alone = Path(shutil.copy(root, tmp_path / "alone.beton"))
    told = packed(alone, tmp_path / "b.pack", source="beton")
    assert [path for path, _ in told.rejects] == ["00000008"]


def test_workers_get_places_and_no_opened_file(pictures, tmp_path):
    """What travels is small, and reads by itself."""
    source = beton_write.BetonOptions(
        source="imagefolder", root=pictures, out=tmp_path / "a.beton", workers=0
    )
    opened = open_source("beton", convert(source).out)
    travelled = pickle.dumps(opened.part(20, 36))
    assert len(travelled) < 3000
    there, beton = pickle.loads(travelled), Beton(tmp_path / "a.beton")
    assert there.records == opened.records[20:36]
    for i in range(16):
        np.testing.assert_array_equal(there.read(i), beton.picture(20 + i))
        np.testing.assert_array_equal(opened.read(20 + i), beton.picture(20 + i))


def test_a_beton_without_labels(pictures, tmp_path):
    source = beton_write.BetonOptions(
        source="imagefolder", root=pictures, out=tmp_path / "a.beton", workers=0
    )
    root = convert(source).out
    packed(root, tmp_path / "a.pack", source="beton", label_from="none")
    pack = Pack(tmp_path / "a.pack")
    assert (pack.labels == -1).all()
    assert pack.classes == ()
    with pytest.raises(UsageError, match=r"--split val: a .beton .* has no splits"):
        packed(root, tmp_path / "b.pack", source="beton", split="val")
    with pytest.raises(UsageError, match=r"is no .beton of version 2"):
        packed(SCRIPT, tmp_path / "b.pack", source="beton")


# ---- the command ----


def command(root: Path, out: Path, *args) -> list:
    return ["--source", "imagefolder", "--root", root, "--out", out, "--workers", 0, *args]


def test_rejects_are_named_and_end_with_status_1(mixed, tmp_path, capsys):
    out = tmp_path / "a.pack"
    assert main(*command(mixed, out)) == 1
    said = capsys.readouterr().out
    assert "37 written + 2 rejected + 0 left out = 39 files seen" in said
    assert "rejected: class1/020cut.jpg" in said
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["class1/020cut.jpg", "class2/empty.png"]
    assert main(*command(mixed, out, "--allow-rejects")) == 0
    assert "is already there, made with the same options" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ycc", "raw"])
def test_an_estimate_is_near_and_writes_nothing(pictures, tmp_path, capsys, encoding):
    out = tmp_path / "a.pack"
    assert main(*command(pictures, out, "--estimate", "--encoding", encoding)) == 0
    said = capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
    assert ("PSNR" in said) == (encoding == "ycc")
    assert ("exact" in said) == (encoding == "raw")
    guess = int(said.split(": ")[1].split(" bytes")[0].replace(",", ""))
    told = packed(pictures, out, encoding=encoding)
    assert guess == pytest.approx(told.manifest["bytes"] - len(files(out)["paths.jsonl"]), abs=1000)


def test_overwrite_replaces_a_pack_and_nothing_else_does(pictures, tmp_path, capsys):
    out = tmp_path / "a.pack"
    assert main(*command(pictures, out, "--encoding", "raw")) == 0
    before = files(out)
    assert main(*command(pictures, out)) == 2
    assert "made with --encoding raw, not ycc: add --overwrite" in capsys.readouterr().err
    assert files(out) == before
    assert main(*command(pictures, out, "--overwrite")) == 0
    assert {*files(out)} == write.NAMES - {"pixels.npy", "rejects.jsonl", "skipped.jsonl"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pack"]


def test_a_link_stays_a_link(pictures, tmp_path):
    there, out = tmp_path / "large disk" / "pack", tmp_path / "a.pack"
    there.mkdir(parents=True)
    out.symlink_to(there)
    packed(pictures, out)
    packed(pictures, out, encoding="raw", overwrite=True)
    assert out.is_symlink()
    assert Pack(there).encoding == "raw"
    assert [p.name for p in there.parent.iterdir()] == ["pack"]


def foreign(out: Path, root: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")


def damaged(out: Path, root: Path) -> None:
    packed(root, out)
    (out / "sizes.npy").unlink()


@pytest.mark.parametrize(
    ("there", "args", "words"),
    [
        (None, ["--out", "a.beton"], "--out got a.beton: its name must end in .pack"),
        (lambda out, root: out.touch(), [], "a file: a pack is a folder; choose another --out"),
        (foreign, [], "holds thesis.tex, no file of a pack"),
        (foreign, ["--overwrite"], "holds thesis.tex, no file of a pack"),
        (damaged, [], "sizes.npy cannot be read (No such file"),
        (None, ["--short-side", "0"], "--short-side got 0"),
        (None, ["--short-side", "9", "--max-side", "9"], "both set the size"),
        (None, ["--limit", "0"], "--limit got 0"),
        (None, ["--root", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(pictures, tmp_path, monkeypatch, capsys, there, args, words):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a.pack"
    if there:
        there(out, pictures)
    before = files(out) if out.is_dir() else {}
    capsys.readouterr()
    assert main(*command(pictures, out), *args) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert before == (files(out) if out.is_dir() else {})
    assert {p.name for p in tmp_path.iterdir()} <= {"a.pack"}


def test_what_was_damaged_is_made_anew_by_overwrite(mixed, unbroken, tmp_path):
    out = tmp_path / "a.pack"
    damaged(out, mixed)
    (out / ".DS_Store").touch()  # what is hidden is in nobody's way
    packed(mixed, out, overwrite=True)
    assert files(out) == unbroken


def test_no_picture_at_all_leaves_nothing(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    with pytest.raises(UsageError, match="no picture of 1 could be used"):
        packed(root, tmp_path / "a.pack")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
