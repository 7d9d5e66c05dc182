"""Rows of results as pages for people: benchmarks/reports/TOPIC.md with a picture each, an index, and the README's table;
and as what runs have by default on a GPU that was measured: fastrot/speed/forms.json.

    python -m benchmarks.report [--results FOLDER] [--out FOLDER]

A page is one topic over all machines: a sentence that needs no knowledge of the code, the picture, tables, the machine
and its versions. Every figure is a row's, or arithmetic on rows that says so; a table names the file and the lines that it
was made from. Of rows with the same key (what, variant, form, mode, shape, dtype, machine) the newest counts.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import forms, measure, plots
from benchmarks.measure import IMAGENET, number
from benchmarks.plots import CORES, PRESET, Rows
from fastrot import entry
from fastrot.config import UsageError, net_name
from fastrot.entry import in_bytes, in_time
from fastrot.presets import PRESETS

BEGIN = "<!-- measured: written by `make report`, from the lines in benchmarks/results -->\n"
END = "<!-- /measured -->"
KEY = ("what", "variant", "form", "mode", "shape", "dtype", "gpu", "cpu", "cores")
OLD_WORDS = {  # as older rows have it -> as it is said now
    "turned_views": "rotated_views",
    '"turns"': '"rotations"',
    "turns told right": "rotations predicted right",
    "held-out turns": "held-out rotations",
}
SETS = ("python", "torch", "triton", "numpy")  # of versions, as far as tests hang on them
VERSIONS = ("python", "torch", "torchvision", "numpy", "simplejpeg", "opencv", "ffcv")
VERSIONS += ("webdataset", "nvidia-dali-cuda130", "cuda", "driver")
FORMS = measure.ROOT / "fastrot" / "speed" / "forms.json"
BILLION = 1_000_000_000  # pictures
BANK_WIDTH = 128  # numbers in a row of the memory bank


def read(folder: Path) -> Rows:
    """The rows that count of all files of results in a folder, each with its `file` and `line` there, in the order of measuring."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for at, line in enumerate(file.read_text().splitlines(), 1):
            for old, new in OLD_WORDS.items():
                line = line.replace(old, new)
            row = json.loads(line)
            if not row.get("commit"):
                raise UsageError(
                    f"line {at} of {file} has no commit: take it out, and measure again"
                )
            key = json.dumps([row.get(name) for name in KEY], sort_keys=True)
            if key not in found or row["when"] >= found[key]["when"]:
                found[key] = {**row, "file": file, "line": at}
    return Rows(sorted(found.values(), key=lambda row: (str(row["file"]), row["line"])))


# ---- words of a figure ----


def told(row: dict[str, Any] | None, field: str = "p50", unit: str | None = None) -> str:
    """A row's figure with its unit, shares in percent; what is not measured says so."""
    value = None if row is None else row.get(field)
    if row is None or value is None:
        return "not measured"
    unit = row["unit"] if unit is None else unit
    mark = " †" if row.get("dirty") else ""
    return (f"{value:.1%}" if unit == "share" else f"{number(value)} {unit}".strip()) + mark


def bare(row: dict[str, Any] | None, field: str = "p50") -> str:
    """A row's figure without its unit, for a cell; empty where it is not measured."""
    value = None if row is None else row.get(field)
    return "" if row is None or value is None else number(value) + " †" * bool(row.get("dirty"))


def target(row: dict[str, Any]) -> str:
    """What was to be reached, and whether it was."""
    if row.get("target") is None:
        return ""
    least = "at least" if row["better"] == "higher" else "at most"
    limit = told({**row, "dirty": False}, "target")
    return f"{least} {limit}: {'met' if measure.met(row) else 'MISSED'}"


# ---- tables ----


class Table(NamedTuple):
    """Cells, the first line its head, and the rows that they were made from."""

    cells: list[list[str]]
    rows: list[dict[str, Any]]


def figures(rows: Iterable[dict[str, Any]]) -> Table:
    """A line for each row: its figure, how far the middle three fifths of its repetitions reach, its target."""
    cells, rows = [["what", "median", "middle three fifths", "target"]], list(rows)
    for row in rows:
        name = ", ".join(filter(None, (row["what"], row.get("variant"), row.get("mode"))))
        spread = f"{bare(row, 'p20')} to {bare(row, 'p80')}" if row["reps"] > 1 else "one run"
        cells.append([name, told(row), spread, target(row)])
    return Table(cells, rows)


