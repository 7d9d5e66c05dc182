"""Whole runs of decoupling: the bank in the checkpoint, resuming to the bit, ranks that share the bank out."""

import json
import re

import numpy as np
import pytest
import torch
from test_end_to_end import TWO, run
from test_run import TINY, assert_same_bits, told

from fastrot import assemble, train
from fastrot.config import RunError, UsageError
from fastrot.methods import rotation_table
from fastrot.methods.decoupling import Decoupling
from fastrot.training import checkpoint, journal, loop

pytestmark = pytest.mark.usefixtures("quick_runs")
TASK = ["decoupling-alexnet", *TINY[1:], "--backbone.kernel", "5", "--backbone.stride", "2"]
TASK += ["--method.dim", "16", "--method.negatives", "60", "--method.z", "ema"]


def go(pictures, out, *more: str) -> int:
    return train.main([*TASK, "--data", str(pictures), "--out", str(out), *more])


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """A run of 20 steps, never broken off: two and a half epochs."""
    out = tmp_path_factory.mktemp("decoupling") / "straight"
    assert go(pictures, out) == 0
    return out


def test_a_run_tells_what_the_original_prints(straight):
    logged = [line for line in told(straight) if "loss" in line]
    judged = [line for line in told(straight) if "val_loss" in line]
    assert logged
    assert judged
    for line in logged:
        assert {"loss", "prec_cls", "loss_cls", "loss_mse", "loss_nce"} <= set(line)
        terms = sum(line[f"loss_{name}"] for name in ("cls", "mse", "nce"))
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
    for line in judged:
        assert {"val_prec_rot", "val_prec_inv", "val_loss_rot", "val_loss_inv"} <= set(line)
        assert line["val_accuracy"] == line["val_prec_rot"]
    summary = json.loads((straight / "summary.json").read_text())
    assert "memory bank: 35 x 16 float32" in summary["method"][0]
    assert set(summary["val"]) >= {"prec_rot", "prec_inv"}
    text = (straight / "log.txt").read_text()
    assert "loss_nce" in text
    assert "prec_inv" in text


def test_the_bank_is_in_the_checkpoint_and_was_written(straight):
    state = checkpoint.load(straight / "checkpoints" / "last.pt")["method"]
    assert set(state) == {"bank.rows", "bank.fingerprint", "mean_exp"}
    lengths = state["bank.rows"].norm(dim=1)
    assert torch.allclose(lengths, torch.ones(35), atol=1e-6)  # each was seen twice: unit by now


@pytest.mark.parametrize("stop", [1, 7], ids=lambda n: f"after-{n}")
def test_a_run_broken_off_goes_on_to_the_same_bits(straight, pictures, tmp_path, stop, capsys):
    go(pictures, tmp_path, "--max-steps", str(stop))
    capsys.readouterr()
    go(pictures, tmp_path)
    assert f"resumed at step {stop}" in capsys.readouterr().out
    assert told(straight) == told(tmp_path)
    assert_same_bits(straight / "checkpoints" / "last.pt", tmp_path / "checkpoints" / "last.pt")


def test_a_bank_in_bfloat16_with_infonce_resumes_too(pictures, tmp_path):
    more = ["--method.bank-dtype", "bf16", "--method.contrast", "infonce", "--max-steps", "9"]
    more = ["--method.exclude-self", "--method.proximal", ".1", *more]
    go(pictures, tmp_path / "straight", *more)
    go(pictures, tmp_path / "broken", *more[:-1], "4")
    go(pictures, tmp_path / "broken", *more)
    both = [tmp_path / name / "checkpoints" / "last.pt" for name in ("straight", "broken")]
    assert_same_bits(*both)
    assert checkpoint.load(both[0])["method"]["bank.rows"].dtype == torch.bfloat16


def test_a_measured_budget_leaves_the_bank_as_it_was(pictures, tmp_path):
    """--budget takes steps to measure; the run begins as if it had not."""
    budget = ["--budget", "1s", "--max-steps", "3"]
    go(pictures, tmp_path / "measured", *budget)
    epochs = checkpoint.load(tmp_path / "measured" / "checkpoints" / "last.pt")["run_identity"][
        "epochs"
    ]
    go(pictures, tmp_path / "told", "--epochs", str(epochs), "--max-steps", "3")
    a, b = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")
        for name in ("measured", "told")
    )
    assert torch.equal(a["method"]["bank.rows"], b["method"]["bank.rows"])
    assert torch.equal(a["method"]["mean_exp"], b["method"]["mean_exp"])


def test_features_that_are_not_finite_stop_the_run_at_once(pictures, tmp_path):
    with pytest.raises(RunError, match=r"not finite at step \d+; there is no checkpoint yet"):
        go(pictures, tmp_path, "--lr", "1e30")


def test_another_dim_is_refused_by_name(straight, pictures):
    with pytest.raises(UsageError, match=r"--method.dim was 16, now 8"):
        go(pictures, straight, "--method.dim", "8")


