"""Advice follows from figures: what to convert, how many workers, whether a pack fits, what an epoch takes."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import tyro

from fastrot import native
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.write import PackOptions
from fastrot.presets import PRESETS
from fastrot.speed import advice
from fastrot.speed.advice import Measurements
from fastrot.speed.bounds import Measured, Subject

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    """The C++ extension is there, built or not."""
    monkeypatch.setattr(native, "load", lambda: object())


def findings(**changed) -> Measurements:
    """A folder of large originals on 4 of 8 cores: 100 images/s a worker, a step that takes 2,000."""
    m = Measured(step=0.5, wait=0.4, decode=0.5, busy=0.1, arithmetic=0.05, memory=0.02)
    known = dict(
        **{"images": 1_200_000, "workers": 4, "batch": 192, "bytes": 110_000.0, "from_disk": 0.0},
        **{"read": 1e12, "decode": 400.0, "step": 2000.0, "train": 400.0, "steps": 30},
        **{"val_seconds": None, "short": 256, "median_short": 375, "pack_bytes": 88 * 10**9},
        **{"damaged": (), "measured": m, "seconds": 20.0},
    )
    return Measurements(**(known | changed))  # type: ignore[arg-type]


def subject(format: str, *, data="some/train", gpu=None, memory=200 * 10**9, cores=8):
    cfg = dataclasses.replace(PRESETS["rotnet-alexnet"](), data=data, precision="fp32")
    machine = {"device": torch.device("cuda" if gpu else "cpu"), "gpu": gpu}
    machine |= {"cores": cores, "memory": memory}
    return Subject(cfg=cfg, format=format, placement=None, **machine)


def test_the_ratios_are_those_of_measured_rows():
    rows = [
        json.loads(line)
        for path in (ROOT / "benchmarks" / "results").glob("cpu_amd_epyc_2_cores.jsonl")
        for line in path.read_text().splitlines()
    ]

    def measured(variant: str) -> float:
        (rate,) = (
            row["p50"]
            for row in rows
            if (row["what"], row.get("mode"), row.get("variant")) == ("loader", "crops", variant)
            and row["commit"].startswith("6a304f69")
        )
        return round(rate, 1)

    variants = {"folder": "folder", "tars": "tar shards"}
    variants |= {name: f"{name}, C++ decoder" for name in ("beton", "pack")}
    assert {name: measured(variant) for name, variant in variants.items()} == advice.RATES
    assert {name: measured(name) for name in ("beton", "pack")} == advice.RATES_WITHOUT_EXTENSION


@pytest.mark.parametrize(
    ("format", "source"), [("folder", "imagefolder"), ("beton", "beton"), ("tars", "webdataset")]
)
def test_a_slow_format_is_to_be_converted_by_a_command_that_can_be_typed(format, source):
    step = {"folder": 2000.0, "beton": 1500.0, "tars": 2500.0}[format]
    said = advice.which_format(findings(step=step), subject(format, data="some/my train"))
    command, *args = shlex.split(said.split("to make it:  ")[1])[1:]
    name = "beton" if format == "folder" else "pack"
    assert said.startswith(f"a .{name}, about ")
    assert command == ("pack" if name == "pack" else "convert")
    options = tyro.cli(PackOptions if name == "pack" else BetonOptions, args=args)
    options.check()
    assert options.source == source
    assert options.short_side == 256
    assert options.root == Path("some/my train")
    assert options.out == Path(f"some/my train-256.{name}")


def test_a_format_that_keeps_up_is_kept():
    kept = advice.which_format(findings(step=300.0), subject("folder"))
    assert kept == "keep the folder: it gives 400 images/s, 1.33 times what the step takes"


def test_the_smallest_format_that_keeps_up_is_chosen_else_the_fastest():
    def said(step: float, format: str = "folder") -> str:
        return advice.which_format(findings(step=step), subject(format))

    assert said(2000.0).startswith("a .beton, about 5.78 times as fast as folder where both")
    assert "gives 400 images/s here, and the step takes 2,000" in said(2000.0)
    assert said(3000.0).startswith("a .pack, about 26.1 times")
    assert said(20_000.0).startswith("a .pack")
    assert said(20_000.0, "pack").startswith("keep the .pack: no other format")


def test_a_pack_without_the_extension_is_slower_than_a_beton(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    said = advice.which_format(findings(step=20_000.0), subject("folder"))
    assert said.startswith("a .beton, about 3.62 times")
    assert advice.which_format(findings(), subject("tars")).startswith("keep the tar shards")


def test_a_slow_disk_is_not_mended_by_a_format():
    m = Measured(step=0.5, wait=0.4, read=0.4, decode=0.1, busy=0.1)
    said = advice.which_format(findings(measured=m), subject("tars"))
    assert said.startswith("keep the tar shards where its disk")
    said = advice.advice(findings(measured=m), subject("tars"))["verdict"]
    assert said.startswith("bound by read at 400 images/s")
    assert "faster disk" in said


def test_a_pack_is_chosen_where_the_gpu_holds_it():
    room, small = (139 * 10**9, 141 * 10**9), (70 * 10**9, 80 * 10**9)
    assert advice.which_format(findings(), subject("folder", gpu=room)).startswith("a .pack")
    assert advice.which_format(findings(), subject("folder", gpu=small)).startswith("a .beton")
    says = advice.whether_a_pack_fits
    assert "which fits into this GPU" in says(findings(), subject("folder", gpu=room))
    assert "--placement pinned" in says(findings(), subject("folder", gpu=small))
    assert "no GPU here: one of 132 GB or more" in says(findings(), subject("folder"))
    none = subject("folder", gpu=small, memory=10**9)
    assert "more than host memory" in says(findings(), none)


def test_how_many_workers():
    said = advice.how_many_workers(findings(step=500.0), subject("folder"))
    assert said.startswith("--workers 6 is enough, of 8 cores (a worker gives 100 images/s")
    few = advice.how_many_workers(findings(step=1990.0), subject("folder", gpu=(1, 1)))
    assert few.startswith("--workers 8, all cores, and that is too few: 22 would keep up")
    assert few.endswith("each further GPU wants 22 cores more")
    assert advice.how_many_workers(findings(), subject("pack", gpu=(1, 1))).startswith("one or two")
    slow = advice.how_many_workers(findings(step=200.0, read=400.0), subject("folder"))
    assert "a worker gives 50 images/s" in slow  # reading takes as long as decoding


def test_what_an_epoch_costs():
    assert findings().epoch_seconds == 3000
    assert findings(val_seconds=60.0).epoch_seconds == 3060
    said = advice.what_an_epoch_costs(findings())
    assert said.startswith("50 minutes for 1,200,000 pictures, by 30 steps of 192;")
    assert "without a validation pass" in said
    assert "; 60 s of it are the validation" in advice.what_an_epoch_costs(
        findings(val_seconds=60.0)
    )
