"""Verdicts on made-up numbers, and ceilings and counts of this machine."""

import dataclasses
import time
from typing import Any

import pytest
import torch

from fastrot import assemble, config, dist, native
from fastrot.config import AlexNet, Config, Nin
from fastrot.speed import bounds
from fastrot.speed.bounds import Ceilings, Measured, Subject, bound, ceilings, verdict
from fastrot.speed.cost import StepCost

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# seconds; a GPU's step whose work takes 50 of 52 ms, issued in 10
BUSY = dict(step=0.052, wait=0.001, copy=0.002, issue=0.010, busy=0.050)
CASES = {
    # GPU
    "decode": ("decode", dict(step=0.1, wait=0.06, copy=0.002, issue=0.01, busy=0.03)),
    "decode-timed-alone": ("decode", dict(step=0.1, wait=0.06, decode=0.09, copy=0.05, busy=0.03)),
    "read": ("read", dict(step=0.1, wait=0.06, read=0.09, decode=0.05, copy=0.05, busy=0.03)),
    "read-and-decoded": ("decode", dict(step=0.1, wait=0.06, read=0.05, decode=0.06, copy=0.1)),
    "copy": ("copy", dict(step=0.1, wait=0.06, copy=0.09, issue=0.01, busy=0.03)),
    "copy-timed-alone": ("copy", dict(step=0.1, wait=0.06, decode=0.03, copy=0.09, busy=0.03)),
    "host-waits-but-the-device-is-busy": ("arithmetic", {**BUSY, "wait": 0.04}),
    "idle-and-no-wait": ("launch", dict(step=0.1, wait=0.001, issue=0.09, busy=0.03)),
    "ends-as-work-comes": ("launch", {**BUSY, "issue": 0.049, "arithmetic": 0.01, "memory": 0.01}),
    "ends-as-work-comes-at-the-floor": (
        "arithmetic",
        {**BUSY, "issue": 0.049, "arithmetic": 0.03, "memory": 0.018},
    ),
    "memory": ("memory", {**BUSY, "arithmetic": 0.015, "memory": 0.03}),
    "arithmetic": ("arithmetic", {**BUSY, "arithmetic": 0.03, "memory": 0.015}),
    "small-floors-on-a-gpu": ("memory", {**BUSY, "arithmetic": 0.001, "memory": 0.002}),
    # CPU
    "cpu-decode": ("decode", dict(step=0.1, wait=0.06, busy=0.04, arithmetic=0.03, memory=0.01)),
    "cpu-calls": ("launch", dict(step=0.1, wait=0.001, busy=0.099, arithmetic=0.003, memory=0.002)),
    "cpu-arithmetic": (
        "arithmetic",
        dict(step=0.1, wait=0.001, busy=0.099, arithmetic=0.05, memory=0.02),
    ),
    "cpu-memory": ("memory", dict(step=0.1, wait=0.001, busy=0.099, arithmetic=0.02, memory=0.05)),
    "nothing-but-waiting-known": ("decode", dict(step=0.1, wait=0.03)),
    "nothing-known": ("arithmetic", dict(step=0.1, wait=0.001)),
}


def subject(device=GPU, format="beton", placement=None, **knobs) -> Subject:
    cfg = config.resolved(Config(precision="bf16"))
    cfg = dataclasses.replace(cfg, **knobs)
    machine: Any = {"device": device, "cores": 8, "memory": 0, "gpu": None}
    return Subject(cfg=cfg, format=format, placement=placement, **machine)


@pytest.mark.parametrize(("kind", "numbers"), CASES.values(), ids=CASES)
def test_the_slowest_stage_binds(kind, numbers):
    m = Measured(**numbers)
    assert bound(m) == kind
    for device in (CPU, GPU):
        said = verdict(m, 1234.0, 8, subject(device))
        assert said.startswith(f"bound by {kind} at 1,234 images/s: ")
        assert "\n" not in said
        assert "None" not in said