def pivot(
    rows: Iterable[dict[str, Any]],
    corner: str,
    line: Callable[[dict[str, Any]], str],
    cells: Callable[[dict[str, Any]], dict[str, str]],
) -> Table:
    """A line for each name that `line` gives, with the columns that its rows' `cells` fill."""
    rows, lines = list(rows), {}
    for row in rows:
        lines.setdefault(line(row), {}).update(cells(row))
    columns = list(dict.fromkeys(name for each in lines.values() for name in each))
    body = [[name, *(each.get(column, "") for column in columns)] for name, each in lines.items()]
    return Table([[corner, *columns], *body], rows)


def markdown(table: Table, results: str) -> str:
    """The table, and below it where its figures stand; `results` leads to the folder of results."""
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table.cells
    ]
    lines.insert(1, "|" + " --- |" * len(table.cells[0]))
    of = []
    for file, rows in itertools.groupby(table.rows, key=lambda row: row["file"].name):
        numbers = ranges(sorted({row["line"] for row in rows}))
        of.append(f"[{file}]({results}/{file}), lines {numbers}")
    dirty = any(row.get("dirty") for row in table.rows)
    note = "; †: measured with changes that no commit has" if dirty else ""
    return "\n".join(lines) + f"\n\nFrom {'; '.join(of)}{note}."


def ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{e[0]}-{e[-1]}" if len(e) > 1 else str(e[0]) for e in ends)


# ---- topics: a machine's sentences and tables ----


