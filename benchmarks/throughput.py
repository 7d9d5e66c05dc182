"""One page over all machines: how quick an epoch is, what bounds a step, and what is not measured yet.

throughput.md, the same as throughput.html, and plots beside them, from rows of every file of results. Every figure leads to
its row; `aims` holds the only others, each with its source.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import aims, contestants, pages, throughput_plots
from benchmarks.figures import (
    IDLE,
    MEMORY,
    NO_PICTURES,
    PARTS,
    REQUIRED,
    TERMS,
    WHOLE,
    Figure,
    Machines,
    Row,
    Value,
    machines,
    missing,
    of,
    on_gpu,
    other_preset,
    ours,
    read,
    required,
    same_size,
    steps,
    values,
)
from benchmarks.measure import met, number
from benchmarks.pages import cited
from fastrot.speed import bounds

NOT_MEASURED, OF_A_GPU = "not measured", "of a GPU only"


# ---- the table of all figures ----


def table(found: Machines) -> list[list[str]]:
    """A line for each figure, a column for each machine; a column for GPUs, and for CPUs, whatever there is."""
    columns = {f"CPU: {name}": values(rows) for name, rows in found.items() if not on_gpu(rows)}
    columns = columns or {"CPU": {}}
    gpus = {f"GPU: {name}": values(rows) for name, rows in found.items() if on_gpu(rows)}
    columns |= gpus or {"GPU": {}}
    told = dict.fromkeys([*required(), *(f for column in columns.values() for f in column)])
    groups = list(REQUIRED)
    lines = [["", "figure", "unit", *columns]]
    for figure in sorted(told, key=lambda figure: groups.index(figure.group)):
        each = [column.get(figure) for column in columns.values()]
        unit = next((value.unit for value in each if value), "")
        cells = (_cell(figure, value, name) for name, value in zip(columns, each, strict=True))
        lines.append([figure.group, figure.name, "%" if unit == "share" else unit, *cells])
    return lines


def _cell(figure: Figure, value: Value | None, column: str) -> str:
    if value is None:
        return OF_A_GPU if column.startswith("CPU") and _needs_a_gpu(figure) else NOT_MEASURED
    return cited(value.row, plain(value.value, value.unit)) + marks(value.row, value.unit)


def _needs_a_gpu(figure: Figure) -> bool:
    form = figure.name.split(", ")[0].split(" + ")
    return (
        figure.group in (IDLE, MEMORY, WHOLE)
        or figure.name in contestants.ON_A_GPU
        or (figure.group.startswith("Step") and "graph" in form)
    )


def plain(value: float, unit: str) -> str:
    """A value as it stands in a cell, in its unit or in percent."""
    return f"{100 * value:.3g}" if unit == "share" else number(value)


def marks(row: Row, unit: str) -> str:
    """What has to be said beside a figure; what is extrapolated in a row is its seconds."""
    said = ["extrapolated"] * bool(row.get("extrapolated") and unit == "s")
    said += ["modelled"] * bool(row.get("modelled"))
    return " †" * bool(row.get("dirty")) + "".join(f", {each}" for each in said)


# ---- what to think of it ----


def verdicts(found: Machines) -> list[str]:
    """What bounds the step on each machine, how much quicker it is than the original's way, what misses its target."""
    said = []
    for name, rows in found.items():
        best = quickest(rows)
        if best is None:
            said.append(f"{name}: no step of {aims.PRESET} is measured.")
            continue
        said.append(
            f"{name}: the quickest step of {aims.PRESET} end to end is {best['form']} with {best['loader']}: "
            f"{_told(best, 'images_per_s', 'images/s')}, {_told(best, 'p50', 'ms')} a step{_largest(best)}."
        )
        said += [f"{name}: {each}" for each in (*_bound(best, rows), *_speed_up(best, rows))]
    return [*said, *_targets(found)]


def quickest(rows: list[Row]) -> Row | None:
    """The step with the most images/s, of those that read pictures where there are any."""
    found = [row for row in ours(rows, "step") if row.get("images_per_s")]
    reading = [row for row in found if row["loader"] not in NO_PICTURES]
    return max(reading or found, key=lambda row: row["images_per_s"], default=None)


