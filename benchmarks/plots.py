"""The plots of each theme's page, drawn from its rows."""

from pathlib import Path
from typing import Any

from benchmarks import advice, bench_quality
from benchmarks.measure import number


def draw(theme: str, rows: list[dict[str, Any]], stem: Path) -> list[Path]:
    """The theme's plots as PNG beside the page."""
    draws = {
        "loaders": (("loaders", _loaders),),
        "cifar": (("curve", _curve),),
        "decoupling": (("curves", _decoupling),),
        "cold": (("epochs", _cold),),
        "quality": (("encodings", _quality),),
    }
    made = []
    for name, plot in draws.get(theme, ()):
        figure = plot(rows)
        if figure is not None:
            made.append(stem.with_name(f"{stem.name}_{name}.png"))
            figure.savefig(made[-1], dpi=110)
    return made


def _loaders(rows: list[dict[str, Any]]):
    """Each loader alone, per core, and beside a step."""
    modes = {"crops": "images/s and core", "crops, beside a stand-in for the step": "images/s"}
    found = {
        mode: sorted(
            (r for r in rows if r["what"] == "loader" and r["mode"] == mode and _is_loader(r)),
            key=lambda row: row["p50"],
        )
        for mode in modes
    }
    shown = [mode for mode in modes if found[mode]]
    if not shown:
        return None
    figure, panels = _panels(
        len(shown), height=sum(1.2 + 0.5 * len(found[m]) for m in shown), shared=False
    )
    for axes, mode in zip(panels, shown, strict=True):
        _bars(axes, found[mode])
        axes.set_xlabel(f"{modes[mode]} (224-pixel random-resized {mode})")
    return figure


def _is_loader(row: dict[str, Any]) -> bool:
    return row["variant"] not in ("synthetic", "none: the step alone")


def _bars(axes, found: list[dict[str, Any]]) -> None:
    middle = [row["p50"] for row in found]
    spread = [[r["p50"] - r["p20"] for r in found], [r["p80"] - r["p50"] for r in found]]
    others = [row["variant"].startswith(advice.OTHERS) for row in found]
    colours = ["#8da0b3" if other else "#d95f02" for other in others]
    bars = axes.barh([r["variant"] for r in found], middle, xerr=spread, color=colours, capsize=3)
    axes.bar_label(bars, [number(value) for value in middle], padding=8)
    axes.set_xlim(0, 1.15 * max(r["p80"] for r in found))
    axes.margins(y=0.01)


def _curve(rows: list[dict[str, Any]]):
    found = [row for row in rows if row.get("curve")]
    if not found:
        return None
    row = found[0]
    figure, axes = _axes(height=3.6)
    seconds = [point["s"] for point in row["curve"]]
    axes.plot(seconds, [point["accuracy"] for point in row["curve"]], label="training pictures")
    axes.plot(seconds[-1], row["p50"], "o", color="#d95f02", label="held-out pictures, at the end")
    axes.axhline(row["chance"], color="grey", linestyle=":", label="chance")
    axes.axhline(row["target"], color="grey", linestyle="--", label="target")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("share of rotations predicted right")
    axes.legend(loc="lower right")
    return figure


def _decoupling(rows: list[dict[str, Any]]):
    """The losses as they are logged, and what the rotation head reads from either half of the features."""
    found = [row for row in rows if row.get("curve")]
    if not found:
        return None
    losses, seen = (found[0]["curve"][name] for name in ("losses", "validations"))
    figure, (contrast, others, judged) = _panels(3, height=8)

    def line(axes, points: list[dict], name: str, colour: str, style: str = "-", more: str = ""):
        values = [point[name] for point in points]
        axes.plot(
            [p["epoch"] for p in points], values, style, color=colour, ms=3, label=name + more
        )

    line(contrast, losses, "loss_nce", "#d95f02")
    contrast.axhline(losses[0]["loss_nce"], color="grey", linestyle=":", label="its first value")
    contrast.set_ylim(bottom=0)
    line(others, losses, "loss_cls", "#1b6ca8")
    line(others, losses, "loss_mse", "#7a7a7a")
    others.set_yscale("log")
    line(judged, seen, "prec_rot", "#1b6ca8", "o-", ": of the half that predicts the rotation")
    line(judged, seen, "prec_inv", "#d95f02", "o-", ": of the other half")
    judged.axhline(found[0]["chance"], color="grey", linestyle=":", label="chance")
    judged.set_xlabel("epochs")
    titles = (
        "loss against the memory bank",
        "the other losses",
        "held-out rotations predicted right",
    )
    for axes, title in zip((contrast, others, judged), titles, strict=True):
        axes.set_ylabel(title)
        axes.legend(loc="best", fontsize="small")
    return figure


