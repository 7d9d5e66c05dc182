"""Tars, zips and shards list what their unpacked trees would, and are never short without a word."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_sources import (
    FATES,
    JPEG,
    PLAIN,
    SPLIT_ROOTS,
    TREES,
    accounted,
    as_expected,
    content,
    encoded,
    tree,
)
from test_write import main
from truth import DATA, photo

from fastrot.config import RunError, UsageError
from fastrot.data import files
from fastrot.data.beton import write
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.prepare.convert import convert as convert_pictures
from fastrot.data.prepare.encode import Chunk, EncodeSpec, encode_chunk
from fastrot.data.sources import archives, members, shards
from fastrot.data.sources.open import open_source
from fastrot.data.sources.records import Source

ODD = {  # what names and bytes there are
    **dict.fromkeys(PLAIN, JPEG),
    **{path: data for path, (data, *_) in FATES.items()},
    f"long/{'x' * 90}/{'y' * 120}.jpg": JPEG,
    f"middle/{'x' * 90}/{'y' * 40}.jpg": JPEG,
    "c/\udcff.jpg": JPEG,
    "c/two words,\n.jpg": JPEG,
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(seed: int) -> bytes:
    """A JPEG unlike all others."""
    from PIL import Image

    return encoded(Image.fromarray(photo(seed, 20, 26)), "JPEG")


def tarred(path: Path, files, kind=tarfile.GNU_FORMAT) -> Path:
    """A tar of (name, bytes) or TarInfo, in this order; or of a folder."""
    if isinstance(files, dict):
        files = files.items()
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as out:
        if isinstance(files, Path):
            out.add(files, ".")
            return path
        for each in files:
            if isinstance(each, tarfile.TarInfo):
                out.addfile(each)
            else:
                info = tarfile.TarInfo(each[0])
                info.size = len(each[1])
                out.addfile(info, io.BytesIO(each[1]))
    return path


def info(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def zipped(path: Path, files: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    """A zip as Unix writes it: odd names are bytes, with nothing said about them."""
    odd = {}
    with zipfile.ZipFile(path, "w", method) as out:
        for i, (name, data) in enumerate(files.items()):
            raw = os.fsencode(name)
            if not raw.isascii():
                name = f"{i:~<{len(raw)}}"
                odd[name.encode()] = raw
            out.writestr(name, data)
    data = path.read_bytes()
    for name, raw in odd.items():
        data = data.replace(name, raw)
    path.write_bytes(data)
    return path


def unpacked(archive: Path, folder: Path) -> Path:
    """By the system's tar, or as unzip would."""
    folder.mkdir(parents=True)
    if archive.suffix == ".tar":
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True, stderr=subprocess.DEVNULL)
        return folder
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def same(ours: Source, folder: Source) -> None:
    """Both list the same pictures, to the last byte."""
    assert ours.records == folder.records
    assert ours.classes == folder.classes
    assert sorted(ours.rejected) == sorted(folder.rejected)
    assert (ours.seen, ours.left_out) == (folder.seen, folder.left_out)
    assert np.array_equal(numbers(ours), numbers(folder))
    assert accounted(ours)
    for i in range(len(ours.records)):
        assert ours.read(i) == folder.read(i)
    assert fingerprint(ours) == fingerprint(folder)


def numbers(source: Source) -> np.ndarray:
    return np.arange(len(source.records)) if source.numbers is None else source.numbers


def fingerprint(source: Source) -> str:
    keys = path_keys(record.path for record in source.records)
    return order_fingerprint(keys, np.array([r.label for r in source.records], np.int64))


# ---- the unpacked tree ----


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tar_is_what_it_unpacks_to(tmp_path, kind):
    root = tree(
        tmp_path / "tree", {k: v for k, v in ODD.items() if kind != "ustar" or len(k) < 200}
    )
    archive = tarred(tmp_path / "a.tar", root, FORMATS[kind])
    same(open_source("tar", archive), open_source("imagefolder", root))


@pytest.mark.parametrize("kind", ["v7", "oldgnu", "ustar", "pax"])
def test_a_tar_by_the_systems_tar_too(tmp_path, kind):
    files = {k: v for k, v in ODD.items() if len(k) < 90}
    root = tree(tmp_path / "tree", files)
    (root / "a" / "hard.jpg").hardlink_to(root / "a" / "good.jpg")
    (root / "a" / "soft.jpg").symlink_to("../b/2.jpg")
    archive = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={kind}", "-cf", archive, "-C", root, "."], check=True)
    same(open_source("tar", archive), open_source("imagefolder", root))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_what_it_unpacks_to(tmp_path, method):
    root = tree(tmp_path / "tree", ODD)
    archive = zipped(tmp_path / "a.zip", ODD, method)
    same(open_source("zip", archive), open_source("imagefolder", root))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_real_pictures_come_out_of_an_archive(tmp_path, kind):
    real = DATA / "imagenet-sample"
    if not real.is_dir():
        pytest.skip("there are no real pictures")
    root = tmp_path / "tree"
    for path in sorted(real.rglob("*.JPEG"))[::10]:
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.parent.name)
    archive = Path(shutil.make_archive(str(tmp_path / "a"), kind, root))
    same(open_source(kind, archive), open_source("imagefolder", root))


CLASSES = {f"n0{c}/{i}.JPEG": picture(10 * c + i) for c in range(3) for i in range(4)}