def _told(row: Row, field: str, unit: str) -> str:
    told = f"{plain(of(row, field), unit)} {'%' if unit == 'share' else unit}"
    return cited(row, told.strip()) + marks(row, unit)


def _largest(step: Row) -> str:
    """The part of a step that takes longest."""
    split = {part: ms for part, ms in (step.get("split") or {}).items() if ms}
    if not split:
        return ""
    part = max(split, key=lambda part: split[part])
    return f", of whose parts {part} is the longest, {_told(step, f'split.{part}', 'ms')}"


def _bound(step: Row, rows: list[Row]) -> Iterator[str]:
    """What binds the step, and how much of it is floor."""
    floors = [row for row in ours(rows, "roofline") if same_size(row, step)]
    if not floors:
        yield "what bounds the step is not told, since no floor of its size is measured."
        return
    floor, idle = floors[-1], step.get("idle_share")
    seconds, waited = step["p50"] / 1e3, step.get("wait_share") or 0.0
    measured = bounds.Measured(
        step=seconds,
        wait=waited * seconds,
        busy=None if idle is None else (1 - idle) * seconds,
        arithmetic=floor["matrix_ms"] / 1e3,
        memory=(floor["traffic_ms"] + floor["optimiser_ms"]) / 1e3,
    )
    rest = (
        "" if idle is None else f", the GPU is idle for {_told(step, 'idle_share', 'share')} of it"
    )
    yield (
        f"bound by {bounds.bound(measured)}: data is waited for {_told(step, 'wait_share', 'share')} of the step{rest}; "
        f"matrix products take at least {_told(floor, 'matrix_ms', 'ms')}, other kernels' traffic "
        f"{_told(floor, 'traffic_ms', 'ms')}, the optimiser {_told(floor, 'optimiser_ms', 'ms')}."
    )
    share = floor["p50"] / step["p50"]
    yield f"of the step, {_told(floor, 'p50', 'ms')} / {_told(step, 'p50', 'ms')} = {share:.3g} is floor."


def _speed_up(step: Row, rows: list[Row]) -> Iterator[str]:
    """Times the original's way: side by side as that benchmark has it, and of the quickest step where sizes agree."""
    for row in rows:
        name = (row.get("variant") or "").replace("original's way", "the original's way")
        if row["what"] == "baseline ratio":
            mine, theirs = name.split(" / ")
            yield f"{mine} is {_told(row, 'p50', 'times')} as quick as {theirs}, side by side in one run."
        elif row["what"] == "baseline" and name.startswith("the original's") and row.get("epoch_s"):
            yield _beside(step, row, name)


def _beside(step: Row, row: Row, name: str) -> str:
    """The quickest step's images/s over those of the original's way."""
    if not same_size(row, step, ("size", "width")):
        return f"the quickest step is not compared with {name}, which is of another size."
    times = step["images_per_s"] / row["p50"]
    other = "" if same_size(row, step) else ", which has another batch"
    other += "" if row["commit"] == step["commit"] else ", measured at another commit"
    return (
        f"the quickest step over {name}{other}: {_told(step, 'images_per_s', 'images/s')} / "
        f"{_told(row, 'p50', 'images/s')} = {times:.3g} times."
    )


def _targets(found: Machines) -> Iterator[str]:
    """Each target: met, missed, or not measured."""
    gpus = {name: rows for name, rows in found.items() if on_gpu(rows)}
    epochs = [
        (name, row) for name, rows in gpus.items() for row in ours(rows, "epoch") if is_whole(row)
    ]
    for name, row in epochs:
        grade = next((told for limit, told in _grades() if row["p50"] <= limit), "MISSED")
        yield f"{grade}: an epoch on {name}, {row['form']}, {row['loader']}: {_told(row, 'p50', 's')} (target {aims.EPOCH_S} s)."
    if not epochs:
        yield f"Not measured: an epoch on a GPU (target {aims.EPOCH_S} s)."
    for name, rows in gpus.items():
        for row in ours(rows, "step"):
            if row["loader"] not in NO_PICTURES and (row.get("wait_share") or 0) > aims.WAITED:
                yield (
                    f"MISSED: {row['form']} with {row['loader']} on {name} waits for data "
                    f"{_told(row, 'wait_share', 'share')} of a step (target under {aims.WAITED:.0%})."
                )
    for name, rows in found.items():
        for row in rows:
            if row.get("theme") == "train" and row.get("target") is not None and not met(row):
                yield f"MISSED: {row['what']}, {row['variant']} on {name}: {_told(row, 'p50', row['unit'])}."


