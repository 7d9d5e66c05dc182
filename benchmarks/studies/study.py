"""Many runs, what is asked of them, and the tables that this makes, as rows of results.

A job is one call of train.py or evaluate.py, in a folder of its own below --work. A study that was broken off goes on where it
was, in mid-epoch too. A figure is a number of a job over all seeds; its row is written once all of them are there.
"""

import argparse
import json
import statistics
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, runs
from fastrot import dist, machine
from fastrot.config import UsageError, flat
from fastrot.training.device import choose_device

Words = tuple[Any, ...]  # of a command line
# epochs from one validation to the next: there is one before the first step, one at the end
LAST = 10**6
SPREAD = "spread"  # a row's `what`


@dataclass(frozen=True)
class Job:
    """A training run, or something asked of one."""

    words: Words  # a preset or an evaluation, then knobs
    of: str | None = None  # the job whose network it begins with, or is asked of
    step: int | None = None  # of that one's checkpoint; None: its last
    asks: bool = False  # by evaluate.py, which has no seed


@dataclass(frozen=True)
class Figure:
    """A cell of a table."""

    table: str
    line: str
    column: str
    job: str
    score: str  # of `val` in summary.json, or as conv3.top1 of what evaluate.py writes
    paper: float | None = None  # the same in the paper, as a share
    to_reach: bool = False  # whether the paper's is an aim at its own sizes


@dataclass(frozen=True)
class Spread:
    """How a number is spread over pictures: a curve beside the tables."""

    title: str
    line: str
    job: str
    score: str  # shares that are as wide, from 0 to `most`, as last.histogram of what evaluate.py writes
    most: float


@dataclass(frozen=True)
class Limit:
    """Jobs that together are to take so many seconds at most on a GPU."""

    words: str
    jobs: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Order:
    """What is expected: one cell above another, in every seed."""

    words: str
    more: tuple[str, str, str]  # table, line and column
    less: tuple[str, str, str]
    by: float = 0.0  # at least, as a share


@dataclass(frozen=True)
class Study:
    """Jobs by name, in an order in which each comes behind the one it is of; figures, and what is expected of them."""

    theme: str
    about: str  # what the reader of a figure must know
    jobs: Mapping[str, Job]
    figures: tuple[Figure, ...]
    orders: tuple[Order, ...] = ()
    limits: tuple[Limit, ...] = ()
    spreads: tuple[Spread, ...] = ()
    precision: str | None = None  # of training; None: bf16 where the device multiplies in it


def parser(doc: str | None, pictures: str) -> argparse.ArgumentParser:
    """The command line of a study; `pictures`: what --root is to hold."""
    made = runs.parser(doc, "work", "device")
    made.add_argument(
        "--root", type=Path, help=f"{pictures}; default: what lies beside the checkout"
    )
    made.add_argument("--seeds", type=int, default=3, help="of everything that is drawn")
    made.add_argument("--tables", nargs="+", metavar="TABLE", help="only these; default: all")
    return made


def rows(study: Study, asked: argparse.Namespace, shape: dict[str, Any]) -> Iterator[dict]:
    """Do the jobs seed by seed, and give a row for each figure, order and limit behind the last."""
    known = dict.fromkeys(f.table for f in study.figures)
    if asked.seeds < 1:
        raise UsageError(f"--seeds got {asked.seeds}: it wants at least 1")
    if wrong := {*(asked.tables or ())} - {*known}:
        raise UsageError(
            f"--tables got {', '.join(wrong)}: choose of {', '.join(map(repr, known))}"
        )
    choose_device(asked.device, dist.place())  # refused here, not by a job
    figures = [f for f in study.figures if asked.tables is None or f.table in asked.tables]
    # a run of other code, pictures or sizes is not gone on with
    commit = measure.row("study")["commit"][:12]
    kind = f"{zlib.crc32(repr(study.jobs).encode()):08x}"
    folder = asked.work / "studies" / f"{study.theme}-{asked.device}-{commit}-{kind}"
    same = shared(study, asked, shape)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(asked.seeds):
        for name in _wanted(study, (f.job for f in figures)):
            found[name, seed] = _done(study, name, seed, folder, asked.device, same["dtype"])
            print(f"{name}, seed {seed}: {found[name, seed]['seconds']:,.0f} s", flush=True)

    def took(names: Iterable[str]) -> float:
        """Seconds of the jobs one after the other, starts and validations included: medians of the seeds."""
        each = ([found[name, seed]["seconds"] for seed in range(asked.seeds)] for name in names)
        return sum(map(statistics.median, each))

    made: dict[tuple[str, str, str], list[float]] = {}
    for f in figures:
        values = [found[f.job, seed][f.score] for seed in range(asked.seeds)]
        made[f.table, f.line, f.column] = values
        yield cell(f, values, took(_wanted(study, [f.job])), same)
    for each in study.spreads:
        if (each.job, 0) in found:
            yield _spread(
                each, [found[each.job, seed][each.score] for seed in range(asked.seeds)], same
            )
    for order in study.orders:
        if order.more in made and order.less in made:
            yield _judged(order, made[order.more], made[order.less], same)
    for limit in study.limits:
        if all((name, 0) in found for name in limit.jobs):
            aim = {"target": limit.seconds, "better": "lower"} if _full(same) else {}
            seconds = measure.middle([took(limit.jobs)], "s")
            yield measure.row("seconds", variant=limit.words, mode="", **same, **seconds, **aim)


