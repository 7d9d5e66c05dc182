"""The doctor's measurements: they name what binds on machines that are slow on purpose, for every format."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from truth import photo

from fastrot import assemble, config
from fastrot.config import AlexNet, RandomResized, RotNet
from fastrot.data import folder as folder_module
from fastrot.data.beton.write import BetonOptions
from fastrot.data.loader import Loader
from fastrot.data.pack.read import Pack
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.tars.read import Tars
from fastrot.data.tars.write import TarsOptions
from fastrot.presets import PRESETS
from fastrot.speed import bounds, probe
from fastrot.speed.advice import Loading, Measurements
from fastrot.speed.cost import StepCost

CPU = torch.device("cpu")
TINY = AlexNet(width=0.1, kernel=5, stride=2)


def cfg_of(*, size=32, batch=8, backbone=TINY) -> config.Config:
    cfg = dataclasses.replace(
        PRESETS["demo"](),
        method=RotNet(crop=RandomResized(size=size)),
        backbone=backbone,
        batch=batch,
        precision="fp32",
        enlarge=True,
    )
    return config.resolved(cfg)


def measured(data, *, cfg=None, workers=1, seconds=0.3) -> Measurements:
    cfg = dataclasses.replace(cfg_of() if cfg is None else cfg, workers=workers)
    return probe.measure(cfg, data, None, CPU, seconds, print)


def undisturbed(measure, right) -> Measurements:
    """What `measure` finds where that is `right`, within three times: others may have the cores for a moment."""
    for _ in range(3):
        if right(found := measure()):
            break
    return found


def bound(found: Measurements) -> bounds.Bound:
    return bounds.bound(found.measured)


@pytest.fixture(scope="module")
def formats(pictures, tmp_path_factory) -> dict[str, str]:
    """The same 37 pictures in every format, by name; synthetic."""
    out = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(out / "cache"))
        assemble.open_data(pictures)
    made = {"source": "imagefolder", "root": pictures, "workers": 0}
    convert(BetonOptions(**made, out=out / "p.beton"))
    parts: Any = convert(BetonOptions(**made, out=out / "q.beton", keep_parts=True), part=9)
    convert(PackOptions(**made, out=out / "p.pack"))
    convert(TarsOptions(**made, out=out / "tars"))
    paths = {"folder": pictures, "beton": out / "p.beton", "set": parts.out}
    paths |= {"pack": out / "p.pack", "tars": out / "tars", "synthetic": "synthetic:50"}
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder of large JPEGs: 3 megapixels each."""
    root = tmp_path_factory.mktemp("large")
    picture = Image.fromarray(photo(0, 1500, 2000))
    for i in range(12):
        picture.save(root / f"{i}.jpg", quality=92)
    return root


# ---- machines that are slow on purpose ----


class SlowTars(Tars):
    """Shards on a disk that takes its time over every picture."""

    def record(self, row: int):
        time.sleep(0.04)
        return super().record(row)


def test_a_throttled_disk_is_named(formats):
    found = measured(SlowTars(formats["tars"]))
    assert bound(found) == "read"
    assert found.read is not None
    assert found.load < found.read < 25
    assert found.decode > found.read


def test_a_throttled_disk_under_a_folder_is_named(formats, monkeypatch):
    at_once = folder_module.picture_file

    def slow(path):
        time.sleep(0.05)
        return at_once(path)

    monkeypatch.setattr(folder_module, "picture_file", slow)  # forked worker processes have it too
    assert bound(measured(assemble.open_data(formats["folder"]), seconds=1.0)) == "read"


def test_one_worker_with_large_pictures_is_named(tmp_path):
    picture = Image.fromarray(photo(0, 1500, 2000))
    for i in range(6):
        picture.save(tmp_path / f"{i}.jpg", quality=92)
    data = assemble.open_data(tmp_path)
    found = undisturbed(
        lambda: measured(data, cfg=cfg_of(batch=4)), lambda each: bound(each) == "decode"
    )
    assert bound(found) == "decode"
    assert found.read is not None
    assert found.read > found.decode


@pytest.fixture
def slow_loader(monkeypatch):
    """A Loader that takes 50 ms for every batch, whatever the data."""
    at_once = Loader.request

    def slow(self, index, epoch):
        time.sleep(0.05)
        return at_once(self, index, epoch)

    monkeypatch.setattr(Loader, "request", slow)


def test_a_slow_decoder_is_not_taken_for_a_slow_disk(formats, slow_loader):
    assert bound(measured(assemble.open_data(formats["tars"]))) == "decode"


def test_pictures_that_are_made_are_neither_read_nor_decoded_however_long_it_takes(slow_loader):
    found = measured(assemble.open_data("synthetic:1000"), workers=0)
    assert bound(found) not in ("read", "decode", "copy")
    assert found.read is None
    assert found.measured.step > 0.05


def test_a_large_net_is_bound_by_its_own_step(formats):
    large = cfg_of(size=96, backbone=AlexNet(width=1.0))
    found = measured(assemble.open_data(formats["pack"]), cfg=large)
    assert bound(found) in ("arithmetic", "memory", "launch", "neighbours")
    assert found.load > found.step


# ---- every format ----