def _grades() -> tuple[tuple[float, str], ...]:
    return (
        (aims.EPOCH_S, "met"),
        (aims.VERY_GOOD_S, "MISSED, very good"),
        (aims.GOOD_S, "MISSED, good"),
    )


def is_whole(row: Row) -> bool:
    """Whether an epoch's row is of all of ImageNet at full size and measured from end to end."""
    size = row["images"] == aims.IMAGENET and of(row, "width") in (None, 1, 1.0)
    return size and not row.get("extrapolated") and bool(row.get("validation"))


# ---- the page ----


def parts(found: Machines, drawn: dict[str, Path], scale: list[Path]) -> list[tuple]:
    """The page; `drawn`: its plots by name; `scale`: pages of a billion pictures."""

    def section(heading: str, plot: str, about: str, *more: tuple) -> list[tuple]:
        picture = ("picture", drawn[plot]) if plot in drawn else ("text", f"{NOT_MEASURED}.")
        return [("heading", heading), ("text", about), picture, *more]

    every = [row for rows in found.values() for row in rows]
    return [
        ("title", "Throughput: an epoch, and what bounds a step"),
        ("list", verdicts(found)),
        ("text", _sizes(found)),
        *section(
            "Throughput by loader",
            "loaders",
            "Dots are medians, lines reach over the middle three fifths of the repetitions; the axes are logarithmic.",
        ),
        *section(
            "A step's time",
            "steps",
            "Parts are timed with marks at their borders, whole steps without; both from `loop.train_step` itself.",
            *_tables(_split_table(found)),
        ),
        *section(
            "The floor of a step",
            "floor",
            "Each layer's forward and backward at the ceilings that the same run measured: a large matrix product, and a copy "
            "in the device's memory. Other kernels run beside no matrix product, so the terms add up.",
            *_tables(*_floor_tables(found)),
        ),
        *section(
            "Seconds per epoch",
            "epochs",
            f"Held against: {aims.REFERENCE}. Targets: {aims.AIMS}.",
            *_notes(found, "epoch", "baseline"),
        ),
        *section(
            "Scaling", "scaling", *_scaling(found), *_notes(found, "communication", "scaling")
        ),
        *section(
            "Learning curves",
            "learning",
            "Held-out rotations predicted right, and their loss, by step; each line a seed.",
            *_notes(found, "learning"),
        ),
        ("heading", "Every figure"),
        ("text", _about_table(every)),
        ("table", table(found)),
        ("text", _told_missing(every)),
        *([("heading", "A billion pictures")] if scale else []),
        *(("page", each) for each in scale),
        ("heading", "The lines"),
    ]


def _tables(*tables: list[list[str]]) -> list[tuple]:
    return [("table", each) for each in tables if len(each) > 1]


def _notes(found: Machines, *kinds: str) -> list[tuple]:
    """What rows of these kinds say about how they were measured, and what follows; each once for a machine."""
    said = {}
    for name, rows in found.items():
        for row in (row for row in rows if row["what"] in kinds):
            for told in filter(None, (row.get("judgement"), row.get("about"))):
                said[name, told] = f"{name}: {cited(row, told)}."
    return [("list", list(said.values()))] if said else []


def _sizes(found: Machines) -> str:
    """What the steps on each machine were of."""
    said = []
    for name, rows in found.items():
        told = {
            f"batch {_told(row, 'batch', '')}, {_told(row, 'size', 'pixels')}, "
            f"width {_told(row, 'width', '')}": None
            for row in ours(rows, "step")[:1]
            if None not in (of(row, "batch"), of(row, "size"), of(row, "width"))
        }
        said += [f"Steps on {name} are of {each}." for each in told]
    return " ".join([*said, "Figures of networks of other sizes do not compare."])