def shared(study: Study, asked: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a study have."""
    precision = study.precision or _precision(asked.device)
    same = {"theme": study.theme, "dtype": precision, "warmup": 0, "about": study.about}
    return same | {"shape": shape | {"device": asked.device}}


def cell(f: Figure, values: list[float], seconds: float, same: dict[str, Any]) -> dict[str, Any]:
    """The row of a figure, of its values by seed; `same` as `shared` gives it."""
    aim = {"target": f.paper, "better": "higher"} if f.to_reach and _full(same) else {}
    return measure.row(
        f.table, variant=f.line, mode=f.column, **same, **measure.middle(values, "share"), **aim,
        values=values, paper=f.paper, seconds=seconds,
    )  # fmt: skip


def _full(same: dict[str, Any]) -> bool:
    """Whether these are the sizes of the paper."""
    return same["shape"]["device"] == "cuda"


def _wanted(study: Study, names: Iterable[str]) -> list[str]:
    """Jobs and those that they are of, in the study's order."""
    every = set()
    for name in names:
        at: str | None = name
        while at is not None:
            every.add(at)
            at = study.jobs[at].of
    return [name for name in study.jobs if name in every]


def _done(
    study: Study, name: str, seed: int, folder: Path, device: str, precision: str
) -> dict[str, Any]:
    """The scores of a job, and the seconds it took; it is done where it is not yet."""
    job, mine = study.jobs[name], folder / f"{name}-{seed}"
    of = folder / f"{job.of}-{seed}"
    if job.step is not None:
        of = of / "checkpoints" / f"step_{job.step}.pt"
    clock = folder / f"{name}-{seed}.seconds"
    if job.asks:
        file = folder / f"{name}-{seed}.json"
        if not file.exists():
            words = (of, *job.words, "--device", device, "--json", file)
            _timed(clock, "fastrot/evaluate.py", *words)
        scores = flat(json.loads(file.read_text())["stages"])
    else:
        file = mine / "summary.json"
        if not file.exists():
            preset, *words = job.words
            words += ("--start-from", of) if job.of else ()
            words += ("--seed", seed, "--device", device, "--precision", precision)
            words += ("--validate-every", LAST, "--out", mine, "--no-tensorboard")
            _timed(clock, "fastrot/train.py", preset, *words)
        scores = json.loads(file.read_text())["val"]
    return {**scores, "seconds": float(clock.read_text())}


def _timed(clock: Path, *command: Any) -> None:
    """Run it, and add its seconds to those in the file `clock`, also where it is broken off."""
    clock.parent.mkdir(parents=True, exist_ok=True)
    before = float(clock.read_text()) if clock.exists() else 0.0
    begin = time.perf_counter()
    try:
        runs.run(*command, quiet=True)
    finally:
        clock.write_text(f"{before + time.perf_counter() - begin:.3f}")


def _precision(device: str) -> str:
    """Of training; evaluate.py asks in float32."""
    return "bf16" if machine.multiplies_bf16(torch.device(device)) else "fp32"


def _judged(order: Order, more: list[float], less: list[float], same: dict[str, Any]) -> dict:
    """How far the one is above the other, seed by seed, and whether it is in each."""
    apart = [a - b for a, b in zip(more, less, strict=True)]
    shown = sum(each > order.by for each in apart)
    verdict = "shown" if shown == len(apart) else "NOT shown"
    least = f" by {order.by:.1%} at least" if order.by else ""
    told = f"{order.words}{least}: {verdict}, in {shown} of {len(apart)} seeds, by {min(apart):+.1%} to {max(apart):+.1%}"
    return measure.row(
        "order", variant=order.words, mode=" / ".join((*order.more, *order.less)), **same,
        **measure.middle(apart, "share"), values=apart, judgement=told, by=order.by,
    )  # fmt: skip


def _spread(each: Spread, shares: list[list[float]], same: dict[str, Any]) -> dict[str, Any]:
    """The mean of the seeds' shares, and of each seed's numbers."""
    width = each.most / len(shares[0])
    means = [sum((n + 0.5) * width * share for n, share in enumerate(one)) for one in shares]
    mean = [statistics.fmean(of_seeds) for of_seeds in zip(*shares, strict=True)]
    return measure.row(
        SPREAD, variant=each.line, mode=each.title, **same, **measure.middle(means, ""), shares=mean, most=each.most,
    )  # fmt: skip


def said(row: dict[str, Any]) -> str:
    """What is to be said of a row beside its figure."""
    if row.get("judgement"):
        return f"\n{row['judgement']}"
    if not row.get("values"):
        return ""
    paper = "" if row["paper"] is None else f", full size in the paper {row['paper']:.2%}"
    return f" ({row['mode']}, {min(row['values']):.1%} to {max(row['values']):.1%}{paper})"
