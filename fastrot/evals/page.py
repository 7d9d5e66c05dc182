"""A run's page: plots/*.png and one index.html that opens from disk, made from the files of the run's folder."""

import base64
import functools
import html
import itertools
import json
import math
import time
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from fastrot import dist
from fastrot.config import flat
from fastrot.core import Batch, Headline, Method
from fastrot.disk import replace_bytes, write_atomically
from fastrot.entry import in_time
from fastrot.evals.picture import BLUE, FAINT, INK, RED, first_filters, legible, rotated_sheet
from fastrot.evals.rotation import rotation_guesses
from fastrot.training.journal import read_lines
from fastrot.training.report import by_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#57606a"
TERMS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # with blue and red: Okabe and Ito's colours
COLOURS = (BLUE, RED, *TERMS)
POINTS = 400  # of a curve: more cannot be told apart at this size
CURVES = ("accuracy", "loss", "throughput", "filters")
TEMPLATE = Path(__file__).with_suffix(".template")


def draw(
    run: Path,
    *,
    headline: Headline,
    net: nn.Module | None = None,
    images: UInt8[Tensor, "n s s 3"] | None = None,
    guesses: Float[Tensor, "n 4 4"] | None = None,
) -> Path:
    """Draw the run as it stands, from its first line on, and return its index.html.

    `guesses`: see `rotated_sheet`. Without `net` or `images`, their plots of an earlier call stay.
    """
    log, plots = RunLog(run, headline), run / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    figures = {"accuracy": _accuracy(log), "loss": _loss(log), "throughput": _throughput(log)}
    if net is not None and (filters := first_filters(net)) is not None:
        figures["filters"] = _filters(log, filters)
    for name, figure in figures.items():
        write_atomically(plots / f"{name}.png", functools.partial(figure.savefig, format="png"))
    if images is not None and len(images):
        rotated_sheet(images, guesses, plots / "turned.png", overall=log.after, footer=log.footer)
    stage = getattr(getattr(net, "trunk", None), "telling", "conv5")
    replace_bytes(run / "index.html", _page(log, stage).encode("utf-8", "replace"))
    return run / "index.html"


class LivePage:
    """The page of a run that goes on: drawn by rank 0, unless it were to cost more than a hundredth of the time."""

    def __init__(self, run: Path, method: Method, shown: Batch | None):
        self.run, self.method, self.shown = run, method, shown  # held-out pictures
        self.drawn, self.cost = -math.inf, 0.0  # when it was last drawn; the seconds that it took

    def at_epoch(self) -> None:
        if dist.rank() == 0 and time.perf_counter() - self.drawn > 100 * self.cost:
            self.draw()

    def draw(self) -> None:
        begun, shown, method = time.perf_counter(), self.shown, self.method
        pictures = None if shown is None else shown.images.cpu()
        guesses = None if shown is None else rotation_guesses(method, shown)
        draw(self.run, headline=method.headline, net=method.net, images=pictures, guesses=guesses)
        self.drawn = time.perf_counter()
        self.cost = self.drawn - begun


class RunLog:
    """What the files of a run's folder tell; each may be missing."""

    def __init__(self, run: Path, headline: Headline):
        self.run, self.headline = run, headline
        self.lines = [line for line in read_lines(run / "metrics.jsonl") if "step" in line]
        self.step = int(self.last("step") or 0)
        self.config, self.environment = _read(run / "config.yaml"), _read(run / "environment.json")
        summary = _read(run / "summary.json")
        # where a finished run was sent on its way again, the old summary no longer holds
        self.summary = summary if (_number(summary.get("steps")) or 0) >= self.step else {}

        first, judged = self.lines[0] if self.lines else {}, f"val_{headline.score}"
        self.before = _number(self.summary.get(f"{judged}_first", first.get(judged)))
        self.after = self.figure(judged)
        self.footer = _footer(self.environment)

    def curve(self, name: str) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Steps and values of one number; neighbours are averaged where there are many. Unknown is NaN."""
        points = [(line["step"], _number(line[name])) for line in self.lines if name in line]
        rows = np.array(points, dtype=np.float64).reshape(-1, 2)
        if len(rows) > POINTS:
            parts = [torch.from_numpy(part) for part in np.array_split(rows, POINTS)]
            rows = np.array([(part[-1, 0], part[:, 1].nanmean()) for part in parts])
        return rows[:, 0], rows[:, 1]

    def last(self, name: str) -> float | None:
        values = (_number(line.get(name)) for line in reversed(self.lines))
        return next((value for value in values if value is not None), None)

    def figure(self, name: str) -> float | None:
        """Of the whole run where it has ended, else the latest."""
        return _number(self.summary[name]) if name in self.summary else self.last(name)

    def say(self, value: float | None) -> str:
        """The headline's score."""
        return "-" if value is None else self.headline.say(value).replace(".0%", "%")


