"""--folds: nets that each leave one fold out, one after the other, each a whole run that resumes to the bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_run import TINY, assert_same_bits, go, told

from fastrot import assemble, entry, evaluate, train
from fastrot.config import UsageError
from fastrot.data.keys import fold_of, held_out
from fastrot.training import loop

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick_runs")
STEPS = 8
SHORT = ["--schedule.steps", str(STEPS)]  # of each fold: epochs of 3 or 4 steps
FOLDS = [*SHORT, "--folds", "2"]


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.pt"


def assert_same_folds(a: Path, b: Path) -> None:
    for fold in ("fold0", "fold1"):
        assert_same_bits(last(a / fold), last(b / fold))
        assert told(a / fold) == told(b / fold)


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """Two folds, never broken off."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert go(pictures, out, *FOLDS) == 0
    return out


# ---- which picture belongs to which fold ----


def test_a_fold_is_a_pictures_own():
    """By its key alone: whatever other pictures there are; and for ever."""
    keys = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    assert np.array_equal(fold_of(keys, 5)[::7], fold_of(keys[::7], 5))
    few = fold_of(np.arange(24, dtype=np.uint64), 3)
    assert "".join(map(str, few)) == "220112222220122011020102"


@pytest.mark.parametrize("folds", [2, 3, 10, 100])
@pytest.mark.parametrize("kind", ["numbers", "hashes"])
def test_folds_are_about_equal_and_apart_from_the_hold_out(folds, kind):
    keys = np.arange(100_000, dtype=np.uint64)
    if kind == "hashes":
        keys = np.random.default_rng(1).integers(0, 2**64, 100_000, dtype=np.uint64)
    fold, aside = fold_of(keys, folds), held_out(keys, 0.2)
    for chosen, share in ((slice(None), 1.0), (aside, 0.2)):
        counts = np.bincount(fold[chosen], minlength=folds)
        assert len(counts) == folds
        expected = share * 100_000 / folds
        assert abs(counts - expected).max() < 5 * expected**0.5


# ---- the runs ----


def test_each_net_learns_from_all_but_its_fold_and_the_hold_out(straight, pictures):
    keys = assemble.open_data(pictures).keys
    fold, aside = fold_of(keys, 2), held_out(keys, 0.05)
    for number in (0, 1):
        learned = np.load(straight / f"fold{number}" / "rows-train.npy")
        judged = np.load(straight / f"fold{number}" / "rows-val.npy")
        assert learned.tolist() == np.flatnonzero(~aside & (fold != number)).tolist()
        assert judged.tolist() == np.flatnonzero(aside).tolist()
        summary = json.loads((straight / f"fold{number}" / "summary.json").read_text())
        assert summary["steps"] == STEPS


def test_rows_of_a_fold_never_reach_its_net(pictures, tmp_path, monkeypatch):
    step, seen = loop.train_step, {}

    def spied(state, batch):
        seen.setdefault(id(state), set()).update(batch.index.tolist())
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", spied)
    go(pictures, tmp_path, *FOLDS, "--val", str(pictures))
    assert not (tmp_path / "fold0" / "rows-val.npy").exists()
    fold = fold_of(assemble.open_data(pictures).keys, 2)
    for number, rows in enumerate(seen.values()):
        assert rows <= set(np.flatnonzero(fold != number))
        assert len(rows) > 12  # also those that would be held out without --val
    learned = np.load(tmp_path / "fold1" / "rows-train.npy")
    assert learned.tolist() == np.flatnonzero(fold != 1).tolist()
    with pytest.raises(UsageError, match="other pictures"):
        go(pictures, tmp_path, *FOLDS)


def test_folds_are_left_out_without_any_judging(pictures, tmp_path):
    go(pictures, tmp_path, *FOLDS, "--hold-out", "0", "--max-steps", "1")
    fold = fold_of(assemble.open_data(pictures).keys, 2)
    learned = np.load(tmp_path / "fold0" / "rows-train.npy")
    assert learned.tolist() == np.flatnonzero(fold != 0).tolist()


def test_folds_broken_off_go_on_to_the_same_bits(straight, pictures, tmp_path, capsys):
    go(pictures, tmp_path, *FOLDS, "--max-steps", "5")
    capsys.readouterr()
    go(pictures, tmp_path, *FOLDS, "--workers", "0")
    assert capsys.readouterr().out.count("resumed at step 5") == 2
    assert_same_folds(straight, tmp_path)


class Killed(BaseException):
    pass


def test_a_killed_fold_goes_on_from_its_last_checkpoint(
    straight, pictures, tmp_path, monkeypatch, capsys
):
    step, steps = loop.train_step, []

    def deadly(state, batch):
        steps.append(1)
        if len(steps) > STEPS + 6:  # in the second fold
            raise Killed
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", deadly)
    with pytest.raises(Killed):
        go(pictures, tmp_path, *FOLDS)
    monkeypatch.undo()
    capsys.readouterr()
    go(pictures, tmp_path, *FOLDS)
    said = capsys.readouterr().out
    assert said.count(f"is done after {STEPS} steps") == 2
    assert_same_folds(straight, tmp_path)