def loaders(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    alone, beside = rows.all("loader", mode="crops"), rows.all("loader", mode=plots.BESIDE)
    best, pack = (rows.one("loader", name, mode="crops") for name in (plots.OURS, plots.PACK))
    others = yardsticks(rows)
    said = [
        f"One processor core turns JPEGs into {told(best, unit='')} random training crops of 224 pixels a second with "
        f"our .beton reader, and pictures of our pack into {told(pack, unit='')}; others on the same pictures: "
        f"{others or 'not measured'}."
    ]

    def cells(row: dict[str, Any]) -> dict[str, str]:
        if row["what"] == "first batch":
            return {"first batch, s": bare(row)}
        if row["what"] == "memory":
            return {"memory, MB": bare(row)}
        if row["mode"] == plots.BESIDE:
            return {
                "beside a step, images/s": bare(row),
                "step waits": told(row, "waited", "share"),
            }
        size = row.get("bytes_per_image")
        each = {"images/s and core": bare(row), "images/s": bare(row, "images_per_s")}
        if not size:
            return each
        each |= {"kB a picture": number(size / 1e3), "ImageNet-1k": in_bytes(size * IMAGENET)}
        return each | {f"its epoch on {CORES} cores": in_time(IMAGENET / row["p50"] / CORES)}

    named = [*alone, *beside, *rows.all("first batch"), *rows.all("memory")]
    known = {row["variant"] for row in alone}
    return said, [pivot([r for r in named if r["variant"] in known], "loader", _variant, cells)]


def reading(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    ours = rows.one("ratio", f"{plots.OURS} / FFCV, its own pipeline")
    readers = pivot(
        rows.all("reader"),
        "crops a second and core, by the file's pictures",
        lambda row: row["variant"].rpartition(", ")[0],
        lambda row: {row["variant"].rpartition(", ")[2]: bare(row)},
    )
    said = f"Taken in turns on one machine, our .beton reader gives {told(ours)} the crops that FFCV gives from the same file."
    return [said], [readers, figures([row for row in rows if row["what"] != "reader"])]


def yardsticks(rows: Rows) -> str:
    """Others' loaders, each with its crops a second and core."""
    each = {
        label: rows.one("loader", name, mode="crops") for name, label in plots.YARDSTICKS.items()
    }
    return ", ".join(f"{label} {bare(row)}" for label, row in each.items() if row)


def demo(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    latest = {row["variant"]: row for row in sorted(rows, key=lambda row: row["when"])}
    took = rows.one("demo", "installation, conversion and training")
    right = rows.one("demo", "held-out rotation accuracy")
    return [
        f"`make demo` takes a fresh clone to a trained net in {told(took)}, and the net then predicts {told(right)} of the "
        f"rotations of photographs that it has not seen, {told(right, 'before', 'share')} before training."
    ], [figures(latest.values())]


def cifar(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    right, took = rows.one("held-out rotation accuracy"), rows.one("seconds of training")
    return [
        f"After {told(took)} of training, a quarter-width Network in Network predicts {told(right)} of the rotations of "
        f"CIFAR-10's test pictures; guessing gives {told(right, 'chance', 'share')}.",
        *_about(rows),
    ], [figures(rows)]


def decoupling(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    rise, fall, other, end = (
        rows.one(name)
        for name in (
            "loss_nce's highest over its first",
            "loss_nce's last over its first",
            "prec_inv's farthest from chance",
            "prec_rot at the end",
        )
    )
    return [
        f"Rotation Feature Decoupling on ten ImageNet classes behaves as its authors' code does: the half of the features "
        f"that is meant for rotations predicts {told(end)} of held-out ones, the other half stays within {told(other)} of "
        "guessing.",
        f"The loss against the memory bank rises to {told(rise)} its first value and ends at {told(fall)}.",
        *_about(rows),
    ], [figures(rows)]


def neighbours(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    def line(row: dict[str, Any]) -> str:
        ours = " (the commands' own)" if row["spins"] == str(entry.SPINS) else ""
        return f"{row['preset']}, spins {row['spins']}{ours}"

    def times(preset: str, count: int) -> str:
        ours, default = (
            rows.one("neighbours", preset=preset, spins=spins, neighbours=count)
            for spins in (str(entry.SPINS), "default")
        )
        if ours is None or default is None:
            return "not measured"
        return f"{number(ours['p50'] / default['p50'])} times as fast"

    presets = dict.fromkeys(row["preset"] for row in rows)
    said = [
        f"{preset}: {times(preset, 0)} as by libgomp's default on a quiet machine, {times(preset, 1)} beside one "
        f"process that computes, {times(preset, 2)} beside two."
        for preset in presets
    ]
    about = "Images/s; a neighbour is a process that computes. Settings are measured in turns."

    def cells(row: dict[str, Any]) -> dict[str, str]:
        return {f"beside {row['neighbours']}" if row["neighbours"] else "alone": bare(row)}

    return [*said, about], [pivot(rows, "threads of OpenMP", line, cells)]


def ops(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    times = [r for r in rows.all("ratio") if r["variant"].startswith("nce_loss")]
    memory, saved = rows.one("extra memory"), rows.one("bank in a checkpoint", "saved")
    low, high = (f(times, key=lambda r: r["p50"], default=None) for f in (min, max))
    said = [
        f"The contrastive loss against a memory bank runs {bare(low)} to {bare(high)} times as fast as plain PyTorch's way, "
        f"gradient included, with {told(memory)} of its extra memory; a checkpoint saves the bank in {told(saved)}."
    ]

    def name(row: dict[str, Any]) -> str:
        shape = row.get("shape") or {}
        if row["what"] in ("nce_loss", "infonce", "estimate_z", "random gather"):
            return f"{row['what']}: {row['variant']}"
        size = [f"{shape[k]} {k}" for k in ("layer", "images", "batch", "size") if k in shape]
        return f"{row['what']}: {row['variant']}, {', '.join(map(str, size))}"

    def cells(row: dict[str, Any]) -> dict[str, str]:
        threads = (row.get("mode") or "").rpartition(", ")[2]
        threads = f", {threads}" if threads.endswith(("thread", "threads")) else ""
        return {f"{row['dtype']}{threads}, ms": bare(row)}

    timed = [row for row in rows if row["unit"] == "ms" and row.get("target") is None]
    rest = [row for row in rows if row not in timed]
    return said, [figures(rest), pivot(timed, "time of one call", name, cells)]


def quality(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    kept, first = (rows.one("picture quality", name) for name in ("ycc", "bc7"))
    right, originals = (
        rows.one("held-out rotation accuracy", name) for name in ("ycc", "originals")
    )
    said = [
        f"The pack keeps pictures as blocks of Y, Cb and Cr (`ycc`): {told(kept, 'bytes_a_pixel', 'bytes')} a pixel at "
        f"{told(kept, 'mean_db', 'dB')}, where BC7 takes {told(first, 'bytes_a_pixel', 'bytes')} at "
        f"{told(first, 'mean_db', 'dB')}; nets learn as much from it: {told(right, 'mean', 'share')} of held-out rotations, "
        f"{told(originals, 'mean', 'share')} from the originals.",
        "The rule, stated before: the encoding with fewer bytes wins, unless its mean accuracy is lower by more than the spread "
        "of the seeds. The script that measured this is in the history.",
    ]

    def cells(row: dict[str, Any]) -> dict[str, str]:
        if row["what"] == "picture quality":
            fields = {"mean_db": "dB", "p5_db": "dB, worst of twenty", "ssim": "SSIM"}
            fields |= {"bytes_a_pixel": "bytes a pixel"}
            return {label: bare(row, name) for name, label in fields.items()}
        if row["what"] == "encoding":
            return {"ms to encode": bare(row)}
        seeds = f"{row['lowest']:.1%} to {row['highest']:.1%}"
        return {"learnt from it": f"{told(row, 'mean', 'share')} ({seeds})"}

    return said, [pivot(rows, "encoding", _variant, cells)]


def cold(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    blocks, full = (
        rows.one("cold epoch", name, mode="reading alone")
        for name in ("blocks of 64, 256 a window", "full permutation")
    )
    mixed, fully = (
        next((r for r in rows.all("mixing", name) if "labels of a batch" in r["mode"]), None)
        for name in ("blocks of 64, 256 a window", "full permutation")
    )
    said = [
        f"Off a cold disk `--order blocks` reads {told(blocks)} where a full shuffle reads {told(full)}, and still mixes: a "
        f"batch holds {told(mixed)} of the labels' variety, {told(fully)} when fully shuffled."
    ]

    def cells(row: dict[str, Any]) -> dict[str, str]:
        if row["what"] == "mixing":
            return {f"bits, {row['mode'].split(',')[0]}": bare(row)}
        mode = row["mode"].replace(", memory stood in for", ", little memory")
        return {f"{mode}: images/s": bare(row), "kB read an image": bare(row, "kb_per_image")}

    return said, [
        pivot(rows.all("cold epoch"), "order", _variant, cells),
        pivot(rows.all("mixing"), "sorted classes of ImageNet's size, order", _variant, cells),
    ]


def chaos(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    row = rows.one("kills survived to the same bits")
    if row is None:
        return [], []
    by = [
        (k, str(n))
        for name in ("by_phase", "by_signal", "by_setting")
        for k, n in row[name].items()
    ]
    return [
        f"Training was killed at random moments {row['kills']} times, by SIGKILL, SIGTERM and SIGUSR1; started again, "
        f"{bare(row)} of them ended with exactly the weights, optimiser and log of a run that was never killed.",
        f"{row['runs_compared']} runs were compared, {row['leaves_compared']:,} values each: {row['mismatches']} differed.",
    ], [Table([["killed", "times"], *map(list, by)], [row])]


def scale(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    """A billion pictures: arithmetic on the rows of orders, files, writers and banks."""
    order = next(
        (r for r in rows.all("order") if r["shape"] == {"pictures": BILLION, "places": 192}), None
    )
    beton, pack = (rows.one("prepared file", name) for name in ("beton", "pack"))
    saved, made = (rows.one("bank", f"float32 rows {name}") for name in ("saved", "made"))
    if not (order and beton and pack and saved and made):
        return [], [figures(rows)]
    bank = BILLION * BANK_WIDTH * 4
    gpus = math.ceil(bank / (measure.GPU_BYTES - measure.KEPT_BYTES))
    said = [
        f"A billion pictures, by arithmetic from what was measured: {in_bytes(BILLION * beton['p50'])} as .beton or "
        f"{in_bytes(BILLION * pack['p50'])} as a pack; a memory bank of {in_bytes(bank)} in float32, over {gpus} large GPUs; a "
        f"shuffled order that holds {in_bytes(order['held_bytes'])} and draws a batch in {order['p50'] * 0.192:.2g} ms.",
        f"On one core a bank of that size is made in {in_time(BILLION / made['p50'])} and saved in "
        f"{in_time(BILLION / saved['p50'])}; ranks share it (`--method.bank sharded`).",
        *(
            f"{row['variant']}: {in_time(BILLION / row['p50'] / 1024)} on 1,024 cores."
            for row in rows.all("conversion")
        ),
    ]
    return said, [figures(rows)]


def throughput(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    baselines, ours = rows.all("baseline"), rows.one("baseline", "ours, eager, .beton")
    theirs = rows.one("baseline", "original's way, num_workers 8")
    best = max(plots.steps(rows), key=lambda r: r["images_per_s"], default=None)
    said = []
    if ours and theirs:
        times = rows.one("baseline ratio", "ours, eager, .beton / original's way, num_workers 8")
        shape = ours["shape"]
        said.append(
            f"Rotation Feature Decoupling trains on {told(ours)} here, the original's way on {told(theirs)}: {told(times)} as "
            f"many, on the same pictures (AlexNet of {shape['width']:g} of its width, batch {shape['batch']}, "
            f"{shape['size']} pixels)."
        )
    if best:
        floor = rows.one("roofline", PRESET)
        said.append(
            f"The quickest step of batch {best['batch']} is {best['form']} from {best['loader']}: {told(best)}, "
            f"{told(best, 'images_per_s', 'images/s')}, {told(best, 'wait_share', 'share')} of it waiting for data; its "
            f"arithmetic and memory traffic alone take {told(floor)}."
        )
    if not rows[0]["gpu"]:
        said.append(
            f"No GPU has been measured yet; the aim there is an ImageNet epoch in {measure.EPOCH_S} s."
        )

    def step(row: dict[str, Any]) -> dict[str, str]:
        split = {part: ms for part, ms in (row["split"] or {}).items() if ms}
        longest = max(split, key=lambda part: split[part], default="")
        idle = (
            {"GPU idle": told(row, "idle_share", "share")} if row["idle_share"] is not None else {}
        )
        return {
            "ms a step": bare(row),
            "images/s": bare(row, "images_per_s"),
            "waits for data": told(row, "wait_share", "share"),
            "of the matrix rate": told(row, "share_of_matrix", "share"),
            "longest part": f"{longest}, {number(split[longest])} ms" if split else "",
            **idle,
        }

    def apart(row: dict[str, Any]) -> dict[str, str]:
        """What making the views takes of it, colours and transforms included."""
        split = row["split"] or {}
        share = f"{split['views'] / sum(split.values()):.1%}" if split else ""
        return {
            "ms a step": bare(row),
            "images/s": bare(row, "images_per_s"),
            "making views": share,
        }

    def epoch(row: dict[str, Any]) -> dict[str, str]:
        seconds = row["p50"] if row["what"] == "epoch" else row.get("epoch_s")
        rate = bare(row) if row["what"] == "baseline" else bare(row, "images_per_s")
        mark = ", extrapolated" * bool(row.get("extrapolated"))
        return {"images/s": rate, "ImageNet epoch": f"{in_time(seconds)}{mark}" if seconds else ""}

    kinds = ("roofline", "bank's share of a step", "checkpoint", "scaling", "learning")
    every = [*baselines, *rows.all("epoch")]
    others = [r for r in rows.all("step") if r.get("form") and r.get("preset") != PRESET]
    name = lambda row: f"ours, {row['form']}, pack" if row["what"] == "epoch" else row["variant"]  # noqa: E731
    return said, [
        pivot(plots.steps(rows), "a step", lambda r: f"{r['form']}, {r['loader']}", step),
        pivot(others, "a step of other presets", _variant, apart),
        pivot(every, "an epoch", name, epoch),
        figures(row for row in rows if row["what"] in kinds),
    ]


def study(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    """A table for each that the study makes, and what was expected of them."""
    rows = plots.latest(rows)
    orders, limits = rows.all("order"), rows.all("seconds")
    shown = sum(min(row["values"]) > row.get("by", 0) for row in orders)
    spreads = rows.all("spread")
    judged = [
        f"{shown} of {len(orders)} expectations, which the papers give, hold in every seed.",
        "\n".join(f"- {row['judgement']}" for row in orders),
    ]
    said = [
        *(judged if orders else ()),
        "Top-1 where a table names nothing else, mean of the seeds, in brackets the lowest and the highest; seconds are of the runs that a line's longest cell needs.",
        *_about(rows),
    ]
    tables = dict.fromkeys(row["what"] for row in rows if row not in (*orders, *limits, *spreads))

    def cells(row: dict[str, Any]) -> dict[str, str]:
        low, high = (f"{100 * f(row['values']):.1f}" for f in (min, max))
        mean = f"{sum(row['values']) / len(row['values']):.1%}" + " †" * bool(row.get("dirty"))
        paper = f", paper {row['paper']:.2%}" if row["paper"] is not None else ""
        aim = f", {target(row)}" if row.get("target") else ""
        return {row["mode"]: f"{mean} ({low} to {high}{paper}{aim})"}

    each = [pivot(rows.all(what), what, _variant, cells) for what in tables]
    for table in each:
        table.cells[0].append("seconds")
        for line in table.cells[1:]:
            line.append(number(max(r["seconds"] for r in table.rows if r["variant"] == line[0])))
    means = pivot(spreads, "mean", _variant, lambda row: {row["mode"]: bare(row)})
    return said, [*each, means, figures(limits)]


def versions(rows: Rows) -> tuple[Iterable[str], Iterable[Table]]:
    tests = rows.all("tests")
    said = "`make matrix` runs the tests that need no GPU under each of these sets of versions."
    cells = [
        [versions_of(row), f"{bare(row)} of {bare(row, 'ran')}", bare(row, "skipped")]
        for row in tests
    ]
    return [said], [Table([["tests under", "passed", "skipped"], *cells], tests)]


def versions_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {(row[name] or 'none').split('+')[0]}" for name in SETS)


def _variant(row: dict[str, Any]) -> str:
    return str(row["variant"])


def _about(rows: Rows) -> list[str]:
    every = dict.fromkeys(row["about"] for row in rows if row.get("about"))
    return [f"{about[0].upper()}{about[1:]}." for about in every]


class Topic(NamedTuple):
    """A page: its title, what it says of one machine's rows, and its picture, drawn or kept."""

    title: str
    of: Callable[[Rows], tuple[Iterable[str], Iterable[Table]]]
    draw: Callable[[Rows], Any] | None = None  # None: the picture is no drawing of rows


TOPICS = {  # by the name of the page; rows of the theme `train` are throughput's
    "demo": Topic("The demonstration", demo),
    "loaders": Topic("Reading pictures: our loaders and others'", loaders, plots.loaders),
    "reading": Topic("Reading and preparing: side by side, and part by part", reading),
    "throughput": Topic("A training step, and an epoch", throughput, plots.throughput),
    "cifar": Topic("Learning: CIFAR-10", cifar, plots.cifar),
    "decoupling": Topic("Learning: Rotation Feature Decoupling", decoupling, plots.decoupling),
    "imagenette": Topic("How good features are: ten ImageNet classes", study, plots.study),
    "cifar10": Topic("How good features are: CIFAR-10, the tables of RotNet", study, plots.study),
    "centric": Topic(
        "Faces, pets and streets: rotations, and what nets look at", study, plots.study
    ),
    "pirl": Topic("PIRL, NPID, jigsaw and RotNet: alike and apart", study, plots.study),
    "detection": Topic("How good features are: objects found", study, plots.study),
    "chaos": Topic("Killed, and gone on", chaos, plots.chaos),
    "neighbours": Topic("Beside other processes", neighbours),
    "ops": Topic("The kernels", ops, plots.ops),
    "cold": Topic("Data that is not in memory yet", cold, plots.cold),
    "quality": Topic("What the pack's encoding keeps", quality, plots.quality),
    "scale": Topic("A billion pictures", scale, plots.scale),
    "versions": Topic("Old and new versions", versions),
}
THEMES = {"train": "throughput"}


# ---- files ----


def topics(rows: Rows) -> dict[str, dict[str, Rows]]:
    """The rows of each topic and machine, by topic and by the machine's name."""
    found: dict[str, dict[str, Rows]] = {name: {} for name in TOPICS}
    for row in rows:
        theme = row.get("theme", "ops")
        whole = row["what"] == "loader" and row["mode"] in ("crops", plots.BESIDE)
        if theme == "loaders" and not (whole or row["what"] in ("first batch", "memory")):
            theme = "reading"
        machine = row["gpu"] or f"{row['cpu']}, {row['cores']} cores"
        found[THEMES.get(theme, theme)].setdefault(machine, Rows()).append(row)
    return {name: machines for name, machines in found.items() if machines}


def page(name: str, machines: dict[str, Rows], out: Path, results: str) -> str:
    """A topic's page as Markdown; its picture is drawn beside it."""
    topic, parts = TOPICS[name], [f"# {TOPICS[name].title}"]
    for machine, rows in machines.items():
        said, tables = topic.of(rows)
        parts += [f"## {machine}", *said]
        several = len(machines) > 1
        of = f"_{re.sub(r'[^a-z0-9]+', '_', machine.lower())}" if several else ""
        picture = out / f"{name}{of}.png"
        figure = topic.draw and topic.draw(rows)
        if figure is not None:
            figure.savefig(picture, dpi=110)
        if picture.exists():
            parts.append(f"![{topic.title}]({picture.name})")
        parts += [markdown(table, results) for table in tables if table.rows]
        parts.append(origin(rows))
    return "\n\n".join(parts) + "\n"


def origin(rows: Rows) -> str:
    """Machine, versions, commits, dates and commands, in a paragraph."""

    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name)))

    versions = [f"{name} {each(name)}" for name in VERSIONS if each(name)]
    commits = ", ".join(dict.fromkeys(row["commit"][:8] for row in rows))
    scripts = [re.search(r"benchmarks[./]((?:studies[./])?\w+)", row["command"]) for row in rows]
    days = sorted({row["when"][:10] for row in rows})
    return (
        f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} at {commits}, with {', '.join(versions)}, by benchmarks/"
        f"{', '.join(dict.fromkeys(script[1] for script in scripts if script))}."
    )


def write(folder: Path, out: Path) -> list[Path]:
    """The pages, their pictures and the index of the rows in `folder`, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    results = os.path.relpath(folder, out).replace(os.sep, "/")
    made, index = (
        [],
        ["# What was measured", "A line for each page; each page names the rows of its figures."],
    )
    for name, machines in topics(read(folder)).items():
        made.append(out / f"{name}.md")
        made[-1].write_text(page(name, machines, out, results))
        for machine, rows in machines.items():
            first = next(iter(TOPICS[name].of(rows)[0]), "No sentence yet.")
            index.append(f"- [{TOPICS[name].title}]({name}.md), {machine}: {first}")
    made.append(out / "README.md")
    made[-1].write_text("\n\n".join(index[:2]) + "\n\n" + "\n".join(index[2:]) + "\n")
    return made


def readme_table(rows: Rows) -> str:
    """At most twelve lines for the README: what a newcomer wants to know, from the rows of the CPU."""
    of = {name: next(iter(machines.values())) for name, machines in topics(rows).items()}
    none = Rows()
    demo, cifar, read, detail, train, kernels = (
        of.get(name, none) for name in ("demo", "cifar", "loaders", "reading", "throughput", "ops")
    )
    right = demo.one("demo", "held-out rotation accuracy")
    took = demo.one("demo", "installation, conversion and training")
    cifar10, seconds = cifar.one("held-out rotation accuracy"), cifar.one("seconds of training")
    convert = max(
        detail.all("conversion", mode="start of the processes included"),
        key=lambda row: row["when"],
        default=None,
    )
    writer = detail.one("ratio", "to_ffcv.py / FFCV's plain writer")
    kills = of.get("chaos", none).one("kills survived to the same bits")
    times = [r for r in kernels.all("ratio") if r["variant"].startswith("nce_loss")]
    low, high = (f(times, key=lambda r: r["p50"], default=None) for f in (min, max))
    ours = train.one("baseline", "ours, eager, .beton")
    theirs = train.one("baseline", "original's way, num_workers 8")
    jpegs, pack = (read.one("loader", name, mode="crops") for name in (plots.OURS, plots.PACK))
    learnt = of.get("imagenette", none)
    guess = told(cifar10, "chance", "share")
    lines = [
        ("`make demo`: a fresh clone becomes a trained net; held-out rotations predicted right", right,
         f"{told(right)} (guessing: {guess}) in {told(took)}, training at {told(right, 'images_per_s', 'images/s')}", "bench_demo"),
        ("CIFAR-10, a small net: held-out rotations predicted right", cifar10,
         f"{told(cifar10)} (guessing: {guess}) after {told(seconds)}", "bench_cifar"),
        ("reading: random training crops, images/s for each core", jpegs,
         f"{bare(jpegs)} from JPEGs ({yardsticks(read)}), {bare(pack)} from our pack", "bench_loaders"),
        ("preparing pictures, images/s for each core", convert,
         f"{bare(convert)} ({told(writer)} FFCV's own writer, side by side)", "bench_conversion"),
        ("training killed at random moments and started again, ending with the same bits", kills,
         f"{bare(kills)} of {bare(kills, 'kills')}", "tests/chaos.py"),
        ("contrastive loss against a memory bank, beside plain PyTorch", low,
         f"{bare(low)} to {bare(high)} times as fast, {told(kernels.one('extra memory'))} of its extra memory", "bench_ops"),
        ("Rotation Feature Decoupling with a small AlexNet, beside the original's way", ours,
         f"{told(ours)} against {told(theirs)}", "baseline"),
    ]  # fmt: skip
    lines += [
        (f"ten ImageNet classes by {name}: linear probe of conv1 ... conv5; kNN of the best; time", learnt.one(plots.LINEAR, name),
         features(learnt, name), "studies.imagenette")
        for name in dict.fromkeys(row["variant"] for row in learnt.all(plots.LINEAR))
    ]  # fmt: skip
    table = ["| what | measured | again by |", "| --- | --- | --- |"]
    for what, row, figure, script in lines:
        if row is not None:
            command = f"python {script}" if "/" in script else f"python -m benchmarks.{script}"
            table.append(f"| {what} | {figure} | `{command}` |")
    if tests := of.get("versions", none).all("tests"):
        sets = ", ".join(
            f"{row['python']} with torch {row['torch'].split('+')[0]}" for row in tests
        )
        each = ", ".join(f"{bare(row)} of {bare(row, 'ran')}" for row in tests)
        table.append(f"| tests passed under Python {sets} | {each} | `make matrix` |")
    machines = dict.fromkeys(
        f"{row['cpu']}, {row['cores']} cores, no GPU" for row in rows if not row["gpu"]
    )
    return (
        "\n".join(table)
        + f"\n\nMedians, and of nets for ten classes means, on {'; '.join(machines)}. [All pages](benchmarks/reports/README.md).\n"
    )


def features(rows: Rows, name: str) -> str:
    """By a method: means of the linear probe by stage with its widest spread, kNN of its best stage, and the time of net and probe."""
    linear, knn = (plots.latest(rows).all(table, name) for table in (plots.LINEAR, plots.KNN))
    if not linear or not knn:
        return "not measured"
    means = [100 * sum(row["values"]) / len(row["values"]) for row in linear]
    apart = max(100 * (max(row["values"]) - min(row["values"])) for row in linear)
    best = max(knn, key=lambda row: sum(row["values"]))
    took = linear[0]["seconds"]
    return (
        f"{' '.join(f'{mean:.1f}' for mean in means)} % (seeds up to {apart:.1f} apart); "
        f"{sum(best['values']) / len(best['values']):.1%}; {in_time(took)}"
    )


def fastest_forms(rows: Rows) -> dict[str, dict[str, Any]]:
    """By a GPU's name, what a run has by default there: its fastest step from a pack, and the row that says so.

    A form learns as well unless a row of bench_learning on that GPU says that it does not.
    """
    latest, found = {}, {}
    for row in sorted(plots.steps(rows), key=lambda row: row["when"]):
        if row["gpu"] and row["loader"] == "pack" and row["shape"].get("bank") == IMAGENET:
            latest[row["gpu"], row["preset"], row["dtype"], row["form"]] = row
    for row in sorted(latest.values(), key=lambda row: row["images_per_s"]):
        learnt = rows.all("learning", gpu=row["gpu"], form=f"{row['dtype']} {row['form']}")
        if all(map(measure.met, learnt)):
            found[row["gpu"]] = {
                **{name: row[name] for name in ("form", "preset", "commit", "when")},
                "knobs": forms.knobs(row["form"]),
                "backbone": net_name(PRESETS[row["preset"]]().backbone),
                "precision": row["dtype"],
                "ms": row["p50"],
            }
    return found


def refresh(readme: Path, rows: Rows) -> None:
    """Put the table between the README's marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + readme_table(rows) + END + rest.split(END, 1)[1])


def main(args: list[str] | None = None) -> int:
    """A page a topic, the index, the README's table, and the forms that runs have by default."""
    here = measure.ROOT / "benchmarks"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--out", type=Path, default=here / "reports")
    asked = parser.parse_args(args)
    if not any(asked.results.glob("*.jsonl")):
        raise UsageError(
            f"{asked.results} holds no results: run make bench, or name a folder with --results"
        )
    for each in write(asked.results, asked.out):
        print(each)
    if asked.results == here / "results":
        rows = read(asked.results)
        refresh(measure.ROOT / "README.md", rows)
        FORMS.write_text(json.dumps(fastest_forms(rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
