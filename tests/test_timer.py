"""What a run sees of its own speed, and the verdict that it ends with: slowed on purpose, or large."""

import json
import time

import pytest
import torch
from test_run import go

from fastrot.data.loader import Loader
from fastrot.speed import bounds
from fastrot.speed.bounds import Ceilings
from fastrot.speed.timer import WARM, StepTimer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_step_is_told_by_the_log_lines_but_for_the_first():
    seen = StepTimer(CPU)
    seen.line(10.0, 0.9)
    only = seen.measured(100)
    assert (only.step, only.wait, only.busy) == (10.0, pytest.approx(9.0), pytest.approx(1.0))
    seen.line(100.0, 0.5)
    seen.line(50.0, 0.0)
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
        seen.line(10.0, 0.0)
    assert seen.enough() == enough


def test_a_run_that_is_too_short_has_no_verdict(tmp_path, capsys):
    args = ["--hold-out", "0", "--max-steps", "6", "--log-every", "2"]
    assert go("synthetic:64", tmp_path, *args) == 0
    assert verdict_of(tmp_path) == (None, None)
    assert "verdict" not in capsys.readouterr().out


class Event:
    """As torch.cuda.Event, on the host's clock; a device that takes 50 ms longer than the host."""

    def __init__(self, **_):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at) + 50


def test_a_gpus_step_is_timed_where_it_finds_the_device_idle(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: made.append(Event()) or made[-1])
    seen = StepTimer(GPU)
    for _ in range(3):
        for _ in range(10):
            with seen.step():
                time.sleep(0.001)
        seen.line(100.0, 0.0)
    assert len(made) == 2  # one step: behind the second line, since the first is in the warm-up
    assert WARM < 20
    with seen.step():
        time.sleep(0.02)
    found = seen.measured(10)  # not read yet: the device was not waited for
    assert found.issue is not None
    assert 0.001 <= found.issue < 0.02
    seen.line(100.0, 0.0)
    found = seen.measured(10)
    assert found.issue is not None
    assert found.busy == pytest.approx(found.issue + 0.05, rel=0.1)
    assert (found.step, found.wait) == (pytest.approx(0.1), 0.0)


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
    line = StepTimer.line  # it never waits for its data, whatever else this machine does
    monkeypatch.setattr(StepTimer, "line", lambda self, rate, _: line(self, rate, 0.0))
    monkeypatch.setattr(bounds, "ceilings", lambda *_: Ceilings(tflops=1e-3, gb_per_s=1e3))
    args = ["--max-steps", "12", "--log-every", "2", "--hold-out", "0"]
    assert go("synthetic:64", tmp_path, *args) == 0
    kind, said = verdict_of(tmp_path)
    assert kind == "arithmetic"
    assert "at this CPU's measured peak" in said
