"""Rank and world out of the environment that each launcher sets."""

import contextlib
import os
import signal
import socket
from contextlib import nullcontext

import pytest
import torch
from forked import forked

from fastrot import dist, entry
from fastrot.config import UsageError
from fastrot.core import Losses
from fastrot.data.prepare.ranks import joined_ranks
from fastrot.dist import Place
from fastrot.training.journal import Meter

JOB = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
SRUN = JOB | {
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
UNEVEN = {"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NODEID": "3"}
UNEVEN |= {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
SHELL = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LAUNCHERS = {
    "none": ({}, Place()),
    "torchrun": (TORCHRUN, Place(rank=3, world=4, local=1, local_world=2)),
    "srun": (SRUN, Place(rank=5, world=8, local=1, local_world=4)),
    "torchrun-inside-srun": (SRUN | TORCHRUN, Place(rank=3, world=4, local=1, local_world=2)),
    "srun-uneven": (SRUN | UNEVEN, Place(rank=6, world=7, local=0, local_world=1)),
    "srun-and-exported-world": (SRUN | {"WORLD_SIZE": "8"}, Place(5, 8, 1, 4)),
    "sbatch-alone": (JOB | {"SLURM_PROCID": "0"}, Place()),
    "salloc": (JOB, Place()),
    "shell-in-a-step": (SRUN | SHELL, Place()),
    "world-of-one": ({"WORLD_SIZE": "1"}, Place()),
}
REFUSED = {
    "RANK=": "set RANK and WORLD_SIZE both, or neither: unset RANK, WORLD_SIZE and SLURM_STEP_ID to",
    "RANK=0": "set RANK and WORLD_SIZE both, or neither",
    "WORLD_SIZE=4": "set RANK and WORLD_SIZE both, or neither",
    "RANK= WORLD_SIZE=2": "RANK= should be a whole number",
    "RANK=1 WORLD_SIZE=two": "WORLD_SIZE=two should be a whole number",
    "RANK=-1 WORLD_SIZE=2": "RANK=-1 should be a whole number",
    "RANK=2 WORLD_SIZE=2": "rank 2 of 2: ranks count from 0",
    "RANK=0 WORLD_SIZE=2": "2 processes, but MASTER_ADDR is not set",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=": "2 processes, but MASTER_ADDR is not set",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost": "2 processes, but MASTER_PORT is not set",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x": "MASTER_PORT=x should be",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=70000": "MASTER_PORT=70000 is no port",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=no.invalid MASTER_PORT=2000": "MASTER_ADDR=no.invalid is not",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without a launcher; what a test sets is gone behind it."""
    for name in {*SRUN, *TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST"}:
        monkeypatch.setenv(name, "")  # so that it is put back even where a test sets it itself
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("variables", "place"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_place_is_what_the_launcher_says(variables, place, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert dist.place() == place
    assert entry.rank() == place.rank


@pytest.mark.parametrize("variables", [SRUN, SRUN | TORCHRUN])
def test_the_way_out_that_is_named_is_one(variables, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    way_out, _ = entry.ALONE.split(" to run alone")
    for name in way_out.removeprefix("unset ").replace(" and", ",").split(", "):
        environment.delenv(name, raising=False)
    assert entry.place() == Place()


@pytest.mark.parametrize(("rank", "tries"), [(0, 1), (1, 3)])
def test_others_wait_for_the_name_of_rank_0s_machine(rank, tries, environment):
    """On Kubernetes it is known once its pod is up."""
    asked = []

    def lookup(name, port):
        asked.append(name)
        if len(asked) < 3:
            raise socket.gaierror("Name or service not known")

    environment.setattr(dist.socket, "getaddrinfo", lookup)
    environment.setattr(dist.time, "sleep", lambda _: None)
    environment.setenv("MASTER_ADDR", "job-0.job")
    environment.setenv("MASTER_PORT", "2000")
    with pytest.raises(UsageError, match="not known here") if rank == 0 else nullcontext():
        assert dist._meeting_place(Place(rank, 2)) == "job-0.job:2000"
    assert len(asked) == tries


@pytest.mark.parametrize(("variables", "told"), REFUSED.items(), ids=REFUSED)
def test_variables_that_make_no_sense_are_refused_in_a_sentence(
    variables, told, environment, capsys
):
    for name, value in (each.split("=") for each in variables.split()):
        environment.setenv(name, value)
    environment.setattr(entry.time, "sleep", lambda _: None)
    assert entry.status(lambda: dist.start(dist.place(), torch.device("cpu"))) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1

    def join():
        with joined_ranks():
            pass

    assert entry.status(join) == 2  # a conversion says the same
    assert capsys.readouterr().err == said


def test_a_port_that_is_taken_is_named(environment):
    with socket.create_server(("localhost", 0)) as taken:
        environment.setenv("MASTER_ADDR", "localhost")
        environment.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        environment.setattr(entry, "met_others", False)
        with pytest.raises(UsageError, match=r"localhost:\d+ is taken: choose another port"):
            dist.start(Place(rank=0, world=2), torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_ranks_that_never_come_says_so_and_ends_by_a_signal(
    number, rank, environment, tmp_path
):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
        environment.setenv(name, str(value))
    environment.setenv("MASTER_ADDR", "localhost")
    environment.setattr(dist, "HINT", 0.1)

    def join():
        with contextlib.closing(entry.PreemptionSignal()), dist.joined(torch.device("cpu")):
            pass

    for last in (False, True):  # another may take the port that was free
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        environment.setenv("MASTER_PORT", str(port))
        with forked(join, tmp_path / f"said{last}") as child:
            child.until(f"localhost:{port}")
            if "is taken" in child.said() and not last:
                continue
            assert f"rank {rank} of 2 waits for the others at localhost:{port}: un" in child.said()
            os.kill(child.pid, number)
            assert child.status() == 128 + number
        break
    if number == signal.SIGTERM:
        assert "SIGTERM while waiting for other processes: ended before the fi" in child.said()


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
    assert meter.take()() == {"loss": 3.0}


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
