"""Real commands in processes of their own: torchrun, two gloo ranks, a kill, exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import TINY, assert_same_bits, told

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


@pytest.mark.ddp
def test_two_ranks_give_the_losses_of_one_process(pictures, tmp_path):
    """Of each method, with the same global batch; BatchNorm in eval mode in both (see rank_losses.py)."""
    script = ROOT / "tests" / "rank_losses.py"
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = run(sys.executable, script, pictures, one)
    assert done.returncode == 0, done.stderr
    done = run(*TWO, script, pictures, two)
    assert done.returncode == 0, done.stderr
    found, ranks = json.loads(one.read_text()), json.loads(two.read_text())
    assert list(found) == ["rotnet", "decoupling", "pirl"]
    for method, mine in found.items():
        assert_the_same(mine, ranks[method])


def assert_the_same(mine: dict, others: dict) -> None:
    assert mine["seen"] == others["seen"]
    assert mine.get("negatives") == others.get("negatives")  # drawn by picture and step
    for name in mine.keys() & {"bank", "z"}:
        assert mine[name] == pytest.approx(others[name], rel=1e-10, abs=1e-13)
    assert mine["losses"] == pytest.approx(others["losses"], rel=1e-12)
    assert mine["weights"] == pytest.approx(others["weights"], rel=1e-10, abs=1e-13)


@pytest.mark.ddp
@pytest.mark.soak
@pytest.mark.parametrize("world", [3])
def test_gradients_sent_in_bf16_are_the_mean_to_its_rounding(tmp_path, world):
    """Each rank's own is rounded once, and each sum once more: to 8 bits, so by 1 part in 256 at most."""
    script, out = ROOT / "tests" / "rank_gradients.py", tmp_path / "gradients.pt"
    several = [*TORCHRUN, "--standalone", "--nproc-per-node", str(world)]
    done = run(*several, script, out)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    mean, size = found["own"].mean(dim=0), found["own"].abs().mean(dim=0)
    assert torch.equal(found["other_fp32"], found["fp32"])  # both ranks have the same
    assert torch.equal(found["other_bf16"], found["bf16"])
    torch.testing.assert_close(found["fp32"], mean, rtol=1e-6, atol=1e-9)
    assert torch.equal(found["bf16"].bfloat16().float(), found["bf16"])
    assert (mean.bfloat16().float() != mean).any()  # or it would show nothing
    off = (found["bf16"] - mean).abs()
    assert (off <= size * (1 + world) / 256 + 1e-30).all()


@pytest.mark.ddp
@pytest.mark.soak
def test_three_ranks_train_and_resume_to_the_same_bits(pictures, tmp_path):
    """Broken off between log lines. With three ranks the order of a sum shows in its last bits."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    three = [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]
    command = [*three, "fastrot/train.py", *TINY, "--batch", "2", "--data", pictures]
    done = run(*command, "--out", straight, "--max-steps", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is done after 12 steps") == 1  # rank 0 speaks for all
    assert run(*command, "--out", broken, "--max-steps", "7").returncode == 0
    done = run(*command, "--out", broken, "--max-steps", "12")
    assert "resumed at step 7" in done.stdout, done.stderr
    assert_same_bits(straight / "checkpoints" / "last.pt", broken / "checkpoints" / "last.pt")
    assert told(straight) == told(broken)


@pytest.mark.ddp
def test_wrong_use_is_said_once_under_torchrun(tmp_path):
    done = run(*TWO, "fastrot/train.py", *TINY, "--data", "no/such/place")
    assert done.returncode != 0
    assert done.stderr.count("--data no/such/place does not exist") == 1


def test_statuses_of_the_command(tmp_path):
    """0 for help, 2 and one sentence without a traceback for wrong use, from any folder."""
    script = str(ROOT / "fastrot" / "train.py")
    wrong = subprocess.run(
        [sys.executable, script, "demo", "--data", "x.beton"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "Traceback" not in wrong.stderr
    helped = run(sys.executable, "-m", "fastrot", "train", "demo", "--help")
    assert helped.returncode == 0
    assert "--max-steps" in helped.stdout
