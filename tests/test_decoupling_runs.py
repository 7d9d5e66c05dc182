"""Whole runs of decoupling: the bank in the checkpoint, resuming to the bit, ranks that share the bank out."""

import json

import pytest
import torch
from test_end_to_end import TWO, run
from test_run import TINY, assert_same_bits, told

from fastrot import checkpoint, train
from fastrot.config import Refused, Stopped

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
    epochs = checkpoint.load(tmp_path / "measured" / "checkpoints" / "last.pt")["facts"]["epochs"]
    go(pictures, tmp_path / "told", "--epochs", str(epochs), "--max-steps", "3")
    a, b = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")
        for name in ("measured", "told")
    )
    assert torch.equal(a["method"]["bank.rows"], b["method"]["bank.rows"])
    assert torch.equal(a["method"]["mean_exp"], b["method"]["mean_exp"])


def test_features_that_are_not_finite_stop_the_run_at_once(pictures, tmp_path):
    with pytest.raises(Stopped, match="finite"):
        go(pictures, tmp_path, "--lr", "1e30")


def test_another_dim_is_refused_by_name(straight, pictures):
    with pytest.raises(Refused, match=r"--method.dim was 16, now 8"):
        go(pictures, straight, "--method.dim", "8")


@pytest.mark.ddp
@pytest.mark.slow
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
