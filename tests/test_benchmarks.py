"""Rows say where they come from; a page holds each row's figure and no other; no test times anything."""

import argparse
import importlib.util
import json
import re
import time

import numpy as np
import pytest
import torch
from packs import write_pack
from PIL import Image

from benchmarks import (
    bench_conversion,
    bench_decoupling,
    bench_loaders,
    bench_neighbours,
    bench_ops,
    bench_train,
    contestants,
    measure,
    rate,
    runs,
)
from fastrot.assemble import open_data
from fastrot.config import RunError, UsageError
from fastrot.ops.blocks import unpack_crops
from fastrot.ops.rotate import SpaceToDepth

FROM = {"what", "gpu", "cpu", "cores", "commit", "dirty", "when", "command"}
FROM |= {"python", "torch", "torchvision", "numpy", "simplejpeg", "opencv"}
FIGURE = {"unit", "p20", "p50", "p80", "reps"}
FEW = ["beton", "beton, whole pictures decoded"]  # loaders that take no second to start
FFCV = importlib.util.find_spec("ffcv") is not None


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


def test_a_row_says_where_it_comes_from(tmp_path):
    row = measure.row("x", variant="a", **measure.middle([3.0, 1.0, 2.0], "s"))
    assert set(row) >= FROM | FIGURE
    assert (row["p50"], row["reps"], row["commit"], row["dirty"]) == (2.0, 3, "f" * 40, True)
    measure.append(tmp_path / "new" / "r.jsonl", row)
    measure.append(tmp_path / "new" / "r.jsonl", row)
    lines = (tmp_path / "new" / "r.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row, row]


def test_a_row_without_a_commit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no commit"):
        measure.append(tmp_path / "r.jsonl", {"what": "x", "commit": None})
    assert not (tmp_path / "r.jsonl").exists()
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(measure, "ROOT", tmp_path)  # no checkout
    with pytest.raises(UsageError, match="COMMIT"):
        measure.row("x")


def test_a_single_repetition_is_its_own_spread():
    assert measure.middle([7.0], "s") == {"unit": "s", "p20": 7, "p50": 7, "p80": 7, "reps": 1}


def test_file_names_are_plain(tmp_path):
    assert re.fullmatch(r"cpu_[a-z0-9_]+_cores\.jsonl", measure.results("cpu").name)
    assert measure.results("cpu", tmp_path).parent == tmp_path
    assert measure.results("cpu", tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl"


@pytest.fixture
def originals(tmp_path):
    """Class folders of twenty pictures, a little larger than the prepared ones."""
    draw = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "originals" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        small.resize((306, 272)).save(folder / f"{i}.jpg")
    return tmp_path / "originals"


def test_ffcvs_writer_is_fed_the_pictures_that_ours_makes(tmp_path, originals):
    fed = bench_conversion.Shrunk(originals)
    ours = open_data(contestants.Formats(originals, tmp_path, 0).beton())
    sizes = [(picture.height, picture.width) for picture, _ in fed]
    assert sorted(sizes) == sorted(map(tuple, ours.sizes(np.arange(20)).tolist()))
    assert sorted(label for _, label in fed) == sorted(ours.labels)


@pytest.mark.ffcv
@pytest.mark.soak
@pytest.mark.skipif(not FFCV, reason="FFCV is not installed: make ffcv")
def test_conversion_is_measured_beside_ffcvs_writer(tmp_path, originals):
    knobs = {"workers": 1, "reps": 1, "over": 1}
    rows = list(bench_conversion.conversion_ratio_rows(originals, tmp_path, **knobs))
    assert [row["what"] for row in rows] == ["conversion", "ratio"]
    assert all(set(row) >= FROM | FIGURE for row in rows)


@pytest.mark.parametrize(
    "only", [FEW, pytest.param(None, marks=pytest.mark.soak)], ids=["few", "all"]
)
def test_loaders_are_measured_on_made_pictures(tmp_path, originals, only, monkeypatch):
    monkeypatch.setitem(bench_loaders.TARGETS, tuple(FEW), 0.1)
    formats = contestants.Formats(originals, tmp_path / "work", 1)
    chosen = contestants.present(only)
    knobs = {"device": "cpu", "seconds": 0.01, "reps": 1, "batch": 4}
    rows = list(bench_loaders.loader_rows(formats, chosen, **knobs))
    crops = [name for name, each in chosen.items() if each.mode == "crops"]
    alone = [r for r in rows if r["what"] == "loader" and not r["mode"].endswith("step")]
    beside = [r for r in rows if r["what"] == "loader" and r["mode"].endswith("step")]
    assert [r["variant"] for r in alone] == list(chosen)
    assert [r["variant"] for r in beside] == ["none: the step alone", *crops]
    assert {r["variant"] for r in rows if r["what"] == "ratio"} == {
        f"{one} / {other}" for one, other in bench_loaders.TARGETS if {one, other} <= chosen.keys()
    }
    for row in rows:
        assert set(row) >= FROM | FIGURE
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    assert all(row["images_per_s"] > 0 for row in alone)
    assert all(0 <= row["waited"] <= 1 for row in beside)
    size = {row["format"]: row["bytes_per_image"] for row in alone}
    assert size["beton"] * 20 == contestants.bytes_of(formats.beton())
    assert size.get("synthetic:1000", 0) == 0


@pytest.mark.soak
def test_first_batch_and_memory_are_measured_in_fresh_processes(tmp_path, originals):
    formats = contestants.Formats(originals, tmp_path / "work", 1)
    chosen = contestants.present([contestants.OURS])
    rows = list(bench_loaders.process_rows(formats, chosen, reps=1, images=20, epochs=4))
    assert [(row["what"], row["variant"]) for row in rows] == [
        *((what, name) for name in chosen for what in ("first batch", "memory")),
        *(("memory growth", contestants.OURS), ("memory slope", contestants.OURS)),
    ]
    assert all(row["p50"] > 0 for row in rows if row["what"] in ("first batch", "memory"))


def test_two_checkouts_are_measured_in_turns(tmp_path, monkeypatch):
    """Both start the same script, each with its own PYTHONPATH."""
    asked = []

    def run(command, env, cwd, **_):
        asked.append((command[1], env["PYTHONPATH"]))
        rate = 100.0 if cwd == measure.ROOT else 80.0
        said = json.dumps({"images_per_s": 2 * rate, "per_core": rate, "native": "there"})
        return argparse.Namespace(returncode=0, stdout=f"{said}\n", stderr="")

    monkeypatch.setattr(bench_loaders.subprocess, "run", run)
    formats = argparse.Namespace(of=lambda name: tmp_path / name, workers=2)
    lines = list(bench_loaders.against(tmp_path, formats, seconds=1.0, reps=2))
    assert [line.split(";")[0] for line in lines] == ["beton", "pack", "folder", "shards"]
    assert "100 here, 80 there: 1.250 times the images/s and core" in lines[0]
    script = str(measure.ROOT / "benchmarks" / "rate.py")
    assert asked[:2] == [(script, str(measure.ROOT)), (script, str(tmp_path.resolve()))]


def test_the_script_that_every_checkout_runs_says_its_rate(capsys):
    rate.main("synthetic:100", "0", "0.01")
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"images_per_s", "per_core", "native"}
    assert found["per_core"] > 0


def test_a_pack_is_copied_to_any_size_and_no_index_wraps_round(tmp_path, monkeypatch):
    photos = [np.full((16 + i, 24, 3), 40 * i, np.uint8) for i in range(3)]
    path = write_pack(tmp_path / "few.pack", photos)
    data, seen = contestants.FullPack(path, 8), []

    def looked(pack, boxes, size):
        seen.extend(boxes[:, 0].tolist())
        return unpack_crops(pack, boxes, size)

    monkeypatch.setattr(contestants, "unpack_crops", looked)
    batches = list(contestants.open_loader(data, 4, 0).epoch(0))
    assert sorted(seen) == list(range(8))  # as they reach the pack: no remainder is taken
    for batch in batches:
        reds = batch.images[:, 100, 100, 0].tolist()
        assert all(
            abs(r - 40 * (i % 3)) <= 2 for r, i in zip(reds, batch.index.tolist(), strict=True)
        )
    few = len(data.few.tiles)
    assert len(data.pack.tiles) == 2 * few + int(
        data.few.first[2]
    )  # two whole copies, and two pictures
    assert torch.equal(data.pack.tiles[few : 2 * few], data.pack.tiles[:few])
    assert data.pack.first[-1] == len(data.pack.tiles)
    assert data.pack.tiles[few:].data_ptr() != data.pack.tiles[:few].data_ptr()


def test_a_loader_that_is_none_is_refused_by_name():
    with pytest.raises(UsageError, match="--only got 'betton': it wants one of beton, "):
        contestants.present(["beton", "betton"])


def test_the_stand_in_keeps_one_core_busy_for_its_time():
    step, begun = bench_loaders.StandIn("cpu", 64), time.perf_counter()
    step()
    assert time.perf_counter() - begun >= bench_loaders.STEP_S


# ---- ops ----


def test_the_plain_way_computes_what_ours_does(monkeypatch):
    bench_ops.check_plain("cpu")
    monkeypatch.setattr(bench_ops, "EPS", 1e-3)  # in both
    bench_ops.check_plain("cpu")
    monkeypatch.setattr(bench_ops, "nce_loss", lambda *of, **more: 1.01 * ours(*of, **more))
    with pytest.raises(AssertionError):
        bench_ops.check_plain("cpu")


def ours(*of, **more):
    from fastrot.ops.nce import nce_loss

    return nce_loss(*of, **more)


def test_all_plain_negatives_are_drawn_and_the_own_row_comes_first():
    positive = torch.tensor([7, 3])
    index = bench_ops.plain_index(positive, 500, 10)
    assert index.shape == (2, 501)
    assert index[:, 0].tolist() == [7, 3]
    assert set(index[:, 1:].flatten().tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("device", "form", "target"), [("cpu", "reference", 3), ("cuda", "kernel", 8)]
)
def test_ratios_are_taken_round_by_round_and_name_their_target(device, form, target):
    plain, end = bench_ops.PLAIN, f", {bench_ops.AS_GRAPH}"
    times = {("nce_loss", plain, "float32"): [8.0, 80.0, 9.0]}
    times |= {("nce_loss", form, "float32"): [2.0, 20.0, 3.0]}
    times |= {("nce_loss", form, "bfloat16"): [1.0, 10.0, 1.0]}
    times |= {("nce_loss", plain + end, "float32"): [6.0, 6.0, 6.0]}
    times |= {("nce_loss", form + end, "float32"): [1.0, 1.0, 1.0]}
    times |= {("infonce", plain, "float32"): [8.0], ("infonce", form, "float32"): [4.0]}
    rows = list(bench_ops.ratio_rows(times, device, {"batch": 192}))
    nce = [row for row in rows if row["variant"].startswith("nce_loss / plain gather")]
    assert [row["p50"] for row in nce] == ([4, 8] if device == "cpu" else [4, 6, 8])
    assert {(row["target"], row["better"]) for row in nce} == {(target, "higher")}
    assert all("target" not in row for row in rows if row not in nce)
    assert all(set(row) >= FROM | FIGURE for row in rows)


def test_the_first_convolution_is_timed_in_both_forms_once_they_agree(monkeypatch):
    of = ("cpu", 0.0, [(1, 64)], torch.float32, (0.05,))
    rows = list(bench_ops.bench_first_convolution(*of))
    assert [row["variant"] for row in rows] == ["plain", "folded"]
    # 4 views of 15 x 15 outputs of 3 channels, 363 products each, twice
    assert rows[0]["tflops"] * rows[0]["p50"] * 1e9 == pytest.approx(4 * 4 * 225 * 3 * 363)
    monkeypatch.setattr(bench_ops, "space_to_depth_of", lambda *_: SpaceToDepth(4, 1, 17))
    with pytest.raises(AssertionError):
        list(bench_ops.bench_first_convolution(*of))


@pytest.mark.skipif(bench_ops.triton is None, reason="torch's build comes without Triton")
def test_what_a_gpu_is_asked_for_once_runs_to_its_last_row(monkeypatch):
    """Kernels in the interpreter; a graph that is captured becomes the call itself."""

    def once(runs, device, **of):
        for run in runs.values():
            run()
        return {name: [0.001] * 3 for name in runs}

    monkeypatch.setattr(measure, "interleaved", once)
    monkeypatch.setattr(bench_ops, "replayed", lambda call: call)
    case = bench_ops.Case("cpu", batch=2, k=8, dim=16, pictures=40)
    case.device = "cuda"
    rows = list(bench_ops.bench_nce(case, 0.0, 1e9))
    found = {(row["what"], row["variant"], row["dtype"]) for row in rows}
    assert len(found) == len(rows)
    for dtype in ("float32", "bfloat16"):
        for variant in (
            "kernel",
            "kernel, as a CUDA graph",
            "kernel, negatives given",
            "reference",
        ):
            assert ("nce_loss", variant, dtype) in found
        assert ("infonce", "kernel, as a CUDA graph", dtype) in found
        assert ("estimate_z", "kernel, as a CUDA graph", dtype) in found
        share = ("share of random gather", f"nce_loss, {dtype} rows, as a CUDA graph", dtype)
        assert share in found
        assert ("ratio", f"nce_loss / plain gather, {dtype} rows, as a CUDA graph", dtype) in found
    assert all(set(row) >= FROM | FIGURE for row in rows)


@pytest.mark.parametrize("pool", [True, False])
def test_the_plain_norm_is_the_fused_one(pool):
    y = torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    learnt = [torch.rand(16) + 0.5 for _ in range(3)]
    found = []
    for of in (bench_ops.plain_norm, bench_ops.fused_norm):
        running = torch.zeros(16), torch.ones(16)
        out = of(y, *learnt, *running, pool)
        found.append((out, *running, *torch.autograd.grad(out, y, torch.ones_like(out))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_layers_norm_is_timed_with_and_without_its_backward():
    rows = list(bench_ops.bench_norm("cpu", 0.0, 1e9, 2, 15, torch.float32))
    assert len(rows) == 4 * len(bench_ops.NORMED) == 20
    assert all(set(row) >= FROM | FIGURE for row in rows)
    assert {row["variant"] for row in rows} == {"fused", "plain"}
    conv1 = [row for row in rows if row["shape"]["layer"] == "conv1"]
    elements, places = 2 * 64 * 15 * 15, 2 * 64 * 7 * 7
    assert {row["bytes"] for row in conv1} == {
        8 * elements + 9 * places,
        16 * elements + 23 * places,
    }


def test_shares_are_of_the_rates_beside_them():
    found = bench_ops.rates(2_000_000, {"p50": 1.0}, copy=4e9, gather=2.5e9)  # 2 GB/s
    assert found["gb_per_s"] == pytest.approx(2)
    assert found["share_of_peak"] == pytest.approx(0.5)
    assert found["share_of_gather"] == pytest.approx(0.8)


def test_bytes_count_each_row_once():
    case = bench_ops.Case("cpu", batch=2, k=5, dim=8, pictures=20)
    assert case.moved("nce_loss", case.rows) == 2 * 6 * 8 * 4 + 2 * 2 * 8 * 4
    assert case.moved("nce_loss", case.rows.bfloat16()) == 2 * 6 * 8 * 2 + 2 * 2 * 8 * 4
    assert case.moved("random gather", case.rows) == 2 * 5 * 8 * 4


def test_every_way_of_only_reading_rows_reads_them_all():
    rows, picks = torch.randn(50, 24), torch.randint(50, (130,))
    wanted = rows[picks].sum(0)
    bags = bench_ops.gathers(rows, picks)["embedding_bag, sums of 64"]()
    torch.testing.assert_close(bags.sum(0), wanted)
    if bench_ops.triton is not None:
        sums = bench_ops.sum_of_rows(rows, picks, block=32)
        assert sums.shape == (5, 24)
        torch.testing.assert_close(sums.sum(0), wanted)


# ---- a training step ----


def test_the_time_of_a_part_in_two_pieces_is_their_sum():
    marks = bench_train.Marks(torch.device("cpu"))
    for begin in (0.0, 1.0):
        marks.made += [("", begin), ("views", begin + 0.1), ("losses", begin + 0.2)]
        marks.made += [("nce", begin + 0.5), ("losses", begin + 0.6), ("rest", begin + 0.9)]
    found = marks.read(steps=1)
    assert {part: pytest.approx(times) for part, times in found.items() if any(times)} == {
        "views": [100.0],
        "losses": [200.0],
        "nce": [300.0],
        "rest": [300.0],
    }


# ---- decoupling's curves ----


def curves(nce, inv=0.25, rot=0.6):
    lines = [{"step": 0, "epoch": 0, "val_prec_rot": 0.25, "val_prec_inv": 0.25}]
    for step, value in enumerate(nce, 1):
        terms = {"loss_cls": 1.3, "loss_mse": 0.01, "loss_nce": value}
        lines.append({"step": 10 * step, "epoch": step // 4, **terms})
    return [*lines, {"step": 10 * len(nce), "epoch": 4, "val_prec_rot": rot, "val_prec_inv": inv}]


SUMMARY = {"steps": 160, "epochs": 4, "seconds": 9.0, "images_per_s": 500.0}
RISES_AND_FALLS = [10, 14, 17, 18, 17, 15, 13, 11, 9, 8, 7, 6, 5, 4, 3, 3]


def missed(lines):
    rows = bench_decoupling.rows([(SUMMARY, lines)], {"batch": 32})
    return {row["what"] for row in rows if "target" in row and not measure.met(row)}


def test_a_curve_of_the_right_shape_passes():
    assert not missed(curves(RISES_AND_FALLS))
    found = bench_decoupling.shape_of(curves(RISES_AND_FALLS))
    assert (found["first"], found["highest"], found["last"]) == (10, 18, 3)
    assert found["highest_at"] == 3 / 16
    points = bench_decoupling.curve(curves(RISES_AND_FALLS), steps=40)
    assert [point["epoch"] for point in points["losses"]] == [0.25, 0.5, 0.75, 1, 2, 3, 4]
    assert points["losses"][4]["loss_nce"] == np.mean(RISES_AND_FALLS[4:8])
    assert [point["prec_rot"] for point in points["validations"]] == [0.25, 0.6]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (curves(sorted(RISES_AND_FALLS, reverse=True)), "loss_nce's highest over its first"),
        (curves(sorted(RISES_AND_FALLS)[8:]), "loss_nce's last over its first"),
        (curves(RISES_AND_FALLS, inv=0.4), "prec_inv's farthest from chance"),
        (curves(RISES_AND_FALLS, inv=0.1), "prec_inv's farthest from chance"),
        (curves(RISES_AND_FALLS, rot=0.3), "prec_rot's gain"),
    ],
)
def test_a_curve_of_another_shape_is_told(lines, what):
    assert missed(lines) == {what}


def test_too_short_a_run_is_told_in_one_sentence():
    with pytest.raises(RunError, match="more steps"):
        bench_decoupling.shape_of(curves([10]))


def test_an_absent_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--root DIR"):
        contestants.originals(tmp_path / "nowhere")
    with pytest.raises(RunError, match="--root DIR"):
        runs.prepared(tmp_path / "nowhere", tmp_path)


@pytest.mark.soak
def test_training_is_measured_beside_neighbours(tmp_path):
    out = tmp_path / "rows.jsonl"
    few = ["--spins", "passive", "--neighbours", "0", "1", "--reps", "1", "--seconds", "0.2"]
    assert not bench_neighbours.main([*few, "--work", str(tmp_path), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["preset"], row["neighbours"]) for row in rows] == [
        (preset, count) for preset in bench_neighbours.KNOBS for count in (0, 1)
    ]
    assert all(row["p50"] > 0 and row["unit"] == "images/s" for row in rows)
