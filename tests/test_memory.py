"""Out of memory: one sentence with the batch that fits. Nets that have room for so many views and no more."""

import os
import re
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
from fastrot.speed.cost import random_batch
from fastrot.speed.timer import StepTimer
from fastrot.training import loop
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build

ROOT = Path(__file__).parents[1]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
CPU = torch.device("cpu")


def room_for(pictures: int, monkeypatch) -> tuple[list[int], list[bool]]:
    """A trunk that takes the four views of so many pictures. The sizes that it was asked for in training; whether the
    views of one that failed were still held when the next was asked for.
    """
    outputs, asked, held, failed = Staged.outputs, [], [], []

    def limited(self, x, names):
        if self.training:
            asked.append(len(x) // 4)
            held.append(any(views() is not None for views in failed))
            if len(x) > 4 * pictures:
                failed.append(weakref.ref(x))
                raise torch.OutOfMemoryError(str(FULL))
        return outputs(self, x, names)

    monkeypatch.setattr(Staged, "outputs", limited)
    return asked, held


def test_the_batch_that_is_told_begins_the_run_in_the_same_folder(
    pictures, tmp_path, monkeypatch, capsys
):
    asked, held = room_for(5, monkeypatch)
    assert entry.status(lambda: go(pictures, tmp_path, "--batch", "16")) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastrot: --batch 16 does not fit into the memory of this machine (")
    assert told.endswith(": --batch 4 does\n")
    assert told.count("\n") == 1
    assert asked == [16, 8, 4]
    assert not any(held)  # what the failed step held would take the room of the smaller batch
    assert not (tmp_path / "checkpoints").exists()
    assert go(pictures, tmp_path, "--batch", "4", "--max-steps", "1") == 0


@pytest.fixture(scope="module")
def loader(pictures):
    view = assemble.training_view(cfg_of(pictures))
    return assemble.open_loader(pictures, view, batch=16, enlarge=True)


def cfg_of(pictures) -> config.Config:
    return config.resolved(train.command_line([*TINY, "--data", str(pictures), "--batch", "16"]))


def state_of(cfg, loader, momentum: bool = False) -> TrainState:
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=9, steps=9, lr=0.1)
    state = build(cfg, assemble.data_info(cfg, loader, None, CPU, torch.float32), schedule)
    if momentum:
        loop.train_step(state, random_batch(loader.view, 2, CPU))
    return state


@pytest.mark.parametrize(
    ("room", "tried", "found"),
    [
        (15, [8], "--batch 16 does not fit into .*: --batch 8 does$"),
        (3, [8, 4, 2], ": --batch 2 does$"),
        (1, [8, 4, 2, 1], ": --batch 1 does$"),
        (0, [8, 4, 2, 1], r"^demo is too large for .* even with --batch 1: .*--backbone.width"),
    ],
)
def test_the_batch_that_fits_is_found_by_halving(room, tried, found, pictures, loader, monkeypatch):
    cfg = cfg_of(pictures)
    built = state_of(cfg, loader), loader.view, StepTimer(CPU)
    asked, _ = room_for(room, monkeypatch)
    told = memory.out_of_memory_error(cfg, CPU, built)
    assert isinstance(told, UsageError)
    assert re.search(found, str(told))
    assert asked == tried


def test_a_net_or_bank_that_cannot_be_built_is_told(pictures, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    error = FULL
    monkeypatch.setattr(assemble, "method", fails)
    with pytest.raises(UsageError, match=r"the network of demo is too large for"):
        go(pictures, tmp_path)
    args = ["decoupling-alexnet", *TINY[1:], "--data", str(pictures), "--out", str(tmp_path / "b")]
    with pytest.raises(
        UsageError, match=r"and its memory bank is too large for .*--method.bank-dtype bf16"
    ):
        train.main(args)
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")  # goes its way
    with pytest.raises(RuntimeError, match="mat1"):
        go(pictures, tmp_path)


def test_behind_the_first_log_line_no_batch_is_looked_for(pictures, tmp_path, monkeypatch):
    step = loop.train_step

    def full(state, batch):
        if state.step == 3:
            raise FULL
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(RunError, match=r"^step 4 did not fit .* the same command goes on"):
        go(pictures, tmp_path)


def test_a_cpus_allocator_has_its_own_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert memory.is_full(raised.value)
    assert not memory.is_full(RuntimeError("mat1"))


@pytest.mark.parametrize("momentum", [False, True])
def test_nothing_of_a_trial_stays(pictures, loader, momentum, monkeypatch):
    state = state_of(cfg_of(pictures), loader, momentum)
    state.method.net.eval()
    weights = {k: v.clone() for k, v in state.method.net.state_dict().items()}
    optimiser, random = repr(state.optimizer.state_dict()), torch.get_rng_state()
    room_for(3, monkeypatch)
    assert memory.largest(state, loader.view, 16) == 2
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
@pytest.mark.soak
@pytest.mark.parametrize("full", ["0,1", "1"])
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
        timeout=600,
    )
    assert done.returncode != 0
    who = "" if "0" in full else "rank 1: "
    assert f"fastrot: {who}--batch 4 does not fit" in done.stderr, done.stderr
    assert "--batch 2 does\n" in done.stderr
    assert done.stderr.count("fastrot: --batch") == int("0" in full)
    assert "fastrot/training/session.py" not in done.stderr
    assert "exitcode  : 2" in done.stderr  # torchrun tells each process's status
