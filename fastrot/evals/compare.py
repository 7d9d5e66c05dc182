"""Several runs over each other: their curves, and what their probes say of each stage, as a PNG and a page."""

import html
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrot.config import UsageError
from fastrot.core import Headline
from fastrot.evals.page import COLOURS, RunLog
from fastrot.evals.picture import INK, legible, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = ("accuracy", "top1_", "top5_", "prec_", "knn_", "wait_share")  # scores in percent
MARKERS = "os^Dv*PX"


def compare(knobs: Any) -> Path:
    """Draw `scores` of the runs' metrics.jsonl against epoch or step, and top-1 by stage where they probe; return the page.

    knobs  a draw.Compare

    Raises UsageError for fewer than two runs, for a folder that holds none, and for a score that none of them has.
    """
    from matplotlib.figure import Figure

    runs, scores = knobs.runs, knobs.scores
    if len(runs) < 2:
        raise UsageError(f"compare got {len(runs)} run(s): name two or more")
    logs = {}
    for run, name in zip(runs, names_of(runs), strict=True):
        if not (log := RunLog(run, Headline())).lines:
            raise UsageError(f"{run} holds no metrics.jsonl of a run: name runs' folders")
        logs[name] = log
    for score in scores:
        if not any(score in line for log in logs.values() for line in log.lines):
            known = sorted({k for log in logs.values() for line in log.lines for k in line})
            raise UsageError(
                f"--scores got {score}, which no run has: choose of {', '.join(known)}"
            )
    tables = {name: _by_stage(log) for name, log in logs.items()}
    tables = {name: table for name, table in tables.items() if table}
    panels = len(scores) + bool(tables)
    figure = Figure(figsize=(4.6 * panels, 3.8), dpi=160)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    own = zip(logs, itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    looks = {name: {"color": colour, "marker": marker} for name, colour, marker in own}
    for each, score in zip(axes, scores, strict=False):
        _curves(each, logs, score, knobs.against, looks)
    if tables:
        _stages(axes[-1], tables, looks)
    names = [legible(name).replace("$", r"\$") for name in logs]  # which would begin a formula
    figure.legend(
        axes[0].get_lines(), names, loc="upper center", ncols=4, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.08 * -(-len(logs) // 4)))
    table = _table(logs, tables, scores)
    return write_page(knobs.out / "compare.png", figure.savefig, "Runs compared", behind=table)


def names_of(runs: tuple[Path, ...]) -> list[str]:
    """The ends of their paths that tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a run is named twice: name each once")


def _by_stage(log: RunLog) -> dict[str, float]:
    """Top-1 of each stage by the last validation."""
    names = dict.fromkeys(k for line in log.lines for k in line if k.startswith("val_top1_"))
    found = {name.removeprefix("val_top1_"): log.last(name) for name in names}
    return {stage: value for stage, value in found.items() if value is not None}


def _curves(
    axes: "Axes", logs: dict[str, RunLog], score: str, against: str, looks: dict[str, dict]
) -> None:
    for name, log in logs.items():
        steps, values = log.curve(score)
        if against == "epoch":
            steps = steps / _batches(log, name)
        axes.plot(steps, values, markersize=3, linewidth=1.4, **looks[name])
    axes.set(xlabel=against, title=score.removeprefix("val_") + _where(score))
    if score.removeprefix("val_").startswith(SHARES):
        axes.yaxis.set_major_formatter("{x:.0%}")
    _plain(axes)


def _where(score: str) -> str:
    return " on held-out pictures" if score.startswith("val_") else " in training"


def _batches(log: RunLog, name: str) -> float:
    """Steps of an epoch: told by the summary, or by a validation at an epoch's end."""
    if log.summary.get("epochs"):
        return log.summary["steps"] / log.summary["epochs"]
    for line in log.lines:
        if "val_loss" in line and line["step"] and not line.get("partial"):
            return line["step"] / (line["epoch"] + 1)
    raise UsageError(f"{name} has ended no epoch yet: give --against step")


def _stages(axes: "Axes", tables: dict[str, dict[str, float]], looks: dict[str, dict]) -> None:
    stages = list(dict.fromkeys(stage for table in tables.values() for stage in table))
    for name, table in tables.items():
        values = [table.get(stage, np.nan) for stage in stages]
        axes.plot(stages, values, markersize=4, linewidth=1.4, **looks[name])
    axes.set(title="top-1 by stage", xlabel="stage")
    axes.yaxis.set_major_formatter("{x:.0%}")
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.title.set(size=10, color=INK)


def _table(
    logs: dict[str, RunLog], tables: dict[str, dict[str, float]], scores: tuple[str, ...]
) -> str:
    """The last of each score, and top-1 of each stage, a run a row."""
    stages = list(dict.fromkeys(stage for table in tables.values() for stage in table))
    rows = [["run", "steps", *scores, *stages]]
    for name, log in logs.items():
        last = [log.last(score) for score in scores]
        own = [tables.get(name, {}).get(stage) for stage in stages]
        said = ["-" if v is None else f"{v:.4g}" for v in last]
        rows.append(
            [name, f"{log.step:,}", *said, *("-" if v is None else f"{v:.1%}" for v in own)]
        )
    lines = ["".join(f"<td>{html.escape(each)}</td>" for each in row) for row in rows]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"
