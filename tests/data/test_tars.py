"""Tar shards: ordinary WebDataset, DALI's index, our own; written whole or not at all, and refused where they are not."""

import importlib.util
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from truth import photo

from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError
from fastrot.core import DamagedRecord, View
from fastrot.data import pictures as decoding
from fastrot.data.prepare.convert import convert
from fastrot.data.prepare.writer import Converted
from fastrot.data.tars import layout
from fastrot.data.tars.read import Tars
from fastrot.data.tars.write import TarsOptions

ROOT = Path(__file__).parents[2]
VIEW = View(crops=(RandomResized(size=24), Shifted(size=30, pad=5)))


def options(root: Path, out: Path, **more) -> TarsOptions:
    return TarsOptions(**{"source": "imagefolder", "root": root, "out": out, "workers": 0, **more})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shards(odd, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    convert(options(odd, out, shard=7))
    return out


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- what is written ----


def test_bytes_are_the_originals_and_sizes_those_of_upright_pictures(odd, shards):
    data = Tars(shards)
    assert data.rows == len([*odd.rglob("*.*")])
    for row in range(data.rows):
        encoded = (odd / data.name(row)).read_bytes()
        assert data.record(row).tobytes() == encoded
        picture = decoding.decode(encoded)
        assert data.sizes(np.array([row])).tolist() == [list(picture.shape[:2])]
        assert np.array_equal(data.picture(row), picture)


def test_a_tar_is_any_tar(odd, shards):
    data, row = Tars(shards), 0
    for shard in sorted(shards.glob("*.tar")):
        assert shard.stat().st_size % layout.RECORD == 0
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name.split(".")[0] == label.name.split(".")[0]
                suffix = Path(data.name(row)).suffix
                assert Path(image.name).suffix == {".tiff": ".tif"}.get(suffix, suffix)
                assert tar.extractfile(image).read() == data.record(row).tobytes()
                assert int(tar.extractfile(label).read()) == data.labels[row]
                row += 1
    assert row == data.rows


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")
def test_webdataset_reads_them(shards):
    import webdataset

    data = Tars(shards)
    names = [str(file) for file in sorted(shards.glob("*.tar"))]
    read = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    for row, sample in enumerate(read):
        (ending,) = {*sample} - {"__key__", "__url__", "__local_path__", "cls"}
        assert sample[ending] == data.record(row).tobytes()
        assert int(sample["cls"]) == data.labels[row]
    assert row == data.rows - 1


def test_the_index_is_that_of_dalis_own_tool(shards, tmp_path):
    tool = pytest.importorskip("wds2idx")
    for shard in sorted(shards.glob("*.tar")):
        with tool.IndexCreator(str(shard), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_bytes() == (tmp_path / "idx").read_bytes()


def test_pixels_and_order_are_those_of_the_folder(odd, shards):
    tars = open_loader(shards, VIEW, batch=5, workers=2)
    folder = open_loader(odd, VIEW, batch=5, workers=0)
    assert tars.fingerprint == folder.fingerprint
    assert tars.data.classes == folder.data.classes
    for a, b in zip(tars.epoch(2), folder.epoch(2), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_a_size_or_a_quality_makes_jpegs(odd, tmp_path):
    convert(options(odd, tmp_path / "small", short_side=20))
    convert(options(odd, tmp_path / "coarse", quality=30))
    small, coarse = Tars(tmp_path / "small"), Tars(tmp_path / "coarse")
    every = np.arange(small.rows)
    assert set(small.sizes(every).min(axis=1)) == {20}
    assert np.array_equal(coarse.sizes(every), open_data(odd).sizes(every))
    for data in (small, coarse):
        for row, size in enumerate(data.sizes(every).tolist()):
            assert decoding.is_upright_jpeg(data.record(row), *size)
    whole = decoding.decode((odd / coarse.name(3)).read_bytes())
    assert 0 < np.abs(coarse.picture(3).astype(int) - whole).mean() < 12
    assert small.mean == pytest.approx(coarse.mean, abs=0.02)


def test_pixels_without_a_file_become_pngs(tmp_path, monkeypatch):
    from fastrot.data.sources.records import Record, Source

    made = [photo(i, 32, 32) for i in range(5)]

    class Pixels(Source):
        def read(self, i):
            return made[i]

    records = [Record(f"{i}", i) for i in range(5)]
    source = Pixels(root=tmp_path, records=records, classes=tuple("abcde"))
    monkeypatch.setattr("fastrot.data.prepare.options.open_source", lambda *_, **__: source)
    convert(options(tmp_path, tmp_path / "shards", source="cifar10"))
    data = Tars(tmp_path / "shards")
    assert all(np.array_equal(data.picture(i), made[i]) for i in range(5))


def test_rejects_leave_no_hole_in_the_names(tmp_path):
    root = tmp_path / "pictures"
    for i in range(9):
        (root / "a").mkdir(parents=True, exist_ok=True)
        encoded = b"\xff\xd8\xff" + bytes(40) if 3 <= i < 6 else jpeg(photo(i, 30, 40))
        (root / "a" / f"{i}.jpg").write_bytes(encoded)
    summary = convert(options(root, tmp_path / "shards", shard=3))
    assert [path for path, _ in summary.rejects] == ["a/3.jpg", "a/4.jpg", "a/5.jpg"]
    assert {*files(tmp_path / "shards")} == {
        *(layout.BESIDE - {"skipped.jsonl"}),
        *("00000.tar", "00000.idx", "00001.tar", "00001.idx"),
    }
    data = Tars(tmp_path / "shards")
    assert [data.name(row) for row in range(6)] == [f"a/{i}.jpg" for i in (0, 1, 2, 6, 7, 8)]
    assert data.numbers.tolist() == [0, 1, 2, 6, 7, 8]


def jpeg(picture: np.ndarray, **more) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", **more)
    return out.getvalue()


def test_bytes_depend_on_neither_workers_nor_ranks_nor_a_broken_start(odd, shards, tmp_path):
    convert(options(odd, tmp_path / "workers", shard=7, workers=2))
    assert files(tmp_path / "workers") == files(shards)

    class Stop(Exception):
        pass

    def broken(self, path, pictures, room, made=[]):  # noqa: B006 (a counter)
        made.append(path)
        if len(made) == 3:
            raise Stop
        write(self, path, pictures, room)

    from fastrot.data.tars.write import TarsWriter

    write = TarsWriter.write_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TarsWriter, "write_part", broken)
        with pytest.raises(Stop):
            convert(options(odd, tmp_path / "again", shard=7))
    assert not (tmp_path / "again").exists()
    summary = convert(options(odd, tmp_path / "again", shard=7))
    assert summary.resumed == 14
    assert files(tmp_path / "again") == files(shards)
    assert not (tmp_path / "again.parts").exists()
    assert convert(options(odd, tmp_path / "again", shard=7)).already


@pytest.mark.soak
@pytest.mark.ddp
@pytest.mark.soak
def test_two_ranks_write_the_same_shards(odd, shards, tmp_path):
    """Under torchrun: see the test of the shared conversion for the rest of what ranks promise."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *(str(ROOT / "dataprep/to_dali.py"), "--source", "imagefolder", "--root"),
        *(str(odd), "--out", str(tmp_path / "shared"), "--shard", "7", "--workers", "0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 rejected" in done.stdout
    assert files(tmp_path / "shared") == files(shards)


@pytest.mark.parametrize("fatal", [0, 1], ids=["old-aside", "new-in-place"])
def test_killed_at_a_rename_it_is_made_again(odd, shards, tmp_path, monkeypatch, fatal):
    rename, done = os.rename, []

    def dies(old, new):
        if len(done) == fatal:
            raise KeyboardInterrupt
        done.append(new)
        rename(old, new)

    out = tmp_path / "out"
    convert(options(odd, out, shard=7, quality=50))  # what stands there before
    again = options(odd, out, shard=7, overwrite=True)
    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(again)
    monkeypatch.setattr(os, "rename", rename)
    convert(again)
    assert files(out) == files(shards)


def test_a_file_system_without_second_names_will_do(odd, shards, tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    convert(options(odd, tmp_path / "plain", shard=7))
    assert files(tmp_path / "plain") == files(shards)


def test_a_part_whose_rows_have_changed_is_made_anew(odd, shards, tmp_path, monkeypatch):
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(Converted, "write_beside", lambda *_: 1 / 0)  # all parts are whole by then
        with pytest.raises(ZeroDivisionError):
            convert(options(odd, out, shard=7))
    rows = np.load(tmp_path / "again.parts" / "0000000007.npy")
    rows["crc"][2] += 1
    np.save(tmp_path / "again.parts" / "0000000007.npy", rows)
    with pytest.raises(UsageError, match=r"0000000007\.tar has changed .* made anew"):
        convert(options(odd, out, shard=7))
    assert convert(options(odd, out, shard=7)).resumed == 20
    assert files(out) == files(shards)


def test_shards_are_a_source_again(shards, tmp_path):
    convert(options(shards, tmp_path / "again", source="webdataset", shard=10))
    data, again = Tars(shards), Tars(tmp_path / "again")
    assert again.labels.tolist() == data.labels.tolist()
    for row in range(data.rows):
        assert again.record(row).tobytes() == data.record(row).tobytes()


def test_estimate_writes_nothing(odd, tmp_path, shards):
    told = convert(options(odd, tmp_path / "none", estimate=True))
    assert told.psnr is None
    real = sum(shard.stat().st_size for shard in shards.glob("*.tar"))
    assert abs(told.bytes - real) < 0.25 * real
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quality": 0}, "--quality got 0"),
        ({"shard": 0}, "--shard got 0"),
        ({"out": Path("train.tar")}, "it wants a folder"),
        ({"short_side": 3, "max_side": 4}, "give one"),
    ],
)
def test_wrong_options_are_refused(odd, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        convert(options(odd, **{"out": tmp_path / "out", **more}))


def test_what_is_there_is_not_overwritten_unasked(odd, copied):
    with pytest.raises(UsageError, match=r"made without --quality: add --overwrite"):
        convert(options(odd, copied, shard=7, quality=50))
    (copied / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds mine\.txt"):
            convert(options(odd, copied, shard=7, overwrite=overwrite))
    (copied / "mine.txt").unlink()
    (copied / "00001.tar").unlink()
    with pytest.raises(UsageError, match=r"00001\.tar is missing or cut short"):
        convert(options(odd, copied, shard=7))
    convert(options(odd, copied, shard=7, overwrite=True))
    assert Tars(copied).rows


# ---- what is refused ----


def cut(folder: Path) -> None:
    with open(folder / "00001.tar", "r+b") as file:
        file.truncate(layout.RECORD)


def grown(folder: Path) -> None:
    with open(folder / "00001.tar", "ab") as file:
        file.write(bytes(layout.RECORD))


def another_tar(folder: Path) -> None:
    """As long as the right one, its pictures elsewhere."""
    size = (folder / "00001.tar").stat().st_size
    content = bytearray((folder / "00001.tar").read_bytes())
    content[layout.BLOCK : 2 * layout.BLOCK] = bytes(layout.BLOCK)
    (folder / "00001.tar").write_bytes((bytes(layout.BLOCK) + content)[:size])


def lost(name: str):
    return lambda folder: (folder / name).unlink()


def flipped(name: str, at: int):
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 4
        (folder / name).write_bytes(content)

    return flip


def renamed_version(folder: Path) -> None:
    from fastrot.data.manifest import sealed, unsealed

    facts = unsealed((folder / layout.MANIFEST).read_bytes())
    (folder / layout.MANIFEST).write_bytes(sealed({**facts, "version": 2}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, r"00001\.tar has 10,240 bytes, and had"),
        (grown, r"00001\.tar has .* bytes, and had"),
        (lost("00001.tar"), r"00001\.tar cannot be read"),
        (another_tar, r"00001\.tar is not the tar that rows\.npy was made for"),
        (lost("rows.npy"), r"rows\.npy cannot be read"),
        (flipped("rows.npy", -30), "is damaged"),
        (flipped("rows.npy", 3), "is damaged"),
        (flipped("keys.npy", -3), "is damaged"),
        (flipped(layout.MANIFEST, 60), "is damaged"),
        (renamed_version, "is of version 2, not 1"),
    ],
)
def test_a_damaged_folder_is_refused(copied, harm, words):
    harm(copied)
    with pytest.raises(UsageError, match=words):
        open_data(copied)


def test_a_flipped_bit_is_named_and_can_be_skipped(copied):
    data = Tars(copied)
    first = int(data._start[9])
    flipped("00001.tar", first + 300)(copied)
    sentence = rf"row 9 of .*00001\.tar \({data.name(9)}\) is damaged, its checksum does not agree"
    with pytest.raises(DamagedRecord, match=sentence):
        list(open_loader(copied, VIEW, batch=4, workers=2).epoch(0))
    loader = open_loader(copied, VIEW, batch=4, workers=2, on_bad_record="skip")
    seen = [i for batch in loader.epoch(0) for i in batch.index.tolist()]
    assert 9 not in seen
    assert len(loader.skipped) == 1


def test_a_folder_of_foreign_shards_is_no_format(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        tar.add(__file__, "0.txt")
    with pytest.raises(UsageError, match="holds tars without an index of ours"):
        open_data(tmp_path)
    with pytest.raises(UsageError, match="is not for --loader tars"):
        open_data(tmp_path, "tars")


def test_the_manifest_says_what_all_formats_say(odd, shards):
    facts = json.loads((shards / layout.MANIFEST).read_bytes())
    assert facts["format"] == "tars"
    assert sum(shard["rows"] for shard in facts["shards"]) == facts["rows"]
    assert facts["rejected"] == facts["skipped"] == 0


def test_more_shards_than_open_files_are_allowed(odd, tmp_path):
    """A mapped file stays open, and many systems allow 1,024 at first."""
    convert(options(odd, tmp_path / "many", shard=1))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        held = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 8, before[1]))
        assert len(Tars(tmp_path / "many")._files) > 16
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_opening_many_shards_looks_at_each_row_once(copied, monkeypatch):
    """A pass over all rows for each shard would take hours where there are thousands of shards."""
    data, looked = Tars(copied), []

    class Counted(np.ndarray):
        def __eq__(self, other):
            looked.append(len(self))
            return super().__eq__(other)

    data._which = data._which.view(Counted)
    data._compare()
    assert sum(looked) <= data.rows


def test_rows_out_of_the_order_of_shards_are_refused(copied):
    data = Tars(copied)
    data._which = data._which[::-1].copy()
    with pytest.raises(UsageError, match="not in the order of the shards"):
        data._compare()