def class_tars(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("n00", "n01", "n02"):
        mine = {path[4:]: data for path, data in CLASSES.items() if path.startswith(name)}
        tarred(folder / f"{name}.tar", mine)
    return folder


def test_class_tars_are_classes_in_a_folder_and_in_a_tar(tmp_path):
    truth = open_source("imagefolder", tree(tmp_path / "tree", CLASSES))
    folder = class_tars(tmp_path / "tars")
    same(open_source("tar", folder), truth)
    same(open_source("tar", tarred(tmp_path / "all.tar", folder)), truth)
    (folder / "notes.txt").write_text("beside")
    source = open_source("tar", folder)
    assert len(source.left_out) == 1
    assert accounted(source)


def test_pictures_without_folders_have_no_label(tmp_path):
    files = {"2.jpg": JPEG, "10.jpg": JPEG}
    root = tree(tmp_path / "tree", files)
    truth = open_source("imagefolder", root)
    assert {record.label for record in truth.records} == {-1}
    same(open_source("tar", tarred(tmp_path / "a.tar", files)), truth)
    labelled = open_source("zip", zipped(tmp_path / "a.zip", CLASSES), label_from="none")
    assert {record.label for record in labelled.records} == {-1}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_split_is_a_folder_inside_or_an_archive(tmp_path, kind):
    pack = {"tar": tarred, "zip": zipped}[kind]
    val = {path: picture(100 + i) for i, path in enumerate(CLASSES)}
    root = tree(tmp_path / "tree", {f"train/{k}": v for k, v in CLASSES.items()})
    tree(root, {f"val/{k}": v for k, v in val.items()} | {"val/../x.txt": b"x"})
    everything = {f"./train/{k}": v for k, v in CLASSES.items()}
    everything |= {f"./val/{k}": v for k, v in val.items()}
    one = pack(tmp_path / f"one.{kind}", everything)
    (tmp_path / "two").mkdir()
    pack(tmp_path / "two" / f"train.{kind}", CLASSES)
    pack(tmp_path / "two" / f"val.{kind}", val)
    for split in ("train", "val"):
        truth = open_source("imagefolder", root, split=split)
        same(open_source(kind, one, split=split), truth)
        same(open_source(kind, tmp_path / "two", split=split), truth)
    with pytest.raises(UsageError, match=r"--split test is none of .* there are: train, val"):
        open_source(kind, one, split="test")


def test_a_split_may_be_deep_in_an_archive_or_a_folder_of_class_tars(tmp_path):
    truth = open_source("imagefolder", tree(tmp_path / "tree", CLASSES))
    files = {f"ILSVRC/Data/CLS-LOC/train/{path}": data for path, data in CLASSES.items()}
    files |= {"ILSVRC/Data/CLS-LOC/test/x.JPEG": JPEG, "ILSVRC/train.txt": b"x"}
    archive = zipped(tmp_path / "a.zip", files)
    same(open_source("zip", archive, split="ILSVRC/Data/CLS-LOC/train"), truth)
    class_tars(tmp_path / "tars" / "train")
    tarred(tmp_path / "tars" / "val.tar", {"x/y.jpg": JPEG})
    same(open_source("tar", tmp_path / "tars", split="train"), truth)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", TREES)
def test_archives_as_people_have_them(tmp_path, name, kind):
    files = {file: content(file) for file in TREES[name][0]}
    archive = {"tar": tarred, "zip": zipped}[kind](tmp_path / f"a.{kind}", files)
    source = open_source(kind, archive)
    same(source, open_source("imagefolder", tree(tmp_path / "tree", files)))
    as_expected(source, archive, name)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", SPLIT_ROOTS)
def test_an_archive_of_splits_is_refused(tmp_path, name, kind):
    files, inside, splits, way = SPLIT_ROOTS[name]
    made = {"tar": tarred, "zip": zipped}[kind](
        tmp_path / f"a.{kind}", {f: content(f) for f in files}
    )
    said = f"{made}{inside} has the splits {splits}: name one with --split {way}; --label-from none takes all$"
    with pytest.raises(UsageError, match=said):
        open_source(kind, made)
    first = open_source(kind, made, split=way)
    assert [record.path.rpartition("/")[2] for record in first.records] == ["1.jpg"]
    if inside:
        assert open_source(kind, made, split="train").records == first.records


def test_what_a_wrapping_folder_leaves_is_named_from_it(tmp_path):
    files = [
        ("../out.jpg", JPEG),
        ("d/a/0.jpg/1.jpg", JPEG),
        ("d/a/0.jpg", JPEG),
        ("d/b/1.jpg", JPEG),
    ]
    source = open_source("tar", tarred(tmp_path / "a.tar", files))
    assert source.notes == ["went through d/"]
    assert [record.path for record in source.records] == ["a/0.jpg/1.jpg", "b/1.jpg"]
    assert dict(source.rejected) == {
        "a/0.jpg": "a folder has its name",
        "../../out.jpg": "its name leads out of the archive",
    }


# ---- links, names, the last of several ----


def test_links_inside_are_followed_and_others_rejected(tmp_path):
    made = [
        ("a/0.jpg", picture(0)),
        ("b/1.jpg", picture(1)),
        info("b/soft.jpg", tarfile.SYMTYPE, "../a/0.jpg"),
        info("b/hard.jpg", tarfile.LNKTYPE, "./a/0.jpg"),
        info("b/hard_to_soft.jpg", tarfile.LNKTYPE, "b/soft.jpg"),
        info("b/plain", tarfile.SYMTYPE, "1.jpg"),
        info("b/gone.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
        info("b/gone.txt", tarfile.SYMTYPE, "nowhere.txt"),
        info("b/self.jpg", tarfile.SYMTYPE, "self.jpg"),
        info("b/below.jpg", tarfile.SYMTYPE, "1.jpg/2.jpg"),
        info("b/up", tarfile.SYMTYPE, ".."),
        info("a_link", tarfile.SYMTYPE, "b"),
        info("d", tarfile.SYMTYPE, ".store/e"),
        (".store/e/3.jpg", picture(3)),
    ]
    archive = tarred(tmp_path / "a.tar", made)
    folder = open_source("imagefolder", unpacked(archive, tmp_path / "tree"))
    source = open_source("tar", archive)
    same(source, folder)
    assert {"b/soft.jpg", "b/hard.jpg", "b/hard_to_soft.jpg", "d/3.jpg"} <= {
        record.path for record in source.records
    }
    outside = [
        info("a/out.jpg", tarfile.SYMTYPE, "../../out.jpg"),
        info("a/root", tarfile.SYMTYPE, "/etc"),
        info("a/late.jpg", tarfile.LNKTYPE, "a/not_yet.jpg"),
        info("a/out_hard.jpg", tarfile.LNKTYPE, "../x.jpg"),
        info("a/device.jpg", tarfile.CHRTYPE),
        info("a/pipe.jpg", tarfile.FIFOTYPE),
    ]
    source = open_source("tar", tarred(tmp_path / "b.tar", made + outside))
    rejected = dict(source.rejected)
    assert rejected.pop("a/late.jpg").startswith("it is a hard link to a/not_yet.jpg")
    assert rejected.pop("a/out_hard.jpg").startswith("it is a hard link to no file")
    assert rejected.pop("a/out.jpg") == "it is a link that leads out of the archive"
    assert rejected.pop("a/root") == "it is a link that leads out of the archive"
    assert sorted(rejected.items()) == sorted(folder.rejected)
    assert source.records == folder.records
    assert accounted(source)


def test_links_in_a_zip_are_links(tmp_path):
    archive = zipped(tmp_path / "a.zip", CLASSES)
    with zipfile.ZipFile(archive, "a") as out:
        for name, target in {"n00/soft.jpg": "../n01/0.JPEG", "n00/out.jpg": "/etc/x.jpg"}.items():
            link = zipfile.ZipInfo(name)
            link.create_system, link.external_attr = 3, 0o120777 << 16
            out.writestr(link, target)
    source = open_source("zip", archive)
    at = [record.path for record in source.records].index("n00/soft.jpg")
    assert source.read(at) == CLASSES["n01/0.JPEG"]
    assert source.rejected == [("n00/out.jpg", "it is a link that leads out of the archive")]


def test_the_last_of_several_wins(tmp_path):
    made = [
        ("a/0.jpg", picture(0)),
        ("a/1.jpg", picture(1)),
        info("a/kept.jpg", tarfile.LNKTYPE, "a/0.jpg"),
        ("./a//0.jpg", picture(2)),
        info("a/1.jpg", tarfile.SYMTYPE, "0.jpg"),
        ("a/2.jpg", b"no picture"),
        ("a/2.jpg", picture(4)),
    ]
    archive = tarred(tmp_path / "a.tar", made)
    folder = open_source("imagefolder", unpacked(archive, tmp_path / "tree"))
    source = open_source("tar", archive)
    same(source, folder)
    assert [source.read(i) for i in range(4)] == [picture(n) for n in (2, 2, 4, 0)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("a/0.jpg", picture(0))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("a/0.jpg", picture(1))
    source = open_source("zip", tmp_path / "a.zip")
    assert source.seen == 1
    assert source.read(0) == picture(1)


def test_what_could_not_be_unpacked_is_rejected_by_name(tmp_path):
    made = [
        ("/a/0.jpg", picture(0)),  # tar strips the slash
        ("../out.jpg", JPEG),
        ("a/../../out.jpg", JPEG),
        ("a/0.jpg/below.jpg", JPEG),
        (f"a/{'x' * 5000}.jpg", JPEG),
        ("a/deep/1.jpg", JPEG),
        ("a/deep", JPEG),
        ("a/inner.tar.gz", b"\x1f\x8b" + bytes(50)),
        ("b/2.jpg", JPEG),
    ]
    source = open_source("tar", tarred(tmp_path / "a.tar", made, tarfile.PAX_FORMAT))
    assert [record.path for record in source.records] == ["a/0.jpg", "a/deep/1.jpg", "b/2.jpg"]
    reasons = dict(source.rejected)
    assert reasons["../out.jpg"] == "its name leads out of the archive"
    assert reasons["a/../../out.jpg"] == "its name leads out of the archive"
    assert reasons["a/0.jpg/below.jpg"] == "it is in a file or link"
    assert reasons["a/deep"] == "a folder has its name"
    assert reasons["a/inner.tar.gz"].startswith("it is an archive in an archive")
    assert any("5,006 characters" in reason for reason in reasons.values())
    assert accounted(source)


def test_sparse_and_huge_members_are_rejected(tmp_path, monkeypatch):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.write(JPEG)
        file.truncate(10_000_000)
    (tmp_path / "x.jpg").write_bytes(JPEG)
    for kind in ("--format=oldgnu", "--format=pax"):
        for version in ("0.0", "0.1", "1.0"):
            archive = tmp_path / "a.tar"
            how = ["-S", kind, f"--sparse-version={version}"]
            subprocess.run(
                ["tar", *how, "-cf", archive, "hole.jpg", "x.jpg"], cwd=tmp_path, check=True
            )
            source = open_source("tar", archive)
            assert source.rejected == [("hole.jpg", "it is stored sparse")]
            assert [record.path for record in source.records] == ["x.jpg"]
    monkeypatch.setattr(files, "MOST_BYTES", len(JPEG))
    bomb = {"bomb.jpg": JPEG + bytes(10_000_000), "x.jpg": JPEG}
    for kind, archive in {
        "tar": tarred(tmp_path / "b.tar", bomb),
        "zip": zipped(tmp_path / "b.zip", bomb),
    }.items():
        source = open_source(kind, archive)
        assert [path for path, _ in source.rejected] == ["bomb.jpg"]
        assert len(source.records) == 1


def test_a_tar_that_becomes_shorter_while_it_is_listed_is_refused(tmp_path, monkeypatch):
    archive = tarred(tmp_path / "a.tar", CLASSES)
    real, stop = os.pread, archive.stat().st_size - 2 * members.BLOCK  # within the zeros at its end
    monkeypatch.setattr(os, "pread", lambda f, n, at: real(f, max(0, min(n, stop - at)), at))
    with pytest.raises(
        UsageError, match=r"a\.tar (is cut short|became shorter while it was listed)"
    ):
        list(members.tar_members(archive))
    monkeypatch.setattr(
        os, "pread", lambda f, n, at: b"" if n > 2 * members.BLOCK else real(f, n, at)
    )
    with pytest.raises(
        UsageError, match=r"a\.tar became shorter while it was listed: fetch it anew"
    ):
        list(members.tar_members(archive))


# ---- zips of Windows ----

DOS, UNIX, NTFS = 0, 3, 10
WINDOWS = {  # who made it, its names -> paths of the pictures
    "dos": (DOS, ["d\\", "d\\c0\\1.jpg", "d\\c1\\2.jpg", "README.txt"], ["c0/1.jpg", "c1/2.jpg"]),
    "ntfs": (NTFS, ["c0\\1.jpg", "c1\\2.jpg"], ["c0/1.jpg", "c1/2.jpg"]),
    "said-to-be-unix": (UNIX, ["c0\\1.jpg", "c1\\2.jpg"], ["c0/1.jpg", "c1/2.jpg"]),
    "drive": (DOS, ["C:\\d\\c0\\1.jpg", "C:\\d\\c1\\2.jpg"], ["c0/1.jpg", "c1/2.jpg"]),
    "dots": (DOS, [".\\c0\\1.jpg", "./c1/2.jpg"], ["c0/1.jpg", "c1/2.jpg"]),
    "mixed": (DOS, ["d\\c0/1.jpg", "d/c1\\2.jpg"], ["c0/1.jpg", "c1/2.jpg"]),
    "unix": (UNIX, ["c0/a\\b.jpg", "c1/2.jpg"], ["c0/a\\b.jpg", "c1/2.jpg"]),
    "unix-flat": (UNIX, ["2.jpg", "a\\b.jpg"], ["2.jpg", "a\\b.jpg"]),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_backslashes_are_separators_where_windows_made_the_zip(tmp_path, name):
    system, names, paths = WINDOWS[name]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for each in names:
            made = zipfile.ZipInfo(each)
            made.create_system = system
            out.writestr(made, b"" if each.endswith("\\") else content(each))
    source = open_source("zip", tmp_path / "a.zip")
    assert [record.path for record in source.records] == paths
    assert source.classes == (() if name == "unix-flat" else ("c0", "c1"))
    assert not source.rejected
    assert accounted(source)


# ---- zips with something wrong ----


def patched(path: Path, name: str, changes: dict[int, bytes]) -> None:
    """Change what a zip's table of contents says of a member, at these places of its entry."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    for place, value in changes.items():
        data[at + place : at + place + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({8: b"\1\0"}, "it is encrypted"),
        ({10: b"\x5d\0"}, "it is compressed by method 93, not deflate"),
        ({42: b"\x07\0\0\0"}, "something else is in its place in the zip"),
        ({20: b"\xff\xff\xff\x7f"}, "it reaches beyond the end of the zip"),
    ],
    ids=["encrypted", "method", "place", "length"],
)
def test_what_a_zip_cannot_give_is_rejected_by_name(tmp_path, changes, reason):
    archive = zipped(tmp_path / "a.zip", CLASSES)
    patched(archive, "n01/2.JPEG", changes)
    source = open_source("zip", archive)
    assert source.rejected == [("n01/2.JPEG", reason)]
    assert len(source.records) == len(CLASSES) - 1
    assert accounted(source)


def test_a_zips_table_that_swallows_a_member_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", CLASSES)
    patched(archive, "n01/2.JPEG", {32: struct.pack("<H", 46 + len("n01/3.JPEG"))})  # its comment
    with pytest.raises(UsageError, match="it names 11 members and announces 12"):
        open_source("zip", archive)


def test_a_zip_counts_its_members_as_zip64_does(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    archive = zipped(tmp_path / "a.zip", CLASSES)
    data = bytearray(archive.read_bytes())
    end = data.rindex(b"PK\5\6")
    data[end + 8 : end + 12] = b"\xff" * 4  # look there, as with very many
    archive.write_bytes(data)
    assert len(open_source("zip", archive).records) == len(CLASSES)
    data[data.rindex(b"PK\6\6") + 32] += 1
    archive.write_bytes(data)
    with pytest.raises(UsageError, match="it names 12 members and announces 13"):
        open_source("zip", archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_inside_a_zip_is_found_by_its_checksum(tmp_path, method):
    from fastrot.data.files import BadPicture

    archive = zipped(tmp_path / "a.zip", CLASSES, method)
    data = bytearray(archive.read_bytes())
    data[data.index(b"n01/2.JPEG") + 400] ^= 1
    archive.write_bytes(data)
    source = open_source("zip", archive)
    at = [record.path for record in source.records].index("n01/2.JPEG")
    with pytest.raises(BadPicture, match="its bytes in the zip are damaged"):
        source.read(at)


def test_a_member_that_inflates_without_end_is_stopped(tmp_path):
    from fastrot.data.files import BadPicture

    archive = zipped(tmp_path / "a.zip", {"x.jpg": JPEG + bytes(30_000_000)})
    patched(archive, "x.jpg", {24: struct.pack("<I", 1000)})  # it says
    source = open_source("zip", archive)
    tracemalloc.start()
    try:
        with pytest.raises(BadPicture, match="length or checksum"):
            source.read(0)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# ---- cut, changed, strange ----


def members_of(kind: str, data: bytes, path: Path) -> set[str] | str:
    """What is listed of these bytes, or the sentence that refuses them."""
    path.write_bytes(data)
    try:
        source = open_source(kind, path)
    except UsageError as e:
        return str(e)
    assert accounted(source)
    return {record.path for record in source.records}


def cuts(data: bytes) -> list[int]:
    """200 lengths; few in the zeros behind a tar's end."""
    draw, size = random.Random(0), len(data.rstrip(b"\0")) + 512
    return sorted({draw.randrange(size) for _ in range(200)})


@pytest.mark.parametrize("kind", ["gnu", "pax", "tar-of-tars", "zip", "zip-of-zip"])
def test_no_cut_makes_a_listing_short_without_a_word(tmp_path, kind):
    path = tmp_path / "cut"
    if kind == "tar-of-tars":
        whole = tarred(path, class_tars(tmp_path / "tars"))
    elif kind.startswith("zip"):
        inner = zipped(tmp_path / "inner.zip", {"other/x.jpg": JPEG}, zipfile.ZIP_STORED)
        more = {"z.zip": inner.read_bytes(), "zz.jpg": JPEG} if kind == "zip-of-zip" else {}
        whole = zipped(path, {**CLASSES, **more}, zipfile.ZIP_STORED)
    else:
        long = {f"n00/{'x' * 200}.jpg": JPEG}
        whole = tarred(path, CLASSES | long, FORMATS[kind])
    data, word = whole.read_bytes(), kind.split("-")[0].replace("gnu", "tar").replace("pax", "tar")
    complete = members_of(word, data, path)
    assert len(complete) >= len(CLASSES)
    assert not isinstance(complete, str)
    refused = 0
    for cut in cuts(data):
        found = members_of(word, data[:cut], path)
        if isinstance(found, str):
            refused += 1
            assert str(path) in found
            assert word == "zip" or cut < 512 or f"byte {cut:,}" in found or "tar-of" in kind
        else:
            assert found == complete, cut
    assert refused > 180


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_hollow_tar_is_no_short_listing(tmp_path, where):
    """A download that sets its room aside first and is then broken off is zeros where nothing came."""
    whole = tarred(tmp_path / "x.tar", CLASSES)
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        second, third = (member.offset for member in tar.getmembers()[1:3])
    if where == "middle":
        data[second:third] = bytes(third - second)
        data[third : third + 512] = b"\1" * 512
    else:
        data[second:] = bytes(members.MOST_ZEROS + 512)
    whole.write_bytes(data)
    with pytest.raises(
        UsageError, match=rf"x\.tar has .* zero bytes from byte {second:,} on.*fetch"
    ):
        open_source("tar", whole)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_changed_bytes_are_no_traceback(tmp_path, kind):
    made = tarred if kind == "tar" else zipped
    data = made(tmp_path / "x", CLASSES | {f"n00/{'x' * 200}.jpg": JPEG}).read_bytes()
    draw = random.Random(1)
    heads = list(range(0, len(data), 512)) if kind == "tar" else [len(data) - 1400]
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 5])):
            at = min(draw.choice(heads) + draw.randrange(512), len(data) - 1)
            changed[at] = draw.randrange(256)
        members_of(kind, bytes(changed), tmp_path / "x")


def test_a_changed_header_is_refused_with_its_place(tmp_path):
    archive = tarred(tmp_path / "a.tar", CLASSES)
    data = bytearray(archive.read_bytes())
    at = data.index(b"n01/2.JPEG")
    data[at + 1] ^= 1
    archive.write_bytes(data)
    with pytest.raises(UsageError, match=rf"a.tar is damaged at byte {at:,}: fetch it anew"):
        open_source("tar", archive)


def test_joined_tars_are_read_to_the_end(tmp_path):
    data = tarred(tmp_path / "a.tar", {"a/0.jpg": picture(0)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(data + tarred(tmp_path / "b", {"b/1.jpg": JPEG}).read_bytes())
    source = open_source("tar", tmp_path / "a.tar")
    assert [record.path for record in source.records] == ["a/0.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("tar", gzip.compress(bytes(1024), mtime=0), "compressed (gzip).*gunzip it first"),
        ("tar", b"PK\3\4" + bytes(1024), "is no tar, but a zip: --source zip reads it"),
        ("tar", b"hello" * 300, "is no tar"),
        ("tar", b"hello", "is no tar"),
        ("tar", b"", "is an empty file"),
        ("tar", bytes(10240), "is empty"),
        ("zip", b"", "is no zip, or was cut short"),
        ("zip", b"PK\3\4" + bytes(5000), "is no zip, or was cut short"),
        ("zip", b"PK\5\6" + bytes(18), "is empty"),
        ("webdataset", b"hello" * 300, "is no tar"),
    ],
)
def test_what_is_no_archive_is_one_sentence(tmp_path, kind, data, says):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UsageError, match=says.replace("(", r"\(").replace(")", r"\)")):
        open_source(kind, tmp_path / "a")


def test_a_folder_with_compressed_tars_is_refused(tmp_path):
    class_tars(tmp_path / "tars")
    (tmp_path / "tars" / "n03.tar.gz").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"n03.tar.gz is compressed: make it a .tar"):
        open_source("tar", tmp_path / "tars")
    with pytest.raises(UsageError, match=r"holds no file named \*\.zip"):
        open_source("zip", tmp_path / "tars")
    with pytest.raises(UsageError, match="give the path of a tar"):
        open_source("tar", tmp_path / "none.tar")


