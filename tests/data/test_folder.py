"""A folder as Data: rows, sizes and their cache, crops out of worker processes."""

import errno
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from asked import asked
from PIL import Image
from truth import photo

from fastrot import assemble, core
from fastrot.config import RandomResized, RunError, Shifted, UsageError, Whole
from fastrot.core import CropRequest, View
from fastrot.data import folder
from fastrot.data import pictures as decoder
from fastrot.data.keys import order_fingerprint
from fastrot.data.loader import Loader
from fastrot.data.prepare.encode import spread
from fastrot.data.sources.open import open_source
from fastrot.ops.resample import resample


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def headers(monkeypatch):
    """Paths whose headers were read."""
    read, size_of = [], decoder.size_of

    def noting(picture):
        if isinstance(picture, str):
            read.append(os.path.basename(picture))
        return size_of(picture)

    monkeypatch.setattr(decoder, "size_of", noting)
    return read


def request(data: folder.Folder, rows, *crops, epoch: int = 0) -> CropRequest:
    loader = Loader(data, View(crops=crops or (Whole(size=16),)), batch=1)
    return loader.request(np.array(rows, np.int64), epoch)


# ---- what a folder says of itself ----


def test_a_folder_is_data(pictures):
    data = folder.Folder(pictures)
    source = open_source("imagefolder", pictures)
    assert isinstance(data, core.Data)
    assert data.rows == len(data.labels) == len(data.keys) == 37
    assert data.classes == ("class0", "class1", "class2")
    assert [data.name(row) for row in range(37)] == [record.path for record in source.records]
    assert data.labels.tolist() == [record.label for record in source.records]
    assert data.fingerprint == order_fingerprint(data.keys, data.labels)
    assert data.numbers is None
    assert data.rejected == []
    rows = np.array([36, 0, 17])
    truth = [decoder.decode(source.read(row)).shape[:2] for row in rows.tolist()]
    assert data.sizes(rows).tolist() == [list(size) for size in truth]


def test_what_cannot_be_read_is_named_and_is_no_row(pictures, tmp_path, caplog):
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    (root / "class0" / "000.jpg").write_bytes(b"text")
    (root / "class1" / "zz.jpg").symlink_to("nowhere.jpg")
    with caplog.at_level(logging.WARNING):
        data = folder.Folder(root)
    assert [path for path, _ in data.rejected] == ["class1/zz.jpg", "class0/000.jpg"]
    assert len(caplog.messages) == 1
    assert "'class0/000.jpg': its first bytes are no picture's" in caplog.messages[0]
    assert data.rows == 36
    assert data.name(0) == "class0/003.jpg"
    assert data.numbers is not None  # torchvision lists the broken link too, behind class1's others
    others = sum(data.labels == 1)
    assert data.numbers.tolist() == [*range(1, 13 + others), *range(14 + others, 38)]


def test_what_is_left_out_and_gone_through_is_said(pictures, tmp_path, caplog):
    inside = tmp_path / "root" / "data"
    shutil.copytree(pictures, inside)
    for name in (
        "@eaDir/x.jpg",
        "class0/@eaDir/x.jpg",
        "class0/Thumbs.db",
        "notes/a.txt",
        "dark/x.jpg",
    ):
        (inside / name).parent.mkdir(exist_ok=True)
        (inside / name).write_bytes(b"text")
    with caplog.at_level(logging.WARNING):
        data = folder.Folder(tmp_path / "root")
    plain = folder.Folder(pictures)
    assert data.fingerprint == plain.fingerprint  # the same data, wherever it lies
    assert data.root == inside
    assert data.classes == ("class0", "class1", "class2", "dark")
    assert caplog.messages == [
        f"{tmp_path / 'root'}: went through data/; 1 folder without pictures makes no class: notes; no picture "
        "is of 1 class: dark; 4 left out: 2 in @eaDir, 1 Thumbs.db, 1 .txt; 1 of 42 files cannot be "
        "used ('dark/x.jpg': its first bytes are no picture's)"
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_alone_tells_of_a_folder(pictures, tmp_path, caplog, monkeypatch, rank):
    shutil.copytree(pictures, tmp_path / "root" / "data")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING):
        folder.Folder(tmp_path / "root")
    assert len(caplog.messages) == (rank == "0")


def test_a_root_of_splits_is_refused_in_a_run(pictures, tmp_path):
    for name in ("train", "val"):
        shutil.copytree(pictures, tmp_path / name)
    with pytest.raises(UsageError, match=f"in a run: --data {tmp_path}/train --val {tmp_path}/val"):
        assemble.open_data(tmp_path)


