"""The rows of bench_train, roofline and the full-size epoch hold what they say; none of it is timed here."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from packs import write_pack
from tape import TapeRecorder
from truth import photo

from benchmarks import (
    bench_checkpoint,
    bench_train,
    contestants,
    forms,
    full_epoch,
    measure,
    roofline,
)
from fastrot import train
from fastrot.config import AlexNet, Decoupling, UsageError
from fastrot.presets import PRESETS
from fastrot.training import state
from fastrot.training.device import PLAIN, with_knobs

CPU = torch.device("cpu")
FIGURE = {"unit", "p20", "p50", "p80", "reps", "commit", "command", "gpu", "torch"}
PRESET = "decoupling-alexnet"


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Measuring them takes seconds: a TFLOP/s of 0.5 and 8 GB/s."""

    def told(device, dtype, quick=False):
        yield roofline.row("matrix product", "square", **measure.middle([0.5], "TFLOP/s"))
        yield roofline.row("copy", "in the device's memory", **measure.middle([8.0], "GB/s"))

    monkeypatch.setattr(roofline, "ceiling_rows", told)


def quick(preset=PRESET):
    """A run whose steps take next to no time."""
    knobs = {"batch": 4, "precision": "fp32"}
    cfg = forms.sized(preset, CPU, quick=True, **knobs)
    cfg = dataclasses.replace(cfg, backbone=dataclasses.replace(cfg.backbone, width=1 / 16))
    if isinstance(cfg.method, Decoupling):
        cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, negatives=64))
    return cfg


# ---- forms ----


def test_a_form_sets_the_knobs_that_its_words_name():
    cfg = quick()
    plain = with_knobs(cfg, PLAIN)
    assert forms.config_in("compiled", cfg) == dataclasses.replace(plain, compile=True)
    assert forms.config_in("eager", forms.config_in("compiled + fused", cfg)) == plain
    with pytest.raises(UsageError, match="'quick': it wants words of eager, compiled"):
        forms.config_in("eager + quick", cfg)


def test_a_form_is_the_same_on_the_command_line():
    """All of it is said, so that nothing is as this GPU has it by default."""
    for form in ("bf16 compiled + graph", "float32 eager", "compiled tuned + folded"):
        cfg = train.command_line([PRESET, *forms.words_of(form)])
        assert cfg == forms.config_in(form, PRESETS[PRESET]())


def test_every_default_form_is_made_of_words():
    assert forms.FORMS[0] == "eager"
    assert all(forms.words(form) for form in forms.FORMS)


def test_a_cpu_runs_a_quarter_of_the_width_and_a_gpu_the_preset():
    assert forms.sized(PRESET, CPU).backbone == AlexNet(width=0.25)
    assert full_epoch.sized(PRESET, "eager", CPU).batch == 192
    whole = forms.sized(PRESET, torch.device("cuda"), precision="bf16")
    assert (whole.backbone, whole.batch, whole.method.crop.size) == (AlexNet(), 192, 224)


# ---- steps ----


def test_a_row_for_each_form_and_loader(tmp_path):
    data = {"held": "held", "synthetic": "synthetic"}
    knobs = {"steps": 2, "reps": 1, "out": tmp_path, "bank": 500}
    rows = list(bench_train.step_rows(quick(), ["eager"], data, CPU, **knobs))
    assert [row["what"] for row in rows] == ["matrix product", "copy", "step", "step"]
    for row in rows[2:]:
        assert set(row) >= FIGURE
        assert row["variant"] == f"{PRESET} eager, {row['loader']}"
        assert (row["form"], row["batch"], row["size"], row["width"]) == ("eager", 4, 64, 1 / 16)
        assert row["unit"] == "ms"
        assert row["images_per_s"] == pytest.approx(4 / (row["p50"] / 1e3))
        assert row["tflops"] == pytest.approx(row["flop"] / (row["p50"] / 1e3) / 1e12)
        assert row["share_of_matrix"] == pytest.approx(row["tflops"] / 0.5)
        assert 0 <= row["wait_share"] <= 1
        assert row["idle_share"] is None  # a GPU's
        assert set(row["split"]) == {"wait", *bench_train.PARTS}
        assert all(ms >= 0 for ms in row["split"].values())
        assert min(row["split"][part] for part in ("backward", "nce", "bank")) > 0
    assert "Self CPU" in (tmp_path / "profiles.txt").read_text()