# ---- conversion ----


def convert(kind: str, root: Path, out: Path, **how) -> bytes:
    given = write.BetonOptions(source=kind, root=root, out=out, **{"workers": 0, **how})
    convert_pictures(given, part=5)
    return out.read_bytes()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_conversion_gives_the_unpacked_folders_bytes(tmp_path, kind):
    files = CLASSES | {"n00/bad.jpg": JPEG[:300], "n01/text.jpg": b"text", "n02/x.txt": b"x"}
    root = tree(tmp_path / "tree", files)
    archive = {"tar": tarred, "zip": zipped}[kind](tmp_path / f"a.{kind}", files)
    ours = convert(kind, archive, tmp_path / "ours.beton")
    assert ours == convert("imagefolder", root, tmp_path / "theirs.beton")
    for name in ("keys.npy", "crc.npy", "paths.jsonl", "rejects.jsonl"):
        mine, theirs = (tmp_path / f"{who}.beton.{name}" for who in ("ours", "theirs"))
        assert mine.read_bytes() == theirs.read_bytes()
    mine, theirs = (
        json.loads((tmp_path / f"{who}.beton.json").read_text()) for who in ("ours", "theirs")
    )
    for name in ("fingerprint", "seen", "skipped", "classes", "numbers", "mean", "std"):
        assert mine[name] == theirs[name]


