"""Checkpoints that are written beside training: what is written, when, who waits for it, and what is told."""

import contextlib
import errno
import itertools
import json
import math
import signal
import threading
import time
from types import SimpleNamespace

import chaos
import pytest
import torch
from test_faults import last, warn
from test_run import TINY, go, leaves

from fastrot import config, dist, entry, ranges, train
from fastrot.config import RunError, UsageError
from fastrot.entry import Preempted
from fastrot.presets import PRESETS
from fastrot.training import checkpoint, journal, loop
from fastrot.training.writer import Writer

pytestmark = pytest.mark.usefixtures("quick_runs")
DATA = "synthetic:40"  # ten steps an epoch
ALONE = ("--hold-out", "0", "--workers", "0")


class Files:
    """Stands in for checkpoint.save: notes each file, and may be held up or fail."""

    def __init__(self, monkeypatch, *, at=None, before=lambda: None):
        self.at, self.before, self.save = at, before, checkpoint.save
        self.written, self.writing, self.most = [], 0, 0
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, path, state):
        self.writing += 1
        self.most = max(self.most, self.writing)
        if self.at in (None, state["step"]):
            self.before()
        self.save(path, state)
        self.written.append((path.name, state["step"]))
        self.writing -= 1


def before_step(monkeypatch, act) -> None:
    """Call `act` with the number of steps done, before each step."""
    step = loop.train_step

    def acting(state, batch):
        act(state.step)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", acting)


# ---- when ----


def test_the_clock_says_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    now, files = [0.0], Files(monkeypatch)
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    before_step(monkeypatch, lambda done: now.__setitem__(0, 60.0 * (done + 1)))
    go(DATA, tmp_path, *ALONE, "--checkpoint-every", "4min", "--keep-every", "9")
    want = [("last.pt", 4), ("last.pt", 8), ("step_9.pt", 9), ("last.pt", 9), ("last.pt", 10)]
    want += [("last.pt", 14), ("step_18.pt", 18), ("last.pt", 18), ("last.pt", 20)]
    assert files.written == want
    now[0] = 0
    files.written.clear()
    go(DATA, tmp_path / "b", *ALONE, "--checkpoint-every", "10min")
    assert files.written == [("last.pt", 10), ("last.pt", 20)]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_agree_on_rank_0s_clock_where_they_ask_each_other_anyway(monkeypatch, rank):
    """As often as without a clock, and a warning is heard beside it."""
    monkeypatch.setattr(dist, "rank", lambda: rank)
    others, asked = [], []

    def highest(number):
        asked.append(number)
        return max(number, *others)

    monkeypatch.setattr(dist, "highest", highest)
    fit = object.__new__(loop._Fit)
    fit.seconds, fit.saved_at, fit.alive = 60.0, time.monotonic() - 61, lambda: None
    fit.state = SimpleNamespace(step=0, schedule=SimpleNamespace(steps=9), progress=loop.Progress())
    fit.preemption = SimpleNamespace(got=0)
    fit.writer, fit.s = SimpleNamespace(wait=lambda: None), SimpleNamespace(folder="run")
    fit.journal = SimpleNamespace(say=lambda sentence: None)
    others[:] = [0, 0] if rank == 0 else [loop.DUE, 0]  # what the others would have said
    assert fit.save_if_warned(late=fit.is_late())
    assert asked == [loop.DUE * (rank == 0)]
    assert not (rank == 1 and fit.is_late())
    others[:] = [loop.DUE, signal.SIGTERM]
    with pytest.raises(Preempted):
        fit.save_if_warned(late=fit.is_late())
    others[:] = [0, 0]
    fit.saved_at = time.monotonic()
    assert not fit.save_if_warned(late=fit.is_late())


@pytest.mark.parametrize("text", ["soon", "0", "-5", "0s", "1.5", "10 days", "None"])
def test_nonsense_between_checkpoints_is_refused_in_a_sentence(text):
    args = [*TINY, "--data", DATA, f"--checkpoint-every={text}"]
    with pytest.raises(
        UsageError, match=r"--checkpoint-every got .*: it wants a time such as 10min, or"
    ):
        train.main(args)


