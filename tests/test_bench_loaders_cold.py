"""The benchmark of cold epochs, on a file of a few hundred kB."""

import json

import numpy as np
import pytest
from PIL import Image
from truth import photo

from benchmarks import bench_loaders
from fastrot.config import BLOCKS
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert

pytestmark = pytest.mark.skipif(
    not hasattr(bench_loaders.os, "posix_fadvise"), reason="drops pages as Linux does"
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
    short = sum(len(source.record(row)) for row in range(12)) / bench_loaders.MB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench_loaders, "MB", round(bench_loaders.MB * short * 20)
        )  # "1 MB": 20 copies
        return source, *(
            bench_loaders.repeated(source, work / f"{seed}.beton", 1, seed=seed)
            for seed in (None, 0)
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
    pages = bench_loaders.Pages(files[1])
    whole = files[1].read_bytes()
    assert pages.megabytes() == pytest.approx(len(whole) / bench_loaders.MB, abs=0.01)
    pages.drop([pages.map])
    assert pages.megabytes() == 0


def test_a_cold_epoch_reads_the_file_once(files, monkeypatch):
    monkeypatch.setitem(bench_loaders.ORDERS, "small blocks", ((8, 4), False))
    for name in (bench_loaders.DATA_ORDER, bench_loaders.FULL, "small blocks"):
        each = bench_loaders.cold_epoch(name, str(files[1]), 1)
        assert each.images >= 240 // bench_loaders.BATCH * bench_loaders.BATCH
        assert each.resident > 0.7 * files[1].stat().st_size / bench_loaders.MB
        assert (each.bits < 1) == (name == bench_loaders.DATA_ORDER)  # of log2(3)


def test_bits_are_those_of_the_labels():
    assert bench_loaders.bits(np.array([0, 1, 2, 3])) == 2
    assert bench_loaders.bits(np.array([7, 7, 7])) == 0


def test_the_default_blocks_mix_sorted_classes_as_the_full_permutation_does(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    rows = list(bench_loaders.mixing_rows(samples=20))
    of = {(row["variant"], row["mode"].split(",")[0]): row["p50"] for row in rows}
    full, blocks = (
        of[name, "labels of a batch"]
        for name in (bench_loaders.FULL, bench_loaders.blocks_name(BLOCKS))
    )
    assert blocks > full - 0.1
    assert of[bench_loaders.blocks_name(bench_loaders.SMALL), "labels of a batch"] < full - 1


def test_a_row_is_the_middle_of_its_epochs(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    each = bench_loaders.Epoch(100, 2.0, 0.1, 1.0, 50.0, 60.0, 3.5)
    row = bench_loaders.epoch_row(bench_loaders.FULL, [each, each], 2, 60.0)
    assert json.loads(json.dumps(row)) == row
    assert (row["p50"], row["images_per_core"], row["kb_per_image"]) == (50, 100, 512)
