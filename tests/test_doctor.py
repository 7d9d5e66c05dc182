"""The doctor: it names what binds on machines that are slow on purpose, and what it advises follows from its figures."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from truth import photo

from fastrot import __main__ as command
from fastrot import assemble, config, doctor, entry
from fastrot.config import AlexNet, RandomResized, RotNet, UsageError
from fastrot.data import folder as folder_module
from fastrot.data.beton.write import BetonOptions
from fastrot.data.beton.write import convert as write_beton
from fastrot.data.loader import Loader
from fastrot.data.pack.read import Pack
from fastrot.data.pack.write import PackOptions
from fastrot.data.pack.write import convert as convert_to_pack
from fastrot.data.tars.read import Tars
from fastrot.data.tars.write import TarsOptions
from fastrot.data.tars.write import convert as write_tars
from fastrot.presets import PRESETS
from fastrot.speed import bounds, probe
from fastrot.speed.probe import FormatTrial, Measurements

ROOT = Path(__file__).parents[1]
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


def examined(data, *, cfg=None, workers=1, seconds=1.0, **more) -> Measurements:
    cfg = cfg_of() if cfg is None else cfg
    budget = probe.TimeBudget(seconds)
    return probe.examine(cfg, data, CPU, workers=workers, budget=budget, **more)


@pytest.fixture(scope="module")
def formats(pictures, tmp_path_factory) -> dict[str, str]:
    """The same 37 pictures in every format, by name; synthetic."""
    out = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(out / "cache"))
        assemble.open_data(pictures)
    made = {"source": "imagefolder", "root": pictures, "workers": 0}
    write_beton(BetonOptions(**made, out=out / "p.beton"))
    parts: Any = write_beton(BetonOptions(**made, out=out / "q.beton", keep_parts=True), part=9)
    convert_to_pack(PackOptions(**made, out=out / "p.pack"))
    write_tars(TarsOptions(**made, out=out / "tars"))
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
        time.sleep(0.02)
        return super().record(row)


def test_a_throttled_disk_is_named(formats):
    found = examined(SlowTars(formats["tars"]))
    assert found.bound == "read"
    assert found.read is not None
    assert found.read < 50
    assert found.decoding > found.read
    said = doctor.verdict(found, subject("tars"))
    assert said.startswith("bound by reading at ")
    assert "faster disk" in said


def test_a_throttled_disk_under_a_folder_is_named(formats, monkeypatch):
    at_once = folder_module._bytes

    def slow(root, path):
        time.sleep(0.03)
        return at_once(root, path)

    monkeypatch.setattr(
        folder_module, "_bytes", slow
    )  # worker processes are forked and have it too
    assert examined(assemble.open_data(formats["folder"])).bound == "read"


def test_one_worker_with_large_pictures_is_named(large):
    found = examined(assemble.open_data(large), workers=1)
    assert found.bound == "decode"
    assert found.read is not None
    assert found.read > found.decoding
    assert found.forms["beton"].decode_one > 1.5 * found.decode_one  # shrunk for crops of 32 pixels
    said = doctor.verdict(found, subject("folder", workers=1))
    assert said.startswith("bound by decode")


class SlowDecoder(Tars):
    """Read in no time, decoded in a long one."""

    def _decoded(self, row, scratch):
        time.sleep(0.02)
        return super()._decoded(row, scratch)


def test_a_slow_decoder_is_not_taken_for_a_slow_disk(formats):
    assert examined(SlowDecoder(formats["tars"])).bound == "decode"


def test_a_tiny_net_on_pictures_that_cost_nothing_waits_for_none():
    found = examined(assemble.open_data("synthetic:1000"), workers=0)
    assert found.bound not in ("read", "decode", "copy")
    assert found.read is None
    assert found.forms == {}


def test_pictures_that_are_made_are_not_decoded_however_long_it_takes(monkeypatch):
    at_once = Loader.request

    def slow(self, index, epoch):
        time.sleep(0.05)
        return at_once(self, index, epoch)

    monkeypatch.setattr(Loader, "request", slow)
    found = examined(assemble.open_data("synthetic:1000"), workers=0)
    assert found.bound not in ("read", "decode", "copy")
    assert found.measured.step > 0.05


def test_a_large_net_is_bound_by_its_own_step(formats):
    large = cfg_of(size=96, batch=8, backbone=AlexNet(width=0.5))
    found = examined(assemble.open_data(formats["pack"]), cfg=large, workers=1)
    assert found.bound in ("arithmetic", "memory", "launch")
    assert found.loading > found.step


# ---- every format ----


@pytest.mark.parametrize("name", ["folder", "beton", "set", "pack", "tars", "synthetic"])
def test_every_format_has_its_figures(formats, name):
    data: Any = assemble.open_data(formats[name])
    found = examined(data, seconds=0.5)
    rates = [found.decode_one, found.decode_all, found.loading, found.step, found.together]
    assert all(0 < rate < float("inf") for rate in rates)
    assert (found.read is None) == (name == "synthetic")
    assert set(found.forms) == (set() if name in ("synthetic", "pack") else {"beton", "pack"})
    assert found.images == data.rows
    assert found.damaged == ()
    if name == "folder":
        sizes = [os.path.getsize(Path(formats[name]) / data.name(row)) for row in range(data.rows)]
        assert min(sizes) <= (found.bytes or 0) <= max(sizes)
    if name == "pack":
        assert found.pack_bytes == data.file.tiles.nbytes


def test_the_command_prints_a_table_and_writes_all_of_it(formats, tmp_path, capsys):
    args = ["--preset", "demo", "--image-size", "32", "--enlarge", "--batch", "4", "--seconds", "5"]
    args += ["--workers", "1", "--device", "cpu", "--val", formats["beton"]]
    assert doctor.main([formats["folder"], *args, "--json", str(tmp_path / "x.json")]) == 0
    said = capsys.readouterr().out
    for word in ("read", "decode + crop, one worker", "step on held pictures", "all together"):
        assert f"\n  {word}" in said
    for word in ("verdict", "format", "workers", "pack", "epoch", "machine", "versions"):
        assert f"\n  {word}  " in said or f"\n  {word} " in said
    whole = json.loads((tmp_path / "x.json").read_text())
    assert whole["environment"]["versions"]["torch"] == torch.__version__
    assert whole["found"]["val_seconds"] > 0
    assert whole["advice"]["verdict"] in said
    assert whole["epoch_s"] == pytest.approx(
        37 / whole["found"]["together"] + whole["found"]["val_seconds"]
    )


def test_pictures_that_cannot_be_read_are_told(formats, tmp_path):
    whole = bytearray(Path(formats["beton"]).read_bytes())
    data: Any = assemble.open_data(formats["beton"])
    for row in range(0, 37, 3):
        start = int(data.contents.ptr[row]) + 40
        whole[start : start + 8] = b"damaged!"
    for file in Path(formats["beton"]).parent.glob("p.beton.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p.beton").write_bytes(whole)
    found = examined(assemble.open_data(tmp_path / "p.beton"), seconds=2.0)
    assert 0 < len(found.damaged) <= 13
    assert all(int(said.split()[1]) % 3 == 0 for said in found.damaged)
    assert "is damaged" in found.damaged[0]


# ---- a step of more pictures than there is time for ----


def test_a_long_step_is_told_from_two_short_ones(monkeypatch):
    """A step that sleeps 100 ms, and 1 ms a picture: 192 pictures take 292 ms, and none of 192 is taken."""
    taken = []

    def step(state, batch):
        taken.append(len(batch.index))
        time.sleep(0.1 + 0.001 * len(batch.index))

    monkeypatch.setattr(probe, "train_step", step)
    monkeypatch.setattr(probe, "_floors", lambda *_: (0.002, 0.002))  # seconds, of two pictures
    cfg = cfg_of(batch=192)
    found = examined(assemble.open_data("synthetic:500"), cfg=cfg, workers=0, seconds=2.0)
    assert max(taken) == found.step_batch < 192
    assert 0.28 < 192 / found.step < 0.6  # seconds; 192 / 22 of what 22 pictures take are 1.1
    assert 0.28 < 192 / found.together < 0.9
    assert found.batch == 192


def test_a_step_that_there_is_no_time_for_is_foretold(monkeypatch):
    """A first step that takes longer than all seconds: no other, and none on the data."""
    taken = []

    def step(state, batch):
        taken.append(len(batch.index))
        time.sleep(0.3)

    monkeypatch.setattr(probe, "train_step", step)
    monkeypatch.setattr(probe, "_floors", lambda *_: (1e-3, 0.0))
    found = examined(assemble.open_data("synthetic:500"), cfg=cfg_of(batch=192), seconds=0.2)
    assert taken == [probe.FEW]
    assert found.steps == 0
    said = doctor.what_an_epoch_costs(found, subject("synthetic"))
    assert "foretold: there was no time" in said
    assert 192 / found.step == pytest.approx(0.3 + 190 * probe.SLOWER * 5e-4, rel=0.2)


def test_what_a_short_step_waits_for_a_long_one_waits_too():
    held = probe._held(assemble.open_data("synthetic:9"), assemble.training_view(cfg_of()), 2, CPU)
    steps = probe._Steps(held, fixed=1.0, each=0.01, issue=None)
    assert steps.seconds(100) == 2.0
    floors = (0.5, 0.1)
    measure = probe._measured
    timed = probe._Together(steps=3, step=1.1, wait=0.0)  # 10 pictures, nothing beyond the step
    quick = measure(timed, 10, 100, steps, 0.001, None, floors, CPU)
    assert (quick.step, quick.wait, quick.decode) == (pytest.approx(2.0), 0.0, pytest.approx(0.1))
    slow = measure(timed, 10, 100, steps, 0.05, None, floors, CPU)  # 5 s a batch: hidden at 10
    assert (slow.step, slow.wait) == (pytest.approx(5.0), pytest.approx(3.0))
    waited = probe._Together(steps=3, step=1.6, wait=0.5)
    long = measure(waited, 10, 100, steps, 0.06, None, floors, CPU)
    assert (long.step, long.wait) == (pytest.approx(7.0), pytest.approx(5.0))
    whole = measure(waited, 10, 10, steps, 0.06, None, floors, CPU)
    assert (whole.step, whole.wait, whole.busy) == (1.6, 0.5, pytest.approx(1.1))
    hiccup = measure(waited, 10, 10, steps, 0.001, None, floors, CPU)  # not for data: 10 ms a batch
    assert (hiccup.step, hiccup.wait) == (1.6, pytest.approx(0.01))


def test_the_watch_shares_the_seconds_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    heard = []
    budget = probe.TimeBudget(20.0, lambda stage, so_far: heard.append((stage, so_far)))
    assert budget.begin("a", 0.1) == 2.0
    now[0] += 1.9
    assert budget.goes_on()
    now[0] += 0.2
    assert not budget.goes_on()
    with budget.stopped():
        now[0] += 1000
    assert budget.so_far == pytest.approx(2.1)
    assert budget.begin("rest") == pytest.approx(17.9)
    now[0] += 50
    assert budget.begin("late") == pytest.approx(probe.LEAST * 20)
    assert heard[0] == ("a", 0.0)
    assert heard[-1] == ("late", pytest.approx(52.1))


# ---- advice from figures ----


def findings(**changed) -> Measurements:
    """A folder of large originals on 4 of 8 cores: 100 images/s a worker, a step that takes 2,000."""
    measured = bounds.Measured(
        step=0.5, wait=0.4, decode=0.5, busy=0.1, arithmetic=0.05, memory=0.02
    )
    known = dict(
        **{"images": 1_200_000, "workers": 4, "batch": 192, "opened": 1.0, "bytes": 110_000.0},
        **{"from_disk": 0.0, "read": 1e6, "reread": 1e6, "decode_one": 100.0, "decode_all": 400.0},
        **{"decoding": 400.0, "loading": 400.0, "copy": None, "step": 2000.0, "step_batch": 192},
        **{"together": 400.0, "together_batch": 192, "steps": 30, "val_seconds": None},
        **{"short": 256, "median_short": 375, "pack_bytes": 88 * 10**9, "damaged": ()},
        forms={
            "beton": FormatTrial(bytes=30e3, decode_one=500.0, convert=0.01),
            "pack": FormatTrial(bytes=65e3, decode_one=5000.0, convert=0.02),
        },
        ceilings=bounds.Ceilings(tflops=1.0, gb_per_s=10.0),
        measured=measured,
        seconds=20.0,
    )
    return Measurements(**(known | changed))  # type: ignore[arg-type]


def subject(format: str, *, data="some/train", gpu=None, memory=200 * 10**9, cores=8, workers=4):
    cfg = dataclasses.replace(
        PRESETS["rotnet-alexnet"](), data=data, workers=workers, precision="fp32"
    )
    device = torch.device("cuda" if gpu else "cpu")
    return doctor.Subject(cfg, format, doctor.Surroundings(device, cores, memory, gpu))


def command_in(sentence: str) -> list[str]:
    return shlex.split(sentence.split("to make:  ")[1].split(";")[0])


@pytest.mark.parametrize(
    ("format", "source"), [("folder", "imagefolder"), ("beton", "beton"), ("tars", "webdataset")]
)
def test_large_originals_are_to_be_converted_by_a_command_that_can_be_typed(format, source):
    forms = findings().forms
    if format == "beton":
        forms = {"pack": forms["pack"]}
    said = doctor.which_format(findings(forms=forms), subject(format, data="some/my train"))
    script, *args = command_in(said)[1:]
    name = "pack" if format == "beton" else "beton"
    assert said.startswith(f"a .{name} of short side 256: about ")
    assert script == f"dataprep/to_{'pack' if name == 'pack' else 'ffcv'}.py"
    assert (ROOT / script).exists()
    options = tyro.cli(PackOptions if name == "pack" else BetonOptions, args=args)
    options.check()
    assert options.source == source
    assert options.short_side == 256
    assert options.root == Path("some/my train")
    assert options.out == Path(f"some/my train-256.{name}")


def test_a_format_that_keeps_up_is_kept():
    kept = doctor.which_format(findings(step=300.0), subject("folder"))
    assert kept == "keep the folder: it gives 400 images/s, 1.33 times what the step takes"
    kept = doctor.which_format(findings(step=700.0), subject("folder"))  # with 8 workers, not 4
    assert "with all 8 cores about 800 images/s" in kept
    assert "to_ffcv" not in kept


def test_a_faster_format_is_chosen_where_the_smaller_one_does_not_keep_up():
    said = doctor.which_format(findings(step=20_000.0), subject("folder"))
    assert said.startswith("a .pack of short side 256: about 39,076 images/s")
    none = findings(
        step=20_000.0, forms={"beton": FormatTrial(bytes=30e3, decode_one=101.0, convert=0.01)}
    )
    assert doctor.which_format(none, subject("folder")).startswith("keep the folder: no other")


def test_a_pack_is_chosen_where_the_gpu_holds_it():
    room, small = (139 * 10**9, 141 * 10**9), (70 * 10**9, 80 * 10**9)
    assert doctor.which_format(findings(), subject("folder", gpu=room)).startswith("a .pack")
    assert doctor.which_format(findings(), subject("folder", gpu=small)).startswith("a .beton")
    says = doctor.whether_a_pack_fits
    assert "which fits into this GPU" in says(findings(), subject("folder", gpu=room))
    assert "--placement pinned" in says(findings(), subject("folder", gpu=small))
    assert "no GPU here: one of 132 GB or more" in says(findings(), subject("folder"))
    none = subject("folder", gpu=small, memory=10**9)
    assert "more than host memory" in says(findings(), none)


def test_data_larger_than_memory_is_to_be_read_in_blocks():
    said = doctor.which_format(findings(), subject("folder", memory=10**10))
    assert "--shuffle 0" in said
    assert "--order blocks" in said
    assert "--order blocks" not in doctor.which_format(findings(), subject("folder"))


def test_slow_reading_counts_a_formats_bytes():
    slow = findings(read=100.0, reread=100.0)  # 11 MB/s
    assert doctor.expected(slow, "pack", 8) == pytest.approx(1 / (1 / 40_000 + 65 / 11_000))
    assert doctor.expected(slow, "beton", 8) > doctor.expected(slow, "pack", 8)
    half = findings(decode_all=200.0)  # four workers do what two should
    assert doctor.expected(half, "pack", 8) == pytest.approx(20_000, rel=0.02)


def test_how_many_workers():
    said = doctor.how_many_workers(findings(step=500.0), subject("folder"))
    assert said.startswith("--workers 6 is enough, of 8 cores (a worker gives 100 images/s")
    few = doctor.how_many_workers(findings(), subject("folder", gpu=(1, 1)))
    assert few.startswith("--workers 8, all cores, and that is too few: 22 would keep up")
    assert few.endswith("each further GPU wants 22 cores more")
    assert doctor.how_many_workers(findings(), subject("pack", gpu=(1, 1))).startswith("one or two")


def test_what_an_epoch_costs():
    assert doctor.epoch_seconds(findings()) == 3000
    assert doctor.epoch_seconds(findings(val_seconds=60.0)) == 3060
    said = doctor.what_an_epoch_costs(findings(), subject("folder"))
    assert said.startswith("50 minutes for 1,200,000 pictures, extrapolated from 30 steps;")
    assert "without a validation pass" in said
    fewer = findings(together_batch=16, val_seconds=60.0)
    assert "30 steps of 16 pictures; 60 s of it" in doctor.what_an_epoch_costs(fewer, subject("x"))


def test_decoding_is_what_reading_again_leaves():
    assert probe.decoding_alone(100.0, None) == 100.0
    assert probe.decoding_alone(100.0, 200.0) == pytest.approx(200.0)
    assert probe.decoding_alone(100.0, 100.0) == pytest.approx(100.0 / probe.NOISE)


def test_the_bytes_of_a_pack_are_those_that_would_be_written(formats, tmp_path):
    data = assemble.open_data(formats["folder"])
    sizes = data.sizes(np.arange(data.rows))
    for short in (31, 48, 300):
        out = tmp_path / f"{short}.pack"
        made = {"source": "imagefolder", "root": Path(formats["folder"]), "workers": 0}
        convert_to_pack(PackOptions(**made, out=out, short_side=short))
        assert probe.pack_bytes(data, sizes, short) == Pack(out).file.tiles.nbytes


# ---- wrong use ----


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "doctor.py wants data: name a .beton file"),
        (["no/such/place"], "--data no/such/place does not exist"),
        ([__file__], "is not a known format"),
        (["EMPTY"], "is empty: give a path with pictures in it"),
        (["synthetic", "--preset", "rotnet-alexnt"], "did you mean rotnet-alexnet?"),
        (["synthetic", "--seconds", "1"], "--seconds got 1: it wants 5 or more"),
        (["synthetic", "--batch", "0"], "--batch got 0"),
        (["synthetic", "--workers", "-1"], "--workers got -1"),
        (["synthetic:100", "--batch", "101"], "set --batch 100 or smaller"),
        (["synthetic", "--val", "no/such"], "--val no/such does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(args, says, tmp_path):
    with pytest.raises(UsageError) as refused:
        doctor.main([str(tmp_path) if arg == "EMPTY" else arg for arg in args])
    assert says in str(refused.value)


def test_it_is_a_command_and_runs_from_any_folder(tmp_path, monkeypatch, capsys):
    assert "doctor" in command.COMMANDS
    script = str(ROOT / "fastrot" / "doctor.py")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"doctor.py wants data" in done.stderr
    monkeypatch.setattr(sys, "argv", ["fastrot", "doctor", "no/such/place"])
    assert entry.status(command._main) == 2
    assert "does not exist" in capsys.readouterr().err