@pytest.mark.parametrize("at", [3, STEPS + 3], ids=["in-the-first", "in-the-second"])
def test_a_warning_in_any_fold_saves_and_ends(
    straight, pictures, tmp_path, at, monkeypatch, capsys
):
    step, steps = loop.train_step, []

    def warned(state, batch):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", warned)
    args = [*TINY, "--data", str(pictures), "--out", str(tmp_path), *FOLDS]
    before = signal.getsignal(signal.SIGTERM)
    assert entry.status(lambda: train.main(args)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: saved at step 3 of 8" in capsys.readouterr().out
    assert (tmp_path / "fold1").exists() == (at > STEPS)  # else it held nothing
    assert last(tmp_path / "fold1").exists() == (at > STEPS)
    monkeypatch.undo()
    go(pictures, tmp_path, *FOLDS)
    assert_same_folds(straight, tmp_path)


def test_a_finished_pair_says_so_and_changes_nothing(straight, pictures, capsys):
    before = {p: p.read_bytes() for p in straight.rglob("*.jsonl")}
    assert go(pictures, straight, *FOLDS) == 0
    said = capsys.readouterr().out
    assert said.count(f"is done after {STEPS} steps") == 2
    assert "fold 0 of 0 to 1 is left out of training" in said
    assert before == {p: p.read_bytes() for p in straight.rglob("*.jsonl")}


def test_one_fold_alone_is_the_fold_of_the_pair(straight, pictures, tmp_path, capsys):
    """On another machine, say; and its config.yaml replays it in its own folder."""
    go(pictures, tmp_path / "fold1", *FOLDS, "--fold", "1", "--max-steps", "3")
    capsys.readouterr()
    train.main(["--config", str(tmp_path / "fold1" / "config.yaml"), "--max-steps", "9"])
    assert "resumed at step 3" in capsys.readouterr().out
    assert_same_bits(last(straight / "fold1"), last(tmp_path / "fold1"))
    assert [path.name for path in tmp_path.iterdir()] == ["fold1"]
    file = straight / "fold0" / "config.yaml"
    plain = train.read_config(file)
    assert (plain.folds, plain.fold, plain.out) == (2, 0, str(straight / "fold0"))


WRONG = {
    "more-folds-than-pictures": (
        ["--folds", "100", "--max-steps", "1"],
        r"--folds 100 leaves fold \d+ empty",
    ),
    "one": (["--folds", "1"], "--folds got 1: it wants 2 to 100"),
    "fold-without-folds": (["--fold", "1"], "--fold got 1: it wants --folds"),
    "fold-too-high": (["--folds", "2", "--fold", "2"], "--fold got 2"),
    "batch": (["--folds", "2", "--batch", "30"], "--batch 30"),
}


@pytest.mark.parametrize(("args", "names"), WRONG.values(), ids=WRONG)
def test_wrong_use_gets_one_sentence(pictures, tmp_path, args, names):
    with pytest.raises(UsageError, match=names) as said:
        go(pictures, tmp_path, *args)
    assert "\n" not in str(said.value)


def test_runs_with_and_without_folds_are_kept_apart(straight, pictures, tmp_path):
    with pytest.raises(UsageError, match="holds the runs of --folds: use --out NEW"):
        go(pictures, straight, *SHORT)
    with pytest.raises(UsageError, match=f"holds the runs of --folds: use --out {straight}/fold1"):
        go(pictures, straight, *FOLDS, "--fold", "1")
    with pytest.raises(UsageError, match="--folds was 2, now 3"):
        go(pictures, straight, *SHORT, "--folds", "3")
    with pytest.raises(UsageError, match="--fold was 1, now 0"):
        go(pictures, straight / "fold1", *FOLDS, "--fold", "0")
    with pytest.raises(UsageError, match="other pictures"):
        go("synthetic:37", straight, *FOLDS)
    go(pictures, tmp_path, *SHORT, "--max-steps", "1")
    with pytest.raises(UsageError, match="holds a run without --folds: use --out NEW"):
        go(pictures, tmp_path, *FOLDS)


# ---- several ranks ----


@pytest.mark.ddp
@pytest.mark.soak
def test_two_ranks_train_folds_resume_and_score(pictures, tmp_path):
    """All folds by the same two processes; the table is that of one process."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    args = [*TINY, "--batch", "2", "--data", pictures, "--folds", "2", "--schedule.steps", "5"]
    command = [*two, "fastrot/train.py", *args, "--workers", "0", "--out", tmp_path / "run"]
    assert run(*command, "--max-steps", "3").count("is done after 3 steps") == 2
    assert run(*command).count("resumed at step 3") == 2
    asked = [str(tmp_path / "run"), "rotation", "--device", "cpu", "--table"]
    said = run(*two, "fastrot/evaluate.py", *asked, tmp_path / "two.npz")
    assert (said.count("all rotations"), said.count("fold 1")) == (1, 1)
    assert evaluate.main([*asked, str(tmp_path / "one.npz")]) == 0
    one, both = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for name in one.files:
        assert np.array_equal(one[name], both[name]), name
    assert (both["probabilities"].sum(axis=2) > 0.99).all()
