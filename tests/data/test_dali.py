"""`--loader dali`: DALI decodes, order and boxes are ours; none of its faults, and its own reader takes our shards."""

import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import write_pack
from PIL import Image
from test_run import TINY
from truth import photo

from fastrot import train
from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError, Whole
from fastrot.core import CropRequest, DamagedRecord, View
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.tars.write import TarsOptions

MISSING = not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
pytestmark = [
    pytest.mark.dali,
    pytest.mark.skipif(MISSING, reason="DALI is not installed: make dali"),
]
ONE = View(crops=(RandomResized(size=32),))
OVER = View(crops=(Shifted(size=36, pad=9),))
TWO = View(crops=(RandomResized(size=32), Whole(size=12)))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def written(odd, tmp_path_factory) -> dict[str, Path]:
    """The same pictures as shards of original bytes, as a .beton, as files."""
    root = tmp_path_factory.mktemp("dali")
    how = {"source": "imagefolder", "root": odd, "workers": 0}
    convert(TarsOptions(**how, out=root / "shards", shard=7))
    convert(BetonOptions(**how, out=root / "jpg.beton"))
    convert(BetonOptions(**how, out=root / "raw.beton", encoding="raw"))
    return {
        "tars": root / "shards",
        "beton": root / "jpg.beton",
        "raw": root / "raw.beton",
        "folder": odd,
    }


@pytest.fixture
def spoilt(odd, tmp_path) -> Path:
    return Path(shutil.copytree(odd, tmp_path / "spoilt"))


def epoch(data, view=ONE, number=0, *, batch=5, workers=2, **how) -> list:
    return list(open_loader(data, view, batch=batch, workers=workers, **how).epoch(number))


def apart(a, b) -> tuple[int, float]:
    """Largest and mean difference of the crops of two epochs that are equal otherwise."""
    found = []
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.index, y.index)
        found += [(s.int() - t.int()).abs() for s, t in zip(x.crops, y.crops, strict=True)]
    return max(int(each.max()) for each in found), float(np.mean([e.float().mean() for e in found]))


