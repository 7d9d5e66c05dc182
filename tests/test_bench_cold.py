"""The benchmark of cold epochs, on a file of a few hundred kB."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from truth import photo

from benchmarks import bench_cold
from fastrot.config import BLOCKS
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions, convert

pytestmark = pytest.mark.skipif(
    not hasattr(bench_cold.os, "posix_fadvise"), reason="drops pages as Linux does"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve pictures of three classes, about 300 kB of them: sorted by class, and shuffled."""
    work = tmp_path_factory.mktemp("cold")
    for i in range(12):
        (work / "in" / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i, 60, 70)).save(work / "in" / f"c{i % 3}" / f"{i}.png")
    out = work / "x.beton"
    convert(BetonOptions(source="imagefolder", root=work / "in", out=out, workers=0))
    source = Beton(out)
    short = sum(len(source.record(row)) for row in range(12)) / bench_cold.MB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_cold, "MB", round(bench_cold.MB * short * 20))  # "1 MB": 20 copies
        return source, *(
            bench_cold.repeated(source, work / f"{seed}.beton", 1, seed=seed) for seed in (None, 0)
        )


def test_the_files_hold_the_same_records_sorted_and_shuffled(files):
    source, *both = files
    ordered, shuffled = map(Beton, both)
    assert ordered.rows == shuffled.rows == 240
    assert np.array_equal(ordered.labels, np.sort(ordered.labels))
    assert not np.array_equal(shuffled.labels, ordered.labels)
    bytes_of = [sorted(b.record(row).tobytes() for row in range(240)) for b in (ordered, shuffled)]
    assert bytes_of[0] == bytes_of[1]
    assert set(bytes_of[0]) == {source.record(row).tobytes() for row in range(12)}


def test_pages_are_dropped_and_counted(files):
    pages = bench_cold.Pages(files[1])
    whole = files[1].read_bytes()
    assert pages.megabytes() == pytest.approx(len(whole) / bench_cold.MB, abs=0.01)
    bench_cold.made_cold(pages, [pages.map])
    assert pages.megabytes() == 0


@pytest.mark.parametrize("mode", [bench_cold.CROPS, bench_cold.READING])
def test_a_cold_epoch_reads_the_file_once(files, mode, monkeypatch):
    monkeypatch.setitem(bench_cold.ORDERS, "small blocks", ((8, 4), False))
    for name in (bench_cold.DATA_ORDER, bench_cold.FULL, "small blocks"):
        (each,) = bench_cold.of_ours(name, str(files[1]), 1, mode, 1)
        assert each.images >= 240 // bench_cold.BATCH * bench_cold.BATCH
        assert each.resident > 0.7 * files[1].stat().st_size / bench_cold.MB
        assert (each.bits < 1) == (name == bench_cold.DATA_ORDER)  # of log2(3)


def test_memory_is_held_down_oldest_first(files):
    pages = bench_cold.Pages(files[1])
    half = pages.bytes / bench_cold.MB / 2
    bench_cold.made_cold(pages, [pages.map])
    limited = bench_cold.LessMemory(pages, [pages.map], half)
    limited.start()
    files[1].read_bytes()
    until = time.monotonic() + 10
    while pages.megabytes() > half and time.monotonic() < until:
        time.sleep(0.01)
    assert limited.close() > half
    assert pages.megabytes() <= half


def test_bits_are_those_of_the_labels():
    assert bench_cold.bits(np.array([0, 1, 2, 3])) == 2
    assert bench_cold.bits(np.array([7, 7, 7])) == 0


def test_the_default_blocks_mix_sorted_classes_as_the_full_permutation_does(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    rows = list(bench_cold.mixing_rows(samples=20))
    of = {(row["variant"], row["mode"].split(",")[0]): row["p50"] for row in rows}
    full, blocks = (
        of[name, "labels of a batch"] for name in (bench_cold.FULL, bench_cold.blocks_name(BLOCKS))
    )
    assert blocks > full - 0.1
    assert of[bench_cold.blocks_name(bench_cold.SMALL), "labels of a batch"] < full - 1


def test_a_row_is_the_middle_of_its_epochs(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    each = bench_cold.Epoch(100, 2.0, 0.1, 1.0, 50.0, 400, 60.0, 3.5)
    for mode in (bench_cold.CROPS, bench_cold.LESS):
        row = bench_cold._row_of(bench_cold.FULL, mode, [each, each], 60.0, 2)
    assert json.loads(json.dumps(row)) == row
    assert (row["p50"], row["images_per_core"], row["kb_per_request"]) == (50, 100, 128)