def test_two_workers_read_by_themselves(tmp_path):
    folder = class_tars(tmp_path / "tars")
    source = open_source("tar", folder)
    chunk = Chunk(3, source.part(3, 9))
    assert len(pickle.dumps(chunk)) < 2500  # places, not pictures
    far = pickle.loads(pickle.dumps(chunk)).source
    assert [far.read(i) for i in range(6)] == [source.read(i) for i in range(3, 9)]
    assert len(far.files) == 3
    ours = convert("tar", folder, tmp_path / "ours.beton", workers=2)
    root = tree(tmp_path / "tree", CLASSES)
    assert ours == convert("imagefolder", root, tmp_path / "theirs.beton")


def test_a_shuffled_source_reads_the_pictures_that_it_names(tmp_path):
    folder = class_tars(tmp_path / "tars")
    source = open_source("tar", folder).shuffled(3)
    assert [record.path for record in source.records] != sorted(CLASSES)
    assert [source.read(i) for i in range(12)] == [CLASSES[r.path] for r in source.records]
    ours = convert("tar", folder, tmp_path / "ours.beton", shuffle=3, workers=2)
    root = tree(tmp_path / "tree", CLASSES)
    assert ours == convert("imagefolder", root, tmp_path / "theirs.beton", shuffle=3)