def test_by_how_much():
    said = {
        name: verdict(Measured(**numbers), 9.0, 8, subject())
        for name, (_, numbers) in CASES.items()
    }
    assert "70% of the time the GPU has nothing to do but wait for data" in said["decode"]
    assert "reading a batch takes 90 ms" in said["read"]
    assert "decoding a batch takes 90 ms" in said["decode-timed-alone"]
    assert "copying a batch takes 90 ms" in said["copy"]
    assert "the host needs 90 ms to issue" in said["idle-and-no-wait"]
    assert "keeps the GPU busy for 30 ms" in said["idle-and-no-wait"]
    assert "49 ms of the 50 ms" in said["ends-as-work-comes"]
    assert "moving numbers takes 60% of a step's 50 ms" in said["memory"]
    assert "multiplying takes 60%" in said["arithmetic"]
    assert "about as fast as it multiplies" in said["arithmetic"]
    said = verdict(Measured(**CASES["cpu-calls"][1]), 9.0, 8, subject(CPU))
    assert "explain 5 ms of a step's 99 ms" in said


WAYS = {  # what binds, what the run has, what it is told to try, and what not
    "few-workers": ("decode", dict(workers=1), "--workers 8 instead of 1", "resident"),
    "all-workers": ("decode", {}, ".pack", "--workers"),
    "pinned-pack": ("decode", dict(format="pack", placement="pinned"), "resident", "fastrot pack"),
    "folder": ("decode", dict(format="folder"), "fastrot convert", "C++"),
    "slow-disk": ("read", dict(format="beton"), "--order blocks", "--workers"),
    "slow-disk-under-a-folder": (
        "read",
        dict(format="folder"),
        "fastrot convert",
        "--order blocks",
    ),
    "copied-pack": ("copy", dict(format="pack"), "--placement resident", "fastrot pack"),
    "launched": ("idle-and-no-wait", {}, "--compile, --graph or a larger --batch", "bf16"),
    "launched-on-a-cpu": ("cpu-calls", dict(device=CPU), "--compile or a larger", "--graph"),
    "compiled": ("idle-and-no-wait", dict(compile=True), "--graph or", "--compile"),
    "graphed": ("idle-and-no-wait", dict(compile=True, graph=True), "--batch", "--graph"),
    "moved": ("memory", {}, "--compile or --backbone.fuse", "bf16"),
    "cannot-be-fused": ("memory", dict(backbone=Nin()), "try --compile", "fuse"),
    "moved-in-fp32": ("memory", dict(precision="fp32"), "--precision bf16", "--graph"),
    "moved-as-little-as-can-be": (
        "memory",
        dict(compile=True, backbone=AlexNet(fuse=True)),
        "--image-size",
        "try",
    ),
    "unknown-floor": ("nothing-known", dict(compile=True), "a larger --batch", "--compile"),
}


@pytest.mark.parametrize(("case", "has", "told", "not_told"), WAYS.values(), ids=WAYS)
def test_what_to_change(case, has, told, not_told):
    has = dict(has)
    workers = has.pop("workers", 8)
    said = verdict(Measured(**CASES[case][1]), 9.0, workers, subject(**has))
    assert told in said
    assert not_told not in said


