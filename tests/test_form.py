"""Which form a step has where nobody says: the fastest that rows of this kind of GPU know, or that of the run that goes on."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from fastrot import config, dist, machine, train
from fastrot.config import UsageError
from fastrot.training import device as devices
from fastrot.training import resume

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ALL = {"compile": True, "graph": True, "backbone.space_to_depth": True, "backbone.fuse": True}
ROW = {"form": "compiled + folded + fused + graph", "preset": "decoupling-alexnet", "ms": 9.876}
ROW |= {"backbone": "AlexNet", "precision": "bf16", "commit": "c0ffee" * 6, "knobs": ALL}
ROW |= {"when": "2027-01-02T03:04:05+00:00"}
SAID = "compiled + folded + fused + graph is the fastest on Card, with 9.88 ms for a step of "
SAID += "decoupling-alexnet (commit c0ffeec0, 2027-01-02)"
CFG = config.Config(precision="bf16")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(devices, "FORMS", {"Card": ROW})
    monkeypatch.setattr(machine, "device_name", lambda device: "Card")


def form(cfg: config.Config) -> dict:
    plain = config.flat(config.to_plain(cfg))
    return {name: plain[name] for name in devices.PLAIN if name in plain}


def test_a_known_gpu_has_the_fastest_form_by_default_and_says_so():
    cfg, said = devices.choose_form(CFG, None, GPU)
    assert form(cfg) == devices.PLAIN | ALL
    knobs = "--compile --graph --backbone.space-to-depth --backbone.fuse"
    assert said == [f"by default {knobs}: {SAID}"]


def test_what_is_asked_for_stays():
    asked = devices.with_knobs(CFG, {"compile": False, "backbone.fuse": False})
    cfg, said = devices.choose_form(asked, None, GPU)
    assert form(cfg) == devices.PLAIN | {"graph": True, "backbone.space_to_depth": True}
    assert said == [f"by default --graph --backbone.space-to-depth: {SAID}"]
    assert devices.choose_form(devices.with_knobs(CFG, devices.PLAIN), None, GPU)[1] == []


def test_a_run_that_cannot_be_recorded_has_the_rest_of_the_form(monkeypatch):
    monkeypatch.setattr(dist, "place", lambda: dist.Place(world=2))
    assert form(devices.choose_form(CFG, None, GPU)[0]) == devices.PLAIN | ALL | {"graph": False}


def test_bits_that_are_promised_are_those_of_a_plain_step():
    cfg = dataclasses.replace(CFG, deterministic=True)
    assert form(devices.choose_form(cfg, None, GPU)[0]) == devices.PLAIN


def test_a_run_that_was_recorded_goes_on_where_none_can_be():
    began = config.to_plain(devices.with_knobs(CFG, devices.PLAIN | {"graph": True}))
    saved = {"step": 1, "validated_step": 0, "config": began}
    saved["run_identity"] = {"global_batch": CFG.batch}
    cfg, _ = devices.choose_form(CFG, began, CPU)
    assert not cfg.graph
    resume.check_settings(saved, cfg, Path("run"))
    saved["config"] = began | {"graph": False}
    with pytest.raises(UsageError, match="--graph was False, now True"):
        resume.check_settings(saved, dataclasses.replace(cfg, graph=True), Path("run"))


@pytest.mark.parametrize(
    "cfg",
    [config.Config(precision="fp32"), config.Config(precision="bf16", backbone=config.Nin())],
    ids=["fp32", "nin"],
)
def test_what_was_not_measured_is_plain(cfg):
    plain, said = devices.choose_form(cfg, None, GPU)
    assert not any(value is True for value in form(plain).values())
    assert said == [
        "by default a plain step: no other was measured on Card with this backbone and precision"
    ]


def test_a_run_that_goes_on_keeps_its_form():
    began = config.to_plain(devices.with_knobs(CFG, devices.PLAIN | {"backbone.fuse": True}))
    cfg, said = devices.choose_form(CFG, began, GPU)
    assert form(cfg) == devices.PLAIN | {"backbone.fuse": True}
    assert said == []
    assert not config.differences(began, config.to_plain(cfg))


def test_a_cpu_is_plain_and_says_nothing():
    cfg, said = devices.choose_form(CFG, None, CPU)
    assert (form(cfg), said) == (devices.PLAIN, [])


def test_the_command_line_tells_off_from_unsaid(straight):
    words = ["--data", "synthetic", "--compile", "--backbone.no-fuse"]
    cfg = train.command_line(["decoupling-alexnet", *words])
    assert form(cfg) == dict.fromkeys(devices.PLAIN) | {"compile": True, "backbone.fuse": False}
    written = config.from_plain(yaml.safe_load((straight / "config.yaml").read_text()))
    assert form(written) == devices.PLAIN
    again = train.command_line(["--config", str(straight / "config.yaml"), "--graph"])
    assert form(again) == devices.PLAIN | {"graph": True}