def places(loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


# ---- pixels ----


@pytest.mark.parametrize("name", ["tars", "beton", "folder"])
@pytest.mark.parametrize("view", [ONE, OVER, TWO], ids=["one", "over-the-border", "two"])
def test_on_a_cpu_the_crops_are_those_of_our_own_reader_to_the_bit(written, name, view):
    """Turned, grey and CMYK JPEGs and pictures that are none among them: decode, turn, then crop."""
    ours, through = epoch(written[name], view, workers=0), epoch(written[name], view, loader="dali")
    assert apart(ours, through) == (0, 0)


@pytest.mark.parametrize("view", [ONE, OVER, TWO], ids=["one", "over-the-border", "two"])
def test_the_crop_kernel_makes_the_same_of_what_dali_decoded(written, view, monkeypatch):
    """A GPU's way, with a CPU as the device; Whole(12) halves three times."""
    from fastrot.data.tars import dali

    there = lambda _, job: lambda: dali._cut_there(job, torch.device("cpu"))  # noqa: E731
    monkeypatch.setattr(dali._Reader, "_cut_here", there)
    data = written["tars"]
    assert apart(epoch(data, view, workers=0), epoch(data, view, loader="dali")) == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_dali_itself_turns_before_it_crops(odd, orientation):
    """Not asked of it, since another decoder of DALI's might not: its CPU one does."""
    from fastrot.data import pictures
    from fastrot.data.tars import dali

    (file,) = odd.rglob(f"turn{orientation}.jpg")
    encoded = np.fromfile(file, np.uint8)
    picture = pictures.decode(encoded.tobytes())
    height, width = picture.shape[:2]
    assert pictures.is_upright_jpeg(encoded, height, width) == (orientation == 1)
    request = CropRequest((np.array([[0, 3, 5, height - 9, width - 6, 0]]),), (24,))
    job = dali._Job(request, np.array([[height, width]], np.int32))
    job.records = [encoded]
    boxes = dali._Pipe(None, 1, False, batch=1).run(job)
    assert np.array_equal(np.asarray(boxes[0]), picture[3 : height - 6, 5 : width - 1])


def test_what_is_known_of_the_data_is_what_it_says_without_dali(written):
    for name in ("tars", "beton", "folder"):
        plain, through = open_data(written[name]), open_data(written[name], "dali")
        for what in ("rows", "classes", "fingerprint", "mean", "std", "format"):
            assert getattr(plain, what) == getattr(through, what)
        assert np.array_equal(plain.labels, through.labels)
        assert np.array_equal(plain.keys, through.keys)
        assert plain.name(3) == through.name(3)


# ---- pipelines ----


def test_epochs_share_a_pipeline_and_two_loaders_do_not(written, monkeypatch):
    from fastrot.data.tars import dali

    built, build = [], dali.Pipeline
    monkeypatch.setattr(dali, "Pipeline", lambda **how: (built.append(how), build(**how))[1])
    data = open_data(written["tars"], "dali")
    training = open_loader(data, ONE, batch=5, workers=2)
    plain = View(crops=(Whole(size=20),), shuffled=False)
    evaluation = open_loader(data, plain, batch=6, workers=2)
    alone = [b.images for b in training.epoch(0)], [b.images for b in evaluation.epoch(0)]
    for number in range(1, 4):
        list(training.epoch(number))
    assert len(built) == 2
    both = zip(training.epoch(0), evaluation.epoch(0), strict=True)
    for k, (one, other) in enumerate(both):
        assert torch.equal(one.images, alone[0][k])
        assert torch.equal(other.images, alone[1][k])
    assert len(built) == 2


def test_broken_off_epochs_leave_nothing_in_the_pipeline(written, lasting_threads):
    loader = open_loader(written["tars"], ONE, batch=3, workers=2, loader="dali")
    whole, threads = [b.images for b in loader.epoch(1)], lasting_threads()
    for stop in (1, 2, 5):
        batches = loader.epoch(0)
        for _ in range(stop):
            next(batches)
        batches.close()
        assert lasting_threads() == threads
        again = [b.images for b in loader.epoch(1)]
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


# ---- pictures that cannot be read ----


def cut_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


WHOLES = View(crops=(Whole(size=24),), shuffled=False)


def test_a_bad_picture_is_named_and_the_rest_goes_on(spoilt):
    data = open_data(spoilt, "dali")
    row = next(i for i in range(data.rows) if "plain4" in data.name(i))
    cut_half(next(spoilt.rglob("plain4.jpg")))
    with pytest.raises(DamagedRecord, match=rf"row {row}, 'class\d/plain4\.jpg', cannot be read"):
        epoch(data, WHOLES)
    sound = epoch(spoilt, WHOLES, workers=0, on_bad_record="skip")
    for _ in range(2):  # it is also remembered
        loader = open_loader(data, WHOLES, batch=5, workers=2, on_bad_record="skip")
        assert apart(sound, list(loader.epoch(0))) == (0, 0)
        assert len(loader.skipped) == 1


def test_a_picture_that_dali_alone_refuses_is_decoded_by_us(written, monkeypatch, caplog):
    """The same crops whether it is met for the first time, in another batch, or known of."""
    from fastrot.data.tars import dali

    every = SimpleNamespace(is_upright_jpeg=lambda *_: True)  # DALI is given the GIF too
    monkeypatch.setattr(dali, "pictures", every)
    ours = epoch(written["tars"], ONE, workers=0)
    data = open_data(written["tars"], "dali")
    with caplog.at_level(logging.WARNING, "fastrot"):
        assert apart(ours, epoch(data)) == (0, 0)
    gif = next(i for i in range(data.rows) if "gif" in data.name(i))
    assert [f"row {gif} is decoded without DALI" in line for line in caplog.messages] == [True]
    assert apart(ours, epoch(data)) == (0, 0)
    assert len(caplog.messages) == 1
    assert apart(ours, epoch(open_data(written["tars"], "dali"))) == (0, 0)


def test_a_file_that_is_gone_or_another_now_is_named(spoilt):
    data = open_data(spoilt, "dali")
    next(spoilt.rglob("plain1.jpg")).unlink()
    Image.fromarray(photo(1, 20, 70)).save(next(spoilt.rglob("plain2.jpg")))
    loader = open_loader(data, ONE, batch=5, workers=2, on_bad_record="skip")
    list(loader.epoch(0))
    list(loader.epoch(1))
    said = sorted(loader.skipped)
    assert len(said) == 2
    assert "plain1.jpg', cannot be read: No such file" in said[0] + said[1]
    assert "it was listed as 46 x 56 and is 20 x 70" in said[0] + said[1]


def test_a_flipped_bit_in_a_shard_is_named_by_its_checksum(written, tmp_path):
    shards = Path(shutil.copytree(written["tars"], tmp_path / "shards"))
    at = int(open_data(shards)._start[3]) + 500
    with open(shards / "00000.tar", "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedRecord, match=r"row 3 of .*00000\.tar .* its checksum"):
        epoch(shards, loader="dali")


# ---- a run, and what is refused ----


def test_a_run_through_dali_says_so_and_tells_of_another_decoder(written, tmp_path, capsys):
    def go(out: str, *more: str) -> None:
        data = ["--data", str(written["tars"]), "--loader", "dali", "--out", str(tmp_path / out)]
        assert train.main([*TINY, *data, "--schedule.steps", "6", *more]) == 0

    go("run", "--max-steps", "4")
    told = capsys.readouterr().out
    assert "pictures are decoded by DALI" in told
    assert "C++ extension" not in told
    go("run", "--loader", "tars")
    told = capsys.readouterr().out
    assert "resumed at step 4" in told
    assert "decoder were DALI" in told


def test_what_holds_no_jpegs_is_refused(written, tmp_path):
    pack = write_pack(tmp_path / "a.pack", [photo(1, 20, 30)])
    for data in ("synthetic:20", written["raw"], pack):
        with pytest.raises(
            UsageError, match=r"--loader dali decodes JPEGs, and --data .* holds none"
        ):
            open_data(data, "dali")


def test_where_dali_is_missing_its_loader_is_refused(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrot.data.tars.dali", None)
    with pytest.raises(UsageError, match=r"cannot import DALI .* make dali"):
        open_data(written["tars"], "dali")


def test_a_gpu_that_dali_cannot_use_is_one_sentence(written):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from fastrot.data.tars import dali

    with pytest.raises(UsageError, match=r"--loader dali cannot use the GPU \(.*choose another"):
        dali._Pipe(0, 1, False, batch=4)


# ---- DALI's own reader ----


def test_dalis_webdataset_reader_takes_our_shards(written):
    from nvidia.dali import fn, pipeline_def

    data = open_data(written["tars"])

    @pipeline_def(batch_size=data.rows, num_threads=1, device_id=None)
    def reading():
        shards = sorted(written["tars"].glob("*.tar"))
        images, labels = fn.readers.webdataset(
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg;png;gif;webp;bmp;tif;ppm", "cls"],
            missing_component_behavior="error",
        )
        return images, labels

    images, labels = reading().run()
    for row in range(data.rows):
        assert np.array_equal(np.asarray(images[row]), data.record(row))
        assert int(np.asarray(labels[row]).tobytes()) == data.labels[row]


# ---- GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tars", "beton", "folder"])
@pytest.mark.parametrize("view", [ONE, OVER, TWO], ids=["one", "over-the-border", "two"])
def test_on_a_gpu_crops_stay_there_and_differ_by_the_decoder(written, name, view):
    there = epoch(written[name], view, loader="dali", device="cuda")
    assert all(crop.is_cuda for batch in there for crop in batch.crops)
    ours = epoch(written[name], view, workers=0)
    for a, b in zip(ours, there, strict=True):
        assert torch.equal(a.index, b.index.cpu())
        for s, t in zip(a.crops, b.crops, strict=True):
            assert (s.int() - t.cpu().int()).abs().float().mean() < 3