def test_more_archives_than_are_held_open(tmp_path):
    (tmp_path / "tars").mkdir()
    for i in range(70):
        tarred(tmp_path / "tars" / f"{i:03d}.tar", {"x.jpg": picture(i % 3)})
    source = open_source("tar", tmp_path / "tars")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
    for i in [*range(70), 0, 5]:
        assert source.read(i) == picture(i % 3)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + archives._OPEN


@pytest.mark.parametrize("how", ["longer", "as long", "gone"])
def test_an_archive_that_changes_underway_stops_the_conversion(tmp_path, how):
    archive = tarred(tmp_path / "a.tar", CLASSES)
    source = open_source("tar", archive)
    if how == "gone":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes() + bytes(512 * (how == "longer")))
        os.utime(archive, ns=(1, 1))
    spec = EncodeSpec(write.Coder())
    with pytest.raises(RunError, match=r"n00/0.JPEG cannot be read: .*a.tar"):
        encode_chunk(spec, Chunk(0, source.part(0, 4)))


def test_the_script_takes_each(tmp_path, capsys):
    tar, zip_ = tarred(tmp_path / "a.tar", CLASSES), zipped(tmp_path / "a.zip", CLASSES)
    for kind, root in {"tar": tar, "zip": zip_, "webdataset": tar}.items():
        out = tmp_path / f"{kind}.beton"
        assert main("--source", kind, "--root", root, "--out", out, "--workers", 0) == 0
        assert "12 written + 0 rejected + 0 left out = 12 files seen" in capsys.readouterr().out
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:5000])
    assert main("--source", "tar", "--root", cut, "--out", tmp_path / "x.beton") == 2
    said = capsys.readouterr().err
    assert "cut.tar is cut short at byte 5,000" in said
    assert said.count("\n") == 1


