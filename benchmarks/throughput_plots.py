"""The plots of the page of throughput, a panel or a line for each machine, drawn from its rows.

Colours are Okabe and Ito's, which the colour-blind tell apart; what they tell, a hatch, a mark or a name tells too.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import advice, aims
from benchmarks.figures import Machines, Row, of, on_gpu, other_preset, ours, steps
from benchmarks.measure import number
from benchmarks.plots import panels_of

BLACK, GREY, BLUE, SKY, GREEN = "#000000", "#999999", "#0072B2", "#56B4E9", "#009E73"
YELLOW, ORANGE, RED, PURPLE = "#F0E442", "#E69F00", "#D55E00", "#CC79A7"
OF_PART: dict[str, str] = {
    "wait": BLACK,
    "views": YELLOW,
    "forward": BLUE,
    "losses": GREEN,
    "nce": PURPLE,
    "backward": SKY,
    "optimiser": ORANGE,
    "bank": RED,
    "rest": GREY,
}
DARK = (BLACK, BLUE, RED)  # white letters stand on them
MARKERS, LINES = "osD^vP*X", (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)
CHANCE = 1 / 4  # of four rotations
ALONE, BESIDE = "crops", "crops, beside a stand-in for the step"


def draw(found: Machines, out: Path) -> dict[str, Path]:
    """The plots as PNG in the folder `out`, by name; none where there is no row to draw."""
    draws: dict[str, Callable[[Machines], Any]] = {
        "loaders": _loaders,
        "steps": _steps,
        "floor": _floor,
        "epochs": _epochs,
        "scaling": _scaling,
        "learning": _learning,
    }
    made = {}
    for name, plot in draws.items():
        file = out / f"throughput_{name}.png"
        figure = plot(found)
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        figure.savefig(file, dpi=110)
        made[name] = file
    return made


def _having(found: Machines, chosen: Callable[[list[Row]], list[Row]]) -> dict[str, list[Row]]:
    """Machines that have such rows, and those."""
    return {name: some for name, rows in found.items() if (some := chosen(rows))}


def _of(what: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if row["what"] == what]


def _spread(rows: Iterable[Row]) -> list[list[float]]:
    return [[r["p50"] - r["p20"] for r in rows], [r["p80"] - r["p50"] for r in rows]]


def _named(rows: list[Row]) -> list[str]:
    return [f"{other_preset(row)}{row['form']}, {row['loader']}" for row in rows]


# ---- loaders ----


def _loaders(found: Machines):
    """Each loader alone and beside a step: a row of panels for each machine, a dot for each."""
    some = _having(found, lambda rows: [row for row in rows if _is_loader(row)])
    if not some:
        return None
    heights = [1 + 0.27 * len({row["variant"] for row in rows}) for rows in some.values()]
    figure, panels = panels_of(
        len(some), sum(heights) + 0.4, columns=2, shared=False, heights=heights, width=11
    )
    for (name, rows), (left, right) in zip(some.items(), panels, strict=True):
        field = "images_per_s" if on_gpu(rows) else "p50"
        alone = sorted((r for r in rows if r["mode"] == ALONE), key=lambda r: r[field])
        beside = [r for r in rows if r["mode"] == BESIDE]
        order = list(dict.fromkeys(row["variant"] for row in [*alone, *beside]))
        _dots(left, alone, order, field)
        _dots(right, beside, order, "p50")
        right.set_yticklabels([])
        left.set_title(name, loc="left", fontsize="medium")
        unit = "images/s of the whole machine" if on_gpu(rows) else "images/s and core"
        left.set_xlabel(f"{unit}, alone")
        right.set_xlabel("images/s, beside a stand-in for the step")
    return figure


def _is_loader(row: Row) -> bool:
    nothing = ("synthetic", "none: the step alone")
    return row["what"] == "loader" and row["variant"] not in nothing


def _dots(axes, rows: list[Row], order: list[str], field: str) -> None:
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if not rows:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    low, high = ("images_per_s_p20", "images_per_s_p80") if field != "p50" else ("p20", "p80")
    for row in rows:
        other = row["variant"].startswith(advice.OTHERS)
        colour, mark = (GREY, "s") if other else (RED, "o")
        at = order.index(row["variant"])
        axes.plot([row.get(low), row.get(high)], [at, at], color=colour, lw=2, alpha=0.6)
        axes.plot(row[field], at, mark, color=colour, ms=6)
        axes.annotate(
            number(row[field]),
            (max(row[field], row.get(high) or 0), at),
            (7, -3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    values = [row[field] for row in rows]
    axes.set_xlim(min(values) / 1.5, max(values) * 3)
    _plain_ticks(axes.xaxis)
    axes.legend(
        handles=[_dot("o", RED, "this project's"), _dot("s", GREY, "others'")],
        loc="lower right",
        fontsize=8,
    )


def _dot(mark: str, colour: str, label: str, face: str | None = None):
    from matplotlib.lines import Line2D

    face = colour if face is None else face
    return Line2D([], [], marker=mark, color=colour, mfc=face, ls="none", label=label)


def _plain_ticks(axis) -> None:
    """Ticks of a logarithmic axis that do not run into each other: 500, 20k, 1M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# ---- steps ----


