"""Figures of trained nets for papers: first filters, where stages answer (attention), what answers hang on (saliency).

Each is written as a PNG of 300 dpi and an SVG whose words stay text, as wide as one column of a paper or two.
"""

import functools
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from fastrot import assemble, dist
from fastrot.config import Config, RunError, UsageError
from fastrot.core import Batch
from fastrot.data.boxes import read_boxes
from fastrot.data.loader import Loader
from fastrot.disk import write_atomically
from fastrot.evals import maps
from fastrot.evals.asked import Named, loader_of, own_pictures, writable
from fastrot.evals.compare import names_of
from fastrot.evals.features import exact
from fastrot.evals.picture import INK, RED, embedded, first_filters, legible, write_html
from fastrot.evals.saliency import asker, boxed, layers_of, maps_of, whole_pictures
from fastrot.evals.trained import Trunk, load, net_of, trained_method
from fastrot.ops.rotate import rotated_views
from fastrot.training.device import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE, HIGH = 3.3, 6.9, 9.0  # inches: the width of one column and of two, a page's height
GAP, SPACE = 0.1, 0.03  # inches: between blocks, between pictures
TEXT, LETTER, LINE = 7, 0.06, 0.13  # points; inches that a letter takes, and a line
COLOURS = "viridis"
MOST = 12  # pictures of a sheet
WIDEST = 16  # stages
RANDOM = "(random)"  # weights; no run is called so


class Block(NamedTuple):
    """Columns of a sheet that stand together: n pictures under each heading, or maps from 0 to 1."""

    title: str
    columns: Mapping[str, np.ndarray]


def filters(knobs: Any) -> Path:
    """Draw what a draw.Filters asks for; return the page."""
    tiles = first_filters(load(knobs.run).net)
    if tiles is None:
        raise UsageError(f"{knobs.run} begins with no convolution that sees colours: name another")
    told = "Filters of the first convolution, each scaled by its own largest weight; grey is 0"
    figure = alone(tiles, COLUMN, interpolation="nearest")
    return write(knobs, {"filters": (figure, f"{told}. {of_step(knobs.run)}.")})


