"""benchmarks/bench_native.py gives its rows, over a few small pictures."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_native, measure
from fastrot import native

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.why())


@pytest.fixture
def originals(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "originals" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        small.resize((306, 272)).save(folder / f"{i}.jpg")
    return tmp_path / "originals"


def test_each_row_has_its_figure(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_native.contestants, "installed", lambda *_: False)
    monkeypatch.setattr(bench_native, "BATCH", 4)
    monkeypatch.delitem(bench_native.TARGETS, ("short side 256", bench_native.TORCHVISION))
    files = bench_native.prepared(originals, tmp_path, workers=0)
    rows = [
        *bench_native.reader_rows(originals, files, workers=1, seconds=0.01, reps=2),
        *bench_native.pack_rows(files["short side 256"], seconds=0.01, reps=2),
        *bench_native.checksum_rows(files["short side 256"], reps=2),
    ]
    of = [(row["what"], row["variant"]) for row in rows]
    for name in bench_native.FILES:
        for quick in (bench_native.QUICK, bench_native.PLAIN):
            assert ("reader", f"{quick}, {name}") in of
        assert ("ratio", f"{bench_native.QUICK} / {bench_native.PLAIN}, {name}") in of
    assert of[-3:] == [("pack crops", "ycc"), ("pack crops", "raw"), ("checksum", "crc32")]
    assert all(row["p50"] > 0 for row in rows)
    assert {row["native"] for row in rows} == {native.why()}
    assert "target at least 5000 crops/s and core" in measure.verdict(rows[-3])