def _steps(found: Machines):
    """The parts of each step on top of each other, beside the whole step without marks."""
    some = _having(found, steps)
    if not some:
        return None
    heights = [1 + 0.3 * len(rows) for rows in some.values()]
    figure, panels = panels_of(len(some), sum(heights) + 1, shared=False, heights=heights, width=11)
    for (name, rows), (axes,) in zip(some.items(), panels, strict=True):
        splits = [row.get("split") or {} for row in rows]
        ends = _stacked(axes, _named(rows), splits, OF_PART)
        captured = [0.0 if split else row["p50"] for row, split in zip(rows, splits, strict=True)]
        axes.barh(range(len(rows)), captured, color="white", ec=GREY, hatch="....")
        below = [at + 0.42 for at in range(len(rows))]
        axes.plot([row["p50"] for row in rows], below, "^", color="white", mec=BLACK, ms=6)
        for at, (row, end) in enumerate(zip(rows, ends, strict=True)):
            axes.annotate(
                f"{number(row['p50'])} ms, {number(row['images_per_s'])} images/s",
                *((max(end, row["p50"]), at), (9, -3)),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xlim(0, 1.35 * max([*ends, *(row["p50"] for row in rows)]))
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_xlabel("milliseconds a step")
    whole = _dot("^", BLACK, "whole step, without marks", face="white")
    from matplotlib.patches import Patch

    captured = Patch(fc="white", ec=GREY, hatch="....", label="captured whole: no parts")
    handles = [*_patches(OF_PART), whole, captured]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=9)
    return figure