# ---- WebDataset ----


def sample_files(first: int, count: int) -> list[tuple[str, bytes]]:
    made = []
    for i in range(first, first + count):
        label = (
            ("cls", b"%d\n" % (i % 3)) if i % 2 else ("json", json.dumps({"label": i % 3}).encode())
        )
        made += [(f"{99 - i:04d}.jpg", picture(i)), (f"{99 - i:04d}.{label[0]}", label[1])]
    return made


def written_shards(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(3):
        tarred(folder / f"train-{shard:06d}.tar", sample_files(shard * 4, 4))
    return folder


def test_shards_keep_their_order_and_labels(tmp_path):
    folder = written_shards(tmp_path / "shards")
    pattern = folder / "train-{000000..000002}.tar"
    each = "::".join(str(folder / f"train-00000{i}.tar") for i in range(3))
    stars = folder / "train-*.tar", folder / "tr?in-00000{0,1,2}.tar"
    for root in (folder, pattern, folder / "train-00000{0,1,2}.tar", *stars, each):
        source = open_source("webdataset", root)
        assert [record.label for record in source.records] == [i % 3 for i in range(12)]
        assert [source.read(i) for i in range(12)] == [picture(i) for i in range(12)]
        assert source.records[5].path == "train-000001/0094.jpg"
        assert source.classes == ("0", "1", "2")
        assert (source.seen, source.left_out, source.rejected) == (12, [], [])  # labels are read
        assert source.numbers is None
    one = open_source("webdataset", folder / "train-000001.tar")
    assert one.records == source.records[4:8]
    none = open_source("webdataset", folder, label_from="none")
    assert ({record.label for record in none.records}, none.classes) == ({-1}, ())
    ours = convert("webdataset", folder, tmp_path / "a.beton", workers=2)
    assert ours == convert("webdataset", pattern, tmp_path / "b.beton")


def test_webdataset_itself_gives_the_same(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = written_shards(tmp_path / "shards")
    urls = str(folder / "train-{000000..000002}.tar")
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    source = open_source("webdataset", urls)
    assert [f"{record.path.split('/')[1]}" for record in source.records] == [
        f"{sample['__key__']}.jpg" for sample in theirs
    ]
    assert [source.read(i) for i in range(12)] == [sample["jpg"] for sample in theirs]
    for record, sample in zip(source.records, theirs, strict=True):
        said = sample["cls"] if "cls" in sample else str(json.loads(sample["json"])["label"])
        assert record.label == int(said)


def test_strange_samples_have_one_fate_each(tmp_path):
    made = [
        ("a/0.seg.jpg", JPEG),  # of the sample, but not its picture
        ("a/0.jpg", JPEG),
        ("a/0.cls", b"1"),
        ("a/0.cls", b" 2 \n"),  # the last wins
        ("a/0.json", b'{"label": 7}'),  # .cls says it
        ("b.png", JPEG),
        ("b.cls", b"cat"),
        ("c.jpg", JPEG),
        ("c.json", b"{" * 100_000),
        ("d.jpg", b"text"),
        ("d.cls", b"1"),
        ("e.jpg", JPEG),  # no label
        ("f.jpg", JPEG),
        ("f.json", json.dumps({"words": "x" * 2000, "cls": "4"}).encode()),
        ("g.jpg", JPEG),
        ("g.json", b'{"label": 1.5}'),
        (".h.jpg", JPEG),
        ("i.jpg", JPEG),
        ("i.json", b"[1]"),
    ]
    source = open_source("webdataset", tarred(tmp_path / "s.tar", made))
    labels = {record.path: record.label for record in source.records}
    assert labels == {
        **{"s/a/0.jpg": 2, "s/b.png": -1, "s/c.jpg": -1, "s/e.jpg": -1, "s/f.jpg": 4},
        **{"s/g.jpg": -1, "s/i.jpg": -1},
    }
    assert dict(source.rejected) == {"s/d.jpg": "its first bytes are no picture's"}
    assert source.notes[0].startswith("3 labels could not be read, and the picture has none: f")
    assert "first cat of s/b.png" in source.notes[0]
    assert accounted(source)
    huge = tarred(tmp_path / "t.tar", [("a.jpg", JPEG), ("a.cls", b"99999999")])
    source = open_source("webdataset", huge)
    assert (source.records[0].label, source.classes) == (-1, ())
    assert (
        "first 99999999 of t/a.jpg; labels are whole numbers from 0 on, below 1,048,576"
        in (source.notes[0])
    )


def samples(*kinds: tuple[str, list[bytes]]) -> list[tuple[str, bytes]]:
    """Members KEY.kind of samples 0, 1 ...; an empty one is left out."""
    count = len(kinds[0][1])
    return [(f"{i}.{kind}", of[i]) for i in range(count) for kind, of in kinds if of[i]]


J = [JPEG] * 6
SAID = {  # members, labels, classes, what is said
    "words": ([("jpg", J), ("cls", [b"dog", b"cat\r\n"] * 3)], [1, 0] * 3, "cat dog", "words"),
    "json": (
        [
            ("jpg", J),
            (
                "json",
                [
                    *(b'{"label": 1}', b'{"label": "1"}', b'{"label": 1.0}', b'{"label": null}'),
                    *(b'{"label": "cat"}', b'{"class_id": 2}'),
                ],
            ),
        ],
        [1, 1, 1, -1, -1, 2],
        "0 1 2",
        "1 label could not be read, and the picture has none: first cat of s/4.jpg",
    ),
    "names in json": (
        [("jpg", J), ("json", [b'{"class_name": "b", "id": 9}', b'{"Category": "a"}'] * 3)],
        [1, 0] * 3,
        "a b",
        "words",
    ),
    "the mark of UTF-8": (
        [("png", J), ("cls", [b"\xef\xbb\xbf%d\n" % i for i in range(6)])],
        [*range(6)],
        "0 1 2 3 4 5",
        "",
    ),
    "one-indexed": (
        [("jpg", J), ("CLS", [b"%d" % i for i in range(1, 7)])],
        [*range(1, 7)],
        "0 1 2 3 4 5 6",
        "",
    ),
    "null": ([("jpg", J), ("cls", [b"null", b"0"] * 3)], [-1, 0] * 3, "0", ""),
    "no number or word": (
        [("jpg", J), ("cls", [b"\x93NUMPY\x01", b"1", b"x" * 300, b"-2", b"1.5", b"0"])],
        [-1, 1, -1, -1, -1, 0],
        "0 1",
        "4 labels could not be read",
    ),
    "captions": ([("jpg", J), ("txt", [b"a dog"] * 6)], [-1] * 6, "", ""),
    "another name": ([("jpg", J), ("label", [b"1", b"0"] * 3)], [1, 0] * 3, "0 1", ""),
}


@pytest.mark.parametrize("case", SAID)
def test_labels_of_samples_as_people_write_them(tmp_path, case):
    kinds, labels, classes, said = SAID[case]
    root = tarred(tmp_path / "s.tar", samples(*kinds))
    source = open_source("webdataset", root)
    assert [record.label for record in source.records] == labels
    assert source.classes == tuple(classes.split())
    assert said in "; ".join(source.notes)
    assert bool(source.notes) == bool(said)
    assert not source.rejected
    unlabelled = open_source("webdataset", root, label_from="none")
    assert [r.path for r in unlabelled.records] == [r.path for r in source.records]
    assert {record.label for record in unlabelled.records} == {-1}


SECOND = "its sample has another picture"


@pytest.mark.parametrize(
    ("names", "taken", "left"),
    [
        ("a.jpg a.png a.mask.png", "a.jpg", {"a.png": SECOND, "a.mask.png": SECOND}),
        ("a.png a.JPEG", "a.JPEG", {"a.png": SECOND}),
        ("a.jpg a.seg.png a.seg.json", "a.jpg", {"a.seg.png": SECOND}),
        ("s.v1.jpg s.v1.cls t.jpg t.cls", "s.v1.jpg=1 t.jpg=1", {}),
        ("i_0.5_1.jpg i_0.5_2.jpg i_0.5_2.json", "i_0.5_1.jpg i_0.5_2.jpg=2", {}),
        ("i.jpg i.5.jpg i.5.cls", "i.jpg i.5.jpg=1", {}),
        ("a.input.jpg a.cls b.input.jpg", "a.input.jpg=1 b.input.jpg", {}),
        ("a.5.png a.5.jpg", "a.5.jpg", {"a.5.png": SECOND}),
        ("a.depth.jpg a.rgb.png a.cls", "a.rgb.png=1", {"a.depth.jpg": SECOND}),
        ("a.depth.png a.left.jpg a.json", "a.left.jpg=2", {"a.depth.png": SECOND}),
        ("a.rgb.jpg a.depth.png", "a.rgb.jpg a.depth.png", {}),
        ("i_0.5_1.jpg i_0.5_2.jpg i_0.5_2.cls", "i_0.5_1.jpg i_0.5_2.jpg=1", {}),
        ("d.x/0001 d.x/0002.img", "d.x/0001 d.x/0002.img", {}),
    ],
)
def test_one_picture_of_each_sample_is_taken(tmp_path, names, taken, left):
    of = {"cls": b"1", "json": b'{"label": 2}', "seg.json": b'{"area": 2}'}
    members = [
        (each, of.get(each[2:], of.get(each[-4:].strip("."), JPEG))) for each in names.split()
    ]
    source = open_source("webdataset", tarred(tmp_path / "s.tar", members))
    found = [f"{r.path[2:]}={r.label}".removesuffix("=-1") for r in source.records]
    assert found == taken.split()
    other = {each.path[2:]: each.reason for each in source.left_out}
    assert {path: why for path, why in other.items() if why != "no picture"} == left
    dotted = [path.split("=")[0] for path in taken.split() if path.split("/")[-1].count(".") > 1]
    dotted = [
        path for path in dotted if not {f"{path[0]}.cls", f"{path[0]}.json"} & {*names.split()}
    ]
    assert any("dots in the name" in note for note in source.notes) == bool(dotted)
    assert accounted(source)
    none = open_source("webdataset", tmp_path / "s.tar", label_from="none")
    assert [each.path for each in none.records] == [each.path for each in source.records]


def test_kinds_of_pictures_without_a_label_are_named(tmp_path):
    members = [(f"{i}.{kind}", JPEG) for i in range(3) for kind in ("depth.png", "rgb.jpg")]
    source = open_source("webdataset", tarred(tmp_path / "s.tar", members))
    assert len(source.records) == 6
    assert source.notes[0].endswith("up to the last dot; names end in .depth.png, .rgb.jpg")


def test_labels_are_read_where_they_are_wanted_and_a_shard_is_opened_once(tmp_path, monkeypatch):
    said = json.dumps({"words": "x" * 2000, "label": [3]}).encode()
    made = [(f"{i}.{kind}", of) for i in range(5) for kind, of in (("jpg", JPEG), ("json", said))]
    shard = tarred(tmp_path / "s.tar", made)
    read, opened = [], []
    monkeypatch.setattr(os, "pread", lambda *a, of=os.pread: read.append(a[1]) or of(*a))
    opens = lambda *a, **how: opened.append(a) or open(*a, **how)  # noqa: E731, SIM115
    monkeypatch.setattr(shards, "open", opens, raising=False)
    none = open_source("webdataset", shard, label_from="none")
    assert len(said) not in read
    source = open_source("webdataset", shard)
    assert (read.count(len(said)), len(opened)) == (5, 2)
    assert [each.label for each in source.records] == [3] * 5
    assert (source.left_out, none.left_out) == ([], [])
    assert [each.path for each in none.records] == [each.path for each in source.records]


def test_a_broken_picture_gives_way_to_another_of_its_sample(tmp_path):
    made = [("a.jpg", b"text"), ("a.png", JPEG), ("b.png", JPEG), ("b.png", picture(1))]
    made += [("c.jpg", b"text"), ("c.mask.png", JPEG)]  # but to no mask
    source = open_source("webdataset", tarred(tmp_path / "s.tar", made))
    assert [record.path for record in source.records] == ["s/a.png", "s/b.png"]
    no_picture = "its first bytes are no picture's"
    assert source.rejected == [("s/a.jpg", no_picture), ("s/c.jpg", no_picture)]
    assert source.notes == ["1 picture left for a later one of the same name"]
    assert source.read(1) == picture(1)


def test_patterns_and_splits_that_name_nothing_are_refused(tmp_path):
    folder = written_shards(tmp_path / "shards")
    with pytest.raises(UsageError, match=r"names 5 shards, of which 2 do not exist; first .*3.tar"):
        open_source("webdataset", folder / "train-{000000..000004}.tar")
    for strange in ("{0..99999999999}", "{2..1}", "{x}", "{0..999}{0..999}{0..999}"):
        with pytest.raises(UsageError, match=r"shards|between braces"):
            open_source("webdataset", folder / strange)
    tarred(folder / "val-000000.tar", sample_files(50, 2))
    with pytest.raises(UsageError, match="has the splits train, val: name one with --split"):
        open_source("webdataset", folder)
    assert len(open_source("webdataset", folder, split="val").records) == 2
    assert len(open_source("webdataset", folder, split="train").records) == 12
    with pytest.raises(UsageError, match=r"--split test is none of .*there are: train, val"):
        open_source("webdataset", folder, split="test")
    with pytest.raises(UsageError, match=r"none-\*.tar names no shard that is there"):
        open_source("webdataset", folder / "none-*.tar")
    with pytest.raises(UsageError, match="give the path of WebDataset shards"):
        open_source("webdataset", tmp_path / "none")
    assert shards.expanded("a{08..10}b{x,yz}") == [
        f"a{number}b{word}" for number in ("08", "09", "10") for word in ("x", "yz")
    ]
