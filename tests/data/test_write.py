"""What dataprep/to_ffcv.py promises: FFCV's format to the byte, nothing lost, the same bytes however made."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from truth import photo

from fastrot import disk
from fastrot.config import RunError, UsageError
from fastrot.data.beton import layout, write
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.pictures import decode, shrink
from fastrot.data.prepare import encode
from fastrot.data.prepare.convert import convert
from fastrot.data.prepare.encode import Chunk, EncodeSpec, encode_chunk, spread
from fastrot.data.prepare.options import NOT_IN_PLAN
from fastrot.data.prepare.parts import PartStats
from fastrot.data.sources.open import open_source
from fastrot.data.sources.records import InMemory

SCRIPT = Path(__file__).parents[2] / "dataprep" / "to_ffcv.py"


def options(root: Path, out: Path, **how) -> write.BetonOptions:
    return write.BetonOptions(source="imagefolder", root=root, out=out, **{"workers": 0, **how})


def main(*args) -> int:
    spec = importlib.util.spec_from_file_location("to_ffcv", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(script)
        return script.main([str(arg) for arg in args])
    finally:
        sys.path[:] = path


def command(root, out, *args) -> list[str]:
    return ["--source", "imagefolder", "--root", root, "--out", out, "--workers", 0, *args]


def parse(path: Path):
    """The format once more, from its description alone; every invariant that FFCV relies on is asserted."""
    data = path.read_bytes()
    version, fields = np.frombuffer(data, "<u2", 2)
    page = int(np.frombuffer(data, "<u4", 1, 4)[0])
    rows, table_at = (int(x) for x in np.frombuffer(data, "<u8", 2, 8))
    assert (version, fields) == (2, 3)
    assert rows > 0
    assert page >= 2**21
    assert page & (page - 1) == 0
    for i, (kind, name) in enumerate([(2, b"image"), (1, b"label"), (1, b"index")]):
        field = data[24 + 1041 * i : 24 + 1041 * (i + 1)]
        assert field == bytes([kind]) + name.ljust(16, b"\0") + bytes(1024)
    table = np.frombuffer(data[table_at:], "<u8").reshape(-1, 3)
    assert len(table) == rows
    assert table[:, 0].tolist() == list(range(rows))
    assert len(set(table[:, 1].tolist())) == rows
    pictures, labels, end = [], [], 24 + 1041 * 3 + 32 * rows
    for (row, ptr, size), at in zip(table.tolist(), range(3147, end, 32), strict=True):
        one = data[at : at + 32]
        mode, (width, height) = one[0], np.frombuffer(one, "<u2", 2, 1).tolist()
        label, index = np.frombuffer(one, "<i8", 2, 16).tolist()
        assert np.frombuffer(one, "<u8", 1, 5)[0] == ptr
        assert one[13:16] == b"\0\0\0"
        assert index == row
        assert size > 0
        assert end <= ptr
        assert ptr + size <= table_at
        assert ptr // page == (ptr + size - 1) // page
        end, record = ptr + size, data[ptr : ptr + size]
        if mode == 1:
            picture = np.frombuffer(record, np.uint8).reshape(height, width, 3)
        else:
            picture = simplejpeg.decode_jpeg(record)
        assert picture.shape == (height, width, 3)
        pictures.append(picture)
        labels.append(label)
    return pictures, labels, page


def upright(root: Path, short_side=None, max_side=None) -> tuple[list[np.ndarray], list[int]]:
    source = open_source("imagefolder", root)
    pictures = [decode((root / r.path).read_bytes()) for r in source.records]
    return [shrink(p, short_side, max_side) for p in pictures], [r.label for r in source.records]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir())}


# ---- what is in the file ----


@pytest.mark.parametrize("how", [{}, {"short_side": 36}, {"max_side": 50}], ids=str)
def test_raw_gives_back_every_bit(pictures, tmp_path, how):
    out = tmp_path / "a.beton"
    convert(options(pictures, out, encoding="raw", **how))
    wanted, labels = upright(pictures, **how)
    got, got_labels, page = parse(out)
    assert got_labels == labels
    assert page == 2**23
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("quality", "least"), [(90, 29), (60, 26)])
def test_jpg_is_near_the_source(pictures, tmp_path, quality, least):
    out = tmp_path / "a.beton"
    convert(options(pictures, out, quality=quality))
    for a, b in zip(parse(out)[0], upright(pictures)[0], strict=True):
        error = np.square(a.astype(float) - b).mean()
        assert 10 * np.log10(255**2 / error) > least


def test_shuffled_pictures_are_the_same_pictures_and_the_manifest_tells_their_order(
    pictures, tmp_path
):
    out = tmp_path / "a.beton"
    convert(options(pictures, out, encoding="raw", shuffle=3))
    facts = json.loads((tmp_path / "a.beton.json").read_bytes())
    order, source = facts["numbers"], open_source("imagefolder", pictures)
    assert facts["options"]["shuffle"] == 3
    assert sorted(order) == list(range(37)) != order
    wanted, wanted_labels = upright(pictures)
    got, labels, _ = parse(out)
    assert labels == [wanted_labels[i] for i in order]
    assert len(set(labels[:6])) > 1  # class-sorted they were all of one
    for a, i in zip(got, order, strict=True):
        np.testing.assert_array_equal(a, wanted[i])
    keys = np.load(tmp_path / "a.beton.keys.npy", allow_pickle=False)
    assert keys.tolist() == path_keys([source.records[i].path for i in order]).tolist()


def test_an_order_depends_on_its_seed_and_on_nothing_else(pictures, tmp_path):
    for name, how in {"a": {"workers": 2}, "b": {}}.items():
        convert(options(pictures, tmp_path / f"{name}.beton", shuffle=3, **how), part=10)
    a, b = ((tmp_path / f"{name}.beton").read_bytes() for name in "ab")
    assert a == b
    with pytest.raises(UsageError, match="made with --shuffle 3, not 4"):
        convert(options(pictures, tmp_path / "a.beton", shuffle=4))
    with pytest.raises(UsageError, match="made with --shuffle 3, not without"):
        convert(options(pictures, tmp_path / "a.beton"))
    with pytest.raises(UsageError, match="made without --limit: add"):
        convert(options(pictures, tmp_path / "a.beton", shuffle=3, limit=5))


def test_what_lies_beside_describes_the_file(pictures, tmp_path):
    out = tmp_path / "a.beton"
    convert(options(pictures, out, encoding="raw"))
    source, data = open_source("imagefolder", pictures), out.read_bytes()
    facts = json.loads((tmp_path / "a.beton.json").read_bytes())
    crcs = np.load(tmp_path / "a.beton.crc.npy", allow_pickle=False)
    keys = np.load(tmp_path / "a.beton.keys.npy", allow_pickle=False)
    lines = (tmp_path / "a.beton.paths.jsonl").read_text().splitlines()
    got, labels, _ = parse(out)
    paths = [record.path for record in source.records]
    assert [json.loads(line) for line in lines] == [
        {"path": path, "number": i} for i, path in enumerate(paths)
    ]
    assert crcs.dtype == np.uint32
    assert crcs.tolist() == [zlib.crc32(picture.tobytes()) for picture in got]
    assert keys.tolist() == path_keys(paths).tolist()
    assert facts["classes"] == ["class0", "class1", "class2"]
    assert facts["fingerprint"] == order_fingerprint(keys, np.array(labels))
    assert facts["numbers"] is None
    table_at = int(np.frombuffer(data, "<u8", 1, 16)[0])
    assert facts["head_crc"] == zlib.crc32(data[: 3147 + 32 * len(got)])
    assert facts["table_crc"] == zlib.crc32(data[table_at:])
    assert facts["rows"] == facts["seen"] == len(got)
    assert (facts["max_height"], facts["max_width"]) == (70, 84)
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in got]) / 255
    np.testing.assert_allclose(facts["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(facts["std"], pixels.std(0), rtol=1e-9)
    assert not list(tmp_path.glob("*.rejects.jsonl"))
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("value", [0, 255])
def test_statistics_are_exact_where_pictures_are_flat_and_large(value):
    flat = np.full((1500, 2000, 3), value, np.uint8)
    sums, squares = encode._channel_sums(flat)
    assert sums == (3_000_000 * value,) * 3
    assert squares == (3_000_000 * value**2,) * 3


@pytest.mark.parametrize("sizes", [[100, 5000, 3], [2**21, 2**21 - 1, 2**21 + 1, 7]], ids=str)
def test_a_record_lies_inside_one_page_however_large(tmp_path, sizes, monkeypatch):
    monkeypatch.setattr(write.layout, "PAGE", 2**21)
    with open(tmp_path / "a", "x+b") as file:
        packer = write.Packer(file, len(sizes) + 2)  # room for more rows than come
        for size in sizes:
            packer.add(bytes(size), mode=1, height=1, width=size % 65_536, label=0)
        packer.finish()
    header = np.fromfile(tmp_path / "a", write.layout.HEADER, 1)[0]
    table = np.fromfile(tmp_path / "a", write.layout.TABLE, offset=int(header["table"]))
    first, last = table["ptr"], table["ptr"] + table["size"] - 1
    assert (first // header["page"] == last // header["page"]).all()
    assert header["page"] == (2**22 if max(sizes) > 2**21 else 2**21)
    assert [len(record) for _, record in write.read_part(tmp_path / "a")] == sizes


def test_labels_limit_and_classes(pictures, tmp_path):
    told = convert(options(pictures, tmp_path / "a.beton", limit=5, label_from="none"))
    assert parse(tmp_path / "a.beton")[1] == [-1] * 5
    assert (told.manifest["rows"], told.manifest["beyond_limit"], told.manifest["seen"]) == (
        5,
        32,
        37,
    )


# ---- however it is made ----


def test_bytes_depend_on_neither_workers_nor_parts(pictures, tmp_path):
    made = []
    for workers, part in [(0, 10_000), (1, 16), (2, 7), (3, 20)]:
        out = tmp_path / f"{workers}-{part}" / "a.beton"
        convert(options(pictures, out, workers=workers, short_side=36), part=part)
        made.append(files(out))
    assert made[1:] == made[:1] * 3


def test_a_second_run_goes_on_from_whole_parts(pictures, tmp_path, monkeypatch):
    straight, out = tmp_path / "straight" / "a.beton", tmp_path / "killed" / "a.beton"
    convert(options(pictures, straight), part=10)
    with monkeypatch.context() as broken:
        broken.setattr(write, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(options(pictures, out), part=10)
    parts = out.parent / "a.beton.parts"
    assert not out.exists()
    assert len(parse(parts / "0000000010.beton")[0]) == 10  # a whole .beton of its own
    (parts / "0000000030.json").unlink()  # the last part is not whole
    with open(parts / "0000000010.beton", "r+b") as file:
        file.truncate(999)  # cut short
    (parts / ".merged.0.tmp").write_bytes(b"left by a killed run")
    told = convert(options(pictures, out), part=10)
    assert (told.converted, told.resumed) == (17, 20)
    assert files(out) == files(straight)


def test_a_changed_part_is_found(pictures, tmp_path, monkeypatch):
    out = tmp_path / "a.beton"
    with monkeypatch.context() as broken:
        broken.setattr(write, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(options(pictures, out))
    part = tmp_path / "a.beton.parts" / "0000000000.beton"
    data = bytearray(part.read_bytes())
    data[3147 + 32 * 37 + 500] ^= 1
    part.write_bytes(data)
    with pytest.raises(UsageError, match="run again"):
        convert(options(pictures, out))
    assert convert(options(pictures, out)).manifest["rows"] == 37


def test_other_options_or_pictures_are_refused_by_name(pictures, tmp_path, monkeypatch):
    root, out = tmp_path / "pictures", tmp_path / "a.beton"
    shutil.copytree(pictures, root)
    with monkeypatch.context() as broken:
        broken.setattr(write, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(options(root, out))
    with pytest.raises(UsageError, match=r"a.beton.parts was begun with --quality 90, not 80"):
        convert(options(root, out, quality=80))
    (root / "class0" / "000.jpg").unlink()
    with pytest.raises(UsageError, match="begun from other pictures"):
        convert(options(root, out))
    assert convert(options(root, out, overwrite=True)).manifest["rows"] == 36
    assert convert(options(root, out)).already
    with pytest.raises(UsageError, match=r"made with --encoding jpg, not raw: add --overwrite"):
        convert(options(root, out, encoding="raw"))
    assert convert(options(root, out, encoding="raw", overwrite=True)).manifest["rows"] == 36
    with open(out, "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(UsageError, match="no whole file of ours"):
        convert(options(root, out, encoding="raw"))


# ---- what is told ----


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Three good pictures, two bad ones of which one is only found while decoding, one text."""
    root = tmp_path / "damaged" / "a"
    root.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(photo(i)).save(root / f"{i}.jpg")
    (root / "1cut.jpg").write_bytes((root / "1.jpg").read_bytes()[:900])
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("no picture")
    return root.parent


