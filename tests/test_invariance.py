"""How far features of a picture are from its transform's: distances, pairs, histograms, and the command."""

import json

import numpy as np
import pytest
import torch
from test_decoupling import info
from test_pirl import LARGE, SMALL, a_batch, go
from torch.nn import functional as F

from fastrot import config, evaluate
from fastrot.backbones.alexnet import alexnet
from fastrot.config import RunError, UsageError
from fastrot.data.loader import Loader
from fastrot.evals import invariance
from fastrot.evals.invariance import BINS, distances, own_transform, seen_by
from fastrot.methods.jigsaw import Jigsaw
from fastrot.methods.pirl import PICTURE, Pirl
from fastrot.methods.rotnet import RotNet


class Batches(Loader):
    """In the place of a loader: batches that are there."""

    def __init__(self, *batches):
        self.batches, self.device = batches, torch.device("cpu")

    def __len__(self):
        return len(self.batches)

    def epoch(self, number):
        return iter(self.batches)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_distances_are_of_all_pairs_of_a_batch_and_add_up():
    parts = [(unit(5, 8), unit(3, 5, 8, seed=1)), (unit(4, 8, seed=2), unit(3, 4, 8, seed=3))]
    given = iter(parts)
    loader = Batches(*(a_batch(range(len(mine))) for mine, _ in parts))
    found = distances(lambda batch: {"x": next(given)}, loader)["x"]
    own, other, nearer = [], [], []
    for mine, views in parts:
        for view in views:
            apart = torch.cdist(view, mine)
            for i, j in np.ndindex(*apart.shape):
                if i == j:
                    own.append(apart[i, i].item())
                else:
                    other.append(apart[i, j].item())
                    nearer.append((apart[i, i] < apart[i, j]).item())
    assert found.own == pytest.approx(np.mean(own), rel=1e-5)
    assert found.other == pytest.approx(np.mean(other), rel=1e-5)
    assert found.nearer == pytest.approx(np.mean(nearer))
    for shares, values in ((found.histogram, own), (found.of_others, other)):
        counts, _ = np.histogram(values, BINS, (0, 2))
        assert shares == pytest.approx(counts / counts.sum())


def test_what_is_alike_is_not_nearer_and_far_ends_are_counted():
    same = unit(1, 8).expand(4, 8)
    found = distances(lambda batch: {"x": (same, same[None])}, Batches(a_batch(range(4))))["x"]
    assert found.nearer == 0.5
    assert found.histogram[0] == found.of_others[0] == 1
    found = distances(lambda batch: {"x": (same, -same[None])}, Batches(a_batch(range(4))))["x"]
    assert found.histogram[-1] == found.of_others[-1] == 1


def ready(method):
    method.net.eval()
    return method


