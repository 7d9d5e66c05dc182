"""Records damaged on disk: named, or skipped and counted; never zeros in silence. The same for every format."""

import shutil

import numpy as np
import pytest
import torch

from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Within
from fastrot.core import DamagedRecord, View
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert

TRAINING = View(crops=(RandomResized(size=24), RandomResized(size=16)))
EVALUATION = View(crops=(Within(size=24, short=28, random=False, flip=False),), shuffled=False)
BATCH = 6


@pytest.fixture(scope="module")
def both(pictures, tmp_path_factory):
    """The same data whole and damaged in rows 5 and 20, as folder and as .beton."""
    at = tmp_path_factory.mktemp("damaged")
    out = at / "whole.beton"
    convert(BetonOptions(source="imagefolder", root=pictures, out=out, workers=0))
    for file in at.glob("whole.beton*"):
        shutil.copy(file, at / file.name.replace("whole", "damaged"))
    whole, damaged = Beton(out), at / "damaged.beton"
    data = bytearray(damaged.read_bytes())
    for row in (5, 20):
        data[int(whole.contents.ptr[row] + whole.contents.size[row] // 2)] ^= 64
    damaged.write_bytes(data)
    shutil.copytree(pictures, at / "folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(at / "cache"))
        folders = open_data(pictures), open_data(at / "folder")
    (at / "folder" / folders[0].name(5)).write_bytes(b"no longer a picture")
    (at / "folder" / folders[0].name(20)).unlink()
    in_python = Beton(out), Beton(damaged)
    for each in in_python:
        each.native = False
    return {"beton": (whole, Beton(damaged)), "beton-in-python": in_python, "folder": folders}


@pytest.fixture(params=["beton", "beton-in-python", "folder"])
def pair(request, both):
    return both[request.param]


def drawn(data, view, workers: int, on_bad_record="skip"):
    loader = open_loader(
        data, view, batch=BATCH, workers=workers, enlarge=True, on_bad_record=on_bad_record
    )
    return list(loader.epoch(2)), loader


@pytest.mark.parametrize("view", [TRAINING, EVALUATION], ids=["training", "evaluation"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_stops_the_loader_by_name(pair, view, workers):
    _, damaged = pair
    with pytest.raises(DamagedRecord, match=r"row (5|20)\b.*class.*--on-bad-record skip") as told:
        drawn(damaged, view, workers, "stop")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_a_neighbour_stands_in(pair, workers, caplog):
    """All other places keep their pictures, shapes stay, and index and label tell who stood in."""
    whole, damaged = (drawn(data, TRAINING, workers)[0] for data in pair)
    _, loader = drawn(pair[1], TRAINING, workers)
    assert len(whole) == len(damaged)
    met = 0
    for sound, other in zip(whole, damaged, strict=True):
        places = list(range(BATCH))
        for place, row in enumerate(sound.index.tolist()):
            if row in (5, 20):
                met += 1
                places[place] = places[place - 1]  # none of its neighbours is damaged too
        assert torch.equal(other.index, sound.index[places])
        assert torch.equal(other.label, sound.label[places])
        assert torch.equal(other.epoch_step, sound.epoch_step)
        for a, b in zip(other.crops, sound.crops, strict=True):
            assert torch.equal(a, b[places])
    assert met == len(loader.skipped) > 0
    assert len([r for r in caplog.records if "skipped: row" in r.message]) == 2 * met  # two loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_in_data_order_it_is_missing(pair, workers):
    whole, damaged = (drawn(data, EVALUATION, workers)[0] for data in pair)
    index = torch.cat([batch.index for batch in damaged]).tolist()
    assert index == [row for row in range(pair[0].rows) if row not in (5, 20)]
    pixels = [torch.cat([batch.images for batch in batches]) for batches in (whole, damaged)]
    assert torch.equal(pixels[0][index], pixels[1])
    labels = torch.cat([batch.label for batch in damaged]).numpy()
    assert np.array_equal(labels, pair[0].labels[index])


def test_a_batch_without_one_sound_picture(both, tmp_path):
    """In training it stops all the same, since nothing can stand in; in data order it is left out."""
    _, damaged = both["beton"]
    np.save(tmp_path / "rows.npy", np.array([5, 20], np.int64))
    training = View(crops=TRAINING.crops, rows=tmp_path / "rows.npy")
    loader = open_loader(damaged, training, batch=2, enlarge=True, on_bad_record="skip")
    with pytest.raises(DamagedRecord, match="no picture of a whole batch can be read"):
        list(loader.epoch(0))
    evaluation = View(crops=EVALUATION.crops, rows=tmp_path / "rows.npy", shuffled=False)
    loader = open_loader(damaged, evaluation, batch=2, enlarge=True, on_bad_record="skip")
    assert list(loader.epoch(0)) == []
    assert len(loader.skipped) == 2