def _cold(rows: list[dict[str, Any]]):
    """LRSchedule of each order in each mode, and how its batches mix the sorted file's classes."""
    found = [row for row in rows if row["what"] == "cold epoch"]
    if not found:
        return None
    modes = list(dict.fromkeys(row["mode"] for row in found))
    figure, panels = _panels(len(modes), height=1 + 2.2 * len(modes), shared=False)
    for axes, mode in zip(panels, modes, strict=True):
        each = [row for row in found if row["mode"] == mode][::-1]
        spread = [[r["p50"] - r["p20"] for r in each], [r["p80"] - r["p50"] for r in each]]
        names = [row["variant"] for row in each]
        bars = axes.barh(names, [r["p50"] for r in each], xerr=spread, color="#8da0b3", capsize=3)
        told = [
            f"{r['label_bits']:.2g} bits, {r['kb_per_image']:,.0f} kB read an image" for r in each
        ]
        axes.bar_label(bars, told, padding=8, fontsize="small")
        axes.set_xlim(0, 1.8 * max(r["p80"] for r in each))
        axes.set_title(mode, loc="left", fontsize="medium")
    panels[-1].set_xlabel("images/s; bits: entropy of the labels of a batch")
    return figure


def _quality(rows: list[dict[str, Any]]):
    """What is kept, and what is learnt from it seed by seed, against the bytes."""
    kept = [row for row in rows if row["what"] == "picture quality"]
    learnt = {row["variant"]: row for row in rows if row["what"] == "held-out rotation accuracy"}
    if not kept:
        return None
    figure, (db, right) = _panels(2, height=7)
    for row in kept:
        name, size = row["variant"], row["bytes_a_pixel"]
        colour = "#d95f02" if name in bench_quality.CANDIDATES else "#8da0b3"
        db.plot([size, size], [row["p5_db"], row["mean_db"]], color=colour, lw=1)
        db.plot(size, row["mean_db"], "o", color=colour)
        down = -10 if name in bench_quality.CANDIDATES else -2  # another may be just above
        db.annotate(name, (size, row["mean_db"]), xytext=(7, down), textcoords="offset points")
        if name in learnt:
            values = learnt[name]["values"]
            right.plot([size] * len(values), values, "o", color=colour, alpha=0.6)
            right.plot(size, learnt[name]["mean"], "_", color=colour, ms=22, mew=2)
            right.annotate(
                name, (size, learnt[name]["mean"]), xytext=(14, 3), textcoords="offset points"
            )
    if originals := learnt.get(bench_quality.ORIGINALS):
        right.axhspan(originals["lowest"], originals["highest"], color="#dddddd", label="originals")
        right.axhline(originals["mean"], color="grey", lw=1)
        right.legend(loc="best", fontsize="small")
    db.set_ylabel("PSNR, dB: mean, down to p5")
    right.set_ylabel("held-out rotations predicted right, by seed")
    right.set_xlabel("bytes a pixel")
    right.set_ylim(bottom=min([0.5, *(row["lowest"] for row in learnt.values())]))
    db.set_xlim(0, 1.2 * max(row["bytes_a_pixel"] for row in kept))
    return figure


def _axes(height: float):
    figure, (axes,) = _panels(1, height)
    return figure, axes


def _panels(count: int, height: float, *, shared: bool = True):
    """So many panels, one above the other, over one x axis unless not `shared`."""
    figure, panels = panels_of(count, height, shared=shared)
    return figure, panels[:, 0]


def panels_of(
    rows: int,
    height: float,
    *,
    columns: int = 1,
    shared: bool = True,
    heights: list[float] | None = None,
    width: float = 8,
):
    """A figure and its panels [rows, columns]; over one x axis where `shared`, as high as `heights` say in parts of them all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        rows, columns, sharex=shared, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