@torch.no_grad()
def test_rotations_are_three_and_heads_embed_them():
    known = info(50, dtype=torch.float32)
    cfg = config.Config(method=config.Pirl(negatives=5))
    method = ready(Pirl(cfg.method, alexnet(SMALL, 64), known))
    batch = a_batch([3, 1], 64, crops=1)
    found = seen_by(method, ("conv3", "last"), 1, "rotation", cfg)(batch)
    assert list(found) == ["conv3", "last", "heads"]
    picture = method.views(batch)[0]
    for stage, (mine, theirs) in found.items():
        assert mine.shape == theirs.shape[1:]
        assert len(theirs) == 3
        for times, view in enumerate(theirs, 1):
            x = torch.rot90(picture, times, (2, 3))
            if stage == "heads":
                want, first = (
                    method.net.embedded("rotation", x),
                    method.net.embedded(PICTURE, picture),
                )
            else:
                want, first = (
                    F.normalize(method.net.trunk.outputs(y, (stage,))[0].mean((2, 3)), dim=1)
                    for y in (x, picture)
                )
            torch.testing.assert_close(view, want, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine, first, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_puzzle_is_the_mean_of_its_patches():
    known, crop = info(50, dtype=torch.float32), config.RandomResized(size=LARGE)
    cfg = config.Config(method=config.Jigsaw(crop=crop, permutations=5))
    method = ready(Jigsaw(cfg.method, alexnet(SMALL, LARGE), known))
    batch = a_batch([3, 1], LARGE, crops=1)
    (mine, theirs), *more = seen_by(method, ("last",), 1, "jigsaw", cfg)(batch).values()
    assert not more
    assert (mine.shape, theirs.shape) == ((2, 32), (1, 2, 32))
    shown = method.views(batch)  # in another order
    each = F.normalize(method.net.trunk(shown).mean((2, 3)), dim=1).unflatten(0, (2, 9))
    cosine = (F.normalize(each.mean(1), dim=1) * theirs[0]).sum(1)
    assert (cosine > 0.99).all()  # from other places of the cells
    assert (theirs[0] - mine).norm() > 0.01


def test_the_transform_is_the_runs_own():
    for cfg, own in (
        (config.RotNet(), "rotation"),
        (config.Jigsaw(), "jigsaw"),
        (config.Pirl(transform="jigsaw"), "jigsaw"),
        (config.Pirl(transform="both"), "rotation"),
        (config.Supervised(), "rotation"),
    ):
        assert own_transform(cfg) == own


def test_a_net_that_sees_no_rotation_is_near_and_one_that_does_is_not():
    """Maps' means of a symmetric filter do not change; a plain net's do."""
    known = info(9, dtype=torch.float32)
    cfg = config.Config(method=config.RotNet())
    method = ready(RotNet(cfg.method, alexnet(SMALL, 64), known))
    batch = a_batch(range(6), 64, crops=1)
    plain = distances(seen_by(method, ("conv1",), 1, "rotation", cfg), Batches(batch))["conv1"]
    weight = method.net.trunk.conv1.conv.weight
    with torch.no_grad():
        weight.copy_(torch.stack([weight.rot90(r, (2, 3)) for r in range(4)]).mean(0))
    batch = a_batch(range(6), 65, crops=1)  # whose grid of strides rotates into itself
    still = distances(seen_by(method, ("conv1",), 1, "rotation", cfg), Batches(batch))["conv1"]
    assert still.own < 1e-3 < plain.own
    assert still.nearer == 1


def test_the_command_prints_and_keeps_what_it_found(pictures, tmp_path, capsys):
    run = go("pirl", pictures, tmp_path / "run", "--max-steps", "1")
    capsys.readouterr()
    out = tmp_path / "found.json"
    assert (
        evaluate.main(
            [str(run), "invariance", "--device", "cpu", "--workers", "0", "--json", str(out)]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "rotation by 90, 180 and 270 degrees" in told
    assert told.count("its own is nearer") == 2
    found = json.loads(out.read_text())["stages"]
    assert set(found) == {"last", "heads"}
    assert sum(found["heads"]["histogram"]) == pytest.approx(1)
    assert invariance.HEADS in found


def test_what_it_cannot_ask_is_refused_and_lone_pictures_have_no_others(pictures, tmp_path):
    run = str(go("jigsaw", pictures, tmp_path / "run", "--max-steps", "1"))
    with pytest.raises(UsageError, match="--pool 2: a puzzle's features are averaged"):
        evaluate.main([run, "invariance", "--pool", "2"])
    with pytest.raises(UsageError, match="--batch 2 or more"):
        evaluate.main([run, "invariance", "--batch", "1"])
    pair, lone = (unit(2, 8), unit(1, 2, 8, seed=1)), (unit(1, 8), unit(1, 1, 8, seed=2))
    given = iter([pair, lone])
    found = distances(lambda b: {"x": next(given)}, Batches(a_batch([0, 1]), a_batch([2])))["x"]
    alone = distances(lambda b: {"x": pair}, Batches(a_batch([0, 1])))["x"]
    assert (found.other, found.nearer) == (alone.other, alone.nearer)
    assert found.own != alone.own
    with pytest.raises(RunError, match="no two pictures"):
        distances(lambda b: {"x": lone}, Batches(a_batch([2])))
