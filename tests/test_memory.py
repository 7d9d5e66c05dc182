"""Out of memory: one sentence with the batch that fits. Nets that have room for so many views and no more."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from test_run import TINY, go

from fastrot import assemble, config, entry, train
from fastrot.backbones.staged import Staged
from fastrot.config import RunError, UsageError
from fastrot.speed import memory
from fastrot.training import loop
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState

ROOT = Path(__file__).parents[1]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
CPU = torch.device("cpu")


def room_for(pictures: int, monkeypatch) -> list[int]:
    """A trunk that takes the four views of so many pictures; the sizes that it was asked for in training."""
    outputs, asked = Staged.outputs, []

    def limited(self, x, names):
        if self.training:
            asked.append(len(x) // 4)
            if len(x) > 4 * pictures:
                raise torch.OutOfMemoryError(str(FULL))
        return outputs(self, x, names)

    monkeypatch.setattr(Staged, "outputs", limited)
    return asked


@pytest.mark.parametrize(
    ("room", "tried", "found"),
    [(15, [8], 8), (7, [8, 4], 4), (3, [8, 4, 2], 2), (1, [8, 4, 2, 1], 1)],
)
def test_the_batch_that_fits_is_found_by_halving(
    room, tried, found, pictures, tmp_path, monkeypatch, capsys
):
    asked = room_for(room, monkeypatch)
    status = entry.status(lambda: go(pictures, tmp_path, "--batch", "16"))
    assert status == 2
    told = capsys.readouterr().err
    assert told.startswith("fastrot: --batch 16 does not fit into the memory of this machine (")
    assert told.endswith(f": --batch {found} does\n")
    assert told.count("\n") == 1
    assert asked == [16, *tried]
    assert not (tmp_path / "checkpoints").exists()


def test_the_told_batch_begins_the_run_in_the_same_folder(pictures, tmp_path, monkeypatch):
    room_for(5, monkeypatch)
    with pytest.raises(UsageError, match=r"--batch 8 does not fit .*: --batch 4 does$"):
        go(pictures, tmp_path, "--batch", "8")
    assert go(pictures, tmp_path, "--batch", "4", "--max-steps", "2") == 0


def test_a_net_without_room_for_one_picture_is_told(pictures, tmp_path, monkeypatch):
    room_for(0, monkeypatch)
    with pytest.raises(
        UsageError, match=r"demo is too large for .* even with --batch 1: .*--backbone.width"
    ):
        go(pictures, tmp_path)


def test_a_net_or_bank_that_cannot_be_built_is_told(pictures, tmp_path, monkeypatch):
    def too_large(*_):
        raise FULL

    monkeypatch.setattr(assemble, "method", too_large)
    with pytest.raises(UsageError, match=r"the network of demo is too large for"):
        go(pictures, tmp_path)
    args = ["decoupling-alexnet", *TINY[1:], "--data", str(pictures), "--out", str(tmp_path / "b")]
    with pytest.raises(
        UsageError, match=r"and its memory bank is too large for .*--method.bank-dtype bf16"
    ):
        train.main(args)


@pytest.mark.parametrize(("at", "kind"), [(2, UsageError), (3, RunError), (11, RunError)])
def test_a_batch_is_looked_for_before_the_first_log_line_alone(
    at, kind, pictures, tmp_path, monkeypatch
):
    step = loop.train_step

    def full(state, batch):
        if state.step == at:
            raise FULL
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(kind) as told:
        go(pictures, tmp_path)
    if kind is RunError:
        assert f"step {at + 1} did not fit" in str(told.value)
        assert "the same command goes on" in str(told.value)
    else:
        assert str(told.value).endswith("--batch 2 does")


def test_the_failed_step_is_let_go_before_the_trial(pictures, tmp_path, monkeypatch):
    """Else its activations would take the room of the smaller batch."""
    outputs, held, alive = Staged.outputs, [], []

    def limited(self, x, names):
        if self.training:
            alive.append([ref() is not None for ref in held])
            held.append(weakref.ref(x))
            if len(x) > 4:
                raise torch.OutOfMemoryError(str(FULL))
        return outputs(self, x, names)

    monkeypatch.setattr(Staged, "outputs", limited)
    with pytest.raises(UsageError, match="--batch 1 does"):
        go(pictures, tmp_path)
    assert alive == [[], [False], [False, False]]


def test_another_error_goes_its_way(pictures, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "train_step", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        go(pictures, tmp_path)


def test_a_cpus_allocator_has_its_own_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert memory.is_full(raised.value)
    assert not memory.is_full(RuntimeError("mat1"))


def state_of(pictures, momentum: bool) -> tuple[TrainState, config.Config, assemble.Loader]:
    cfg = config.resolved(train.command_line([*TINY, "--data", str(pictures), "--batch", "8"]))
    loader = assemble.open_loader(pictures, assemble.training_view(cfg), batch=8, enlarge=True)
    torch.manual_seed(0)
    method = assemble.method(cfg, assemble.data_info(cfg, loader, None, CPU, torch.float32))
    state = TrainState(
        method=method,
        net=method.net,
        optimizer=sgd(method.net, cfg.optim, 0.0),
        schedule=LRSchedule(cfg.schedule, epochs=1, batches=9, steps=9, lr=0.1),
        device=CPU,
        dtype=torch.float32,
    )
    if momentum:
        loop.train_step(state, next(loader.epoch(0)))
    return state, cfg, loader


@pytest.mark.parametrize("momentum", [False, True])
def test_nothing_of_a_trial_stays(pictures, momentum, monkeypatch):
    state, cfg, loader = state_of(pictures, momentum)
    state.method.net.eval()
    weights = {k: v.clone() for k, v in state.method.net.state_dict().items()}
    optimiser, random = repr(state.optimizer.state_dict()), torch.get_rng_state()
    room_for(3, monkeypatch)
    assert memory.largest(state, loader.view, cfg.batch) == 2
    assert all(torch.equal(v, weights[k]) for k, v in state.method.net.state_dict().items())
    assert repr(state.optimizer.state_dict()) == optimiser
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in state.method.net.parameters())
    assert not state.method.net.training


SCRIPT = """
import sys, torch
sys.path[:0] = ["tests", "."]
from fastrot import entry, train
from fastrot.backbones.staged import Staged