def _split_table(found: Machines) -> list[list[str]]:
    lines = [["machine", "form", "loader", *(f"{part}, ms" for part in PARTS)]]
    for name, rows in found.items():
        for row in filter(lambda row: row.get("split"), steps(rows)):
            each = (of(row, f"split.{part}") for part in PARTS)
            cells = ("" if ms is None else cited(row, number(ms)) for ms in each)
            lines.append([name, f"{other_preset(row)}{row['form']}", row["loader"], *cells])
    return lines


def _floor_tables(found: Machines) -> Iterator[list[list[str]]]:
    """The three terms on each machine, and what each layer asks for."""
    floors = [["machine", *(f"{term}, {'s' if term == 'epoch' else 'ms'}" for term in TERMS)]]
    layers = [
        ["machine", "layer", "GFLOP", "traffic, MB", "traffic not fused, MB", "parameters, MB"]
    ]
    scale = {"flop": 1e9, "traffic": 1e6, "traffic_unfused": 1e6, "weights": 1e6}
    for name, rows in found.items():
        for row in ours(rows, "roofline")[-1:]:
            each = (of(row, field) for field in TERMS.values())
            floors.append([name, *("" if v is None else cited(row, number(v)) for v in each)])
            for layer in row.get("layers") or ():
                asked = (
                    cited(row, number((layer.get(field) or 0) / by)) for field, by in scale.items()
                )
                layers.append([name, layer["name"], *asked])
    yield floors
    yield layers


def _scaling(found: Machines) -> tuple[Any, ...]:
    """What the modelled figures stand on."""
    lines = [["modelled", "from a step of, ms", "on", "bytes a step and rank", "at GB/s", "link"]]
    for row in (row for rows in found.values() for row in rows if row["what"] == "scaling"):
        step, sent, speed = (of(row, name) for name in ("step_ms", "bytes", "link_gb_per_s"))
        told = (cited(row, number(value)) if value is not None else "" for value in (sent, speed))
        on, link = row.get("step_on") or "", row.get("link")
        lines.append(
            [row["variant"], cited(row, number(step)), on, *told, cited(row, link) if link else ""]
        )
    about = (
        "One GPU, or processor, is measured; more are modelled, not measured: the measured step, and behind it the bytes that "
        "ranks were counted to send each other, over links whose speed is an assumption. The bars reach to where "
        "gradients are sent beside the step as far as they fit."
    )
    return about, *_tables(lines)


def _about_table(rows: list[Row]) -> str:
    said = "Each figure leads to its row; of several rows the newest counts."
    if any(row.get("dirty") for row in rows):
        said += " † was measured with changes that no commit has."
    return said


def _told_missing(rows: list[Row]) -> str:
    absent = [f"{figure.group}: {figure.name}" for figure in missing(rows)]
    if not absent:
        return "No figure that a CPU has to have is missing."
    return f"Missing on the CPU: {'; '.join(absent)}."


def page(files: dict[Path, list[Row]], drawn: dict[str, Path], scale: list[Path]) -> list[tuple]:
    """All of it: its parts, and the lines that they lead to."""
    rows = read(files)
    made = parts(machines(rows), drawn, scale)
    cites = pages.citations(made)
    return [*made, ("lines", [row for row in rows if (row["file"], row["line"]) in cites])]


def write(files: dict[Path, list[Row]], out: Path, scale: list[Path]) -> list[Path]:
    """The page of these files of results and their rows, its plots beside it, in the folder `out`.

    `scale`: pages of a billion pictures beside it, which it leads to.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn = throughput_plots.draw(machines(read(files)), out)
    whole = page(files, drawn, scale)
    results = os.path.relpath(next(iter(files)).parent, out).replace(os.sep, "/")
    made = [out / "throughput.md", out / "throughput.html"]
    made[0].write_text(pages.markdown(whole, results))
    made[1].write_text(pages.as_html(whole))
    return [*made, *drawn.values()]
