"""Which figures the page of throughput holds, and which field of which row tells each.

A figure is the same whatever the machine: a column of the page is one machine's rows. `REQUIRED` lists what a CPU has to
have; `missing` names what of it no row tells.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aims, contestants

Row = dict[str, Any]
Machines = dict[str, list[Row]]  # its rows, by its name

LOADERS = ("held", "synthetic", "beton", "shards", "pack")
NO_PICTURES = ("held", "synthetic")  # loaders that read none
PARTS = ("wait", "views", "forward", "losses", "nce", "backward", "optimiser", "bank", "rest")
RATE, TIME, WAIT = "Step: images/s end to end", "Step: time", "Step: share waited for data"
ALONE, BESIDE, WHOLE = (
    "Loader alone, a core",
    "Loader beside a stand-in for the step",
    "Loader alone, whole machine",
)
IDLE, MEMORY, MATRIX = (
    "Step: share that the GPU is idle",
    "Step: peak memory",
    "Step: share of the matrix ceiling",
)
FLOOR, EPOCH, BASELINE = "Floor of a step", "Epoch", "The original's way, and ours beside it"
CEILING, BANK = "Ceilings", "The bank's share of a step"
BYTES, SCALING, LEARNING = "Bytes a step and rank", "Scaling", "Learning: held-out accuracy"
EXPERIMENTS = "Experiments and runs"

TERMS = {  # of a step's floor, and the fields that hold them
    "whole": "p50",
    "matrix products": "matrix_ms",
    "other kernels' traffic": "traffic_ms",
    "optimiser": "optimiser_ms",
    "other kernels' traffic, not fused": "traffic_unfused_ms",
    "epoch": "floor_epoch_s",
}

FORMS = ("compiled", "eager + folded", "eager + fused")  # besides eager, on a CPU
_whole = (*(f"eager, {each}" for each in LOADERS), *(f"{form}, held" for form in FORMS))
_loaders = ("beton", "beton, C++ decoder", "tar shards", "pack", "pack, C++ decoder", "folder")
REQUIRED = {  # figures that a CPU has to have, in their order on the page
    ALONE: (*_loaders, contestants.UINT8, contestants.FLOAT, contestants.FFCV, contestants.DALI),
    BESIDE: _loaders,
    WHOLE: (),
    CEILING: ("matrix product", "copy"),
    FLOOR: ("whole", "matrix products", "other kernels' traffic", "optimiser", "epoch"),
    RATE: _whole,
    TIME: _whole,
    WAIT: _whole,
    MATRIX: _whole,
    IDLE: (),
    MEMORY: (),
    BANK: (aims.PRESET,),
    EPOCH: ("eager, pack",),
    BASELINE: (
        *(f"num_workers {n}: {told}" for n in (0, 8) for told in ("images/s", "step", "epoch")),
        *("step alone: images/s", "step alone: step"),
        *(f"ours, eager, .beton / num_workers {n}" for n in (0, 8)),
    ),
    BYTES: (f"2 ranks, {aims.PRESET}",),
    SCALING: tuple(f"{gpus} GPUs: {told}" for gpus in (8, 64) for told in ("images/s", "an epoch")),
    LEARNING: ("float32 eager", "bf16 eager"),
    EXPERIMENTS: (),
}


class Figure(NamedTuple):
    """What is told, whatever the machine."""

    group: str
    name: str


class Value(NamedTuple):
    """What a machine's row says of a figure."""

    row: Row
    value: float
    unit: str


# ---- rows ----


def read(files: dict[Path, list[Row]]) -> list[Row]:
    """Rows of files of results, each with the name of its file and its line as it stands there."""
    rows = []
    for file, found in files.items():
        lines = file.read_text().splitlines()
        rows += [{**row, "file": file.name, "json": lines[row["line"] - 1]} for row in found]
    return rows


def machines(rows: Iterable[Row]) -> Machines:
    """The rows of each machine that tell a figure, the newest of each, processors first."""
    newest: dict[tuple[str, Figure], Row] = {}
    for row in sorted(rows, key=lambda row: row["when"]):
        for figure, _, _ in figures_of(row):
            newest[_name(row), figure] = row
    found: Machines = {}
    for row in sorted(
        newest.values(), key=lambda row: (bool(row["gpu"]), row["file"], row["line"])
    ):
        mine = found.setdefault(_name(row), [])
        if row not in mine:
            mine.append(row)
    return found


def _name(row: Row) -> str:
    return row["gpu"] or f"{row['cpu']}, {row['cores']} cores"


def on_gpu(rows: list[Row]) -> bool:
    return bool(rows[0]["gpu"])


def of(row: Row, name: str) -> Any:
    """What a row says of a name: at its top, in its shape, or by a dot inside what stands there."""
    if "." in name:
        name, inner = name.split(".", 1)
        return (row.get(name) or {}).get(inner)
    found = row.get(name)
    return (row.get("shape") or {}).get(name) if found is None else found


