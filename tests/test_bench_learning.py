"""The rule by which forms are judged, what a form is on the command line, and a short look at all of it."""

import json

import pytest
from PIL import Image
from truth import photo

from benchmarks import bench_learning, measure
from benchmarks.bench_learning import PLAIN, Asked
from fastrot.config import UsageError


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


def a_run(*accuracies: float) -> tuple[dict, list[dict]]:
    lines = []
    for k, accuracy in enumerate(accuracies):
        lines += [{"step": 10 * k, "loss": 2.0 / k}] if k else []
        lines.append({"step": 10 * k, "val_accuracy": accuracy, "val_loss": 1 - accuracy})
    return {"preset": "demo", "images_per_s": 5.0, "seconds": 2.0}, lines


ASKED = Asked("cpu", {}, measure.ROOT, quick=True)


@pytest.mark.parametrize(
    ("plain", "form", "as_well"),
    [
        ([0.50, 0.50], [0.475, 0.475], True),  # within the bound
        ([0.50, 0.50], [0.465, 0.465], False),
        ([0.45, 0.55], [0.42, 0.42], True),  # within the seeds' own spread
        ([0.45, 0.55], [0.38, 0.38], False),
        ([0.50, 0.50], [0.9, 0.9], True),
    ],
)
def test_the_rule(plain, form, as_well):
    first = bench_learning.row_of(
        "rotnet", PLAIN, [a_run(0.25, each) for each in plain], None, ASKED
    )
    row = bench_learning.row_of(
        "rotnet", "bf16 eager", [a_run(0.25, e) for e in form], first, ASKED
    )
    assert measure.met(first)
    assert measure.met(row) is as_well
    assert ("as well" in row["judgement"]) is as_well
    assert row["seeds"] == 2
    assert [points[-1]["accuracy"] for points in row["curves"]] == form


def test_nothing_is_told_where_the_plain_form_did_not_learn():
    first = bench_learning.row_of("rotnet", PLAIN, [a_run(0.25, 0.27)], None, ASKED)
    row = bench_learning.row_of("rotnet", "bf16 eager", [a_run(0.25, 0.9)], first, ASKED)
    assert not measure.met(first)
    assert "nothing is told" in row["judgement"]


def test_a_curve_has_a_point_for_each_validation():
    _, lines = a_run(0.25, 0.4, 0.5)
    assert bench_learning.curve(lines) == [
        {"step": 0, "accuracy": 0.25, "loss": 0.75},
        {"step": 10, "accuracy": 0.4, "loss": 0.6, "training": 2.0},
        {"step": 20, "accuracy": 0.5, "loss": 0.5, "training": 1.0},
    ]


def test_the_plain_form_comes_first_and_a_cpu_has_no_graphs(capsys):
    assert bench_learning.named(["bf16 eager", PLAIN], "cpu") == [PLAIN, "bf16 eager"]
    assert bench_learning.named(["bf16 compiled + graph"], "cpu") == [PLAIN]
    assert "only a GPU has graphs" in capsys.readouterr().out
    with pytest.raises(UsageError, match="fast"):
        bench_learning.named(["fast eager"], "cpu")


@pytest.mark.soak
def test_a_short_look_through_the_real_entry(tmp_path):
    for split, count in (("train", 8), ("val", 96)):
        for i in range(count):
            folder = tmp_path / "root" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(i, 48, 52)).save(folder / f"{i:03d}.jpg")
    out = tmp_path / "rows.jsonl"
    knobs = ["--root", tmp_path / "root", "--work", tmp_path / "work", "--out", out, "--quick"]
    knobs += ["--device", "cpu", "--tasks", "decoupling", "--forms", "bf16 eager"]
    assert bench_learning.main([str(knob) for knob in knobs]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["variant"] for row in rows] == [f"decoupling, {PLAIN}", "decoupling, bf16 eager"]
    for row in rows:
        [points] = row["curves"]
        assert [point["step"] for point in points] == [0, 4, 8, 12]  # 72 pictures, batches of 16
        assert row["p50"] == points[-1]["accuracy"]
        assert row["dtype"] == row["form"].split()[0]
    runs = {path.name for path in (tmp_path / "work" / "learning").iterdir()}
    assert len(runs) == 2
