"""FFCV reads what we write, and `--loader ffcv` gives its pictures in our order, without its faults.

The referee for pixels is exact: FFCV decodes with libjpeg-turbo's fast DCT and resamples with OpenCV's INTER_AREA.
"""

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from asked import asked
from PIL import Image
from test_run import TINY, assert_same_bits
from truth import photo

from fastrot import train
from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError, Whole
from fastrot.core import CropRequest, DamagedRecord, View
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert

ROOT = Path(__file__).parents[2]
MISSING = importlib.util.find_spec("ffcv") is None
pytestmark = [
    pytest.mark.ffcv,
    pytest.mark.skipif(MISSING, reason="FFCV is not installed: make ffcv"),
]
PHOTOS = [photo(i, 60 + 7 * (i % 5), 80 + 9 * (i % 4)) for i in range(26)]
RANDOM = View(crops=(RandomResized(size=32),))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """The same photos, from PNGs, as jpg and as raw."""
    import fastrot.data.beton.ffcv  # noqa: F401 (imports FFCV without its typed dict)

    root = tmp_path_factory.mktemp("ffcv")
    for i, picture in enumerate(PHOTOS):
        (root / "png" / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / "png" / f"c{i % 3}" / f"{i:02d}.png")
    for kind in ("jpg", "raw"):
        options = {"source": "imagefolder", "root": root / "png", "workers": 0}
        convert(BetonOptions(**options, out=root / f"{kind}.beton", encoding=kind))
    return {kind: root / f"{kind}.beton" for kind in ("jpg", "raw")}


@pytest.fixture
def spoilt(written, tmp_path) -> Path:
    """A jpg file with all that lies beside it, to be spoilt."""
    for file in written["jpg"].parent.glob("jpg.beton*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "jpg.beton"


def whole(data: Beton, row: int) -> np.ndarray:
    """The picture as FFCV decodes it."""
    record = data.record(int(row))
    if data.contents.raw[row]:
        return record.reshape(*data.contents.sizes[row], 3)
    return simplejpeg.decode_jpeg(record, fastdct=True)


def cropped(picture: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """The box of a row, resampled by area, mirrored if flip; outside is 0."""
    _, y, x, h, w, flip = row.tolist()
    pad = max(h, w)
    box = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)))[y + pad : y + pad + h, x + pad :][:, :w]
    small = cv2.resize(box, (size, size), interpolation=cv2.INTER_AREA)
    return small[:, ::-1] if flip else small


def request_of(rows: list[int], data: Beton, size: int = 16) -> CropRequest:
    heights, widths = data.sizes(np.array(rows)).T
    zero = np.zeros_like(heights)
    boxes = np.stack([rows, zero, zero, heights, widths, zero], 1).astype(np.int64)
    return CropRequest((boxes,), (size,))


# ---- FFCV's own Reader and Loader ----


@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_ffcvs_reader_finds_every_byte(written, kind):
    from ffcv.reader import Reader

    reader, ours = Reader(str(written[kind])), Beton(written[kind])
    file = written[kind].read_bytes()
    assert reader.field_names == ["image", "label", "index"]
    assert reader.num_samples == len(PHOTOS)
    assert reader.metadata["f1"].tolist() == ours.labels.tolist()
    assert reader.metadata["f2"].tolist() == list(range(len(PHOTOS)))
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist()))  # noqa: B905
    for row, image in enumerate(reader.metadata["f0"]):
        assert [image["height"], image["width"]] == ours.contents.sizes[row].tolist()
        at = int(image["data_ptr"])
        assert file[at : at + sizes[at]] == ours.record(row).tobytes()
        if kind == "raw":
            truth = PHOTOS[int(Path(ours.name(row)).stem)]
            assert ours.record(row).tobytes() == truth.tobytes()