def test_rejects_are_named_and_counted(damaged, tmp_path, capsys):
    out = tmp_path / "a.beton"
    assert main(*command(damaged, out)) == 1
    said = capsys.readouterr().out
    assert "3 written + 2 rejected + 1 left out = 6 files seen" in said
    assert "rejected: a/1cut.jpg: " in said
    lines = [json.loads(x) for x in (tmp_path / "a.beton.rejects.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {"a/1cut.jpg", "a/empty.png"}
    assert all(line["reason"] for line in lines)
    assert len(parse(out)[0]) == 3
    numbers = json.loads((tmp_path / "a.beton.json").read_bytes())["numbers"]
    assert numbers == [0, 1, 3]  # torchvision's, which counts the bad ones
    assert main(*command(damaged, out, "--allow-rejects")) == 0  # already there
    assert main(*command(damaged, out)) == 1


ACCOUNT = {  # files of a root -> status, what is printed of it
    ("cat/1.jpg", "dog/2.jpg", "dog/@eaDir/2.jpg"): (
        0,
        "2 pictures + 0 rejected + 1 left out = 3 files seen; nothing was converted",
        "2 classes, pictures in each: cat: 1, dog: 1",
        "1 left out: 1 in @eaDir; named in {at}.skipped.jsonl",
    ),
    ("0.jpg", "x/2.jpg"): (
        1,
        "1 picture + 0 rejected + 1 left out = 2 files seen; nothing was converted",
        "1 picture lies beside the class folders, without a label: --label-from none takes all pictures, as do "
        "methods that need no labels",
        "1 class for all pictures: x: 1 (none with --label-from none)",
        "1 left out: 1 .jpg (beside the class folders); named in {at}.skipped.jsonl",
        "status 1, since pictures are missing: mend that, or --allow-rejects accepts it",
    ),
    ("d/a/1.jpg", "d/b/1.jpg", "d/b/2.jpg", "d/c/1.jpg", "d/e/1.jpg", "d/f/1.jpg", "d/f/2.jpg"): (
        0,
        "7 pictures + 0 rejected + 0 left out = 7 files seen; nothing was converted",
        "went through d/",
        "5 classes, pictures in each: a: 1, b: 2, ..., f: 2; smallest: a: 1",
    ),
    ("1.jpg",): (0, "1 picture + 0 rejected + 0 left out = 1 file seen; nothing was converted"),
}


@pytest.mark.parametrize("files", ACCOUNT)
def test_the_account_is_plain(tmp_path, capsys, pictures, files):
    picture, (status, *said) = next(pictures.rglob("*.jpg")).read_bytes(), ACCOUNT[files]
    for file in files:
        (tmp_path / "root" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / file).write_bytes(picture)
    out = tmp_path / "a.beton"
    assert main(*command(tmp_path / "root", out, "--dry-run")) == status
    first, *lines = capsys.readouterr().out.splitlines()
    assert [first.partition(": ")[2], *lines] == [line.format(at=f"{out}.dry-run") for line in said]
    assert not out.exists()
    assert main(*command(tmp_path / "root", out)) == status  # and the conversion tells the same
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in said[1:] if line.format(at=out) not in lines] == []


def test_a_dry_run_changes_nothing_of_a_finished_file(damaged, tmp_path, capsys):
    out, new = tmp_path / "a.beton", tmp_path / "new" / "b.beton"
    main(*command(damaged, out))
    before = {file: file.read_bytes() for file in tmp_path.glob("a.beton*")}
    (damaged / "a" / "Thumbs.db").touch()
    for each in (out, new):  # of which one's folder is not there
        capsys.readouterr()
        assert main(*command(damaged, each, "--dry-run")) == 1
        named = each.with_name(f"{each.name}.dry-run.skipped.jsonl")
        assert f"2 left out: 1 Thumbs.db, 1 .txt; named in {named}" in capsys.readouterr().out
        left = [json.loads(line)["path"] for line in named.read_text().splitlines()]
        assert left == ["a/Thumbs.db", "a/notes.txt"]
    assert {file: file.read_bytes() for file in before} == before


def test_a_part_of_rejects_alone(damaged, tmp_path):
    told = convert(options(damaged, tmp_path / "a.beton"), part=1)
    assert (told.manifest["rows"], len(told.rejects)) == (3, 2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--short-side", 32, "--max-side", 32], "--max-side 32 both set the size"),
        (["--quality", 0], "--quality got 0"),
        (["--limit", 0], "--limit got 0"),
        (["--split", "nowhere"], "nowhere"),
        (["--out", "a.tar"], "must end in .beton"),
        (["--root", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=lambda x: None if isinstance(x, list) else x,
)
def test_wrong_use_is_one_sentence(pictures, tmp_path, capsys, args, says):
    assert main(*command(pictures, tmp_path / "a.beton", *args)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_option_is_explained(capsys):
    """The words come from comments, which a formatter may push out of tyro's sight."""
    with pytest.raises(SystemExit):
        main("--help")
    said = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    assert "--keep-parts no merging" in said.replace("--no-keep-parts ", "").replace(",", "")
    assert not re.findall(r"--\S+ (?:\S*[}|A-Z]+ )?\((?:default|required)", said)


def test_no_picture_at_all(tmp_path, capsys):
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    assert main(*command(root, tmp_path / "a.beton")) == 2
    assert "cut.jpg" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_estimate_is_near_and_writes_nothing(pictures, tmp_path, capsys):
    out = tmp_path / "a.beton"
    assert main(*command(pictures, out, "--estimate", "--encoding", "raw")) == 0
    assert "exact" in capsys.readouterr().out
    told = convert(options(pictures, out, estimate=True, quality=75))
    assert not list(tmp_path.iterdir())
    convert(options(pictures, out, quality=75))
    assert abs(told.bytes / out.stat().st_size - 1) < 0.1
    errors, pixels = 0.0, 0
    for a, b in zip(parse(out)[0], upright(pictures)[0], strict=True):
        errors, pixels = errors + np.square(a.astype(float) - b).sum(), pixels + a.size
    assert told.psnr == pytest.approx(10 * np.log10(255**2 * pixels / errors), abs=1e-6)


# ---- processes ----


def test_a_raising_worker_is_surfaced():
    with pytest.raises(ValueError, match="'seven'"):
        list(spread(int, ["7", "seven"], 1))


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(RunError, match=r"run again.*--workers than 1"):
        list(spread(os._exit, [9], 1))


def test_a_bug_names_the_picture(pictures):
    class Broken(write.Coder):
        def encode(self, picture):
            raise ZeroDivisionError

    source = open_source("imagefolder", pictures)
    with pytest.raises(RuntimeError, match=r"class0/000.jpg.*ZeroDivisionError"):
        encode_chunk(EncodeSpec(Broken()), Chunk(0, source.part(0, 3)))


def test_ctrl_c_and_kill_leave_whole_parts(pictures, tmp_path):
    """By hand in a process of its own: parts of 16, and a source slow enough to be interrupted."""
    out = tmp_path / "a.beton"
    program = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell's & has them ignore
        "if __name__ == '__mp_main__':\n"  # a worker that begins: Ctrl-C would end it with a traceback
        "    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "from fastrot import entry; from fastrot.data.beton import write; from fastrot.data.prepare import convert, parts\n"
        "made = parts.Part.make\n"
        "def slow(*args):\n"  # in naps: a signal in the moment before a sleep begins does not end it
        "    made(*args); print('part', flush=True)\n"
        "    for _ in range(600): time.sleep(.1)\n"
        "parts.Part.make = slow\n"
        f"o = write.BetonOptions(source='imagefolder', root=Path({str(pictures)!r}), "
        f"out=Path({str(out)!r}), workers=1)\n"
        "if __name__ == '__main__': sys.exit(entry.status(lambda: convert.run(o, part=16)))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.Popen(
        [sys.executable, script], env=environment, stdout=-1, stderr=-1, text=True
    )
    assert run.stdout.readline() == "part\n"
    start = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert run.returncode == 130
    assert "Traceback" not in error
    assert convert(options(pictures, out), part=16).resumed == 16


def test_the_command_runs_from_anywhere(pictures, tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, *map(str, command(pictures, "made/a.beton")), "--workers", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "37 written" in run.stdout
    assert len(parse(tmp_path / "made" / "a.beton")[0]) == 37


# ---- disk.py ----

HOLDER = """
import os, sys
from pathlib import Path
from fastrot.disk import locked
folder = Path(sys.argv[1])
with locked(folder, "taken"):
    print("held", flush=True)
    input()
    (folder / "lock").unlink()
    if sys.argv[2] == "folder":
        folder.rmdir()
"""


@pytest.mark.parametrize("removed", ["lock", "folder"])
def test_a_lock_that_its_owner_removes_at_the_end_is_not_taken(tmp_path, monkeypatch, removed):
    """Where it was waited for: a third process would lock the next file of that name."""
    folder = tmp_path / "held"
    folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, removed],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(disk.__file__).parents[1],
    )
    assert holder.stdout.readline() == "held\n"
    waiting = SimpleNamespace(sleep=lambda _: holder.communicate("end\n"), monotonic=lambda: 0.0)
    monkeypatch.setattr(disk, "time", waiting)
    if removed == "lock":
        with disk.locked(folder, "taken"):
            assert (folder / "lock").read_text().startswith(f"process {os.getpid()} ")
    else:
        with pytest.raises(UsageError, match="it has ended just now"), disk.locked(folder, "taken"):
            pass
    assert holder.returncode == 0


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    disk.replace_bytes(path, b"old")

    def fails(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disk.write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_no_jpeg_holds_is_rejected():
    with pytest.raises(write.BadPicture, match="70000x1 pixels: a side of a JPEG may have 65,500"):
        write.Coder().encode(np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(2, "No such file"), None),
        (OSError(116, "Stale file handle"), None),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error.*again to go on"),
        (MemoryError(), "more memory than there is.*fewer --workers"),
    ],
    ids=["gone", "stale", "disk", "memory"],
)
def test_what_cannot_be_read_is_rejected_unless_the_machine_is_at_fault(pictures, error, says):
    class Fails(InMemory):
        def read(self, i):
            raise error

    (record, *_) = open_source("imagefolder", pictures).records
    chunk = Chunk(7, Fails(root=pictures, records=[record], pictures=[]))
    spec = EncodeSpec(write.Coder())
    if says is None:
        (reject,) = encode_chunk(spec, chunk)
        assert (reject.record, reject.reason) == (7, f"cannot be read: {error.strerror}")
    else:
        with pytest.raises(RunError, match=says):
            encode_chunk(spec, chunk)


def test_statistics_of_a_large_picture_are_those_of_its_pixels():
    """It is summed up in bands."""
    picture = np.random.default_rng(0).integers(0, 256, (1100, 701, 3), np.uint8)
    wide = picture.astype(np.int64)
    sums, squares = encode._channel_sums(picture)
    assert sums == tuple(wide.sum((0, 1)).tolist())
    assert squares == tuple((wide**2).sum((0, 1)).tolist())


def test_mean_and_std_are_rounded_alike_on_every_processor():
    """A square root is, everywhere; a power is not."""
    draw = np.random.default_rng(0)
    for sums in draw.integers(10**6, 2 * 10**6, (4000, 3)).tolist():
        squares = [s * s // 10**4 + 10**7 for s in sums]
        mean, std = PartStats(pixels=10**4, sums=sums, squares=squares).mean_and_std()
        exact = [10**4 * q - s * s for s, q in zip(sums, squares, strict=True)]
        assert std == (np.sqrt([v / 10**8 for v in exact]) / 255).tolist()
        assert mean == [s / 2_550_000 for s in sums]


def test_options_that_change_no_byte_are_named():
    names = {field.name for field in dataclasses.fields(write.BetonOptions)}
    assert set(NOT_IN_PLAN) < names


def test_a_record_may_end_with_its_page(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        packer = write.Packer(file, 2)
        first = layout.PAGE - packer._at
        packer.add(bytes(first), mode=1, height=1, width=1, label=0)
        assert packer._at == layout.PAGE
        packer.add(bytes(layout.PAGE), mode=1, height=1, width=1, label=0)
        assert packer._at == 2 * layout.PAGE
