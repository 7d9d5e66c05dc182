"""The picture of each topic's page, drawn from one machine's rows; None where there is no row to draw.

Colours are Okabe and Ito's, which the colour-blind tell apart; what they tell, a hatch, a mark or a name tells too.
"""

from collections.abc import Iterable
from typing import Any

from benchmarks.measure import EPOCH_S, OTHERS, PRESET, number

BLACK, GREY, BLUE, SKY, GREEN = "#000000", "#999999", "#0072B2", "#56B4E9", "#009E73"
YELLOW, ORANGE, RED, PURPLE = "#F0E442", "#E69F00", "#D55E00", "#CC79A7"
PARTS = {  # of a step
    **{"wait": BLACK, "views": YELLOW, "forward": BLUE, "losses": GREEN, "nce": PURPLE},
    **{"backward": SKY, "optimiser": ORANGE, "bank": RED, "rest": GREY},
}
CORES = 16  # of a machine that hours are told for
OURS, PACK = "beton, C++ decoder", "pack, C++ decoder"
YARDSTICKS = {
    "FFCV, its own pipeline": "FFCV",
    "DALI, its own pipeline, same JPEGs": "DALI",
    "webdataset + PIL, same JPEGs": "webdataset",
    "torchvision uint8": "torchvision",
}
FROM_JPEGS = {  # a loader's row -> its name for people, whether it is ours
    OURS: (".beton, C++ decoder", True),
    "DALI, our order and boxes": ("DALI decoding our batches", True),
    "tar shards": ("tar shards", True),
    "beton": (".beton, Python decoder", True),
    "FFCV's Loader, our order and boxes": ("FFCV decoding our batches", True),
    "FFCV, its own pipeline": ("FFCV", False),
    "DataLoader + simplejpeg, same JPEGs": ("DataLoader, simplejpeg and OpenCV", False),
    "DALI, its own pipeline, same JPEGs": ("DALI", False),
    "torchvision v2 uint8, same JPEGs": ("torchvision v2", False),
    "folder": ("image folder of originals", True),
    "webdataset + PIL, same JPEGs": ("webdataset", False),
    "torchvision uint8": ("torchvision ImageFolder, originals", False),
    "torchvision normalised float": ("the same, normalised floats", False),
}
OTHERWISE = {
    PACK: ("pack, C++ decoder", True),
    "beton, raw, C++ resampler": (".beton of raw pixels", True),
    "FFCV, its own pipeline, raw": ("FFCV, raw pixels", False),
}
BESIDE = "crops, beside a stand-in for the step"
LINEAR, KNN = "linear probe, top-1", "kNN, top-1"  # tables of the study of ten ImageNet classes