rank, full = entry.rank(), [int(r) for r in sys.argv[1].split(",")]
outputs = Staged.outputs

class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if rank in full and len(g) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return g

def limited(self, x, names):
    if not self.training:
        return outputs(self, x, names)
    first = self.get_submodule(self.stages[0])(x)  # its gradient comes last: others are under way by then
    rest, self.stages = self.stages, self.stages[1:]
    try:
        return outputs(self, Late.apply(first), names)
    finally:
        self.stages = rest

Staged.outputs = limited
if __name__ == "__main__":  # and not where the loader's workers import it
    sys.exit(entry.status(lambda: train.main(sys.argv[2:])))
"""


@pytest.mark.ddp
@pytest.mark.parametrize("full", ["0,1", "1"], ids=["all-ranks", "rank-1"])
def test_ranks_look_each_for_itself_in_the_middle_of_a_backward_pass(pictures, tmp_path, full):
    script = tmp_path / "full.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", script, full, *TINY, "--data", pictures, "--out", tmp_path / "run"]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    who = "" if "0" in full else "rank 1: "
    assert f"fastrot: {who}--batch 4 does not fit" in done.stderr, done.stderr
    assert "--batch 2 does\n" in done.stderr
    assert done.stderr.count("fastrot: --batch") == int("0" in full)
    assert "fastrot/training/session.py" not in done.stderr
    assert "exitcode  : 2" in done.stderr  # torchrun tells each process's status
