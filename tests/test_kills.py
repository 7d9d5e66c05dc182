"""Real training processes, killed and started again: they end with the bits of a run that was never killed.

The machinery, and more kills, are in chaos.py. Here each kill is named; the moment within its phase is drawn.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import chaos
import pytest
import torch
from chaos import CHECKPOINT, KILL, START, STEPS, TERM, USR1, VALIDATION, Kill, Struck
from test_run import assert_same_bits, go
from test_run import told as lines

from fastrot import entry
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.training import checkpoint

SEED = 3
STEPS_EACH = 48
CASES = {
    "one-process-folder": (
        1,
        "folder",
        [
            Kill(CHECKPOINT, KILL, "process"),
            Kill(VALIDATION, TERM, "process"),
            Kill(STEPS, USR1, "process"),
        ],
    ),
    "one-process-beton": (
        1,
        "beton",
        [
            Kill(STEPS, KILL, "process"),
            Kill(START, KILL, "process"),
            Kill(CHECKPOINT, USR1, "process"),
        ],
    ),
    "two-ranks-folder": (
        2,
        "folder",
        [
            Kill(STEPS, KILL, "rank 1"),
            Kill(STEPS, USR1, "torchrun"),
            Kill(STEPS, KILL, "torchrun"),
            Kill(CHECKPOINT, TERM, "rank 1"),
        ],
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "form", "kills"),
    [pytest.param(*c, marks=[pytest.mark.ddp] * (c[0] > 1), id=n) for n, c in CASES.items()],
)
def test_a_killed_run_ends_with_the_same_bits(pictures, tmp_path, ranks, form, kills):
    data = pictures
    if form == "beton":
        data = tmp_path / "pictures.beton"
        convert(BetonOptions(source="imagefolder", root=pictures, out=data, workers=0))
    setting = chaos.Setting(ranks, data, tmp_path, STEPS_EACH, paused=1.0)
    seen = chaos.batter(setting, kills, random.Random(SEED), lambda _: None)
    told = f"seed {SEED}: {seen.wrong}"
    assert not seen.wrong, told
    came = Counter(each.kill for each in seen.counted())  # more than planned where one stood in
    assert not Counter(kills) - came, told
    assert came.keys() <= set(kills) | {kill._replace(phase=STEPS) for kill in kills}, told
    aimed = [(each.phase, each.kill.phase) for each in seen.counted() if each.kill.phase != START]
    assert all(hit == phase for hit, phase in aimed), told
    assert seen.leaves > 100
    left_ranks = [kill for kill in kills if (kill.signal, kill.target) == (KILL, "torchrun")]
    assert seen.refused == len(left_ranks)  # while paused they hold their folder
    for k in range(seen.runs):
        straight, run = tmp_path / "straight", tmp_path / f"struck-{k}"
        assert_same_bits(*(each / "checkpoints" / "last.pt" for each in (straight, run)))
        assert lines(straight) == lines(run), told


class Forked:
    """As subprocess.Popen, of a child of this process, which need not import anything."""

    def __init__(self, main, said: Path):
        self.pid, self.returncode = os.fork(), None
        if not self.pid:
            code = 99
            try:
                sys.stdout = sys.stderr = said.open("w", buffering=1)
                code = entry.status(main)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, code = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(code) if done else None
        return self.returncode

    def wait(self, timeout: float = chaos.PATIENCE) -> int:
        if not chaos.until(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired("", timeout)
        return self.returncode or 0


class Warm(chaos.Running):
    def begun(self, words: list[str]) -> Forked:
        def main() -> int:
            torch.set_num_threads(1)  # those of this process do not live on in a child
            sys.argv[1:] = [*words, "--threads", "1"]
            return chaos.child(str(self.notes))

        return Forked(main, self.said)


@pytest.mark.soak
def test_fifty_kills_in_and_beside_the_writing_of_checkpoints(pictures, tmp_path):
    draw = random.Random(SEED)
    ways = [(CHECKPOINT, KILL)] * 4 + [(CHECKPOINT, TERM), (CHECKPOINT, USR1), (STEPS, KILL)]
    kills = [Kill(*way, "process") for way in draw.choices(ways, k=50)]
    setting = chaos.Setting(1, pictures, tmp_path, running=Warm)
    seen = chaos.batter(setting, kills, draw, lambda _: None)
    assert not seen.wrong, f"seed {SEED}: {seen.wrong}"
    assert seen.survived == len(seen.counted()) == 50
    assert Counter(each.phase for each in seen.counted())[CHECKPOINT] >= 30


# ---- the comparison can fail ----


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("kills") / "run"
    go(pictures, run, "--schedule.steps", "4")
    return run


def test_a_run_is_no_different_from_itself(finished):
    wrong, leaves = chaos.differences(finished, finished)
    assert (wrong, leaves > 100) == ([], True)


def first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(0,) * tensor.ndim]  # a view of one number


def momentum(state) -> torch.Tensor:
    return first(state["optimizer"]["state"][0]["momentum_buffer"])


ALTERED = {
    "weight": lambda state: first(next(iter(state["net"].values()))).add_(1e-7),
    "optimiser": lambda state: momentum(state).add_(1e-9),
    "minus-zero": lambda state: momentum(state).fill_(-0.0),
    "random-state": lambda state: state["rng"][0]["cpu"].add_(1),
    "meter": lambda state: state["meter"].update(count=state["meter"]["count"] + 1),
    "order": lambda state: state.update(step=state["step"] + 1),
    "rate": lambda state: state["optimizer"]["param_groups"][0].update(lr=0.123),
    "missing": lambda state: state["progress"].pop("images"),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_leaf_that_differs_is_named(finished, tmp_path, alter):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for run in (mine, other):
        shutil.copytree(finished, run)
        state = checkpoint.load(run / "checkpoints" / "last.pt")
        momentum(state).fill_(0.0)
        if run == other:
            alter(state)
        torch.save(state, run / "checkpoints" / "last.pt")
    wrong, _ = chaos.differences(mine, other)
    assert wrong


def test_a_line_that_differs_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    file = tmp_path / "other" / "metrics.jsonl"
    told = [json.loads(line) for line in file.read_text().splitlines()]
    told[-1]["images_per_s"] = -1.0  # the clock may differ
    file.write_text("".join(json.dumps(line) + "\n" for line in told))
    assert chaos.differences(finished, tmp_path / "other")[0] == []
    told[-1]["val_loss"] += 1e-6
    file.write_text("".join(json.dumps(line) + "\n" for line in told))
    assert chaos.differences(finished, tmp_path / "other")[0] == ["metrics.jsonl"]


SAID = "resumed at step 5\nstep 6  loss 1.0\n"
STARTS = {  # what a start said, its status, how it was struck; a word of the complaint, or none
    "killed": (SAID, -9, Kill(STEPS, KILL, "process"), None),
    "begun-anew": ("step 3  loss 1.0\n", -9, Kill(STEPS, KILL, "process"), "went on at"),
    "another-step": (SAID.replace("5", "4"), -9, Kill(STEPS, KILL, "process"), "went on at"),
    "warned-and-gone": (SAID, -15, Kill(STEPS, TERM, "process"), "status -15"),
    "warned-unsaved": (SAID, 143, Kill(STEPS, TERM, "process"), "did not save"),
    "another-status": (SAID, 1, Kill(STEPS, USR1, "process"), "status 1"),
    "fell-over": (SAID, 1, None, "nobody struck"),
    "warned-at-start": ("", -15, Kill(START, TERM, "process"), None),
    "done": (SAID + "demo is done after 60 steps", 0, None, None),
    "warned-late": (SAID + "demo is done after 20 steps", 0, Kill(STEPS, TERM, "process"), None),
    "deaf": (SAID + "demo is done after 60 steps", 0, Kill(STEPS, TERM, "process"), "to its end"),
}


@pytest.mark.parametrize(("said", "status", "kill", "word"), STARTS.values(), ids=STARTS)
def test_what_a_start_did_wrong_is_told(tmp_path, said, status, kill, word):
    process = SimpleNamespace(returncode=status)
    running = SimpleNamespace(words=lambda: said, process=process, run=tmp_path, step=5)
    wrong = chaos.complaints(running, kill and Struck(kill.phase, kill, 6, True))  # type: ignore[arg-type]
    assert word in " ".join(wrong) if word else wrong == []
