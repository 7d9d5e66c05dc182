"""`evaluate.py RUN rotation`: what is said of each picture and rotation, by which net, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import go

from fastrot import assemble, config, evaluate, train
from fastrot.config import RunError, UsageError
from fastrot.data.keys import fold_of, held_out
from fastrot.evals.trained import trained_method
from fastrot.methods import rotation_table
from fastrot.methods.rotnet import RotNet
from fastrot.ops.rotate import rotated_views
from fastrot.training import checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick_runs")
SHORT = ["--schedule.steps", "6"]


def ask(run, *more: str) -> int:
    return evaluate.main([str(run), "rotation", "--device", "cpu", "--workers", "1", *more])


def table_of(run, data, path: Path, *more: str) -> rotation_table.RotationTable:
    """What evaluate.py writes of some pictures."""
    assert ask(run, "--data", str(data), "--table", str(path), *more) == 0
    opened = assemble.open_data(data)
    return rotation_table.read(path, rows=opened.rows, fingerprint=opened.fingerprint)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """One net, judged on the pictures that it learned from."""
    run = tmp_path_factory.mktemp("runs") / "one"
    go(pictures, run, *SHORT, "--val", str(pictures))
    return run


@pytest.fixture(scope="module")
def folds(pictures, tmp_path_factory) -> Path:
    """Two nets, each without one fold."""
    run = tmp_path_factory.mktemp("runs") / "folds"
    go(pictures, run, *SHORT, "--folds", "2")
    return run


# ---- what is said ----


def test_accuracy_is_that_of_the_runs_own_validation(trained, pictures, tmp_path, capsys):
    """Its --val is the data that is asked about, seen in the same view."""
    summary = json.loads((trained / "summary.json").read_text())
    table = table_of(trained, pictures, tmp_path / "a.npz")
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = {" ".join(words[:-1]): words[-1] for words in said}
    assert shares["all rotations"] == f"{summary['val_accuracy']:.2%}"
    each = [shares["upright"], *(shares[f"rotated {90 * r} degrees"] for r in (1, 2, 3))]
    right = (table.probabilities.argmax(axis=2) == np.arange(4)).mean(axis=0)
    assert each == [f"{share:.2%}" for share in right]
    assert right.mean() == pytest.approx(summary["val_accuracy"])
    assert len(set(each)) > 1  # or their order would not show


def test_each_number_is_what_the_net_says_of_that_picture_and_turn(trained, pictures, tmp_path):
    """Derived again: each picture alone, rotated by numpy.rot90 on the uint8 crop."""
    table = table_of(trained, pictures, tmp_path / "a.npz")
    state = checkpoint.load(trained / "checkpoints" / "last.pt")
    cfg = config.from_plain(state["config"])
    net = trained_method(trained, torch.device("cpu")).net
    loader = assemble.open_loader(
        pictures, assemble.evaluation_view(cfg), batch=1, workers=0, enlarge=True
    )
    for row, batch in enumerate(loader.epoch(0)):
        assert batch.index.tolist() == [row]
        for rotation in range(4):
            crop = np.rot90(batch.images[0].numpy(), rotation).copy()
            pixels = torch.from_numpy(crop)[None]
            view = rotated_views(pixels, (0,), cfg.mean, cfg.std, dtype=torch.float32)
            with torch.no_grad():
                said = net(view).softmax(dim=1)[0].numpy()
            np.testing.assert_allclose(table.probabilities[row, rotation], said, atol=1e-5)
    assert np.ptp(table.upright, axis=0).max() > 0.01  # it tells pictures apart
    assert (table.fold == -1).all()


def test_each_picture_is_scored_by_the_net_that_never_saw_it(folds, pictures, tmp_path, capsys):
    data = assemble.open_data(pictures)
    fold = fold_of(data.keys, 2)
    table = table_of(folds, pictures, tmp_path / "a.npz")
    said = capsys.readouterr().out
    assert np.array_equal(table.fold, fold)
    assert table.fingerprint == data.fingerprint
    for number in (0, 1):
        alone = table_of(folds / f"fold{number}", pictures, tmp_path / f"{number}.npz")
        mine = fold == number
        assert np.array_equal(table.probabilities[mine], alone.probabilities[mine])
        assert not np.array_equal(table.probabilities[~mine], alone.probabilities[~mine])
        learned = np.load(folds / f"fold{number}" / "rows-train.npy")
        assert not mine[learned].any()
        right = alone.probabilities[mine].argmax(axis=2) == np.arange(4)
        count = f"{right.mean():.2%} of {mine.sum()} pictures, by {folds / f'fold{number}'}"
        assert f"fold {number}" in said
        assert count in said
    assert "too sure" not in said


def test_a_pictures_pixels_reach_the_nets_of_other_folds_alone(folds, pictures, tmp_path):
    """The net that scores a picture keeps its bits when that picture changes; the other net's change."""
    data = assemble.open_data(pictures)
    fold, altered = fold_of(data.keys, 2), tmp_path / "altered"
    shutil.copytree(pictures, altered)
    row = int(np.flatnonzero(~held_out(data.keys, 0.05) & (fold == 0))[4])
    file = altered / data.name(row)  # type: ignore[attr-defined]
    Image.fromarray(255 - np.asarray(Image.open(file).convert("RGB"))).save(file)
    go(altered, tmp_path / "run", *SHORT, "--folds", "2")
    nets = [
        [checkpoint.load(run / f"fold{f}" / "checkpoints" / "last.pt")["net"] for f in (0, 1)]
        for run in (folds, tmp_path / "run")
    ]
    same = [
        [torch.equal(a[k], b[k]) for k in a if "weight" in k] for a, b in zip(*nets, strict=True)
    ]
    assert all(same[0])
    assert not any(same[1])
    mine = table_of(folds, pictures, tmp_path / "mine.npz")
    other = table_of(tmp_path / "run", altered, tmp_path / "other.npz")
    assert (mine.fingerprint, mine.fold.tolist()) == (other.fingerprint, other.fold.tolist())
    alike = (mine.probabilities == other.probabilities).all(axis=(1, 2))
    rest = (fold == 0) & (np.arange(len(fold)) != row)
    assert alike[rest].all()  # tables stay aligned: the same net said the same of the same pictures
    assert not alike[row]
    assert not alike[fold == 1].any()


