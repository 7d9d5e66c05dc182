"""Rank and world out of the environment that each launcher sets."""

import pytest
import torch

from fastrot import dist, entry
from fastrot.core import Losses
from fastrot.dist import Place
from fastrot.training.journal import Meter

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LAUNCHERS = {
    "none": ({}, Place()),
    "torchrun": (TORCHRUN, Place(rank=3, world=4, local=1, local_world=2)),
    "srun": (SRUN, Place(rank=5, world=8, local=1, local_world=4)),
    "torchrun-inside-srun": (SRUN | TORCHRUN, Place(rank=3, world=4, local=1, local_world=2)),
    "sbatch-alone": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place()),
}


@pytest.mark.parametrize(("variables", "place"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_place_is_what_the_launcher_says(variables, place, monkeypatch):
    for name in {*SRUN, *TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist.place() == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("node3", "node3"), ("a,b", "a"), ("n-1-[3,5]", "n-1-3")],
)
def test_the_first_node_leads(nodes, first):
    assert dist._first_node(nodes) == first


def test_one_process_needs_no_group():
    dist.start(Place(), torch.device("cpu"))
    assert (dist.rank(), dist.world()) == (0, 1)
    rows = torch.arange(6).reshape(3, 2)
    assert torch.equal(dist.gather_rows(rows), rows)
    assert torch.equal(dist.sum_over_ranks(rows), rows)
    dist.barrier()
    dist.stop()


def test_a_logged_mean_is_over_all_ranks(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "sum_over_ranks", lambda mine: mine + torch.tensor([8.0]))
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add(Losses({}, {}, torch.tensor([value])))
    assert meter.read() == {"loss": 3.0}


@pytest.mark.parametrize(
    ("launcher", "seen", "share"),
    [("torchrun", 8, 2), ("torchrun", 16, 4), ("srun", 8, 8), ("srun", 16, 4)],
)
def test_ranks_share_the_cores_unless_each_has_its_own(monkeypatch, launcher, seen, share):
    """Four processes on a machine of 16 cores, which see 8 or all of them."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(entry, "cores", lambda: seen)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert entry.share_of_cores(4) == share