def _footer(environment: dict[str, Any]) -> str:
    """The machine, and what the run was computed with."""
    known = {**environment, **environment.get("versions", {})}
    named = ("fastrot", "torch", "python", "cuda", "commit")
    parts = [f"{name} {known[name]!s:.18}" for name in named if known.get(name)]
    return legible(" · ".join([str(known.get("device", "")), *parts]))[:130]


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


# ---- curves ----


def _accuracy(log: RunLog) -> "Figure":
    figure, (axes,) = _figure("Accuracy", log)
    _curve(axes, log, "accuracy", "training", BLUE)
    _curve(axes, log, "val_accuracy", "held-out", RED, marker="o")
    _curve(axes, log, "val_prec_inv", "held-out, other half", TERMS[0], marker="o", linewidth=1.0)
    of_stages = ("val_top1_", "val_knn_")  # a probe's; an online one's
    names = dict.fromkeys(n for line in log.lines for n in line if n.startswith(of_stages))
    if probed := [name for name in names if name.startswith("val_top1_")]:
        names.pop(probed[-1])  # which is the held-out accuracy
    for name, colour in zip(names, itertools.cycle(TERMS), strict=False):
        label = name.removeprefix("val_").replace("top1_", "").replace("_", " ")
        _curve(axes, log, name, label, colour, marker="o", linewidth=1.0)
    if (chance := log.headline.chance) is not None:
        axes.axhline(chance, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        right = {"ha": "right", "va": "top", "transform": axes.get_yaxis_transform()}
        axes.text(0.995, chance - 0.025, "chance", color=GREY, size=8, **right)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    return figure


def _loss(log: RunLog) -> "Figure":
    figure, (axes,) = _figure("Loss", log)
    names = dict.fromkeys(name for line in log.lines for name in line if name.startswith("loss_"))
    if len(names) > 1:  # a single term is the loss
        axes.set_yscale("log")  # a spread of .001 beside an NCE of 20
        for name, colour in zip(names, itertools.cycle(TERMS), strict=False):
            _curve(axes, log, name, name.removeprefix("loss_"), colour, linewidth=1.0)
    _curve(axes, log, "loss", "training", BLUE)
    several = any("val_prec_inv" in line for line in log.lines)
    judged = "held-out, rotation alone" if several else "held-out"
    _curve(axes, log, "val_loss", judged, RED, marker="o")
    return figure


def _throughput(log: RunLog) -> "Figure":
    title = "Images per second, and share of time waiting for data"
    figure, (speed, waiting) = _figure(title, log, panels=2)
    _curve(speed, log, "images_per_s", "", BLUE)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    _curve(waiting, log, "wait_share", "", RED)
    waiting.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    waiting.yaxis.set_major_formatter("{x:.0%}")
    return figure


def _filters(log: RunLog, filters: UInt8[np.ndarray, "h w 3"]) -> "Figure":
    figure, (axes,) = _figure("Filters of the first layer", log)
    axes.autoscale()  # _figure fixed the limits
    axes.set(frame_on=False, xticks=(), yticks=(), xlabel="", position=(0.012, 0.09, 0.95, 0.8))
    axes.set_anchor("NW")
    axes.imshow(filters)
    return figure


def _figure(title: str, log: RunLog, *, panels: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.5), dpi=160)
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.115, right=0.95, top=0.87, bottom=0.18, hspace=0.2)
    figure.text(0.018, 0.935, title, size=11, weight="bold", color=INK)
    figure.text(0.018, 0.022, log.footer, size=5.5, color=FAINT, parse_math=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c4c9d0")
        axes.tick_params(labelsize=8, colors=GREY, length=3)
        axes.grid(axis="y", color="#eceef1", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(7 - 2 * panels))
        axes.set_xlim(0, max(1, log.step))
    grid[-1, 0].set_xlabel("step", size=8, color=GREY)
    return figure, list(grid.flat)


def _curve(axes: "Axes", log: RunLog, name: str, label: str, colour: str, **look: Any) -> None:
    """One number over the steps, in the legend where it has a label; nothing where there is none yet."""
    steps, values = log.curve(name)
    if np.isnan(values).all():
        return
    if len(steps) > 60:
        look["marker"] = ""
    elif len(steps) < 3:
        look.setdefault("marker", ".")
    label = legible(label).replace("$", r"\$")  # which would begin a formula
    look = {"linewidth": 1.6, "markersize": 4, "clip_on": False, "color": colour, **look}
    axes.plot(steps, values, label=label, **look)
    if label:
        place = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.985), "frameon": False}
        axes.legend(fontsize=8, ncols=5, columnspacing=1.2, handlelength=1.5, **place)


