"""The sbatch files with a fake cluster around them: tasks are started for real, warned, queued again, and go on."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import TINY

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "slurm").glob("*.sbatch"))
LAST_WORDS = re.compile(
    r"SIGUSR1: saved at step (\d+) of 300 to .*; the same command goes on there"
)

SRUN = '''#!{python}
"""Starts the tasks of one node, each in a session of its own; one that fails takes the others with it."""
import os, subprocess, sys, time

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for task in range(int(os.environ["SLURM_NTASKS"])):
    known = dict(SLURM_PROCID=str(task), SLURM_LOCALID=str(task), SLURM_STEP_ID="0")
    count = os.environ["SLURM_NTASKS"]
    known |= dict(SLURM_STEP_NUM_TASKS=count, SLURM_STEP_TASKS_PER_NODE=count, SLURM_NODEID="0")
    env = os.environ | known | dict(SLURM_STEP_NODELIST="localhost")
    tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
with open("{folder}/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.returncode for task in tasks) and "--kill-on-bad-exit=1" in sys.argv:
        time.sleep(2)
        for task in tasks:
            if task.poll() is None:
                task.kill()
    time.sleep(0.02)
os.remove("{folder}/tasks")
sys.exit(max(task.returncode % 256 for task in tasks))
'''
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" >> {folder}/requeued; fi
"""


class Cluster:
    """srun and scontrol, first on PATH, and what sbatch sets in the environment of a job on one node."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(
                text.replace("{python}", sys.executable).replace("{folder}", str(folder))
            )
            (folder / name).chmod(0o755)
        self.job = free_job()

    def sbatch(self, file: str, *words: object, tasks: int, **variables: str) -> subprocess.Popen:
        job = {
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NAME": "pretrain",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_SUBMIT_DIR": ROOT,
            "SLURM_NTASKS": tasks,
            "SLURM_NNODES": 1,
            "SLURM_CPUS_PER_TASK": 1,
            "SLURM_GPUS_ON_NODE": 2,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RUN": self.run,
            "OMP_NUM_THREADS": 1,
            "CUDA_VISIBLE_DEVICES": "",
        }
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "RANK"))
        }
        return subprocess.Popen(
            ["bash", str(ROOT / "benchmarks" / "slurm" / file), *map(str, words)],
            cwd=self.folder,
            env=kept | {k: str(v) for k, v in (job | variables).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def warn(self) -> None:
        """What --signal=USR1@120 does: all processes of the step get it, the batch script does not."""
        for task in (self.folder / "tasks").read_text().split():
            os.killpg(int(task), signal.SIGUSR1)

    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().splitlines() if file.exists() else []

    def until_logged(self, job: subprocess.Popen) -> None:
        """Wait for the run's first log line of a step."""
        metrics, end = self.run / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and '"loss"' in metrics.read_text()):
            assert time.monotonic() < end
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    if (tmp_path / "tasks").exists():  # a test that failed half-way
        for task in (tmp_path / "tasks").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(task), signal.SIGKILL)


def free_job() -> int:
    """A job number whose port (20000 + job % 20000) is free."""
    while True:
        job = random.randrange(1_000_000)
        with socket.socket() as tried:
            try:
                tried.bind(("localhost", 20000 + job % 20000))
            except OSError:
                continue
            return job


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_files_are_bash_and_say_what_a_cluster_needs(file):
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = file.read_text()
    for line in ("--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert "srun --kill-on-bad-exit=1" in text
    assert "$(date" not in text


def test_there_are_files_for_pretraining_and_probes():
    assert {file.name for file in FILES} >= {"pretrain.sbatch", "probe.sbatch"}


@pytest.mark.ddp
@pytest.mark.soak
@pytest.mark.parametrize("file", ["pretrain.sbatch", "pretrain_torchrun.sbatch"])
def test_a_warned_job_saves_is_queued_again_and_goes_on(cluster, file):
    tasks = 2 if file == "pretrain.sbatch" else 1  # torchrun starts the two
    words = [*TINY, "--batch", "2", "--schedule.steps", "300", "--data", "synthetic:400"]
    job = cluster.sbatch(file, *words, tasks=tasks)
    cluster.until_logged(job)
    cluster.warn()
    told, _ = job.communicate(timeout=600)
    assert job.returncode == (138 if tasks == 2 else 1), told
    assert cluster.requeued() == [f"requeue {cluster.job}"], told
    said = LAST_WORDS.fullmatch((cluster.run / "log.txt").read_text().splitlines()[-1])
    assert said, told

    job = cluster.sbatch(file, *words, tasks=tasks)
    told, _ = job.communicate(timeout=600)
    assert job.returncode == 0, told
    assert f"resumed at step {said[1]}" in told
    assert "is done after 300 steps" in told
    assert len(cluster.requeued()) == 1


@pytest.mark.parametrize(
    ("file", "status"),
    [
        ("pretrain.sbatch", 2),
        pytest.param("pretrain_torchrun.sbatch", 1, marks=[pytest.mark.ddp, pytest.mark.soak]),
    ],
)
def test_a_job_that_fails_is_not_queued_again(cluster, file, status):
    """Also where the start before it was warned, and this one fails before it says a word."""
    cluster.run.mkdir()
    old = "SIGUSR1: saved at step 7 of 300 to runs/x; the same command goes on there\n"
    (cluster.run / "log.txt").write_text(old)
    job = cluster.sbatch(file, *TINY, "--data", "no/such/place", tasks=1)
    told, _ = job.communicate(timeout=300)
    assert job.returncode == status, told
    assert "--data no/such/place does not exist" in told
    assert not cluster.requeued()


@pytest.mark.soak
def test_a_probe_begins_with_the_trunk(cluster, tmp_path):
    words = ["--data", "synthetic:40", *TINY[1:], "--image-size", "64", "--schedule.steps", "1"]
    job = cluster.sbatch("probe.sbatch", *words, tasks=1, TRUNK="no/such/run")
    told, _ = job.communicate(timeout=300)
    assert job.returncode == 2
    assert "--start-from: there is no checkpoint no/such/run" in told
    for variables in ({}, {"TRUNK": str(cluster.run), "RUN": str(tmp_path / "tuned")}):
        job = cluster.sbatch("probe.sbatch", *words, tasks=1, **variables)
        told, _ = job.communicate(timeout=300)
        assert job.returncode == 0, told
    summary = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert (summary["preset"], summary["steps"]) == ("supervised-alexnet", 1)
