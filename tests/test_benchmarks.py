"""Rows say where they come from; a page holds each row's figure and no other; no test times anything."""

import importlib.util
import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_loaders, measure, report
from fastrot.assemble import open_data
from fastrot.config import Refused

FROM = {"what", "gpu", "cpu", "cores", "commit", "dirty", "when", "command"}
FROM |= {"python", "torch", "torchvision", "numpy", "simplejpeg", "opencv"}
FIGURE = {"unit", "p20", "p50", "p80", "reps"}
FFCV, WEBDATASET = (importlib.util.find_spec(name) is not None for name in ("ffcv", "webdataset"))


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
    with pytest.raises(Refused, match="COMMIT"):
        measure.row("x")


def test_a_single_repetition_is_its_own_spread():
    assert measure.middle([7.0], "s") == {"unit": "s", "p20": 7, "p50": 7, "p80": 7, "reps": 1}


def test_file_names_are_plain(tmp_path):
    assert re.fullmatch(r"cpu_[a-z0-9_]+_cores\.jsonl", measure.results("cpu").name)
    assert measure.results("cpu", tmp_path).parent == tmp_path
    assert measure.results("cpu", tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl"


def test_a_page_holds_each_figure_and_no_other(tmp_path):
    def row(what, variant, p50, when, **more):
        of = {
            "mode": "crops",
            "shape": {"batch": 64},
            "dtype": "uint8",
            "unit": "images/s and core",
        }
        each = measure.row(what, theme="loaders", variant=variant, **of, reps=5, **more)
        return each | {"p20": p50 * 0.9, "p50": p50, "p80": p50 * 1.1, "when": when}

    old, new = "2031-01-01T00:00:00+00:00", "2031-02-01T00:00:00+00:00"
    rows = [
        row("loader", "beton", 111.0, old),  # measured anew below
        row("loader", "torchvision uint8", 222.0, new),
        row("loader", "beton", 1776.0, new),
        row("ratio", "beton / torchvision uint8", 8.0, new, target=4.0, better="higher"),
        row("first batch", "beton", 0.75, new, target=0.5, better="lower"),
    ]
    for each in rows:
        measure.append(tmp_path / "results" / "cpu_x_2_cores.jsonl", each)
    made = report.write(tmp_path / "results" / "cpu_x_2_cores.jsonl", tmp_path / "reports")
    assert {path.name for path in made} == {
        "loaders_cpu_x_2_cores_203102.md",
        "loaders_cpu_x_2_cores_203102.html",
    }
    text = (tmp_path / "reports" / "loaders_cpu_x_2_cores_203102.md").read_text()
    table = text.split("## Figures")[1].split("## Machine")[0]
    shown = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert [(cells[2], cells[-1].strip(" |")) for cells in shown] == [
        ("1,776", "3"),
        ("222", "2"),
        ("8", "4"),
        ("0.75", "5"),
    ]
    assert shown[0][3] == "1,598 to 1,954"
    assert "111" not in text.split("## Machine")[0]
    assert "1 of 2 targets met" in text
    assert "(200% of it)" in text
    assert "MISSED: first batch" in text
    assert [json.loads(line) for line in re.findall(r"^\{.*\}$", text, re.M)] == [
        rows[i] for i in (2, 1, 3, 4)
    ]
    page = (tmp_path / "reports" / "loaders_cpu_x_2_cores_203102.html").read_text()
    assert "1,776" in page
    assert page.count("data:image/png;base64,") == 1
    assert (tmp_path / "reports" / "loaders_cpu_x_2_cores_203102_loaders.png").exists()


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
    fed = bench_loaders.Shrunk(originals)
    ours = open_data(bench_loaders.prepared(originals, tmp_path, workers=0))
    sizes = [(picture.height, picture.width) for picture, _ in fed]
    assert sorted(sizes) == sorted(map(tuple, ours.sizes(np.arange(20)).tolist()))
    assert sorted(label for _, label in fed) == sorted(ours.labels)


@pytest.mark.ffcv
@pytest.mark.skipif(not FFCV, reason="FFCV is not installed: make ffcv")
def test_conversion_is_measured_beside_ffcvs_writer(tmp_path, originals):
    knobs = {"workers": 1, "reps": 1, "over": 1}
    rows = list(bench_loaders.conversion_ratio_rows(originals, tmp_path, **knobs))
    assert [row["what"] for row in rows] == ["conversion", "ratio"]
    assert all(set(row) >= FROM | FIGURE for row in rows)


@pytest.mark.slow
def test_loaders_are_measured_on_made_pictures(tmp_path, originals):
    work = tmp_path / "work"
    beton = bench_loaders.prepared(originals, work, workers=0)
    rows = [
        *bench_loaders.loader_rows(originals, beton, workers=1, seconds=0.01, reps=1, batch=4),
        *bench_loaders.process_rows(beton, workers=1, reps=1, images=20, epochs=4),
    ]
    assert [row["what"] for row in rows] == [
        *["loader"] * (8 + 2 * FFCV + WEBDATASET),
        *["ratio"] * (2 + 2 * FFCV),
        *["first batch"] * (1 + FFCV),
        *("memory growth", "memory slope"),
    ]
    for row in rows:
        assert set(row) >= FROM | FIGURE
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["what"] == "memory slope" or row["p50"] > 0
    assert all(row["images_per_s"] > 0 for row in rows if row["what"] == "loader")


def test_an_absent_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(Refused, match="--root DIR"):
        bench_loaders.originals(tmp_path / "nowhere")


def test_the_readme_shows_what_the_results_say():
    files = sorted((measure.ROOT / "benchmarks" / "results").glob("*.jsonl"))
    text = (measure.ROOT / "README.md").read_text()
    table = text.split(report.BEGIN)[1].split(report.END)[0]
    assert table == report.readme_table(files)
    assert table.count("\n") > 3
