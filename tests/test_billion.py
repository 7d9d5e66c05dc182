"""A billion pictures: what is measured of them is of that size."""

import json

import numpy as np
import pytest

from benchmarks import billion


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


@pytest.mark.soak
def test_the_command_measures_what_its_page_wants(pictures, tmp_path):
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
