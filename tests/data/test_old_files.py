"""What the version before this one prepared: tests/data/old/, made at commit 83934b9 from the four pictures there."""

import json
import shutil
from pathlib import Path

import pytest

from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized
from fastrot.core import View
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.data.tars.write import TarsOptions

OLD = Path(__file__).parent / "old"
HOW = dict(source="imagefolder", root=OLD / "pictures", workers=0)
MADE = {
    "a.beton": lambda out: BetonOptions(**HOW, out=out),
    "a.pack": lambda out: PackOptions(**HOW, out=out, short_side=16),
    "tars": lambda out: TarsOptions(**HOW, out=out, shard=4),
}


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.mark.parametrize("name", MADE)
def test_it_is_read_and_counts_as_finished(old, name):
    data = open_data(old / name)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.name(2) == "class1/1.png"
    view = View(crops=(RandomResized(size=16),))
    (batch,) = open_loader(data, view, batch=4, workers=0, enlarge=True).epoch(0)
    assert sorted(batch.label.tolist()) == [0, 0, 1, 1]
    assert convert(MADE[name](old / name)).already


@pytest.mark.parametrize("name", MADE)
def test_made_anew_it_has_the_same_bytes(tmp_path, name):
    convert(MADE[name](tmp_path / name))
    for file in (p for p in OLD.rglob("*") if str(p.relative_to(OLD)).startswith(name)):
        new = tmp_path / file.relative_to(OLD)
        if file.suffix == ".json":
            theirs, ours = (json.loads(p.read_bytes()) for p in (file, new))
            for facts in (theirs, ours):  # an option that is not in use is one that is not there
                used = facts.pop("options", {}).items()
                facts["options"] = {name: value for name, value in used if value is not None}
            changing = {"versions": 0, "crc": 0}
            assert theirs | changing == {name: ours[name] for name in theirs} | changing
        elif file.is_file():
            assert new.read_bytes() == file.read_bytes(), file.name


def test_a_conversion_that_was_killed_goes_on(old):
    out = old / "killed.beton"
    assert convert(BetonOptions(**HOW, out=out), part=2).resumed == 4
    assert out.read_bytes() == (OLD / "a.beton").read_bytes()