class Rows(list[dict[str, Any]]):
    """Rows of one machine, asked by what they are of."""

    def all(self, what: str, variant: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        wanted = {"what": what} | ({} if variant is None else {"variant": variant}) | fields
        return [row for row in self if all(row.get(k) == v for k, v in wanted.items())]

    def one(self, what: str, variant: str | None = None, **fields: Any) -> dict[str, Any] | None:
        """The newest of them."""
        found = self.all(what, variant, **fields)
        return max(found, key=lambda row: row["when"], default=None)


def latest(rows: Rows) -> Rows:
    """Those of a study's sizes that were measured last; of one second the last row's."""
    newest = max(reversed(rows), key=lambda row: row["when"], default=None)
    return Rows(row for row in rows if newest and row.get("shape") == newest.get("shape"))


def steps(rows: Rows) -> list[dict[str, Any]]:
    """Whole steps that say their form and loader; older rows do not."""
    return [row for row in rows.all("step") if row.get("form") and row.get("preset") == PRESET]


def panels(rows: int, height: float, heights: list[float] | None = None, width: float = 8):
    """A figure and its panels, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    each = figure.subplots(rows, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes in each:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, each


def bars(axes, names: list[str], values: list[float], said: Iterable[str], **style: Any) -> None:
    """Horizontal bars, the first name on top, each with what is said of it behind its end."""
    spread = style.get("xerr")
    made = axes.barh(range(len(names)), values, capsize=2, ecolor=BLACK, **style)
    axes.bar_label(made, list(said), padding=5, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(
        0,
        1.16
        * max(
            v + e for v, e in zip(values, spread[1] if spread else [0] * len(values), strict=True)
        ),
    )


def spread(rows: list[dict[str, Any]]) -> list[list[float]]:
    """How far below and above the median the middle three fifths reach."""
    return [[r["p50"] - r["p20"] for r in rows], [r["p80"] - r["p50"] for r in rows]]


# ---- the topics' pictures ----


def loaders(rows: Rows):
    """Images a second and core, ours and others': what decodes JPEGs, and what reads pixels that are encoded otherwise."""
    from matplotlib.patches import Patch

    found = []
    for names in (FROM_JPEGS, OTHERWISE):
        each = [row for name in names if (row := rows.one("loader", name, mode="crops"))]
        found.append(sorted(each, key=lambda row: -row["p50"]))
    found = [each for each in found if each]
    if not found:
        return None
    heights = [1.0 + 0.3 * len(each) for each in found]
    figure, every = panels(len(found), sum(heights), heights)
    for axes, each in zip(every, found, strict=True):
        names = [(FROM_JPEGS | OTHERWISE)[row["variant"]] for row in each]
        drawn = axes, [name for name, _ in names], [r["p50"] for r in each]
        bars(
            *drawn,
            [number(r["p50"]) for r in each],
            xerr=spread(each),
            color=[BLUE if ours else ORANGE for _, ours in names],
            hatch=["" if ours else "///" for _, ours in names],
            edgecolor="white",
        )
        jpegs = each[0]["variant"] in FROM_JPEGS
        axes.set_title(
            "from JPEGs of a short side of 256 pixels, but for originals"
            if jpegs
            else "from packs and raw pixels",
            loc="left",
            fontsize=10,
        )
    every[-1].set_xlabel("random crops of 224 pixels a second, for each processor core")
    kinds = [
        Patch(fc=BLUE, label="this project"),
        Patch(fc=ORANGE, hatch="///", ec="white", label="others"),
    ]
    every[0].legend(handles=kinds, loc="lower right", fontsize=9)
    return figure


def throughput(rows: Rows):
    """The parts of each step on top of each other, and how long an epoch of ImageNet takes."""
    from matplotlib.patches import Patch

    parted = [row for row in steps(rows) if row["split"]]
    epochs = [
        row
        for row in [*rows.all("baseline"), *rows.all("epoch")]
        if row.get("epoch_s") or row["what"] == "epoch"
    ]
    if not parted or not epochs:
        return None
    heights = [1.0 + 0.32 * len(parted), 1.0 + 0.32 * len(epochs)]
    figure, (above, below) = panels(2, sum(heights) + 0.5, heights, width=9)
    names, ends = [f"{row['form']}, {row['loader']}" for row in parted], [0.0] * len(parted)
    for part, colour in PARTS.items():
        values = [row["split"].get(part) or 0.0 for row in parted]
        above.barh(range(len(parted)), values, left=ends, color=colour, ec="white", lw=0.5)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for at, (row, end) in enumerate(zip(parted, ends, strict=True)):
        above.text(end, at, f"  {number(row['images_per_s'])} images/s", va="center", fontsize=8)
    above.set_yticks(range(len(names)), names, fontsize=9)
    above.set_ylim(len(names) - 0.4, -0.6)
    above.set_xlim(0, 1.2 * max(ends))
    above.set_xlabel("milliseconds a step, by its parts")
    handles = [Patch(color=colour, label=part) for part, colour in PARTS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=9, fontsize=8)
    hours = [(row["p50"] if row["what"] == "epoch" else row["epoch_s"]) / 3600 for row in epochs]
    names = [f"ours, {r['form']}, pack" if r["what"] == "epoch" else r["variant"] for r in epochs]
    mine = [name.startswith("ours") for name in names]
    bars(
        *(below, names, hours, [f"{each:.2g} h" for each in hours]),
        color=[BLUE if each else ORANGE for each in mine],
        hatch=["" if each else "///" for each in mine],
        edgecolor="white",
    )
    guess = ", extrapolated from some seconds" if any(r.get("extrapolated") for r in epochs) else ""
    below.set_xlabel(f"hours for an epoch of ImageNet{guess} (the aim on one H200: {EPOCH_S} s)")
    return figure


def cifar(rows: Rows):
    """Accuracy as it trains, and at the end on held-out pictures."""
    row = next((row for row in rows if row.get("curve")), None)
    if row is None:
        return None
    figure, (axes,) = panels(1, 3.4)
    seconds = [point["s"] for point in row["curve"]]
    shares = [point["accuracy"] for point in row["curve"]]
    axes.plot(seconds, shares, color=BLUE, label="training pictures, none seen before")
    axes.plot(seconds[-1], row["p50"], "o", color=RED, label="held-out pictures, at the end")
    axes.axhline(row["chance"], color=GREY, ls=":", label="guessing")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("rotations predicted right")
    axes.legend(loc="lower right", fontsize=9)
    return figure


def decoupling(rows: Rows):
    """The losses, and what the rotation head reads from either half of the features, by epoch."""
    row = next((row for row in rows if row.get("curve")), None)
    if row is None:
        return None
    losses, seen = row["curve"]["losses"], row["curve"]["validations"]
    figure, (above, below) = panels(2, 6)
    for name, colour, style in (
        ("loss_nce", RED, "-"),
        ("loss_cls", BLUE, "--"),
        ("loss_mse", BLACK, ":"),
    ):
        points = [(point["epoch"], point[name]) for point in losses]
        above.plot(*zip(*points, strict=True), style, color=colour, label=name)
    above.set_yscale("log")
    above.set_ylabel("training losses")
    halves = {
        "prec_rot": ("o-", BLUE, "the half meant for rotations"),
        "prec_inv": ("s-", RED, "the other half"),
    }
    for name, (style, colour, label) in halves.items():
        points = [(point["epoch"], point[name]) for point in seen]
        below.plot(*zip(*points, strict=True), style, color=colour, ms=3, label=f"from {label}")
    below.axhline(row["chance"], color=GREY, ls=":", label="guessing")
    below.set_ylabel("held-out rotations predicted right")
    below.set_xlabel("epochs")
    for axes in (above, below):
        axes.legend(loc="center right", fontsize=9)
    return figure


def chaos(rows: Rows):
    """Kills by what the run was doing, and by signal."""
    row = rows.one("kills survived to the same bits")
    if row is None:
        return None
    counts = row["by_phase"] | row["by_signal"]
    figure, (axes,) = panels(1, 0.8 + 0.28 * len(counts))
    names = [*(f"during {name}" for name in row["by_phase"]), *row["by_signal"]]
    colours = [BLUE] * len(row["by_phase"]) + [SKY] * len(row["by_signal"])
    bars(axes, names, list(counts.values()), map(str, counts.values()), color=colours)
    axes.set_xlabel("kills, each survived to the same bits" if not row["mismatches"] else "kills")
    return figure


def ops(rows: Rows):
    """The contrastive loss with its gradient, plain and ours."""
    found = [row for row in rows.all("nce_loss") if "given" not in row["variant"]]
    if not found:
        return None
    figure, (axes,) = panels(1, 1 + 0.32 * len(found))
    plain = [row["variant"].startswith("plain") for row in found]
    names = [
        f"{'plain PyTorch' if p else 'ours, ' + r['variant']}, {r['dtype']}, {r['mode'].rpartition(', ')[2]}"
        for p, r in zip(plain, found, strict=True)
    ]
    bars(
        *(axes, names, [r["p50"] for r in found], [number(r["p50"]) for r in found]),
        xerr=spread(found),
        color=[ORANGE if p else BLUE for p in plain],
        hatch=["///" if p else "" for p in plain],
        edgecolor="white",
    )
    axes.set_xlabel("milliseconds: contrastive loss and its gradient")
    return figure


def cold(rows: Rows):
    """Images a second of each order from a cold disk, and how its batches mix a class-sorted file."""
    found = rows.all("cold epoch")
    if not found:
        return None
    modes = list(dict.fromkeys(row["mode"] for row in found))
    heights = [1.0 + 0.32 * sum(row["mode"] == mode for row in found) for mode in modes]
    figure, every = panels(len(modes), sum(heights), heights)
    for axes, mode in zip(every, modes, strict=True):
        each = [row for row in found if row["mode"] == mode]
        said = [
            f"{number(r['p50'])}; mixes {r['label_bits']:.2g} of {r['most_bits']:.2g} bits"
            for r in each
        ]
        bars(axes, [r["variant"] for r in each], [r["p50"] for r in each], said, color=SKY)
        axes.set_xlim(0, 1.5 * max(r["p50"] for r in each))
        axes.set_title(
            mode.replace("memory stood in for", "with little memory"), loc="left", fontsize=10
        )
    every[-1].set_xlabel("images/s")
    return figure


def quality(rows: Rows):
    """What is kept of pictures, and what is learnt from them, against the bytes."""
    kept = rows.all("picture quality")
    if not kept:
        return None
    figure, (above, below) = panels(2, 6.5)
    for row in kept:
        name, size = row["variant"], row["bytes_a_pixel"]
        colour, mark = (RED, "D") if name == "ycc" else (BLUE, "o")
        above.plot(size, row["mean_db"], mark, color=colour)
        down = -10 if name in ("ycc", "jpeg 95") else 4  # neighbours
        above.annotate(
            name, (size, row["mean_db"]), (6, down), textcoords="offset points", fontsize=9
        )
        learnt = rows.one("held-out rotation accuracy", name)
        if learnt:
            below.plot(
                [size] * len(learnt["values"]), learnt["values"], mark, color=colour, alpha=0.5
            )
            below.plot(size, learnt["mean"], "_", color=colour, ms=22, mew=2)
            below.annotate(
                name,
                (size, learnt["mean"]),
                (14, -12 if name == "jpeg 75" else 3),
                textcoords="offset points",
                fontsize=9,
            )
    if originals := rows.one("held-out rotation accuracy", "originals"):
        below.axhspan(
            originals["lowest"], originals["highest"], color="#dddddd", label="the originals"
        )
        below.legend(loc="lower right", fontsize=9)
    above.set_ylabel("mean PSNR, dB")
    below.set_ylabel("held-out rotations, by seed")
    below.set_xlabel("bytes a pixel")
    for axes in (above, below):
        axes.set_xlim(0, 1.2 * max(row["bytes_a_pixel"] for row in kept))
    return figure


def scale(rows: Rows):
    """Bytes a picture, on disk and in the bank."""
    found = rows.all("prepared file")
    bank = rows.one("bank", "float32 rows saved")
    if not found or bank is None:
        return None
    names = [f"as {'.beton' if row['variant'] == 'beton' else 'a pack'}" for row in found] + [
        "memory bank, float32"
    ]
    values = [*(row["p50"] / 1e3 for row in found), bank["bytes_a_row"] / 1e3]
    figure, (axes,) = panels(1, 2)
    bars(axes, names, values, [f"{number(v)} kB" for v in values], color=[BLUE, BLUE, RED])
    axes.set_xlabel("kB a picture: as many TB for a billion")
    return figure


def study(rows: Rows):
    """A panel for each table of more than one column: a line for each of its lines, over the seeds' means and spread; and one of
    histograms for each title of a study's spreads.
    """
    from matplotlib.ticker import PercentFormatter

    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in latest(rows):
        if row.get("values") and row["what"] != "order":
            tables.setdefault(row["what"], {}).setdefault(row["variant"], []).append(row)
    tables = {name: t for name, t in tables.items() if max(map(len, t.values())) > 1}
    spreads: dict[str, list[dict[str, Any]]] = {}
    for row in latest(rows).all("spread"):
        spreads.setdefault(row["mode"], []).append(row)
    count = len(tables) + len(spreads)
    if not count:
        return None
    figure, every = panels(count, 2.8 * count, width=11)
    for axes, (title, lines) in zip(every[len(tables) :], spreads.items(), strict=True):
        nets = dict.fromkeys(row["variant"].removesuffix(OTHERS) for row in lines)
        colours = dict(zip(nets, (BLUE, ORANGE, GREEN, RED, PURPLE, BLACK), strict=False))
        for row in lines:
            edges = [row["most"] * n / len(row["shares"]) for n in range(len(row["shares"]) + 1)]
            net = row["variant"].removesuffix(OTHERS)
            look = {"color": colours[net], "linestyle": "-" if net == row["variant"] else ":"}
            axes.stairs(row["shares"], edges, label=row["variant"], linewidth=1.6, **look)
        axes.set_title(title, loc="left", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes, (name, lines) in zip(every, tables.items(), strict=False):
        looks = zip((BLUE, ORANGE, GREEN, RED, PURPLE, BLACK, SKY, GREY), "os^Dv*PX", strict=True)
        for (line, cells), (colour, mark) in zip(lines.items(), looks, strict=False):
            means = [sum(row["values"]) / len(row["values"]) for row in cells]
            # a mean of equal numbers may be beyond them
            both = list(zip(means, cells, strict=True))
            low = [max(0.0, mean - min(row["values"])) for mean, row in both]
            high = [max(0.0, max(row["values"]) - mean) for mean, row in both]
            columns = [row["mode"] for row in cells]
            style = {"color": colour, "marker": mark, "ms": 4, "capsize": 2}
            axes.errorbar(columns, means, (low, high), label=line, **style)
        axes.set_title(name, loc="left", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