@pytest.mark.parametrize("labelled", [False, True])
def test_loose_pictures_are_rows_unless_labels_are_wanted(pictures, tmp_path, caplog, labelled):
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    shutil.copy(root / "class0" / "000.jpg", root / "loose.jpg")
    with caplog.at_level(logging.WARNING):
        data = assemble.open_data(root, labelled=labelled)
    assert data.rows == 37 + (not labelled)
    assert int((data.labels < 0).sum()) == int(not labelled)
    assert any("1 picture lies beside the class folders" in m for m in caplog.messages) == labelled
    if labelled:
        assert data.fingerprint == folder.Folder(pictures).fingerprint


def test_a_folder_without_a_readable_picture_is_refused(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x.jpg").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"no picture that can be read; a/x.jpg: its first bytes"):
        folder.Folder(tmp_path / "root")


# ---- the cache of sizes ----


def test_headers_are_read_once_and_again_where_a_file_changed(pictures, tmp_path, headers):
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    first = folder.Folder(root)
    assert len(headers) == 37
    headers.clear()
    assert (folder.Folder(root)._sizes == first._sizes).all()
    assert headers == []
    Image.fromarray(photo(0, 30, 31)).save(root / "class0" / "000.jpg")
    shutil.copy(root / "class0" / "003.jpg", root / "class0" / "new.jpg")
    (root / "class1" / "001.jpg").unlink()
    data = folder.Folder(root)
    assert sorted(headers) == ["000.jpg", "new.jpg"]
    assert data.sizes(np.array([0])).tolist() == [[30, 31]]
    assert data.rows == 37


def test_sizes_come_out_the_same_without_a_usable_cache(pictures, cache, headers, monkeypatch):
    truth = folder.Folder(pictures)._sizes
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-7], b"\x80\x04" + whole, bytes(len(whole))):
        file.write_bytes(damaged)
        assert (folder.Folder(pictures)._sizes == truth).all()
        assert file.read_bytes() == whole  # mended
    (cache / "file").write_text("in the way")
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(cache / "file" / "below"))
    assert (folder.Folder(pictures)._sizes == truth).all()


def test_the_cache_lies_where_the_user_wants_it(pictures, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTROT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder.Folder(pictures)
    (file,) = (tmp_path / "xdg" / "fastrot").iterdir()
    assert file.suffix == ".npy"


# ---- crops ----


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_the_boxes_of_the_decoded_pictures(pictures, workers):
    data = folder.Folder(pictures)
    both = (RandomResized(size=24), Shifted(size=16))
    work = [request(data, rows, *both) for rows in ([3, 36, 5], [0], [7, 7], list(range(9)))]
    for request_, (got, errors) in zip(work, asked(data, work, workers), strict=True):
        assert not errors
        for boxes, size, crop in zip(request_.rows, request_.sizes, got, strict=True):
            assert crop.shape == (len(boxes), size, size, 3)
            assert crop.dtype == torch.uint8
            for box, pixels in zip(boxes, crop.numpy(), strict=True):
                truth = np.zeros_like(pixels)
                path = os.path.join(data.root, data.name(int(box[0])))
                with open(path, "rb") as file:
                    resample(decoder.decode(file.read()), box, truth)
                assert (pixels == truth).all()


def test_epochs_are_the_same_for_any_number_of_workers(pictures):
    data = folder.Folder(pictures)
    view = View(crops=(RandomResized(size=24),))
    before = torch.get_rng_state()
    seen = [
        [
            (batch.index.tolist(), batch.images.sum().item())
            for batch in Loader(data, view, batch=5, workers=workers).epoch(1, start=2)
        ]
        for workers in (0, 1, 2)
    ]
    assert len(seen[0]) == 5
    assert seen[0] == seen[1] == seen[2]
    assert (torch.get_rng_state() == before).all()


def children() -> int:
    return len(multiprocessing.active_children())


def test_breaking_off_leaves_no_process(pictures):
    data = folder.Folder(pictures)
    loader = Loader(data, View(crops=(Whole(size=16),)), batch=2, workers=2)
    for _ in loader.epoch(0):
        assert children() == 2
        break
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "damaged"),
        (lambda file: Image.fromarray(photo(0, 20, 21)).save(file), "and is 20 x 21"),
    ],
    ids=["gone", "cut", "replaced"],
)
def test_a_picture_that_changed_is_named(pictures, tmp_path, workers, change, said):
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    data = folder.Folder(root)
    change(root / "class0" / "006.jpg")
    sound, changed = asked(data, [request(data, [0, 1]), request(data, [5, 2])], workers)
    assert sound.errors == []
    [(place, told)] = changed.errors
    assert place == 1
    assert re.search(f"row 2, 'class0/006.jpg'.*{said}", told)
    assert "\n" not in told
    assert children() == 0


