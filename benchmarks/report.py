"""Rows of results as a page a theme: benchmarks/reports/<theme>_<machine>_<yyyymm>.md, the same as .html, plots as .png.

    python -m benchmarks.report [--results FOLDER] [--out FOLDER] [--strict]

throughput.md and throughput.html are over all machines (see throughput.py); --strict ends with status 1 where a figure
that a CPU has to have is not measured.

Every figure on a page is a row's; the last column names its line in the file of results. Of rows with the same key
(what, variant, form, mode, shape, dtype, machine) the newest counts.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import re
from typing import Any

from benchmarks import advice, bench_quality, billion, figures, measure, pages, plots, throughput
from benchmarks.measure import number
from fastrot import entry
from fastrot.config import UsageError

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
    "scale": "A billion pictures",
}
APART = ("quality",)  # themes whose figures stand in a table for each thing that is measured
BEGIN, END = (
    "<!-- measured: written by `make report`, from the lines in benchmarks/results -->\n",
    "<!-- /measured -->",
)
KEY = ("what", "variant", "form", "mode", "shape", "dtype", "gpu", "cpu", "cores")
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


def newest(file: Path) -> list[dict[str, Any]]:
    """The rows that count, each with its `line` in the file, in the order in which they were first measured."""
    found: dict[str, dict[str, Any]] = {}
    for at, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        if not row.get("commit"):
            raise UsageError(f"line {at} of {file} has no commit: take it out, and measure again")
        key = json.dumps([row.get(name) for name in KEY], sort_keys=True)
        if key not in found or row["when"] >= found[key]["when"]:
            found[key] = {**row, "line": at}
    return list(found.values())


# ---- a page, as parts: headings, paragraphs, tables, pictures, code ----


def page(
    theme: str,
    rows: list[dict[str, Any]],
    name: str,
    drawn: list[Path],
    known: list[dict[str, Any]],
) -> list[tuple]:
    """A theme's page from its rows, those of the file `name`; `known`: all rows of that file."""
    lines = [{k: v for k, v in row.items() if k != "line"} for row in rows]
    return [
        ("title", f"{TITLES.get(theme, theme)}: {rows[0]['gpu'] or _processor(rows[0])}"),
        ("list", conclusion(rows)),
        *(("picture", plot) for plot in drawn),
        *(advice.parts(rows) if theme == "loaders" else []),
        *(billion.parts(known) if theme == "scale" else []),
        ("heading", "Figures"),
        (
            "text",
            f"Medians, with the 20th and 80th percentile of the repetitions. Line: in {name}.",
        ),
        *(("table", table_of(some)) for some in tables(theme, rows)),
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
        limit = f"at {'least' if row['better'] == 'higher' else 'most'} {number(row['target'])}"
        met = "met" if measure.met(row) else "MISSED"
        said.append(
            f"{met}: {row['what']}, {row['variant']}: {number(row['p50'])} {row['unit']} where {limit} "
            f"was the target ({row['p50'] / row['target']:.0%} of it)."
        )
    core = {r["variant"]: r for r in rows if r["what"] == "loader" and r["unit"].endswith("core")}
    whole, ours = core.get("beton, whole pictures decoded"), core.get("beton")
    if whole and ours:
        said.append(
            f"Decoding whole pictures takes {ours['p50'] / whole['p50']:.0%} of the .beton reader's time on the "
            "processor: the decoder binds it."
        )
    cold = [row for row in rows if row["what"] == "cold epoch"]
    if cold and cold[0]["shape"]["MB"] < cold[0]["memory_mb"]:
        said.append(
            f"The file of {cold[0]['shape']['MB']:,} MB fits into the memory of {number(cold[0]['memory_mb'])} MB: an "
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


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    more = {k: label for k, label in SHOWN.items() if any(row.get(k) is not None for row in rows)}
    table = [["what", "variant", "median", "p20 to p80", "unit", "n", *more.values(), "of", "line"]]
    for row in rows:
        of = [f"{k} {v}" for k, v in (row.get("shape") or {}).items()]
        void = "VOID" if row.get("void") else None
        table.append(
            [
                *(row["what"], row.get("variant") or "", number(row["p50"])),
                *(f"{number(row['p20'])} to {number(row['p80'])}", row["unit"], str(row["reps"])),
                *("" if row.get(k) is None else number(row[k]) for k in more),
                ", ".join(filter(None, [void, row.get("mode"), row.get("dtype"), *of])),
                str(row["line"]),
            ]
        )
    return table


def machine(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What the figures come from; more than one value where rows differ."""
    names = ("cpu", "simd", "cores", "gpu", "driver", "power_limit_w", *VERSIONS, "command")
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


# ---- files ----


def write(file: Path, out: Path) -> list[Path]:
    """The pages of one file of results."""
    themes: dict[str, list[dict[str, Any]]] = {}
    known = newest(file)
    for row in known:
        themes.setdefault(row.get("theme", "ops"), []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for theme, rows in themes.items():
        month = re.sub("-", "", max(row["when"] for row in rows)[:7])
        stem = out / f"{theme}_{file.stem}_{month}"
        parts = page(theme, rows, file.name, plots.draw(theme, rows, stem), known)
        for suffix, text in ((".md", pages.markdown(parts)), (".html", pages.as_html(parts))):
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
    return f"{value:.1%}" if unit == "share" else f"{number(value)} {unit}"


def refresh(readme: Path, files: list[Path]) -> None:
    """Put the table between the README's marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + readme_table(files) + END + rest.split(END, 1)[1])


def main(args: list[str] | None = None) -> int:
    """A page a theme for each file of results, the page of throughput, and the README's table."""
    here = measure.ROOT / "benchmarks"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--out", type=Path, default=here / "reports")
    parser.add_argument(
        "--strict", action="store_true", help="status 1 where a CPU's figure is missing"
    )
    asked = parser.parse_args(args)
    files = sorted(asked.results.glob("*.jsonl"))
    if not files:
        raise UsageError(
            f"{asked.results} holds no results: run make bench, or name a folder with --results"
        )
    made = [page for file in files for page in write(file, asked.out)]
    rows = {file: newest(file) for file in files}
    scale = [page for page in made if page.name.startswith("scale_") and page.suffix == ".md"]
    for each in [*made, *throughput.write(rows, asked.out, scale)]:
        print(each)
    if asked.results == here / "results":
        refresh(measure.ROOT / "README.md", files)
    absent = figures.missing(figures.read(rows))
    for figure in absent:
        print(f"not measured on a CPU: {figure.group}: {figure.name}")
    return 1 if absent and asked.strict else 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
