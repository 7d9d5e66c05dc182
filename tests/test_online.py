"""`--online-probe knn`: features are judged while they are learnt, and nothing of the run changes."""

import json

import chaos
import numpy as np
import pytest
import torch
from test_run import go, leaves

from fastrot import assemble
from fastrot.config import UsageError
from fastrot.data.keys import some
from fastrot.evals import online
from fastrot.evals.features import features
from fastrot.evals.knn import knn_top1
from fastrot.evals.trained import load
from fastrot.training import checkpoint

pytestmark = pytest.mark.usefixtures("quick_runs")
LAST = "checkpoints/last.pt"
IMAGENET = 1_281_167


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    go(pictures, out, "--online-probe", "knn", "--tensorboard", "--hold-out", "0.3")
    return out


def lines(run):
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in told if "val_loss" in line]


def test_each_validation_has_it_and_the_run_is_the_same(run, pictures, tmp_path, capsys):
    shares = [line["val_knn_conv5"] for line in lines(run)]
    assert len(shares) >= 3
    assert all(0 <= share <= 1 for share in shares)
    assert json.loads((run / "summary.json").read_text())["val"]["knn_conv5"] == shares[-1]
    assert f"knn_conv5 {shares[-1]:.1%}" in (run / "log.txt").read_text()
    go(pictures, tmp_path / "plain", "--hold-out", "0.3")
    mine, other = (
        {k: v for k, v in leaves(checkpoint.load(each / LAST)).items() if ".config." not in k}
        for each in (run, tmp_path / "plain")
    )
    assert mine.keys() - other.keys() == {
        ".progress.val.knn_conv5",
        ".progress.val_first.knn_conv5",
    }
    assert [name for name in other if not chaos.same(mine[name], other[name])] == []


def test_it_is_in_tensorboard_too(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    assert "val/knn_conv5" in board.Tags()["scalars"]


def test_it_is_what_the_finished_net_says(run, pictures):
    """Derived again from the checkpoint, over the rows that it noted."""
    trunk = load(run)
    data, found = assemble.open_data(str(pictures)), []
    for name in ("rows-train.npy", "rows-val.npy"):  # all, since they are few
        view = assemble.evaluation_view(trunk.config, run / name)
        loader = assemble.open_loader(data, view, batch=3, workers=0, enlarge=True)
        rows = features(trunk, loader, ["conv5"])["conv5"]
        found += [torch.nn.functional.normalize(rows), torch.from_numpy(data.labels[loader.rows])]
    again = knn_top1(*found, 3, min(online.K, len(found[0])), online.SIGMA)
    assert lines(run)[-1]["val_knn_conv5"] == pytest.approx(again)


def test_it_costs_under_three_hundredths_of_imagenets_epoch(run):
    """Counted in pictures read, of which it sees one view forward, and training four forward and back."""
    keys = np.arange(IMAGENET, dtype=np.uint64)
    read = sum(len(some(keys, count)) for count in (online.LEARNT, online.ASKED))
    assert read == 3_000
    assert read / IMAGENET < 0.03


def test_it_asks_about_so_many_pictures(pictures, tmp_path, monkeypatch):
    asked = []

    def counted(trunk, loader, *more, **how):
        asked.append(loader.images)
        return features(trunk, loader, *more, **how)

    monkeypatch.setattr(online, "features", counted)
    monkeypatch.setattr(online, "LEARNT", 9)
    monkeypatch.setattr(online, "ASKED", 4)
    few = ["--online-probe", "knn", "--hold-out", "0.3", "--max-steps", "2"]
    go(pictures, tmp_path / "run", *few)
    assert asked
    assert set(asked) == {9, 4}


def test_what_it_cannot_judge_is_refused(pictures, tmp_path):
    more = ["--online-probe", "knn"]
    with pytest.raises(UsageError, match="--online-probe got knn: it wants held-out pictures"):
        go(pictures, tmp_path / "a", *more, "--hold-out", "0")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="--online-probe knn learns from labels, but"):
        go(flat, tmp_path / "b", *more)
    assert not (tmp_path / "b").exists()