def steps(rows: list[Row]) -> list[Row]:
    """Whole steps that say their form and loader, in the order of the loaders; older rows do not."""
    found = [row for row in rows if row["what"] == "step" and row.get("form") and row.get("loader")]
    order = {name: i for i, name in enumerate(LOADERS)}
    forms = list(dict.fromkeys(row["form"] for row in found))
    return sorted(
        found, key=lambda row: (forms.index(row["form"]), order.get(row["loader"], len(order)))
    )


def ours(rows: list[Row], what: str) -> list[Row]:
    """Rows of this kind that are of the preset that the page is about."""
    found = steps(rows) if what == "step" else [row for row in rows if row["what"] == what]
    return [row for row in found if (row.get("preset") or row["variant"]) == aims.PRESET]


def same_size(one: Row, other: Row, names: tuple[str, ...] = ("size", "width", "batch")) -> bool:
    """Whether two rows are of pictures and networks of one size, as far as they say it."""
    pairs = ((of(one, name), of(other, name)) for name in names)
    return all(a == b for a, b in pairs if a is not None and b is not None)


# ---- the figures of a row ----


def figures_of(row: Row) -> Iterator[tuple[Figure, str, str]]:
    """The figures that a row tells, each with the name of the field that holds it and its unit."""
    variant, unit = row.get("variant") or "", row.get("unit") or ""
    match row["what"]:
        case "loader" if row.get("mode") == "crops" and variant in contestants.ON_A_GPU:
            yield Figure(WHOLE, variant), "images_per_s", "images/s"
        case "loader" if row.get("mode") == "crops":
            yield Figure(ALONE, variant), "p50", unit
        case "loader" if str(row.get("mode")).startswith("crops, beside"):
            yield Figure(BESIDE, variant), "p50", unit
        case "matrix product" | "copy" if row.get("theme") == "train":
            yield Figure(CEILING, row["what"]), "p50", unit
        case "roofline":
            name = other_preset(row)
            for told, field in TERMS.items():
                yield Figure(FLOOR, f"{name}{told}"), field, "s" if told == "epoch" else "ms"
        case "step" if row.get("form") and row.get("loader"):
            name = f"{other_preset(row)}{row['form']}, {row['loader']}"
            yield Figure(RATE, name), "images_per_s", "images/s"
            yield Figure(TIME, name), "p50", unit
            yield Figure(WAIT, name), "wait_share", "share"
            yield Figure(MATRIX, name), "share_of_matrix", "share"
            yield Figure(IDLE, name), "idle_share", "share"
            yield Figure(MEMORY, name), "peak_memory_mb", "MB"
        case "bank's share of a step":
            yield Figure(BANK, aims.PRESET if aims.PRESET in variant else variant), "p50", "share"
        case "epoch" if row.get("form"):
            name = f"{other_preset(row)}{row['form']}, {row['loader']}"
            yield Figure(EPOCH, name), "p50", unit
            yield Figure(EPOCH, f"{name}: of it, training"), "split.train", "s"
            yield Figure(EPOCH, f"{name}: of it, validation"), "split.validation", "s"
        case "baseline":
            name = _short(variant)
            yield Figure(BASELINE, f"{name}: images/s"), "p50", unit
            yield Figure(BASELINE, f"{name}: step"), "step_ms", "ms"
            yield Figure(BASELINE, f"{name}: epoch"), "epoch_s", "s"
        case "baseline ratio":
            yield Figure(BASELINE, _short(variant)), "p50", unit
        case "communication":
            yield Figure(BYTES, variant), "p50", unit
            for kind in row.get("counted") or ():
                yield Figure(BYTES, f"{variant}: of it, {kind}"), f"counted.{kind}", unit
        case "scaling":
            yield Figure(SCALING, f"{variant}: images/s"), "p50", unit
            yield Figure(SCALING, f"{variant}: an epoch"), "seconds_per_epoch", "s"
            at_most = Figure(SCALING, f"{variant}: images/s, gradients sent beside the step")
            yield at_most, "full_overlap.images_per_s", "images/s"
        case "learning":
            yield Figure(LEARNING, variant), "p50", unit
        case what if row.get("theme") == "train" and what not in ("step", "step part"):
            yield Figure(EXPERIMENTS, f"{what}: {variant}"), "p50", unit


def _short(variant: str) -> str:
    return variant.replace("original's way, ", "")


def other_preset(row: Row) -> str:
    preset = row.get("preset") or (row["variant"] if row["what"] == "roofline" else aims.PRESET)
    return "" if preset == aims.PRESET else f"{preset}: "


def values(rows: list[Row]) -> dict[Figure, Value]:
    """The figures of one machine; the newest row of each."""
    found: dict[Figure, Value] = {}
    for row in sorted(rows, key=lambda row: row["when"]):
        for figure, field, unit in figures_of(row):
            value = of(row, field)
            if isinstance(value, int | float):
                found[figure] = Value(row, value, unit)
    return found


def missing(rows: Iterable[Row]) -> list[Figure]:
    """The figures that a CPU has to have and that no CPU's row tells."""
    there = {
        figure for each in machines(rows).values() if not on_gpu(each) for figure in values(each)
    }
    return [figure for figure in required() if figure not in there]


def required() -> list[Figure]:
    return [Figure(group, name) for group, names in REQUIRED.items() for name in names]