# what FFCV does to numba's types breaks the finalizers of its own functions
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("kind", "os_cache"), [("jpg", True), ("raw", False)])
def test_ffcvs_loader_reads_every_picture(written, kind, os_cache):
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    ours = Beton(written[kind])
    drawn = Loader(
        str(written[kind]),
        batch_size=8,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [CenterCropRGBImageDecoder((24, 24), ratio=1)],
            "label": [IntDecoder()],
            "index": [IntDecoder()],
        },
    )
    seen = []
    for images, labels, index in drawn:
        for image, label, row in zip(images, labels[:, 0], index[:, 0], strict=True):
            height, width = ours.contents.sizes[row].tolist()
            side = min(height, width)
            box = np.array([row, (height - side) // 2, (width - side) // 2, side, side, 0])
            assert np.array_equal(image, cropped(whole(ours, row), box, 24))
            assert label == ours.labels[row]
            seen.append(row)
    assert seen == list(range(len(PHOTOS)))
    del drawn
    gc.collect()


# ---- --loader ffcv ----


@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_pixels_are_those_of_fast_dct_and_area(written, kind):
    view = View(crops=(RandomResized(size=32), Shifted(size=40, pad=9), Whole(size=20)))
    loader = open_loader(open_data(written[kind], "ffcv"), view, batch=8, workers=2)
    for batch in loader.epoch(3):
        request = loader.request(batch.index.numpy(), 3)
        for rows, size, pixels in zip(request.rows, request.sizes, batch.crops, strict=True):
            for row, crop in zip(rows, pixels.numpy(), strict=True):
                assert np.array_equal(crop, cropped(whole(loader.data, row[0]), row, size))


@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_batches_are_those_of_our_reader_but_for_the_resampler(written, kind):
    apart = []
    for a, b in zip(
        open_loader(written[kind], RANDOM, batch=8, workers=0).epoch(1),
        open_loader(written[kind], RANDOM, batch=8, workers=2, loader="ffcv").epoch(1),
        strict=True,
    ):
        for name in ("index", "label", "epoch_step"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        apart.append((a.images.float() - b.images.float()).abs())
    assert torch.cat(apart).mean() < 3  # grey levels; another box or flip is over 20 apart


def test_what_is_known_of_the_file_is_what_our_reader_knows(written):
    ours, theirs = Beton(written["jpg"]), open_data(written["jpg"], "ffcv")
    for name in ("rows", "classes", "fingerprint", "mean", "std"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert np.array_equal(ours.labels, theirs.labels)
    assert np.array_equal(ours.keys, theirs.keys)


def test_any_batch_size_gives_equal_bytes(written):
    data, view = open_data(written["jpg"], "ffcv"), View(crops=RANDOM.crops, shuffled=False)
    runs = [
        torch.cat([b.images for b in open_loader(data, view, batch=size, workers=workers).epoch(2)])
        for size, workers in ((1, 1), (5, 3), (26, 2), (40, 0))
    ]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_two_loaders_at_once(written):
    loaders = [open_loader(written[k], RANDOM, batch=4, workers=2, loader="ffcv") for k in written]
    alone = [[b.images for b in loader.epoch(0)] for loader in loaders]
    for k, pair in enumerate(zip(*(loader.epoch(0) for loader in loaders), strict=True)):
        assert all(torch.equal(b.images, each[k]) for b, each in zip(pair, alone, strict=True))


# ---- none of FFCV's faults ----


def flip_bit_in_scan(path: Path, row: int) -> None:
    data = Beton(path)
    at = int(data.contents.ptr[row] + data.contents.size[row]) - 40
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_named_by_the_checksum(spoilt):
    flip_bit_in_scan(spoilt, 7)
    data = open_data(spoilt, "ffcv")
    request = request_of([3, 7, 11, 7], data)
    (((crop,), errors),) = asked(data, [request], 2)
    assert sorted(place for place, _ in errors) == [1, 3]
    for _, sentence in errors:
        assert f"row 7 of {spoilt} ({data.name(7)})" in sentence
        assert "checksum" in sentence
    assert np.array_equal(crop[2].numpy(), cropped(whole(data, 11), request.rows[0][2], 16))
    with pytest.raises(DamagedRecord, match=r"row 7 of .*jpg\.beton"):
        list(open_loader(data, RANDOM, batch=4, workers=2).epoch(0))


def test_without_a_checksum_the_decoder_is_believed(spoilt):
    """A record that ends too early, and one that is another picture's: never zeros without a word."""
    bare = Path(shutil.copy(spoilt, spoilt.with_name("alone.beton")))
    data = Beton(bare)
    with open(bare, "r+b") as file:
        start, size = int(data.contents.ptr[5]), int(data.contents.size[5])
        file.seek(start + size * 6 // 10)
        file.write(bytes(size - size * 6 // 10))
        other = simplejpeg.encode_jpeg(photo(1, 24, 24), quality=40)
        file.seek(int(data.contents.ptr[9]))
        file.write(other)
    data = open_data(bare, "ffcv")
    request = request_of([0, 1, 2, 3, 4, 5, 9, 10], data)
    ((_, errors),) = asked(data, [request], 1)
    said = dict(sorted(errors))
    assert list(said) == [5, 6]
    assert "row 5" in said[5]
    assert "cannot decode" in said[5]
    assert "it is 24 x 24 pixels" in said[6]


def test_sound_records_without_checksums_are_read(spoilt):
    bare = Path(shutil.copy(spoilt, spoilt.with_name("alone.beton")))
    data = open_data(bare, "ffcv")
    request = request_of(list(range(data.rows)), data)
    ((_, errors),) = asked(data, [request], 2)
    assert not errors


@pytest.mark.parametrize("workers", [1, 2])
def test_an_operation_that_raises_ends_the_epoch_with_that_error(
    written, monkeypatch, workers, lasting_threads
):
    from fastrot.data.beton import ffcv

    resample, calls = ffcv._resample, iter(range(100))

    def broken(*how):
        if next(calls) == 5:
            raise ZeroDivisionError("in an operation")
        resample(*how)

    monkeypatch.setattr(ffcv, "_resample", broken)
    loader = open_loader(written["jpg"], RANDOM, batch=4, workers=workers, loader="ffcv")
    threads, met = lasting_threads(), []

    def epoch():
        try:
            list(loader.epoch(0))
        except ZeroDivisionError as error:
            met.append(str(error))

    consumer = threading.Thread(target=epoch, daemon=True)
    consumer.start()
    consumer.join(timeout=20)
    assert met == ["in an operation"]
    assert lasting_threads() == threads


def own_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_epochs_broken_off_leave_nothing(written, lasting_threads):
    view = View(crops=(RandomResized(size=192),))
    loader = open_loader(
        written["jpg"], view, batch=8, workers=2, loader="ffcv", enlarge=True
    )  # an epoch left behind would hold over 2 MB
    threads = lasting_threads()

    def broken_off():
        batches = loader.epoch(0)
        next(batches)
        batches.close()

    for _ in range(3):
        broken_off()
    before = own_memory()
    for _ in range(10):
        broken_off()
    assert lasting_threads() == threads
    assert own_memory() - before < 8


def test_torchs_threads_are_left_alone(written):
    """Also those of its libraries, and in the midst of an epoch, where FFCV's own thread would set them."""
    kept = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        said = [torch.__config__.parallel_info()]
        loader = open_loader(written["jpg"], RANDOM, batch=4, workers=2, loader="ffcv")
        said.append(torch.__config__.parallel_info())
        for _ in loader.epoch(0):
            said.append(torch.__config__.parallel_info())
        said.append(torch.__config__.parallel_info())
    finally:
        torch.set_num_threads(kept)
    assert set(said) == {said[0]}


FRESH = """
import sys
import torch
from numba.core import event
torch.set_num_threads(3)
before = torch.__config__.parallel_info()
with event.install_recorder("numba:compile") as compiled:
    from fastrot.assemble import open_loader
    from fastrot.config import RandomResized
    from fastrot.core import View
    loader = open_loader(sys.argv[1], View(crops=(RandomResized(size=32),)), batch=8, workers=2, loader="ffcv")
    batches = loader.epoch(0)
    next(batches)
    batches.close()
assert torch.__config__.parallel_info() == before, "torch's threads were set"
print(len(compiled.buffer))
"""


def test_a_process_of_its_own_compiles_nothing_and_leaves_torchs_threads(written):
    command = [sys.executable, "-c", FRESH, str(written["jpg"])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_numbas_types_are_left_alone(written):
    import numba

    flat = numba.uint8[::1]
    open_data(written["jpg"], "ffcv")
    assert flat.mutable


@pytest.mark.soak
def test_a_run_through_ffcv_resumes_to_the_same_bits(written, tmp_path, capsys):
    def go(out: str, *more: str) -> Path:
        argv = [
            *TINY,
            "--data",
            str(written["jpg"]),
            "--loader",
            "ffcv",
            "--out",
            str(tmp_path / out),
        ]
        assert train.main([*argv, "--schedule.steps", "9", *more]) == 0
        return tmp_path / out / "checkpoints" / "last.pt"

    straight = go("straight")
    go("broken", "--max-steps", "4")
    capsys.readouterr()
    broken = go("broken", "--workers", "2")
    assert "resumed at step 4" in capsys.readouterr().out
    assert_same_bits(straight, broken)


def test_only_a_beton_is_read_through_ffcv(written):
    with pytest.raises(UsageError, match=r"is not for --loader ffcv: name"):
        open_data(written["jpg"].parent / "png", "ffcv")