def test_a_number_of_steps_of_an_older_config_is_read():
    plain = config.to_plain(PRESETS["demo"]()) | {"checkpoint_every": 500}
    cfg = config.from_plain(plain)
    ranges.check(cfg)
    assert cfg.checkpoint_every == "500"
    assert config.differences(plain, config.to_plain(PRESETS["demo"]())) == {}


# ---- beside training ----


def test_steps_go_on_while_a_checkpoint_is_written_and_what_is_written_is_of_its_step(
    tmp_path, monkeypatch
):
    go(DATA, tmp_path / "short", *ALONE, "--max-steps", "4")
    go_on, done = threading.Event(), []
    files = Files(monkeypatch, at=4, before=lambda: go_on.wait(60))

    def act(step):
        done.append((step, list(files.written)))
        if step == 7:
            go_on.set()

    before_step(monkeypatch, act)
    go(DATA, tmp_path / "run", *ALONE, "--keep-every", "4", "--checkpoint-every", "100")
    assert [step for step, written in done if not written] == list(range(8))
    assert files.most == 1
    assert ("step_4.pt", 4) in files.written
    written = tmp_path / "run" / "checkpoints" / "step_4.pt"
    mine, then = (leaves(checkpoint.load(file)) for file in (written, last(tmp_path / "short")))
    differ = {name for name in mine if not chaos.same(mine[name], then[name])}
    assert differ == {".config.checkpoint_every", ".config.keep_every", ".validated_step"}


def test_a_second_checkpoint_waits_for_the_first_and_the_time_is_told(
    tmp_path, monkeypatch, capsys
):
    files, ticks = Files(monkeypatch, before=lambda: time.sleep(0.05)), itertools.count(step=10)
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(ticks))
    monkeypatch.setattr(loop, "time", clock)  # each pause is of ten seconds
    go(DATA, tmp_path, *ALONE, "--checkpoint-every", "1", "--max-steps", "4")
    assert [step for _, step in files.written] == [1, 2, 3, 4]
    assert files.most == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["saving_seconds"] == 50 < summary["seconds"]  # of four saves, and of the end
    assert summary["saving_share"] == pytest.approx(50 / summary["seconds"], 0.001)
    assert summary["images_per_s"] == pytest.approx(16 / summary["seconds"], 0.01)
    rates = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1]["images_per_s"] > summary["images_per_s"]  # of steps alone
    assert ", 50.0 s" in capsys.readouterr().out


def small(value: float) -> dict:
    return {"net": {"w": torch.full((1000,), value)}, "plain": {"seen": [value]}, "step": 1}