def test_several_processes_are_not_told_to_record_a_graph(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    said = verdict(Measured(**CASES["idle-and-no-wait"][1]), 9.0, 8, subject())
    assert said.endswith("try --compile or a larger --batch")


@pytest.mark.parametrize(("threads", "way"), [(8, "try --threads 7;"), (4, "let them end;")])
def test_neighbours_are_told_in_place_of_launch(threads, way, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(bounds, "left", lambda taken: 8 - taken)
    m = Measured(**CASES["cpu-calls"][1], others=1.1)
    assert bound(m) == "neighbours"
    said = verdict(m, 1234.0, 8, subject(CPU))
    assert said.startswith("other processes take 1.1 of 8 cores: let them end")
    assert way in said
    assert "1,234 images/s" in said
    assert "launch" not in said
    assert "--compile" not in said


@pytest.mark.parametrize(
    ("name", "device", "workers", "told"),
    [
        ("cpu-decode", CPU, 1, True),
        ("cpu-arithmetic", CPU, 8, True),
        ("decode", GPU, 8, True),
        ("decode", GPU, 6, False),  # 6.9 cores are left
        ("idle-and-no-wait", GPU, 8, False),
        ("memory", GPU, 8, False),
        ("copy", GPU, 8, False),
    ],
)
def test_neighbours_are_told_first_where_they_have_what_binds(
    name, device, workers, told, monkeypatch
):
    monkeypatch.setattr(bounds, "left", lambda taken: 8 - taken)
    kind, numbers = CASES[name]
    m = Measured(**numbers)
    beside = dataclasses.replace(m, others=1.1)
    assert bound(beside) == kind
    without, said = (verdict(x, 9.0, workers, subject(device)) for x in (m, beside))
    assert said.startswith("other processes take 1.1 of 8 cores: ") == told
    assert said.endswith(f"; beside them {without}" if told else without)


def test_beside_neighbours_a_cpu_is_not_as_fast_as_it_can_be():
    m = Measured(step=0.1, wait=0.001, busy=0.099, arithmetic=0.08)
    assert "about as fast as it multiplies" in verdict(m, 9.0, 8, subject(CPU))
    beside = dataclasses.replace(m, others=1.1)
    assert "about as fast as it multiplies" not in verdict(beside, 9.0, 8, subject(CPU))


@pytest.mark.parametrize("built", [True, False])
def test_a_missing_extension_is_told_where_it_would_help(built, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: object() if built else None)
    monkeypatch.setattr(native, "why", lambda: "not built: no g++")
    m = Measured(**CASES["decode"][1])
    said = {
        name: verdict(m, 9.0, 8, subject(CPU, format=name)) for name in ("beton", "folder", "tars")
    }
    assert ("the C++ extension (not built: no g++)" in said["beton"]) == (not built)
    assert "C++" not in said["folder"] + said["tars"]


def test_ceilings_are_measured_in_time_and_draw_no_random_numbers():
    before = torch.get_rng_state()
    begun = time.perf_counter()
    found = ceilings(CPU, torch.float32, seconds=0.1)
    assert time.perf_counter() - begun < 3  # 0.3 s on a free core
    assert torch.equal(before, torch.get_rng_state())
    assert 1e-3 < found.tflops < 100
    assert 0.1 < found.gb_per_s < 10_000


def test_ceilings_of_a_nearly_full_device_are_measured_on_less(monkeypatch):
    asked = []

    def measure(size):
        asked.append(size)
        if size > 1000:
            raise torch.OutOfMemoryError("full")
        return 2.0

    assert bounds._halved(4096, measure) == 2.0
    assert asked == [4096, 2048, 1024, 512]
    with pytest.raises(torch.OutOfMemoryError):
        bounds._halved(4096, lambda _: measure(9999))


def test_floors_are_counts_over_ceilings():
    peak = Ceilings(tflops=2.0, gb_per_s=4.0)
    cost = StepCost(flop=10**12, traffic=10**9)
    assert bounds.floors(cost, peak) == {"arithmetic": 0.5, "memory": 0.25}


def test_a_run_on_a_cpu_gets_floors_and_no_copy(monkeypatch):
    monkeypatch.setattr(bounds, "ceilings", lambda *_: Ceilings(tflops=2.0, gb_per_s=4.0))
    m = Measured(step=1.0, wait=0.5, busy=0.5)
    cost = StepCost(flop=10**12, traffic=10**9)
    about = subject(CPU, precision="fp32")
    found = bounds.with_floors(m, cost, assemble.training_view(about.cfg), about)
    assert found == dataclasses.replace(m, arithmetic=0.5, memory=0.25)
