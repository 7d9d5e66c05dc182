"""Log lines of a GPU are written one line late, so that it is not waited for: what they say, and what is waited for."""

import json
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import Gpu
from test_run import assert_same_bits, go, told

from fastrot import machine
from fastrot.config import RunError
from fastrot.training import loop

EPOCH = 8  # steps


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """Ten times as slow as its host: steps are computed on the CPU, and take a made-up time."""
    gpu, step = Gpu(), loop.train_step

    def issued(state, batch):
        gpu.step = state.step  # what begins a run anew goes on counting
        gpu.launch(issue=0.001, work=0.01)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", issued)

    class Late(loop._Timer):
        def __init__(self, *of):
            super().__init__(*of)
            self.late = True

    monkeypatch.setattr(loop, "_Timer", Late)
    for module in ("training.loop", "training.journal"):
        monkeypatch.setattr(f"fastrot.{module}.Moment", gpu.moment)
    return gpu


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("stop", [None, 13])
def test_a_run_on_a_gpu_writes_the_same_lines_and_checkpoints(straight, pictures, tmp_path, gpu, stop):  # fmt: skip
    if stop is not None:
        go(pictures, tmp_path, "--max-steps", str(stop))
    go(pictures, tmp_path)
    assert told(straight) == told(tmp_path)
    assert_same_bits(straight / "checkpoints" / "last.pt", tmp_path / "checkpoints" / "last.pt")
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "images_per_s" in line:
            assert line["images_per_s"] == pytest.approx(400, rel=0.05)  # of 4 in 10 ms
            assert line["wait_share"] == 0  # for the host was ahead


@pytest.mark.usefixtures("quick_runs")
def test_nothing_but_the_line_before_is_waited_for(pictures, tmp_path, gpu):
    go(pictures, tmp_path, "--checkpoint-every", "100", "--log-every", "2")
    ends = (EPOCH, 2 * EPOCH, 20)
    assert gpu.waits
    for now, noted in gpu.waits:
        assert now in ends or noted == now - 2, (now, noted)
    assert {now for now, _ in gpu.waits} == {4, 6, 8, 12, 14, 16, 20}


@pytest.mark.usefixtures("quick_runs")
def test_what_is_not_finite_is_named_by_its_own_line(pictures, tmp_path, gpu, monkeypatch):
    step = loop.train_step

    def poisoned(state, batch):
        if state.step == 10:
            with torch.no_grad():
                next(state.method.net.parameters()).fill_(torch.nan)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(RunError, match=r"is not finite at step 12; the last good checkpoint"):
        go(pictures, tmp_path, "--checkpoint-every", "100")
    assert gpu.step == 15
    assert told(tmp_path)[-1]["step"] == 12


def test_a_moment_of_a_gpu_is_an_event_of_its_stream(monkeypatch):
    asked = []

    class Event:
        def __init__(self, **how):
            assert how == {"enable_timing": True, "blocking": True}
            self.done = False

        def record(self, stream):
            asked.append(stream)

        def query(self):
            return self.done

        def synchronize(self):
            self.done = True

        def elapsed_time(self, end):
            assert end.done
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    first, second = (machine.Moment(torch.device("cuda", 1)) for _ in range(2))
    assert asked == ["current of cuda:1"] * 2
    assert not second.reached()
    assert second.since(first) == 1.5
    assert second.reached()


def test_a_moment_of_a_cpu_is_now(monkeypatch):
    clock = iter([2.0, 5.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first, second = (machine.Moment(torch.device("cpu")) for _ in range(2))
    assert second.reached()
    assert second.since(first) == 3.0
