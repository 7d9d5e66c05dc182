"""Rows of results as a page a theme: benchmarks/reports/<theme>_<machine>_<yyyymm>.md, the same as .html, plots as .png.

    python -m benchmarks.report [--results FOLDER] [--out FOLDER]

Every figure on a page is a row's; the last column names its line in the file of results. Of rows with the same key
(what, variant, mode, shape, dtype, machine) the newest counts.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import base64
import html
import json
import re
from typing import Any

from benchmarks import advice, bench_quality, measure
from fastrot import entry
from fastrot.config import Refused

TITLES = {
    "loaders": "Loaders and conversion",
    "cifar": "Learning on real pictures: CIFAR-10",
    "decoupling": "Decoupling on real pictures: ten ImageNet classes",
    "ops": "Ops",
    "train": "A training step",
    "demo": "The demonstration",
    "cold": "Data that is not in memory: orders of an epoch",
    "chaos": "Killed, and gone on",
    "quality": "What encodings keep: the choice of the pack's",
}
APART = ("quality",)  # themes whose figures stand in a table for each thing that is measured
BEGIN, END = (
    "<!-- measured: written by `make report`, from the lines in benchmarks/results -->\n",
    "<!-- /measured -->",
)
KEY = ("what", "variant", "mode", "shape", "dtype", "gpu", "cpu", "cores")
SHOWN = {  # columns beside what every row has
    "images_per_s": "images/s",
    "waited": "share waited",
    "bytes_per_image": "bytes a picture",
    "gb_per_s": "GB/s",
    "share_of_peak": "share of copy",
    "share_of_gather": "share of random gather",
    "tflops": "TFLOP/s",
    "share_of_matrix": "share of matrix peak",
    "with_ms": "with, ms",
    "without_ms": "without, ms",
    "peak_memory_mb": "peak MB",
    "parent_mb": "parent MB",
    "worker_mb": "a worker MB",
    "seconds": "seconds",
    "images_per_core": "images/s and core",
    "read_mb": "MB read",
    "kb_per_image": "kB read an image",
    "kb_per_request": "kB a request",
    "resident_mb": "most MB of the file in memory",
    "first_batch_s": "first batch, s",
    "label_bits": "label bits a batch",
    "most_bits": "most bits",
    "memory_mb": "memory, MB",
    "mean_db": "mean, dB",
    "pooled_db": "pooled, dB",
    "p5_db": "p5, dB",
    "ssim": "mean SSIM",
    "p5_ssim": "p5 SSIM",
    "bytes_a_pixel": "bytes a pixel",
    "bytes_a_picture": "bytes a picture",
    "mean_ms": "mean, ms",
    "mean": "mean",
}
VERSIONS = ("python", "torch", "torchvision", "triton", "cuda", "numpy", "simplejpeg", "opencv")
VERSIONS += ("ffcv", "numba", "webdataset", "nvidia-dali-cuda130")
VERSIONS += ("etcpak", "texture2ddecoder", "scikit-image")
STYLE = "body{font:16px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left}table{border-collapse:collapse;font-size:90%}img{max-width:100%}pre{overflow-x:auto;font-size:75%;background:#f6f6f6;padding:1em}"


def newest(file: Path) -> list[dict[str, Any]]:
    """The rows that count, each with its `line` in the file, in the order in which they were first measured."""
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        if not row.get("commit"):
            raise Refused(f"line {number} of {file} has no commit: take it out, and measure again")
        key = json.dumps([row.get(name) for name in KEY], sort_keys=True)
        if key not in found or row["when"] >= found[key]["when"]:
            found[key] = {**row, "line": number}
    return list(found.values())


# ---- a page, as parts: headings, paragraphs, tables, pictures, code ----


def page(theme: str, rows: list[dict[str, Any]], name: str, plots: list[Path]) -> list[tuple]:
    lines = [{k: v for k, v in row.items() if k != "line"} for row in rows]
    return [
        ("title", f"{TITLES.get(theme, theme)}: {rows[0]['gpu'] or _processor(rows[0])}"),
        ("list", conclusion(rows)),
        *(("picture", plot) for plot in plots),
        *(advice.parts(rows) if theme == "loaders" else []),
        ("heading", "Figures"),
        (
            "text",
            f"Medians, with the 20th and 80th percentile of the repetitions. Line: in {name}.",
        ),
        *(("table", figures(some)) for some in tables(theme, rows)),
        *(("text", f"Note: {about}.") for about in _each(rows, "about")),
        *decided(theme, rows),
        ("heading", "Machine, versions, commands"),
        ("table", machine(rows)),
        ("heading", "The lines"),
        ("code", "\n".join(json.dumps(line) for line in lines)),
    ]


def conclusion(rows: list[dict[str, Any]]) -> list[str]:
    """What to think of it: each target, met or missed and by how much; what binds the reader."""
    said = []
    judged = [row for row in rows if row.get("target") is not None]
    for row in judged:
        limit = f"at {'least' if row['better'] == 'higher' else 'most'} {_number(row['target'])}"
        met = "met" if measure.met(row) else "MISSED"
        said.append(
            f"{met}: {row['what']}, {row['variant']}: {_number(row['p50'])} {row['unit']} where {limit} "
            f"was the target ({row['p50'] / row['target']:.0%} of it)."
        )
    core = {row["variant"]: row for row in rows if row["what"] == "loader"}
    whole, ours = core.get("beton, whole pictures decoded"), core.get("beton")
    if whole and ours:
        said.append(
            f"Decoding whole pictures takes {ours['p50'] / whole['p50']:.0%} of the .beton reader's time on the "
            "processor: the decoder binds it."
        )
    cold = [row for row in rows if row["what"] == "cold epoch"]
    if cold and cold[0]["shape"]["MB"] < cold[0]["memory_mb"]:
        said.append(
            f"The file of {cold[0]['shape']['MB']:,} MB fits into the memory of {_number(cold[0]['memory_mb'])} MB: an "
            "epoch from the disk is a first one, in which every order reads each byte once. Where memory is stood in "
            "for, pages were dropped by the benchmark, not by the system, and the column of MB in memory tells how well."
        )
    met = sum(map(measure.met, judged))
    return [
        f"{met} of {len(judged)} targets met." if judged else "No row here has a target.",
        *said,
    ]


def tables(theme: str, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each table of a page."""
    if theme not in APART:
        return [rows]
    return [[row for row in rows if row["what"] == what] for what in _each(rows, "what")]