def test_a_captured_step_is_played_and_has_no_parts(tmp_path, monkeypatch):
    """With a stand-in for the GPU's graphs."""
    made = []
    monkeypatch.setattr(state, "Cuda", lambda device: made.append(TapeRecorder()) or made[-1])
    knobs = {"steps": 2, "reps": 1, "out": tmp_path, "bank": 500}
    names = ["eager", "eager + graph"]
    rows = list(bench_train.step_rows(quick(), names, {"held": "held"}, CPU, **knobs))
    split = {row["form"]: row["split"] for row in rows if row["what"] == "step"}
    assert split["eager + graph"] is None
    assert set(split["eager"]) == {"wait", *bench_train.PARTS}
    assert made[0].done[:12] == [*["aside"] * 11, "record"]
    assert set(made[0].done[12:]) == {"play"}


def test_a_cpu_has_no_graphs(capsys):
    assert list(forms.present(["eager + graph", "eager"], CPU)) == ["eager"]
    assert "only a GPU has graphs" in capsys.readouterr().out
    assert forms.config_in("compiled + graph", quick()).graph


def test_a_broken_form_loses_no_row_of_those_before(tmp_path, monkeypatch):
    """Each is written before the next form is built."""
    cfg, of = quick("rotnet-alexnet"), {"steps": 1, "reps": 1, "out": tmp_path, "bank": 500}
    rows = bench_train.step_rows(cfg, ["eager", "compiled"], {"held": "held"}, CPU, **of)
    assert [next(rows)["what"] for _ in range(3)] == ["matrix product", "copy", "step"]
    monkeypatch.setattr(bench_train, "Trained", None)
    with pytest.raises(TypeError):
        next(rows)


def test_kernels_side_by_side_are_counted_once():
    assert bench_train.covered([]) == 0
    assert bench_train.covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert bench_train.covered([(0, 10), (2, 3), (4, 5)]) == 10


def test_loaders_without_pictures_are_refused(tmp_path):
    assert set(bench_train.data_of(None, None, tmp_path)) == {"held", "synthetic"}
    with pytest.raises(UsageError, match="--loaders got pack: it wants --root DIR"):
        bench_train.data_of(["held", "pack"], None, tmp_path)


# ---- the roofline ----


def test_the_floor_is_the_sum_of_its_terms():
    cfg = quick()
    row = roofline.roofline_row(cfg, roofline.net_of(cfg, CPU), tflops=0.5, gb_per_s=8.0)
    assert set(row) >= FIGURE
    layers = row["layers"]
    assert [layer["name"] for layer in layers[:3]] == ["views", "memory bank", "conv1"]
    assert row["matrix_ms"] == pytest.approx(sum(each["flop"] for each in layers) / 0.5e12 * 1e3)
    assert row["traffic_ms"] == pytest.approx(sum(each["traffic"] for each in layers) / 8e9 * 1e3)
    assert row["optimiser_ms"] == pytest.approx(row["optimiser_bytes"] / 8e9 * 1e3)
    terms = ("matrix_ms", "traffic_ms", "optimiser_ms")
    assert row["p50"] == pytest.approx(sum(row[term] for term in terms))
    assert row["traffic_unfused_ms"] > row["traffic_ms"]
    assert row["look_ms"] < row["p50"] / 2
    steps, looks = 1_281_167 // 4, 50_000 / 4
    assert row["floor_epoch_s"] == pytest.approx(
        (steps * row["p50"] + looks * row["look_ms"]) / 1e3
    )
    assert f"{row['floor_epoch_s']:,.0f} s an epoch" in roofline.table(row)
    views, bank = layers[0]["traffic"], layers[1]["traffic"]
    assert views == 4 * 64 * 64 * 3 * (1 + 4 * 4)
    assert bank == 4 * (64 + 3) * 128 * 4


@pytest.mark.parametrize(("preset", "views"), [("supervised-alexnet", 4), ("rotnet-alexnet", 16)])
def test_views_are_as_many_as_the_method_makes(preset, views):
    cfg = quick(preset)
    assert roofline.views_shape(cfg) == (views, 3, 64, 64)
    trained = bench_train.Trained(cfg, 16, CPU)
    assert tuple(trained.state.method.views(trained.batch).shape) == (views, 3, 64, 64)