def attention(knobs: Any) -> Path:
    """Draw what a draw.Attention asks for; return the page."""
    device = choose_device(knobs.device, dist.place())
    runs = (knobs.run, *knobs.beside)
    nets = dict(zip(names_of(tuple(map(Path, runs))), (load(r, device) for r in runs), strict=True))
    trunk, *others = nets.values()
    stages = _stages(trunk, knobs.stages)
    for run, other in zip(knobs.beside, others, strict=True):
        if (other.size, other.stages) != (trunk.size, trunk.stages):
            told = f"{run} has other stages, or sees {other.size} pixels a side, not {trunk.size}"
            raise UsageError(f"--beside: {told}: name another")
    powers = [*knobs.powers, *knobs.powers[-1:] * len(stages)][: len(stages)]
    if len(knobs.powers) > len(stages) or not all(0 < p < np.inf for p in powers) or not powers:
        got = " ".join(f"{power:g}" for power in knobs.powers)
        raise UsageError(f"--powers got {got}: give numbers above 0, one a stage ({len(stages)})")
    named, rows = pictures_of(knobs, trunk.config, MOST)
    loader = loader_of(named.data, rows, trunk.config, knobs, device)
    images = torch.cat([batch.images for batch in _batches(loader, named)])
    if knobs.random:
        nets[RANDOM] = load(knobs.run, device, learnt=False)
    blocks = [Block(n, _answers(net, images, stages, powers)) for n, net in nets.items()]
    pictures = Block("", {"": images.cpu().numpy()})
    across = max(1, WIDEST // len(stages))
    lines = [[pictures, *blocks[i : i + across]] for i in range(0, len(blocks), across)]
    some = sorted({min(2, len(stages) - 1), min(4, len(stages) - 1)})
    turned = []
    for rotation in range(4):
        seen = torch.rot90(images, rotation, (1, 2)).contiguous()
        maps_of_it = _answers(trunk, seen, [stages[i] for i in some], [powers[i] for i in some])
        turned.append(Block(f"{90 * rotation}°", {"": seen.cpu().numpy(), **maps_of_it}))
    each = ", ".join(f"{stage} {power:g}" for stage, power in zip(stages, powers, strict=True))
    told = f"{len(images)} pictures of {named.name}"
    drawn = "; ".join([of_step(run) for run in runs] + ["random weights"] * knobs.random)
    scale = f"p is {each}; each map from its least (dark) to its largest value (yellow, {COLOURS})"
    sheets = {
        "attention": (
            sheet(lines),
            f"Attention to {told}: the sum over a stage's channels of |activation|^p; {scale}. {drawn}.",
        ),
        "rotations": (
            sheet([turned]),
            f"Attention to {told} in four rotations, by the same p and scale. {of_step(knobs.run)}.",
        ),
    }
    return write(knobs, sheets)


def saliency(knobs: Any) -> Path:
    """Draw what a draw.Saliency asks for; return the page."""
    device = choose_device(knobs.device, dist.place())
    methods = {
        n: trained_method(knobs.run, device, learnt=n != RANDOM)
        for n in (Path(knobs.run).resolve().name, RANDOM)
    }
    net = net_of(knobs.run)
    layers = layers_of(net, knobs.layers)
    named, rows = pictures_of(knobs, net.cfg, MOST)
    boxes = read_boxes(named.data) if "boxes.npz" in named.data.beside else None
    if boxes is not None:
        rows = boxed(boxes, named, None, knobs.pictures)
    batches = _batches(whole_pictures(named.data, rows, net, knobs, device), named)
    pictures = np.concatenate([batch.images.cpu().numpy() for batch in batches])
    blocks = [Block("", {"": pictures})]
    for name, method in methods.items():
        columns = {}
        for layer in layers:
            ask = asker(method, layer)
            found = torch.cat([maps_of(ask, b, net.cfg, knobs.reduce).cpu() for b in batches])
            most = found.flatten(1).quantile(0.99, dim=1).clamp_min(1e-30)
            columns[layer] = (found / most[:, None, None]).numpy()
        blocks.append(Block(name, columns))
    seen = torch.cat([batch.index for batch in batches]).tolist()
    frames = [] if boxes is None else [boxes.squashed(row, pictures.shape[1]) for row in seen]
    of = {"rotation": "the rotations' scores", "embedding": "the features of the last stage"}
    told = (
        f"Saliency: the gradient of {' and of '.join(of[layer] for layer in layers)} by the picture's pixels, its largest "
        f"absolute value over colours and the {knobs.reduce} over neurons, each map from 0 (dark) to its 99th percentile "
        f"(yellow, {COLOURS}); {'frames are boxes of objects' if boxes is not None else 'the data has no boxes'}. "
        f"{len(pictures)} pictures of {named.name}; {of_step(knobs.run)}, and its network with random weights."
    )
    return write(knobs, {"saliency": (sheet([blocks], frames), told)})


def pictures_of(knobs: Any, cfg: Config, most: int) -> tuple[Named, Int64[np.ndarray, " n"]]:
    """The data that is meant, and of its rows as many as are asked for, evenly spread."""
    if not 1 <= knobs.pictures <= most:
        raise UsageError(f"--pictures got {knobs.pictures}: choose 1 to {most:,}")
    if knobs.data is None:
        named = own_pictures(knobs.run, cfg, "val", knobs.loader, "--data")
    else:
        named = Named(assemble.open_data(knobs.data, knobs.loader), knobs.data, None)
    rows = np.arange(named.data.rows) if named.rows is None else np.load(named.rows)
    spread = np.linspace(0, len(rows) - 1, min(knobs.pictures, len(rows)))
    return named, rows[spread.round().astype(int)]


def of_step(run: str) -> str:
    return f"{run} at step {net_of(run).step:,}"


# ---- on paper ----


def sheet(
    lines: Sequence[Sequence[Block]], boxes: Sequence[Int64[np.ndarray, "k 4"]] = ()
) -> "Figure":
    """Blocks side by side in each line, a row for each picture, its boxes (r0 c0 r1 c1) over all that stands in it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = max(sum(len(block.columns) for block in line) for line in lines)
    wide = COLUMN if count <= 6 else PAGE
    rows, gaps = len(next(iter(lines[0][0].columns.values()))), GAP * (max(map(len, lines)) - 1)
    cell = min((wide - gaps) / count, HIGH / (rows * len(lines)))
    wide = gaps + count * cell
    said = max(heading.count("\n") for line in lines for b in line for heading in b.columns)
    head = LINE * (said + 2)
    top = high = len(lines) * (head + rows * cell + GAP) - GAP
    figure = Figure(figsize=(wide, high))
    for line in lines:
        left = 0.0
        for block in line:
            broad = len(block.columns) * cell
            say(figure, left + broad / 2, top - LINE, block.title, room=broad)
            for heading, pictures in block.columns.items():
                say(figure, left + cell / 2, top - head, heading)
                for row, picture in enumerate(pictures):
                    x, y = left + SPACE / 2, top - head - (row + 1) * cell + SPACE / 2
                    side = (cell - SPACE) / wide, (cell - SPACE) / high
                    axes = figure.add_axes((x / wide, y / high, *side))
                    axes.set_axis_off()
                    axes.imshow(picture, vmin=0, vmax=1, cmap=COLOURS)
                    for r0, c0, r1, c1 in boxes[row] if boxes else ():
                        frame = Rectangle((c0 - 0.5, r0 - 0.5), c1 - c0, r1 - r0, clip_on=False)
                        axes.add_patch(frame).set(facecolor="none", edgecolor=RED, linewidth=0.8)
                left += cell
            left += GAP
        top -= head + rows * cell + GAP
    return figure


def alone(picture: UInt8[np.ndarray, "h w 3"], wide: float, **how: Any) -> "Figure":
    """A picture, so many inches wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, wide * picture.shape[0] / picture.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(picture, **how)
    return figure


def say(figure: "Figure", x: float, y: float, text: str, room: float = np.inf) -> None:
    """Text on a line at y, its middle at x inches; the end of it where there is no room for all."""
    wide, high = figure.get_size_inches()
    text = "\n".join(map(legible, text.split("\n")))
    if len(text) > (letters := max(4, room / LETTER)):
        text = "…" + text[1 - int(letters) :]
    look = {"size": TEXT, "color": INK, "ha": "center", "linespacing": 1.1, "parse_math": False}
    figure.text(x / wide, (y + 0.03) / high, text, **look)


def write(knobs: Any, figures: Mapping[str, tuple["Figure", str]]) -> Path:
    """Write figures into --out by their names, and a page with each and its caption; print the captions."""
    import matplotlib

    writable(knobs.out, "--out")
    parts = []
    for name, (figure, caption) in figures.items():
        for kind, more in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            save = functools.partial(figure.savefig, format=kind, dpi=300, **more)
            # words stay words; the same figure, the same bytes
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
                write_atomically(knobs.out / f"{name}.{kind}", save)
        print(caption)
        parts += [embedded(knobs.out / f"{name}.png", name), f"<p>{html.escape(caption)}</p>"]
    return write_html(
        knobs.out / "index.html", f"{next(iter(figures)).title()} of {knobs.run}", *parts
    )


# ---- of nets ----


def _stages(trunk: Trunk, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Those asked for, or all that give maps but pools. Raises UsageError for one that gives none, and for too many."""
    empty = torch.zeros(1, 3, trunk.size, trunk.size, device=next(trunk.parameters()).device)
    names = asked or trunk.stages
    maps = {
        n: each.ndim == 4 for n, each in zip(names, trunk.net.outputs(empty, names), strict=True)
    }
    chosen = asked or tuple(n for n in names if maps[n] and not n.startswith("pool"))
    flat = [name for name in chosen if not maps[name]]
    if flat or not 1 <= len(chosen) <= WIDEST:
        got = f"{flat[0]}, which gives no map" if flat else f"{len(chosen)}"
        raise UsageError(f"--stages got {got}: name 1 to {WIDEST} that give maps")
    return chosen


def _answers(
    trunk: Trunk, images: UInt8[Tensor, "n s s 3"], stages: Sequence[str], powers: Sequence[float]
) -> dict[str, np.ndarray]:
    """Attention maps over the pictures, by what stands over their column."""
    views = rotated_views(images, (0,), trunk.mean, trunk.std, dtype=torch.float32)
    with exact():
        found = maps.attention(trunk.net, views, stages, powers)
    return {
        f"{stage}\np = {power:g}": maps.upscaled(each, images.shape[1]).cpu().numpy()
        for stage, power, each in zip(stages, powers, found, strict=True)
    }


def _batches(loader: Loader, named: Named) -> list[Batch]:
    batches = list(loader.epoch(0))
    if not batches:
        raise RunError(f"no picture of {named.name} to be drawn can be read: prepare it anew")
    return batches