def test_what_is_changed_behind_its_back_is_not_written_and_memory_is_used_again(
    tmp_path, monkeypatch
):
    hold, at = threading.Event(), []
    files = Files(monkeypatch, before=lambda: hold.wait(60))
    writer = Writer(torch.device("cpu"), contextlib.nullcontext)
    for k in range(3):
        state = small(float(k))
        writer.begin(state, [tmp_path / f"{k}.pt"])
        state["net"]["w"].fill_(-1.0)
        state["plain"]["seen"].append("later")
        at.append(writer._held[0].data_ptr())
        hold.set()
    writer.wait()
    assert len(set(at)) == 1
    assert files.most == 1
    for k in range(3):
        found = checkpoint.load(tmp_path / f"{k}.pt")
        assert torch.equal(found["net"]["w"], torch.full((1000,), float(k)))
        assert found["plain"] == {"seen": [float(k)]}
    state = small(5.0) | {
        "net": {"w": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    }
    writer.begin(state, [tmp_path / "other.pt"])  # of another shape
    writer.wait()
    found = checkpoint.load(tmp_path / "other.pt")["net"]["w"]
    assert found.stride() == state["net"]["w"].stride()


def test_a_gpus_copy_is_pinned_and_the_thread_waits_for_it(tmp_path, monkeypatch):
    """A device that is none: what would be launched is noted, in order."""
    noted, where = [], threading.main_thread()

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    class Event:
        def __init__(self, *, blocking):
            assert blocking

        def record(self, stream):
            noted.append(("record", stream))

        def synchronize(self):
            assert threading.current_thread() is not where
            noted.append("synchronize")

    def empty_like(tensor, *, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        noted.append("pinned")
        return torch.empty(tensor.shape)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(checkpoint, "save", lambda path, state: noted.append(state))
    writer = Writer(torch.device("cuda"), contextlib.nullcontext)
    on_gpu, gathered = torch.ones(3).as_subclass(OnGpu), torch.zeros(5)
    for _ in range(2):
        writer.begin({"w": on_gpu, "bank": gathered}, [tmp_path / "last.pt"])
        writer.wait()
    assert noted[:3] == ["pinned", ("record", "stream of cuda"), "synchronize"]
    assert noted[3]["bank"] is gathered  # in host memory already: given away
    assert noted[3]["w"] is not on_gpu
    assert noted[4:6] == [("record", "stream of cuda"), "synchronize"]
    assert noted[6]["w"] is noted[3]["w"]


# ---- who waits ----


@pytest.mark.parametrize("at", [4, 10], ids=["within-an-epoch", "at-its-end"])
def test_a_warning_is_answered_when_all_is_on_disk(tmp_path, monkeypatch, at):
    files, seen = Files(monkeypatch, before=lambda: time.sleep(0.2)), []
    say = journal.Journal.say

    def saying(self, *lines):
        seen.extend((line, list(files.written)) for line in lines if "saved at step" in line)
        say(self, *lines)

    monkeypatch.setattr(journal.Journal, "say", saying)
    before_step(monkeypatch, lambda done: done == at - 1 and warn(signal.SIGTERM))
    with pytest.raises(Preempted):
        go(DATA, tmp_path, *ALONE, "--checkpoint-every", "3")
    assert [(f"saved at step {at} " in line, written[-1]) for line, written in seen] == [
        (True, ("last.pt", at))
    ]


def test_what_is_not_finite_waits_to_tell_of_the_last_good_checkpoint(tmp_path, monkeypatch):
    files = Files(monkeypatch, before=lambda: time.sleep(0.3))
    step = loop.train_step

    def poisoned(state, batch):
        if state.step == 4:
            with torch.no_grad():
                next(state.method.net.parameters()).fill_(math.nan)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(RunError, match=r"at step 6; the last good checkpoint is .*last\.pt"):
        go(DATA, tmp_path, *ALONE, "--checkpoint-every", "4")
    assert files.written == [("last.pt", 4)]


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "checkpoints/last.pt")


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path, monkeypatch, capsys):
    go_on, done = threading.Event(), []
    Files(monkeypatch, before=lambda: (go_on.wait(60), full()))

    def act(step):
        done.append(step)
        if step == 5:
            go_on.set()
            time.sleep(0.1)

    before_step(monkeypatch, act)
    args = [*TINY, *ALONE, "--checkpoint-every", "4", "--data", DATA, "--out", str(tmp_path)]
    assert entry.status(lambda: train.main(args)) == 1
    assert done == [0, 1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checkpoints/last.pt: No space left on device; nothing written before is harmed" in said


def test_a_full_disk_at_the_end_of_a_run_is_no_end(tmp_path, monkeypatch):
    Files(monkeypatch, at=2, before=full)
    with pytest.raises(OSError, match="No space left"):
        go(DATA, tmp_path, *ALONE, "--max-steps", "2")
    assert not (tmp_path / "summary.json").exists()


def test_a_full_disk_beside_another_error_is_told_too(tmp_path, monkeypatch, capsys):
    failing = threading.Event()
    Files(monkeypatch, before=lambda: (failing.wait(60), full()))

    def act(step):
        if step == 5:
            failing.set()
            raise RunError("the data is gone")

    before_step(monkeypatch, act)
    with pytest.raises(RunError, match="the data is gone"):
        go(DATA, tmp_path, *ALONE, "--checkpoint-every", "4")
    assert "fastrot: checkpoints/last.pt: No space left" in capsys.readouterr().err
