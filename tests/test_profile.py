"""--profile: a trace, a table, and a run that is the same with it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chaos
import pytest
from test_run import go, leaves

from fastrot.speed import profile
from fastrot.speed.profile import MARK, parts
from fastrot.training import checkpoint
from fastrot.training.state import TrainState


def table(folder) -> dict[str, float]:
    """Milliseconds of the parts of a step, on the host."""
    lines = (folder / "profile" / "table.txt").read_text().split("\n\n")[1].splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines[1:]}


def test_a_profile_is_written_and_changes_nothing(pictures, tmp_path):
    length = ["--max-steps", "15", "--log-every", "4"]
    assert go(pictures, tmp_path / "a", *length, "--profile") == 0
    assert go(pictures, tmp_path / "b", *length) == 0
    states = [leaves(checkpoint.load(tmp_path / x / "checkpoints" / "last.pt")) for x in "ab"]
    unlike = [name for name, value in states[0].items() if not chaos.same(value, states[1][name])]
    assert unlike == [".config.profile"]
    assert not (tmp_path / "b" / "profile").exists()
    trace = json.loads((tmp_path / "a" / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    for part in profile.PARTS:
        assert names.count(MARK + part) == profile.STEPS, part
    assert "aten::convolution_backward" in names
    found = table(tmp_path / "a")
    assert list(found) == list(profile.PARTS)
    assert min(found.values()) > 0
    words = (tmp_path / "a" / "profile" / "table.txt").read_text()
    assert words.startswith("steps 11 to 15 of this start")
    assert "aten::mm" in words
    log = (tmp_path / "a" / "log.txt").read_text()
    assert f"profile of steps 11 to 15 of this start: {tmp_path / 'a' / 'profile'}" in log


@pytest.mark.parametrize(
    ("steps", "graphed", "traced"),
    [(1, False, (0, 0)), (7, False, (2, 6)), (99, False, (10, 14)), (99, True, (12, 16))],
)
def test_a_short_run_is_profiled_to_its_end_and_a_graph_behind_its_recording(
    steps, graphed, traced
):
    state: Any = object.__new__(TrainState)
    state.graphed = object() if graphed else None
    seen = profile.Profile(state, Path(), steps, print)
    assert (seen.first, seen.last) == traced


def event(name, start, end, kernels=(), kind="CPU"):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=SimpleNamespace(name=kind),
        kernels=[SimpleNamespace(duration=each) for each in kernels],
    )


def test_kernels_count_to_the_part_in_which_they_are_launched():
    events = [
        event(MARK + "forward", 0, 100, kernels=[7777]),  # a label's own is no kernel
        event(MARK + "forward", 0, 900, kind="CUDA"),  # its shadow on the device
        event("aten::conv", 10, 50, kernels=[300, 20]),
        event(MARK + "backward", 110, 200),
        event("aten::conv_backward", 120, 180, kernels=[500]),  # of another thread
        event(MARK + "optimiser", 181, 191),
        event("aten::add_", 182, 183, kernels=[70]),
        event("aten::between", 105, 106, kernels=[9]),
        event("aten::before", -5, -4, kernels=[9]),
        event("kernel", 10, 50, kind="CUDA"),
        event(MARK + "forward", 300, 310),
        event("aten::conv", 301, 302, kernels=[1]),
    ]
    assert parts(events) == {
        "forward": (110.0, 321.0),
        "backward": (80.0, 500.0),
        "optimiser": (10.0, 70.0),
    }