def decided(theme: str, rows: list[dict[str, Any]]) -> list[tuple]:
    """What follows from the figures, where a choice hangs on them."""
    if theme != "quality":
        return []
    return [("heading", "The decision"), ("list", bench_quality.decision(rows))]


def figures(rows: list[dict[str, Any]]) -> list[list[str]]:
    more = {k: label for k, label in SHOWN.items() if any(row.get(k) is not None for row in rows)}
    table = [["what", "variant", "median", "p20 to p80", "unit", "n", *more.values(), "of", "line"]]
    for row in rows:
        of = [f"{k} {v}" for k, v in (row.get("shape") or {}).items()]
        void = "VOID" if row.get("void") else None
        table.append(
            [
                *(row["what"], row.get("variant") or "", _number(row["p50"])),
                *(f"{_number(row['p20'])} to {_number(row['p80'])}", row["unit"], str(row["reps"])),
                *("" if row.get(k) is None else _number(row[k]) for k in more),
                ", ".join(filter(None, [void, row.get("mode"), row.get("dtype"), *of])),
                str(row["line"]),
            ]
        )
    return table


def machine(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What the figures come from; more than one value where rows differ."""
    names = ("cpu", "cores", "gpu", "driver", "power_limit_w", *VERSIONS, "command")
    table = [["", ""], *([name, ", ".join(_each(rows, name))] for name in names)]
    commits = {
        f"{r['commit'][:12]}{' with changes not committed' * bool(r['dirty'])}" for r in rows
    }
    table.append(["commit", ", ".join(sorted(commits))])
    table.append(["measured", f"{min(r['when'] for r in rows)} to {max(r['when'] for r in rows)}"])
    return [line for line in table if line[1] or line == ["", ""]]


def _each(rows: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))


def _processor(row: dict[str, Any]) -> str:
    return f"{row['cpu']}, {row['cores']} cores"


def _number(value: float) -> str:
    """Three digits, or all of a larger one."""
    if abs(value) < 1e-9:
        return "0"  # a slope through equal points
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- plots ----


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
    axes.bar_label(bars, [_number(value) for value in middle], padding=8)
    axes.set_xlim(0, 1.15 * max(r["p80"] for r in found))


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
    axes.set_ylabel("share of turns told right")
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
    line(judged, seen, "prec_rot", "#1b6ca8", "o-", ": of the half that tells turns")
    line(judged, seen, "prec_inv", "#d95f02", "o-", ": of the other half")
    judged.axhline(found[0]["chance"], color="grey", linestyle=":", label="chance")
    judged.set_xlabel("epochs")
    titles = ("loss against the memory bank", "the other losses", "held-out turns told right")
    for axes, title in zip((contrast, others, judged), titles, strict=True):
        axes.set_ylabel(title)
        axes.legend(loc="best", fontsize="small")
    return figure


def _cold(rows: list[dict[str, Any]]):
    """Rates of each order in each mode, and how its batches mix the sorted file's classes."""
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
    right.set_ylabel("held-out turns told right, by seed")
    right.set_xlabel("bytes a pixel")
    right.set_ylim(bottom=min([0.5, *(row["lowest"] for row in learnt.values())]))
    db.set_xlim(0, 1.2 * max(row["bytes_a_pixel"] for row in kept))
    return figure


def _axes(height: float):
    figure, (axes,) = _panels(1, height)
    return figure, axes


def _panels(count: int, height: float, *, shared: bool = True):
    """So many panels, one above the other, over one x axis unless not `shared`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, 1, sharex=shared, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


# ---- Markdown and HTML ----


def markdown(parts: list[tuple]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def table(rows: list[list[str]]) -> str:
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])

    write = {
        "title": lambda text: f"# {text}",
        "heading": lambda text: f"## {text}",
        "text": lambda text: text,
        "list": lambda lines: "\n".join(f"- {line}" for line in lines),
        "table": table,
        "picture": lambda path: f"![{path.stem}]({path.name})",
        "code": lambda text: f"```json\n{text}\n```",
    }
    return "\n\n".join(write[kind](what) for kind, what in parts) + "\n"


def as_html(parts: list[tuple]) -> str:
    """One file that opens from disk: pictures are inside."""

    def table(rows: list[list[str]]) -> str:
        head, *body = rows
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
        names = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in [names, *lines]) + "</table>"

    def picture(path: Path) -> str:
        inside = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{inside}">'

    write = {
        "title": lambda text: f"<title>{html.escape(text)}</title><h1>{html.escape(text)}</h1>",
        "heading": lambda text: f"<h2>{html.escape(text)}</h2>",
        "text": lambda text: f"<p>{html.escape(text)}</p>",
        "list": lambda lines: (
            f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        ),
        "table": table,
        "picture": picture,
        "code": lambda text: f"<pre>{html.escape(text)}</pre>",
    }
    body = "\n".join(write[kind](what) for kind, what in parts)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><style>{STYLE}</style>\n{body}\n</html>\n'


def write(file: Path, out: Path) -> list[Path]:
    """The pages of one file of results."""
    themes: dict[str, list[dict[str, Any]]] = {}
    for row in newest(file):
        themes.setdefault(row.get("theme", "ops"), []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for theme, rows in themes.items():
        month = re.sub("-", "", max(row["when"] for row in rows)[:7])
        stem = out / f"{theme}_{file.stem}_{month}"
        parts = page(theme, rows, file.name, draw(theme, rows, stem))
        for suffix, text in ((".md", markdown(parts)), (".html", as_html(parts))):
            made.append(stem.with_name(stem.name + suffix))
            made[-1].write_text(text)
    return made


def readme_table(files: list[Path]) -> str:
    """The figures that have a target, for the README: each a row's, with the command that measures it."""
    lines = ["| what | measured | target | on | command |", "| --- | --- | --- | --- | --- |"]
    for file in files:
        for row in newest(file):
            if row.get("target") is None:
                continue
            least = "at least" if row["better"] == "higher" else "at most"
            missed = "" if measure.met(row) else " (missed)"
            what = ", ".join(filter(None, [row["what"], row.get("variant"), row.get("mode")]))
            module = re.search(r"benchmarks[./]\w+", row["command"])
            command = f"python -m {module[0].replace('/', '.')}" if module else row["command"]
            lines.append(
                f"| {what} | {_with_unit(row['p50'], row['unit'])}{missed} | {least} "
                f"{_with_unit(row['target'], row['unit'])} | {row['gpu'] or _processor(row)}, torch "
                f"{row['torch']} | `{command}` |"
            )
    return "\n".join(lines) + "\n"


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{_number(value)} {unit}"


def refresh(readme: Path, files: list[Path]) -> None:
    """Put the table between the README's marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + readme_table(files) + END + rest.split(END, 1)[1])


def main() -> int:
    """A page a theme for each file of results, and the README's table."""
    here = measure.ROOT / "benchmarks"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--out", type=Path, default=here / "reports")
    asked = parser.parse_args()
    files = sorted(asked.results.glob("*.jsonl"))
    if not files:
        raise Refused(
            f"{asked.results} holds no results: run make bench, or name a folder with --results"
        )
    for file in files:
        for made in write(file, asked.out):
            print(made)
    if asked.results == here / "results":
        refresh(measure.ROOT / "README.md", files)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
