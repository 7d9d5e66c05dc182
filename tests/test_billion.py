"""A billion pictures: what is measured of them is of that size, and the rest is arithmetic on lines."""

import json
import re

import numpy as np
import pytest

from benchmarks import billion, measure
from fastrot.data import sampler


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


def test_an_order_of_a_billion_holds_nothing():
    rows = {row["variant"]: row for row in billion.order_rows(0.01)}
    assert len(rows) == 4
    for row in rows.values():
        big = row["shape"]["pictures"] == billion.PICTURES
        assert row["sort"] is not big
        assert (row["held_bytes"] < 10_000) is big
        assert row["p50"] > 0


def test_tables_in_memory_are_counted_and_maps_are_not(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(1000))
    held = {"whole": np.zeros(100), "mapped": np.load(tmp_path / "a.npy", mmap_mode="r")}
    held["part"] = held["whole"][:3]
    assert billion.held_bytes([held, held["whole"]]) == 800


def made_rows() -> list[dict]:
    rows = []
    for images in (billion.IMAGENET, billion.PICTURES):
        for places in (billion.BATCH, sampler.CHUNK):
            of = {
                "sort": images < 2**26,
                "built_s": 1.0,
                "held_bytes": 8,
                "most_bytes": 9,
                "p50": 0.5,
            }
            rows.append(
                {
                    "what": "order",
                    "variant": f"{images:,} pictures, {places:,} places at once",
                    **of,
                }
            )
    for name, size in (("beton", 30_000.0), ("pack", 60_500.0)):
        sizes = {"p50": size, "beside": 100.0, "tables": 50.0}
        rows.append({"what": "prepared file", "variant": name, **sizes})
        rows.append({"what": "conversion", "variant": f"to a {name}", "p50": 250.0})
    for name in ("made", "saved", "loaded"):
        of = {"p50": 1e6, "gb_per_s": 0.5, "bytes_a_row": 512.0, "place_bytes": 30.0}
        rows.append({"what": "bank", "variant": f"float32 rows {name}", **of})
    rows.append({"what": "loader opened", "variant": "over a .beton", "p50": 40.0, "held": 0.5})
    return [{"theme": "scale", "line": at, **row} for at, row in enumerate(rows, 1)]


def test_parts_are_arithmetic_on_the_lines():
    loader = {"what": "loader", "mode": "crops", "variant": "beton, C++ decoder", "format": "beton"}
    loader |= {"theme": "loaders", "p50": 2000.0, "line": 99}
    parts = billion.parts([*made_rows(), loader])
    tables = [what for kind, what in parts if kind == "table"]
    text = "\n".join(str(what) for kind, what in parts if kind != "table")
    [_, _, big], [_, wide, lean], [_, beton, pack], [_, made, _] = tables
    assert big[3] == "0.096 ms"  # 192 places of 0.5 us
    assert big[-1] == "3, 4"
    assert wide[1:5] == ["512 GB", "94 GB", "38 GB", "31 GB"]
    assert (wide[5], lean[5]) == ("6", "3")  # of 121 GB less 30 of places
    assert beton[1] == "30 TB"
    assert beton[5:8] == ["600 MB/s", "6 GB/s", "5"]
    assert pack[4] == "500"  # 60.5 TB by 121 GB
    assert made[2] == "2.89 days"  # 1e9 / 250 / 16 s
    assert "10 cores for 20,000 images/s" in text
    assert "(line 99)" in text
    assert "403 MB of rows" in text
    assert "saved in 16.7 minutes" in text
    assert "40 GB, while it opens" in text
    assert "512 GB, gathered" in text


def test_no_row_of_the_theme_makes_no_page():
    assert billion.parts([{"what": "loader", "variant": "x", "mode": "crops", "p50": 1.0}]) == []


@pytest.mark.slow
def test_the_command_measures_what_its_page_wants(pictures, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    knobs = ["--root", pictures, "--work", tmp_path / "work", "--out", out, "--quick"]
    assert billion.main([str(knob) for knob in knobs]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["theme"] for row in rows} == {"scale"}
    keys = [(row["what"], row["variant"]) for row in rows]
    assert len(set(keys)) == len(keys)
    [pack] = [row for row in rows if (row["what"], row["variant"]) == ("prepared file", "pack")]
    assert pack["p50"] == max(pack["files"].values())
    assert pack["p50"] + pack["beside"] == pytest.approx(sum(pack["files"].values()))
    assert re.search(r"float32 x 128 \| 512 GB", capsys.readouterr().out)
    assert measure.number(1) == "1"