def test_what_a_method_keeps_is_saved_only_where_it_is_finite(pictures, tmp_path, monkeypatch):
    """A row that no loss has met yet."""
    kept = Decoupling.state_dict

    def poisoned(self):
        state = kept(self)
        return state | {"bank.rows": state["bank.rows"].index_fill(0, torch.tensor([3]), torch.nan)}

    monkeypatch.setattr(Decoupling, "state_dict", poisoned)
    with pytest.raises(RunError, match="not finite at step 4; there is no checkpoint yet"):
        go(pictures, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_rotation_loss_the_best_has_the_lowest_loss(pictures, tmp_path, capsys):
    go(pictures, tmp_path, "--method.lambda-cls", "0", "--keep-best")
    judged = [line for line in told(tmp_path) if "val_loss" in line and line["step"]]
    best = min(judged, key=lambda line: line["val_loss"])
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["step"] == best["step"]
    said = capsys.readouterr().out
    assert f"validation loss {judged[-1]['val_loss']:.4f}\n" in said
    assert re.search(r"^ *loss on held-out pictures +\d", said, re.M)
    assert loop._merit({"accuracy": 0.2, "loss": 9.0}) == 0.2


def test_pu_weights_are_told_of(pictures, tmp_path, capsys):
    """With the epoch of this run that they begin at."""
    data = assemble.open_data(pictures)
    table = np.full((data.rows, 4, 4), 0.25, np.float32)
    rotations = rotation_table.RotationTable(
        table, np.full(data.rows, -1, np.int8), data.fingerprint
    )
    rotation_table.write(tmp_path / "t.npz", rotations)
    more = ["--method.pu-table", str(tmp_path / "t.npz"), "--method.pu-from", "100"]
    go(pictures, tmp_path / "run", *more, "--max-steps", "1")
    assert f"PU weights from epoch 2 on, of {tmp_path / 't.npz'}" in capsys.readouterr().out


def test_terms_are_shown_where_there_are_several():
    line = {
        "step": 3,
        "loss": 3.0,
        "accuracy": 0.5,
        "loss_cls": 1.0,
        "loss_nce": 2.0,
        "prec_cls": 0.5,
        "z": 9,
    }
    shown = "loss 3.0000  loss_cls 1.0000  loss_nce 2.0000  prec_cls 50.0%"
    assert journal._describe(line) == shown
    alone = {"step": 3, "loss": 3.0, "accuracy": 0.5, "loss_cls": 3.0}
    assert journal._describe(alone) == "loss 3.0000  accuracy 50.0%"
    judged = {"loss": 7.0, "val_loss": 1.0, "val_prec_inv": 0.25, "val_loss_inv": 1.4}
    assert journal._describe(judged, "val_") == "loss 1.0000  prec_inv 25.0%  loss_inv 1.4000"


def test_a_validation_without_accuracy_comes_again_too(tmp_path):
    """One that was told behind the checkpoint it belongs to."""
    lines = [{"step": 4, "loss": 1.0}, {"step": 4, "val_loss": 1.0}]
    path = tmp_path / "metrics.jsonl"
    for judged, kept in ((0, 1), (4, 2)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        journal._cut_back(path, 4, judged).close()
        assert journal.read_lines(path) == lines[:kept]


@pytest.mark.ddp
@pytest.mark.soak
@pytest.mark.parametrize("bank", ["replicated", "sharded"])
def test_two_ranks_resume_to_the_same_bits(pictures, tmp_path, bank):
    """And a run of two ranks goes on with one, which takes over all rows."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    task = [*TASK, "--data", pictures, "--method.bank", bank]
    two = [*TWO, "fastrot/train.py", *task, "--batch", "2"]
    done = run(*two, "--out", straight, "--max-steps", "12")
    assert done.returncode == 0, done.stderr
    alone = "35 rows over 2 ranks; rank 0 holds 18 x 16 float32"
    assert (alone in done.stdout) == (bank == "sharded")
    assert run(*two, "--out", broken, "--max-steps", "7").returncode == 0
    done = run(*two, "--out", broken, "--max-steps", "12")
    assert "resumed at step 7" in done.stdout, done.stderr
    last = [out / "checkpoints" / "last.pt" for out in (straight, broken)]
    assert_same_bits(*last)
    assert told(straight) == told(broken)
    state = checkpoint.load(last[0])["method"]
    assert state["bank.rows"].shape == (35, 16)
    assert len(state["mean_exp"]) == 2
    assert (state["mean_exp"][0] == state["mean_exp"][1]) == (bank == "replicated")
    one = train.main([str(w) for w in [*task, "--out", straight, "--max-steps", "14"]])
    assert one == 0
    assert "resumed at step 12" in (straight / "log.txt").read_text()
    after = checkpoint.load(last[0])["method"]["bank.rows"]
    seen = (after != state["bank.rows"]).any(dim=1).sum().item()
    assert seen == 8  # two steps of four: all other rows are those that two ranks left