# ---- the page ----


def _page(log: RunLog, stage: str) -> str:
    text, plots = html.escape, log.run / "plots"
    state = f"step {log.step:,} · epoch {log.last('epoch') or 0:g}"
    score, chance, say = log.headline.score, log.headline.chance, log.say
    figure = f"{say(log.before)} <i>→</i> {say(log.after)}"
    note = f"held-out pictures, before training → {'after' if log.summary else 'so far'}"
    if log.after is None:  # nothing is held out
        figure, note = say(log.last(score)), "pictures that it trains on"
    elif not any(f"val_{score}" in line for line in log.lines[1:]):
        figure, note = say(log.before), "held-out pictures, before training"
    note += "" if chance is None else f" · chance {_percent(chance)}"
    speed, seconds = log.figure("images_per_s"), _number(log.summary.get("seconds"))
    tiles = [
        (text(log.headline.title), figure, note),
        ("Images per second", "-" if speed is None else f"{speed:,.0f}", "in training"),
        ("Waiting for data", _percent(log.figure("wait_share")), "share of training time"),
    ]
    if seconds is not None:
        tiles.append(("Training time", in_time(seconds), "without validation"))
    verdict = log.summary.get("verdict")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=text(str(log.config.get("preset", log.run.name))),
        state=state if log.summary else f"{state} · still training",
        tiles="".join(f"<div><h2>{k}</h2><b>{v}</b><p>{note}</p></div>" for k, v, note in tiles),
        verdict="" if verdict is None else f'<p class="verdict">{text(str(verdict))}</p>',
        curves="".join(_picture(plots / f"{name}.png") for name in CURVES),
        rotated=_picture(plots / "turned.png"),
        run=text(str(log.run)),
        quoted=text(json.dumps(str(log.run), ensure_ascii=False)),
        stage=stage,
        stages=_table("By stage", dict(by_stage(log.summary.get("val", {})))),
        config=_table("Configuration", log.config),
        environment=_table("Environment", log.environment),
        footer=text(log.footer),
    )


def _picture(path: Path) -> str:
    if not path.exists():
        return ""
    coded = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="{path.stem}" alt="{path.stem}" src="data:image/png;base64,{coded}">'


def _table(title: str, plain: dict[str, Any]) -> str:
    row, text = "<tr><th>{}</th><td>{}</td></tr>", html.escape
    rows = "".join(row.format(text(str(k)), text(str(v))) for k, v in flat(plain).items())
    return f"<details><summary>{title}</summary><table>{rows}</table></details>" if rows else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}".replace(".0%", "%")