@pytest.mark.parametrize("name", ["folder", "set", "pack"])  # others: above and below
def test_every_format_has_its_figures(formats, name):
    data: Any = assemble.open_data(formats[name])
    found = measured(data, seconds=0.2)
    rates = [found.read, found.decode, found.load, found.step, found.train]
    assert all(rate is not None and 0 < rate < float("inf") for rate in rates)
    assert (found.images, found.damaged) == (data.rows, ())
    if name == "folder":
        sizes = [os.path.getsize(Path(formats[name]) / data.name(row)) for row in range(data.rows)]
        assert min(sizes) <= (found.bytes or 0) <= max(sizes)
    if name == "pack":
        assert found.pack_bytes == data.tiles.nbytes


def test_pictures_that_cannot_be_read_are_told(formats, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SMALLEST", 8)  # of two, both may be damaged
    whole = bytearray(Path(formats["beton"]).read_bytes())
    data: Any = assemble.open_data(formats["beton"])
    for row in range(0, 37, 3):
        start = int(data.contents.ptr[row]) + 40
        whole[start : start + 8] = b"damaged!"
    for file in Path(formats["beton"]).parent.glob("p.beton.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p.beton").write_bytes(whole)
    found = measured(assemble.open_data(tmp_path / "p.beton"))
    assert 0 < len(found.damaged) <= 13
    assert all(int(said.split()[1]) % 3 == 0 for said in found.damaged)
    assert "is damaged" in found.damaged[0]


def test_the_bytes_of_a_pack_are_those_that_would_be_written(formats, tmp_path):
    data = assemble.open_data(formats["folder"])
    sizes = data.sizes(np.arange(data.rows))
    for short in (31, 48, 300):
        out = tmp_path / f"{short}.pack"
        made = {"source": "imagefolder", "root": Path(formats["folder"]), "workers": 0}
        convert(PackOptions(**made, out=out, short_side=short))
        assert probe.pack_bytes(data, sizes, short) == Pack(out).tiles.nbytes


# ---- how it measures ----


def test_a_batch_is_as_large_as_there_is_time_for(monkeypatch):
    """A step that takes 1 ms a picture and should take 0.3: of 192 pictures those are timed that fit four times."""
    taken = []

    def step(state, batch):
        taken.append(len(batch.index))
        time.sleep(0.001 * len(batch.index))

    def floors(cost, peak):
        return {"arithmetic": 0.0003 * cost.flop, "memory": 0.0}

    monkeypatch.setattr(probe, "train_step", step)
    monkeypatch.setattr(probe, "step_cost", lambda *a: StepCost(flop=a[2].batch, traffic=0))
    monkeypatch.setattr(bounds, "floors", floors)
    fits = int(1.0 * probe.SHARES["step"] / probe.STEPS / probe.SLOWER / 0.0003 - 1)

    def measure() -> Measurements:
        taken.clear()
        return measured(assemble.open_data("synthetic:500"), cfg=cfg_of(batch=192), seconds=1.0)

    found = undisturbed(measure, lambda each: each.batch == fits)
    assert set(taken) == {found.batch}
    assert found.batch == fits
    assert 300 < found.step <= 1000


def test_what_is_waited_for_and_what_not():
    """Steps of 8 pictures that take 100 ms alone, on the data 160 ms, 60 ms of them waiting."""

    def found(read: float | None, decode: float, device=CPU) -> bounds.Measured:
        loading = Loading(bytes=None, from_disk=None, read=read, decode=decode)
        return probe._measured(together, alone, loading, 8, device)

    alone = bounds.Measured(step=0.1, wait=0.0, busy=0.1)
    together = bounds.Measured(step=0.16, wait=0.06, busy=0.1)
    m = found(200.0, 400.0)
    assert (m.step, m.wait, m.busy) == tuple(map(pytest.approx, (0.16, 0.06, 0.1)))
    assert (m.read, m.decode) == (0.04, 0.02)
    hiccup = found(2000.0, 4000.0)  # for data: 6 ms a batch
    assert hiccup.wait == pytest.approx(0.006)
    made = found(None, 4000.0)
    assert (made.wait, made.busy, made.read) == (0.0, made.step, None)
    ahead = found(20.0, 400.0)  # 420 ms a batch
    assert (ahead.step, ahead.busy) == (pytest.approx(0.42), pytest.approx(0.1))
    gpu = found(200.0, 400.0, torch.device("cuda"))
    assert gpu.busy == pytest.approx(0.1)  # a step's on random pixels


def test_decoding_is_what_reading_again_leaves():
    assert probe.decode_alone(100.0, 200.0) == pytest.approx(200.0)
    assert probe.decode_alone(100.0, 100.0) == pytest.approx(100.0 / probe.NOISE)


def test_the_first_log_line_is_not_counted_and_the_batches_are_closed():
    closed = []

    def batches():
        try:
            while True:
                yield probe.random_batch(assemble.training_view(cfg_of()), 2, CPU)
        finally:
            closed.append(True)

    work = iter([0.3, 0.05, 9.0])
    timer = probe._timed(batches(), lambda _: time.sleep(next(work)), CPU, 0.1, line=1)
    assert (timer.lines, closed) == (2, [True])
    assert 0.05 <= timer.measured(2).step < 0.3
