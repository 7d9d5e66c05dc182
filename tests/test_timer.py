"""What a run sees of its own speed, and the verdict that it ends with: slowed on purpose, or large."""

import dataclasses
import json
import time

import pytest
import torch
from fake_gpu import Gpu
from test_run import go

from fastrot.data.loader import Loader
from fastrot.speed import bounds
from fastrot.speed.bounds import Ceilings
from fastrot.speed.neighbours import Neighbours
from fastrot.speed.timer import WARM, StepTimer
from fastrot.training import loop
from fastrot.training.state import Progress

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_step_is_told_by_the_log_lines_but_for_the_first():
    seen = StepTimer(CPU)
    seen.line()
    seen.rate(10.0, 0.9)
    only = seen.measured(100)
    assert (only.step, only.wait, only.busy) == (10.0, pytest.approx(9.0), pytest.approx(1.0))
    for rate in ((100.0, 0.5), (50.0, 0.0)):
        seen.line()
        seen.rate(*rate)
    found = seen.measured(100)
    assert found.step == pytest.approx(1.5)  # of 1 and 2 seconds
    assert found.wait == pytest.approx(0.25)
    assert found.busy == pytest.approx(1.25)
    assert seen.lines == 3


@pytest.mark.parametrize(
    ("lines", "enough"), [([30], False), ([3, 12], False), ([3, 13], True), ([3, 5, 13], True)]
)
def test_a_run_is_judged_by_ten_steps_behind_its_first_line(lines, enough):
    seen = StepTimer(CPU)
    for steps in lines:
        while seen.steps < steps:
            with seen.step():
                pass
        seen.line()
    assert seen.enough() == enough


def test_a_run_that_is_too_short_has_no_verdict(tmp_path, capsys):
    args = ["--hold-out", "0", "--max-steps", "6", "--log-every", "2"]
    assert go("synthetic:64", tmp_path, *args) == 0
    assert verdict_of(tmp_path) == (None, None)
    assert "verdict" not in capsys.readouterr().out


def test_neighbours_count_from_the_first_rate_on(monkeypatch):
    made = []
    monkeypatch.setattr(Neighbours, "__init__", lambda self: made.append(self))
    monkeypatch.setattr(Neighbours, "take", lambda self, threads: 0.1 * threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    seen = StepTimer(CPU)
    assert not made
    for _ in range(3):
        seen.rate(10.0, 0.0)
    assert len(made) == 1
    assert seen.measured(10).others == pytest.approx(0.7)


# seconds of a step: to load its batch, to issue it, of the device alone; kernels that may be under way; what binds
LONG = 10**9
CASES = {
    "ahead": (0.001, 0.002, 0.01, LONG, "arithmetic", dict(step=0.01, wait=0, issue=0, busy=0.01)),
    "full-queue": (0, 0.002, 0.01, 300, "arithmetic", dict(step=0.01, wait=0, issue=0, busy=0.01)),
    "host-waits": (0.008, 0.002, 0.01, 300, "arithmetic", dict(step=0.01, wait=0, busy=0.01)),
    "starved": (0.02, 0.002, 0.01, LONG, "decode", dict(step=0.02, wait=0.01, issue=0.002)),
    "launch": (0.001, 0.012, 0.008, LONG, "launch", dict(step=0.012, issue=0.012, busy=0.012)),
    "slow-host": (0.02, 0.012, 0.008, LONG, "decode", dict(step=0.02, issue=0.012, busy=0.012)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gpus_verdict_is_right_wherever_the_host_is(case, monkeypatch):
    load, issue, work, queue, binds, numbers = case
    gpu = Gpu(queue)
    monkeypatch.setattr("fastrot.speed.timer.Moment", gpu.moment)
    monkeypatch.setattr("fastrot.training.loop.Moment", gpu.moment)
    monkeypatch.setattr("fastrot.speed.timer.time.perf_counter", lambda: gpu.now)
    seen, timer, left = StepTimer(GPU), loop._Timer(Progress(), GPU), []

    def batches():
        while True:
            due = gpu.now + load if not ready else ready[-1] + load
            ready.append(due)
            gpu.now = max(gpu.now, due)
            yield "a batch"

    ready: list[float] = []
    timer.begin()
    for step, _ in enumerate(timer.waits(batches()), start=1):
        with seen.step():
            gpu.launch(issue, work)
        timer.progress.images += 100
        if step % 20 == 0:
            lap = timer.lap()
            seen.line()
            for told in left:
                seen.rate(**told())
            left = [lap]
            gpu.now += 0.001  # the line is written
        if step == 200:
            break
    m = seen.measured(100)
    assert len(seen._single) >= 4
    for name, value in numbers.items():
        assert getattr(m, name) == pytest.approx(value, rel=0.03, abs=1e-4), name
    assert bounds.bound(dataclasses.replace(m, arithmetic=0.4 * work, memory=0.3 * work)) == binds


def test_steps_are_timed_behind_the_warm_up_one_a_line():
    seen = StepTimer(GPU)
    gpu = Gpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrot.speed.timer.Moment", gpu.moment)
        for line in range(1, 5):
            for _ in range(10):
                with seen.step():
                    gpu.launch(0.001, 0.01)
            seen.line()
            gpu.now = gpu.free
            assert len(seen._single) == max(0, line - 3)  # that behind line 2 is read at line 4
    assert WARM < 20


def test_watching_costs_next_to_nothing():
    seen = StepTimer(CPU)
    begun = time.process_time()
    for _ in range(1000):
        with seen.step():
            pass
    assert time.process_time() - begun < 0.1  # a hundredth of steps of 10 ms; 4 ms on a free core


def verdict_of(folder) -> tuple[str, str]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["bound"], summary["verdict"]


def test_a_run_with_a_slow_loader_is_bound_by_decode(tmp_path, monkeypatch, capsys):
    at_once = Loader.request

    def throttled(self, index, epoch):
        time.sleep(0.1)
        return at_once(self, index, epoch)

    monkeypatch.setattr(Loader, "request", throttled)
    args = ["--hold-out", "0", "--max-steps", "12", "--log-every", "2"]
    assert go("synthetic:64", tmp_path, *args) == 0
    kind, said = verdict_of(tmp_path)
    assert kind == "decode"
    assert "nothing to do but wait for data" in said
    assert f"verdict                        {said}" in capsys.readouterr().out


def test_a_run_on_a_slow_device_is_bound_by_its_own_work(tmp_path, monkeypatch):
    rate = StepTimer.rate  # it never waits for its data, whatever else this machine does
    monkeypatch.setattr(StepTimer, "rate", lambda self, per_s, _: rate(self, per_s, 0.0))
    monkeypatch.setattr(bounds, "ceilings", lambda *_: Ceilings(tflops=1e-3, gb_per_s=1e3))
    args = ["--max-steps", "12", "--log-every", "2", "--hold-out", "0"]
    assert go("synthetic:64", tmp_path, *args) == 0
    kind, said = verdict_of(tmp_path)
    assert kind == "arithmetic"
    assert "at this CPU's measured peak" in said