# ---- the epoch ----


@pytest.fixture
def pack(tmp_path, monkeypatch):
    path = write_pack(tmp_path / "few.pack", [photo(i, 70, 80 + i) for i in range(5)])
    monkeypatch.setattr(contestants.Formats, "pack", lambda self: path)
    return path


def test_the_epochs_row_says_what_was_done(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(full_epoch, "IMAGENET", 1000)
    real = full_epoch.timed

    def timed(state, *of):
        split, written = real(state, *of)
        assert min(*split.values(), written) > 0
        assert split["saving"] + written == pytest.approx(state.progress.saving, 0.1)
        assert state.progress.images == 3 * 8
        return {"train": 6.0, "saving": 0.25, "validation": 1.0}, 0.5

    monkeypatch.setattr(full_epoch, "timed", timed)
    monkeypatch.setitem(forms.QUICK, "backbone", quick().backbone)
    (row,) = full_epoch.rows(PRESET, "eager", tmp_path, tmp_path, CPU, quick=True)
    wanted = {"what": "epoch", "preset": PRESET, "images": 1000, "size": 64, "rotations": 4}
    wanted |= {"batch": 8, "loader": "pack", "extrapolated": True, "validation": True, "unit": "s"}
    wanted |= {"form": "eager", "width": 1 / 16, "steps": 3, "judged": 16, "different_pictures": 5}
    assert {name: row[name] for name in wanted} == wanted
    assert set(row) >= FIGURE
    assert row["variant"] == f"{PRESET}, pack"
    split = {"train": 6 * 125 / 3, "saving": 0.25, "validation": 1 * 50_000 / 16}
    assert row["split"] == pytest.approx(split)
    assert (row["written"], row["images_per_s"]) == (0.5, pytest.approx(1000 / 250.25))
    assert row["p50"] == pytest.approx(sum(row["split"].values()))
    assert "extrapolated from 3 steps" in row["about"]
    assert "no index wraps round" in row["about"]


def test_a_whole_epoch_is_told_as_it_was_timed(pack):
    cfg = full_epoch.sized(PRESET, "eager", CPU, quick=True)
    data = contestants.FullPack(pack, 24)
    state = argparse.Namespace(progress=argparse.Namespace(wait_share=lambda: 0.5))
    split = {"train": 60.0, "saving": 0.5, "validation": 2.0}
    how = {"written": 1.0, "steps": 3, "looked": 16, "whole": True}
    row = full_epoch.row(cfg, "eager", data, state, split, **how)
    assert (row["p50"], row["split"]) == (62.5, split)
    assert not row["extrapolated"]
    assert "extrapolated" not in row["about"]
    json.dumps(row)


def test_a_checkpoints_rows_say_what_stood_still(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_checkpoint, "REPEATS", 1)
    monkeypatch.setattr(bench_checkpoint, "STEPS", 1)
    monkeypatch.setitem(forms.QUICK, "backbone", quick().backbone)
    rows = list(bench_checkpoint.rows(CPU, tmp_path, quick=True))
    assert [row["mode"] for row in rows] == [
        *("written by the loop", "copied, written by a thread", "alone", "beside the writing"),
        "copied, written by a thread",
    ]
    for row in rows:
        assert set(row) >= FIGURE
        assert row["shape"]["bank"] == 1000
        assert row["p50"] > 0
    assert not list(tmp_path.iterdir())


def test_pictures_that_do_not_fit_are_refused_before_anything_is_copied():
    full_epoch.must_fit(90 * 10**9, 140 * 10**9)
    with pytest.raises(UsageError, match="wants 90 GB of GPU memory"):
        full_epoch.must_fit(90 * 10**9, 80 * 10**9)


def test_a_copied_packs_size_is_known_before_it_is_copied(pack):
    data = contestants.FullPack(pack, 12)
    known = data.nbytes
    assert data.pack is None
    data.place(None, CPU)
    assert data.pack.tiles.nbytes == known
    assert np.array_equal(data.sizes(np.arange(5, 10)), data.sizes(np.arange(5)))