@pytest.mark.parametrize("what", ["length", "time"])
def test_a_cached_size_needs_the_same_length_and_time(tmp_path, what):
    file = tmp_path / "a.png"
    for width in (30, 40):
        Image.new("RGB", (width, 20)).save(file)
        size = 5000 + width * (what == "length")
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
        os.utime(file, ns=(1, 1 + width * (what == "time")))
        assert folder.Folder(tmp_path).sizes(np.array([0])).tolist() == [[20, width]]


def test_a_bug_in_a_worker_names_the_picture(pictures, monkeypatch):
    def broken(decode, *_):
        decode(1)
        raise ZeroDivisionError("in a bug")

    monkeypatch.setattr(folder, "fill_decoded", broken)
    data = folder.Folder(pictures)
    words = rf"row 2, '{data.name(2)}', cannot be cropped: in a bug"
    with pytest.raises(RuntimeError, match=words):
        asked(data, [request(data, [0, 2], Whole(size=8))], 0)


def broken(*_):
    raise OSError("AF_UNIX path too long")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="wants Linux")
def test_crops_of_workers_need_no_file_in_shared_memory(pictures, monkeypatch):
    """A container has 64 MB of them; where memory cannot be shared either, a pipe carries the same crops."""
    data = folder.Folder(pictures)
    loader = Loader(data, View(crops=(Whole(size=96),)), batch=37, workers=1)
    (batch,) = loader.epoch(0)
    mapped = Path("/proc/self/maps").read_text()
    assert "/memfd:crops" in mapped
    assert "/dev/shm/torch" not in mapped
    del batch
    (batch,) = loader.epoch(0)
    for module, name in ((folder.reduction, "DupFd"), (os, "ftruncate"), (os, "memfd_create")):
        with monkeypatch.context() as lacking:
            lacking.setattr(module, name, broken)  # in the worker, which is forked from here
            (piped,) = loader.epoch(0)
            assert torch.equal(batch.images, piped.images)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="wants Linux")
def test_crops_that_cannot_be_shared_leave_nothing_open(monkeypatch):
    monkeypatch.setattr(folder, "_sharing", True)
    before = os.listdir("/proc/self/fd")
    assert type(folder._crops((2, 4, 4, 3))) is np.ndarray  # no worker
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: 1)
    assert folder._crops((0, 4, 4, 3)).shape == (0, 4, 4, 3)
    for module, name in ((os, "ftruncate"), (folder.mmap, "mmap"), (folder.reduction, "DupFd")):
        with monkeypatch.context() as lacking:
            lacking.setattr(folder, "_sharing", True)
            lacking.setattr(module, name, broken)
            assert type(folder._crops((2, 4, 4, 3))) is np.ndarray
            assert not folder._sharing
    assert os.listdir("/proc/self/fd") == before


def test_crops_are_pinned_where_a_gpu_asks(pictures, monkeypatch):
    """By torch's own thread, which takes what has a pin_memory; the parent hands on what it gets."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    crops = np.zeros((2, 4, 4, 3), np.uint8)
    done = torch.utils.data._utils.pin_memory.pin_memory(folder._Cropped((crops,), [(0, "why")]))
    assert pinned == [1]
    assert isinstance(done.crops[0], torch.Tensor)
    assert done.errors == [(0, "why")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.EROFS])
def test_no_room_for_locks_is_said_in_a_sentence(pictures, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("_multiprocessing.SemLock", none)
    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", none)
    told = f"/dev/shm, where .* cannot be used .{os.strerror(number)}.*--shm-size 64m"
    with pytest.raises(RunError, match=told):
        next(
            Loader(folder.Folder(pictures), View(crops=(Whole(size=8),)), batch=2, workers=1).epoch(
                0
            )
        )
    with pytest.raises(RunError, match=told):
        next(spread(abs, [1], 1))


@pytest.mark.soak
@pytest.mark.parametrize("how", ["size=1m", "size=4k", "ro"])
def test_a_small_shared_memory_holds_nothing_up(pictures, tmp_path, how):
    """Of a whole run, with more crops under way than it could hold; without room for locks, a sentence."""
    words = ["demo", "--data", pictures, "--out", tmp_path / "run", "--batch", 32, "--workers", 2]
    words += ["--enlarge", "--image-size", 128, "--max-steps", 3, "--backbone.width", 0.1]
    train = shlex.join([sys.executable, "fastrot/train.py", *map(str, words)])
    mount = f"mount -t tmpfs -o {how} tmpfs /dev/shm || exit 77"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount}; exec {train}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("mounting a small /dev/shm is not allowed here")
    if how == "size=1m":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1, done.stderr
        assert "fastrot: /dev/shm, where processes keep their locks" in done.stderr
        assert "Traceback" not in done.stderr