def _stacked(axes, names: list[str], splits: list[dict[str, Any]], colours: dict[str, str]):
    """Bars of parts, the first name on top; where each ends."""
    ends = [0.0] * len(names)
    widest = max(sum(value or 0 for value in split.values()) for split in splits)
    for part, colour in colours.items():
        values = [split.get(part) or 0 for split in splits]
        axes.barh(range(len(names)), values, left=ends, color=colour, ec="white", lw=0.5)
        for at, (value, left) in enumerate(zip(values, ends, strict=True)):
            if value > 0.07 * widest:
                axes.text(
                    *(left + value / 2, at, number(value)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if colour in DARK else "black",
                )
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    return ends


def _patches(colours: dict[str, str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in colours.items()]


# ---- the floor ----


def _floor(found: Machines):
    """What each layer takes at least, by matrix arithmetic and by other kernels' traffic, at the run's own ceilings."""
    some = _having(found, lambda rows: [r for r in ours(rows, "roofline") if r.get("layers")][-1:])
    if not some:
        return None
    heights = [1.2 + 0.27 * (len(rows[0]["layers"]) + 1) for rows in some.values()]
    figure, panels = panels_of(
        len(some), sum(heights) + 0.6, shared=False, heights=heights, width=10
    )
    colours = {"matrix products": BLUE, "other kernels' traffic": SKY, "optimiser": ORANGE}
    for (name, (row,)), (axes,) in zip(some.items(), panels, strict=True):
        layers = row["layers"]
        splits = [_terms_of(layer, row) for layer in layers]
        splits.append({"optimiser": row["optimiser_ms"]})
        names = [*(layer["name"] for layer in layers), "all parameters"]
        ends = _stacked(axes, names, splits, colours)
        more = [
            max(0.0, ((layer.get("traffic_unfused") or 0) - layer["traffic"]))
            / (row["gb_per_s"] * 1e6)
            for layer in layers
        ]
        axes.barh(
            range(len(layers)), more, left=ends[:-1], color="none", ec=GREY, hatch="////", lw=0.8
        )
        axes.set_title(
            f"{name}: floor {number(row['p50'])} ms a step, at {number(row['tflops'])} TFLOP/s "
            f"and {number(row['gb_per_s'])} GB/s",
            loc="left",
            fontsize="medium",
        )
        axes.set_xlabel("milliseconds a step, forward and backward")
    from matplotlib.patches import Patch

    unfused = Patch(fc="none", ec=GREY, hatch="////", label="more, where nothing is fused")
    figure.legend(
        handles=[*_patches(colours), unfused], loc="outside upper center", ncols=4, fontsize=9
    )
    return figure


def _terms_of(layer: dict[str, Any], row: Row) -> dict[str, float]:
    """Milliseconds of a layer at the ceilings of its row."""
    return {
        "matrix products": layer["flop"] / (row["tflops"] * 1e9),
        "other kernels' traffic": layer["traffic"] / (row["gb_per_s"] * 1e6),
    }


# ---- epochs ----


def _epochs(found: Machines):
    """Seconds of an epoch: the reference, the original's way here, ours, the floor; a logarithmic axis."""
    bars = {name: _bars_of(rows) for name, rows in found.items()}
    bars = {name: some for name, some in bars.items() if some}
    if not bars:
        return None
    heights = [1.3 + 0.33 * (len(some) + 1) for some in bars.values()]
    figure, panels = panels_of(len(bars), sum(heights) + 0.6, heights=heights, width=10)
    reference = 3600.0 * aims.REFERENCE_HOURS
    longest = max([reference, *(s for some in bars.values() for _, s, _, _ in some)])
    for (name, some), (axes,) in zip(bars.items(), panels, strict=True):
        some = [("the reference, one GPU of 32 GB", reference, GREY, False), *some]
        for at, (_, seconds, colour, stretched) in enumerate(some):
            axes.barh(
                *(at, seconds),
                color="white" if stretched else colour,
                ec=colour,
                hatch="////" if stretched else None,
            )
            axes.annotate(
                f"{number(seconds)} s",
                *((seconds, at), (5, -3)),
                textcoords="offset points",
                fontsize=8,
                zorder=4,
                bbox={"fc": "white", "ec": "none", "pad": 0.6},
            )
        axes.set_yticks(range(len(some)), [label for label, _, _, _ in some])
        axes.set_ylim(len(some) - 0.4, -0.6)
        axes.axvline(aims.EPOCH_S, color=BLACK, ls="--", lw=1.2, zorder=3)
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_xscale("log")
        axes.set_xlim(min([10, *(0.5 * s for _, s, _, _ in some)]), longest * 3)
        _plain_ticks(axes.xaxis)
    panels[-1, 0].set_xlabel("seconds an epoch, logarithmic")
    figure.legend(handles=_epoch_marks(), loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _epoch_marks() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    target = f"target: {aims.EPOCH_S} s on one H200"
    return [
        Patch(fc="white", ec=BLACK, hatch="////", label="extrapolated from fewer steps"),
        Patch(color=BLUE, label="this project's"),
        Patch(color=ORANGE, label="the original's way, here"),
        Line2D([], [], color=BLACK, ls="--", label=target),
    ]


def _bars_of(rows: list[Row]) -> list[tuple[str, float, str, bool]]:
    """Label, seconds, colour and whether it is extrapolated, of each bar of a machine."""
    baselines = [row for row in rows if row["what"] == "baseline" and row.get("epoch_s")]
    bars = []
    for row in baselines:
        colour = BLUE if row["variant"].startswith("ours") else ORANGE
        of_it = row["epoch_s"], colour, bool(row.get("extrapolated"))
        bars.append((row["variant"] + _size(row), *of_it))
    bars += [
        (
            f"{row.get('form') or ''}, {row['loader']}{_size(row)}".removeprefix(", "),
            *(row["p50"], BLUE, bool(row.get("extrapolated"))),
        )
        for row in ours(rows, "epoch")
    ]
    floors = [row for row in ours(rows, "roofline") if row.get("floor_epoch_s")]
    bars += [("floor" + _size(row), row["floor_epoch_s"], GREEN, False) for row in floors[-1:]]
    return bars


def _size(row: Row) -> str:
    """Its network's width where that is not the paper's, and its pictures' size."""
    width, size = of(row, "width"), of(row, "size")
    said = [f"width {width:g}"] if width not in (None, 1) else []
    said += [f"{size} px"] if size else []
    return f" ({', '.join(said)})" if said else ""


# ---- scaling ----


def _scaling(found: Machines):
    """Images/s of one GPU as measured and of more as modelled, against as many times one; a panel for each kind of run."""
    kinds: dict[str, list[Row]] = {}
    for name, rows in _having(found, _of("scaling")).items():
        for row in sorted(rows, key=_count):
            kinds.setdefault(f"{name}{_kind(row)}", []).append(row)
    if not kinds:
        return None
    figure, panels = panels_of(len(kinds), 3.1 * len(kinds) + 0.4, shared=False, width=8)
    for (name, rows), (axes,) in zip(kinds.items(), panels, strict=True):
        counts, rates = [_count(row) for row in rows], [row["p50"] for row in rows]
        measured = _modelled_from(rows[0], found)
        if measured is not None:
            one = measured["images_per_s"]
            more = [one, one * counts[-1]]
            axes.plot([1, counts[-1]], more, ":", color=GREY, label="as many times one")
            axes.plot(1, one, "o", color=RED, ms=8, label="measured")
            _say(axes, 1, one, f"{number(one)} images/s")
        most = [of(row, "full_overlap.images_per_s") or row["p50"] for row in rows]
        axes.vlines(counts, rates, most, color=BLUE, lw=3, alpha=0.5)
        style = {"color": BLUE, "mfc": "white", "ms": 8, "label": "modelled, not measured"}
        axes.plot(counts, rates, "--o", **style)
        for count, row in zip(counts, rows, strict=True):
            epoch = f"{number(row['seconds_per_epoch'])} s an epoch"
            _say(axes, count, row["p50"], f"{number(row['p50'])} images/s,\n{epoch}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, *counts], [str(count) for count in (1, *counts)])
        axes.set_xlim(0.75, counts[-1] * 3)
        axes.margins(y=0.2)
        axes.set_ylabel("images/s")
        axes.set_title(_modelled_title(name, rows[0]), loc="left", fontsize="medium")
        _plain_ticks(axes.yaxis)
        axes.legend(loc="upper left", fontsize=8)
    panels[-1, 0].set_xlabel("GPUs")
    return figure


def _modelled_title(name: str, row: Row) -> str:
    return f"{name}: from a step of {number(row['step_ms'])} ms"


def _kind(row: Row) -> str:
    """What its variant says behind the number of GPUs."""
    _, _, kind = row["variant"].partition(", ")
    return f", {kind}" if kind else ""


def _count(row: Row) -> int:
    return int(row["variant"].split()[0])


def _modelled_from(row: Row, found: Machines) -> Row | None:
    """The step that the model stands on; none where it is no longer the newest."""
    every = (step for rows in found.values() for step in ours(rows, "step"))
    return next((step for step in every if step["p50"] == row.get("step_ms")), None)


def _say(axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (9, -4), textcoords="offset points", fontsize=8, va="top")


# ---- learning ----


def _learning(found: Machines):
    """Held-out accuracy and loss by step, a line for each seed of each form; panels for each machine and preset."""
    kinds: dict[str, list[Row]] = {}
    for name, rows in _having(found, _of("learning")).items():
        for row in rows:
            kinds.setdefault(f"{name}: {row['preset']}", []).append(row)
    if not kinds:
        return None
    figure, panels = panels_of(len(kinds), 3.4 * len(kinds), columns=2, shared=False, width=11)
    for (name, rows), (accuracy, loss) in zip(kinds.items(), panels, strict=True):
        for row, colour, mark in zip(rows, LINES, MARKERS, strict=False):
            _seeds(accuracy, row, "accuracy", colour, mark)
            _seeds(loss, row, "loss", colour, mark)
        accuracy.axhline(CHANCE, color=GREY, ls=":", lw=1, label="chance")
        accuracy.set_ylabel("share of held-out rotations predicted right")
        accuracy.set_title(name, loc="left", fontsize="medium")
        loss.set_ylabel("held-out loss")
        for axes in (accuracy, loss):
            axes.set_xlabel("steps")
            axes.legend(loc="best", fontsize=8)
    return figure


def _seeds(axes, row: Row, field: str, colour: str, mark: str) -> None:
    """A line for each seed of a row, named once."""
    for i, points in enumerate(row["curves"]):
        told = [(point["step"], point[field]) for point in points]
        style = {"ms": 4, "lw": 1.3, "alpha": 0.8, "label": None if i else row["form"]}
        axes.plot(*zip(*told, strict=True), f"-{mark}", color=colour, **style)