def test_text_and_arrays_hold_the_same_bits(folds, pictures, tmp_path):
    arrays = table_of(folds, pictures, tmp_path / "a.npz")
    text = table_of(folds, pictures, tmp_path / "prob.dat")
    assert text.upright.tobytes() == arrays.upright.tobytes()
    assert text.digest == arrays.digest


def test_the_number_of_pictures_at_once_changes_rounding_at_most(
    trained, pictures, tmp_path, monkeypatch
):
    views, sizes = RotNet.views, set()
    monkeypatch.setattr(
        RotNet, "views", lambda self, b: (sizes.add(len(b.index)), views(self, b))[1]
    )
    one = table_of(trained, pictures, tmp_path / "1.npz", "--batch", "1", "--workers", "0")
    many = table_of(trained, pictures, tmp_path / "64.npz", "--batch", "64")
    assert sizes == {1, 64}  # of one shape, also where 37 pictures are left
    np.testing.assert_allclose(one.probabilities, many.probabilities, atol=1e-6)


def test_a_net_is_too_sure_of_what_it_was_trained_on_and_that_is_said(
    trained, pictures, tmp_path, capsys
):
    ask(trained)
    assert "the net is too sure: for PU weights train with --folds 2" in capsys.readouterr().out
    others = tmp_path / "others"
    shutil.copytree(pictures / "class1", others)
    table = table_of(trained, others, tmp_path / "a.npz")
    assert len(table.fold) == len(list(others.iterdir()))
    assert "too sure" not in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_weighs_in_full(
    folds, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    data = assemble.open_data(root)  # its sizes are known from here on
    row = 7
    file = root / data.name(row)  # type: ignore[attr-defined]
    stamp = file.stat()
    file.write_bytes(file.read_bytes()[:300] + bytes(stamp.st_size - 300))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(RunError, match=r"row 7, .*cannot be read.*--on-bad-record skip"):
        ask(folds, "--data", str(root))
    table = table_of(folds, root, tmp_path / "a.npz", "--on-bad-record", "skip")
    assert "1 of 37 pictures cannot be read: their probabilities are 0" in capsys.readouterr().out
    assert not table.probabilities[row].any()
    assert rotation_table.pu_weights(table.upright, 2.0)[row].tolist() == [1] * 4
    whole = table_of(folds, pictures, tmp_path / "b.npz")
    rest = np.arange(len(table.fold)) != row
    np.testing.assert_allclose(table.probabilities[rest], whole.probabilities[rest], atol=1e-6)


# ---- what is refused ----


@pytest.fixture
def copy(folds, tmp_path) -> Path:
    shutil.copytree(folds, tmp_path / "copy")
    return tmp_path / "copy"


def altered(file: Path, change) -> None:
    state = checkpoint.load(file)
    change(state)
    torch.save(state, file)


LAST = "fold1/checkpoints/last.pt"
UNSOUND = {
    "folder-missing": (
        lambda run: shutil.rmtree(run / "fold1"),
        "fold1 holds no trained net: train with --folds 2",
    ),
    "first-missing": (lambda run: shutil.rmtree(run / "fold0"), "fold0 holds no trained net"),
    "no-checkpoint": (lambda run: (run / LAST).unlink(), "fold1 holds no trained net"),
    "unfinished": (
        lambda run: altered(run / LAST, lambda s: s.update(step=4)),
        r"fold1 is not trained to its end \(step 4 of 6\)",
    ),
    "of-other-folds": (
        lambda run: altered(run / LAST, lambda s: s["config"].update(folds=3)),
        "fold0 was trained as fold 0 of --folds 2, where fold 0 of 3 belongs",
    ),
    "another-fold": (
        lambda run: altered(run / LAST, lambda s: s["config"].update(fold=0)),
        "fold1 was trained as fold 0 of --folds 2, where fold 1 of 2 belongs",
    ),
    "of-other-data": (
        lambda run: altered(run / LAST, lambda s: s["run_identity"].update(data_fingerprint="x")),
        "other pictures than .*fold1 was trained on",
    ),
    "damaged": (
        lambda run: (run / LAST).write_bytes((run / LAST).read_bytes()[:-500]),
        r"last\.pt is cut short",
    ),
}


@pytest.mark.parametrize(("spoil", "says"), UNSOUND.values(), ids=UNSOUND)
def test_folds_that_are_not_whole_are_refused(copy, spoil, says):
    spoil(copy)
    with pytest.raises(UsageError, match=says) as told:
        ask(copy)
    assert "\n" not in str(told.value)


WRONG = {
    "other-data": (
        ["--data", "synthetic:40"],
        "--data synthetic:40 holds other pictures than .*fold0",
    ),
    "no-data": (["--data", "no/such/place"], "--data no/such/place does not exist"),
    "table-name": (["--table", "a.csv"], r"--table a\.csv wants a name that ends in \.npz"),
    "table-folder": (["--table", "no/such/a.npz"], "--table no/such/a.npz cannot be written"),
    "batch": (["--batch", "0"], "--batch got 0: it wants at least 1"),
    "workers": (["--workers", "-1"], "--workers got -1: it wants at least 0"),
}


@pytest.mark.parametrize(("args", "says"), WRONG.values(), ids=WRONG)
def test_wrong_use_gets_one_sentence(folds, args, says):
    with pytest.raises(UsageError, match=says) as told:
        ask(folds, *args)
    assert "\n" not in str(told.value)


def test_wrong_words_get_one_sentence(folds):
    for words, says in {
        (str(folds),): "wants a run and an evaluation: RUN and one of rotation",
        ("--table", "a.npz"): "wants a run and an evaluation",
        (str(folds), "zebra"): "there is no evaluation 'zebra': choose one of rotation",
        ("no/such/run", "rotation"): "there is no checkpoint no/such/run",
    }.items():
        with pytest.raises(UsageError, match=says):
            evaluate.main(list(words))


def test_a_task_without_turns_is_refused(pictures, tmp_path):
    args = ["supervised-alexnet", "--batch", "4", "--image-size", "32", "--backbone.width", "0.1"]
    args += ["--enlarge", "--device", "cpu", "--no-tensorboard", "--backbone.kernel", "5"]
    args += ["--backbone.stride", "2", "--data", str(pictures), "--out", str(tmp_path)]
    train.main([*args, "--max-steps", "1", "--workers", "0"])
    with pytest.raises(UsageError, match=r"predicts no rotations \(Supervised\)"):
        ask(tmp_path)


def test_from_folds_to_decoupling_with_pu_weights(folds, pictures, tmp_path, capsys):
    """The way of the README: a table of folds, and a decoupling that it weighs, which can be asked too."""
    file = tmp_path / "rotations.npz"
    table = table_of(folds, pictures, file)
    args = ["decoupling-alexnet", "--batch", "4", "--image-size", "64", "--backbone.width", "0.1"]
    args += ["--enlarge", "--device", "cpu", "--no-tensorboard", "--method.negatives", "8"]
    args += ["--workers", "0", "--out", str(tmp_path / "run"), "--max-steps", "2"]
    args += ["--method.pu-table", str(file), "--method.pu-from", "0", "--data"]
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "class0" / "000.jpg").rename(other / "class0" / "001.jpg")
    with pytest.raises(UsageError, match=f"--method.pu-table {file} was written from other data"):
        train.main([*args, str(other)])
    train.main([*args, str(pictures)])
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["run_identity"]["method"]["pu_table"] == table.digest
    file.unlink()
    capsys.readouterr()
    assert ask(tmp_path / "run") == 0  # without bank and table
    assert "all rotations" in capsys.readouterr().out
    altered(
        tmp_path / "run" / "checkpoints" / "last.pt",
        lambda state: state["config"]["method"].update(lambda_cls=0.0, pu_table=None),
    )
    with pytest.raises(UsageError, match=r"predicts no rotations \(Decoupling\)"):
        ask(tmp_path / "run")


def test_help_names_the_evaluations(capsys):
    assert evaluate.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: fastrot evaluate RUN EVALUATION" in said
    for word in evaluate.EVALUATIONS:
        assert f"  {word} " in said


def test_the_command_from_anywhere(tmp_path):
    """As a script: one sentence, status 2, and torch is not waited for."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "fastrot" / "evaluate.py", "runs/x", "no-such"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "fastrot: there is no evaluation 'no-such'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "| torch\n" not in done.stderr
