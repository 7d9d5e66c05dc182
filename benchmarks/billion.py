"""A billion pictures: what an order, the memory bank, prepared files, their making and a checkpoint then cost.

    python -m benchmarks.billion [--root FOLDER] [--work FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

Measured here, as rows of the theme `scale`: an order's places and its memory at a billion rows (those of a real epoch:
nothing of it is scaled up), bytes a picture of prepared files, of what lies beside them and of tables in memory,
pictures a second and core of both writers, seconds to make, save and load a bank. All else is arithmetic on these lines and
on those of loaders: `parts` gives it as a page's tables and sentences, each figure with the line that it comes from.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import math
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import contestants, measure
from benchmarks.advice import GPU_GB, KEPT_GB
from fastrot import assemble, entry
from fastrot.config import RandomResized
from fastrot.core import DataInfo, View
from fastrot.data import sampler
from fastrot.entry import in_bytes, in_time
from fastrot.methods.bank import Bank
from fastrot.training import checkpoint

PICTURES, IMAGENET = 1_000_000_000, 1_281_167
BATCH, NEGATIVES, DIM = 192, 4096, 128  # of decoupling-alexnet
ROWS, QUICK_ROWS = 1_000_000, 20_000  # of the bank that is measured
RANKS = (8, 64, 512)
CORES = (16, 128, 1024)
RATES = (20_000, 200_000)  # images/s: one H200's target, and ten times that
ABOUT = "figures of a billion pictures are arithmetic on the lines that are named; only orders were measured at that many rows"


# ---- measured ----


def order_rows(seconds: float) -> Iterator[dict[str, Any]]:
    """Microseconds a place and bytes held by an epoch's order, of ImageNet and of a billion pictures."""
    for images in (IMAGENET, PICTURES):
        tracemalloc.start()
        begun = time.perf_counter()
        made = sampler.ShuffledSampler(images, seed=0, epoch=0)
        built = time.perf_counter() - begun
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for batch in (BATCH, sampler.CHUNK):
            places, each = np.arange(batch, dtype=np.int64) * 1001 % images, []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(each) < 5:
                begun = time.perf_counter()
                rows = made[places]
                each.append(1e6 * (time.perf_counter() - begun) / batch)
                assert len(np.unique(rows)) == batch
            yield row(
                "order",
                f"{images:,} pictures, {batch:,} places at once",
                **measure.middle(each, "us a place"),
                built_s=built,
                held_bytes=held,
                most_bytes=most,
                sort=images <= sampler.SORTED_UP_TO,
                shape={"pictures": images, "places": batch},
            )


def file_rows(formats: contestants.Formats) -> Iterator[dict[str, Any]]:
    """Bytes a picture of prepared files, and of what lies beside them and in memory; pictures a second and core of writers."""
    root = formats.root
    for name, script, knobs in (
        ("beton", "to_ffcv.py", ("--quality", "90")),
        ("pack", "to_pack.py", ()),
    ):
        with tempfile.TemporaryDirectory(dir=formats.work) as folder:
            out = Path(folder) / f"made.{name}"
            used = measure.cpu_seconds()
            command = contestants.conversion(script, root, out, formats.workers, *knobs)
            subprocess.run(command, check=True, capture_output=True)
            used = measure.cpu_seconds() - used
            data = assemble.open_data(out)
            files = {each.name: each for each in contestants.files_of(Path(folder))}
            each = {n.removeprefix("made."): f.stat().st_size / data.rows for n, f in files.items()}
            tables = held_bytes(data) / data.rows
            shape = {"pictures": data.rows, "short": contestants.SHORT}
            yield row(
                "prepared file",
                name,
                **measure.middle([max(each.values())], "bytes a picture"),
                beside=sum(each.values()) - max(each.values()),
                tables=tables,
                files=each,
                shape=shape,
            )
            rate = measure.middle([data.rows / used], "images/s and core")
            yield row("conversion", f"{script}, to a {name}", **rate, shape=shape)


def opening_row(beton: Path, rows: int) -> dict[str, Any]:
    """Bytes a picture that a Loader allocates as it opens so many rows: the same few pictures again and again."""
    few = assemble.open_data(beton)
    data = contestants.Repeated(few, -(-rows // few.rows))
    view = View(crops=(RandomResized(),))
    tracemalloc.start()
    loader = assemble.open_loader(data, view, batch=BATCH, workers=0, enlarge=True)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return row(
        "loader opened",
        "over a .beton",
        **measure.middle([most / data.rows], "bytes a picture"),
        held=held / data.rows,
        shape={"pictures": loader.images},
    )


def held_bytes(data: Any) -> int:
    """Bytes of the arrays that opened data holds in memory: nothing that a file is mapped to."""
    seen: dict[int, int] = {}
    visited: set[int] = set()
    open_ends = [data]
    while open_ends:
        part = open_ends.pop()
        if id(part) in visited or isinstance(part, (str, bytes, int, float, type)):
            continue
        visited.add(id(part))
        if isinstance(part, np.ndarray):
            whole = part
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            if whole.base is None:  # else: a map of a file, or another's buffer
                seen[id(whole)] = whole.nbytes
        elif isinstance(part, torch.Tensor):
            seen[part.data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, dict):
            open_ends += part.values()
        elif isinstance(part, (list, tuple)):
            open_ends += part
        elif type(part).__module__.startswith("fastrot"):
            open_ends += vars(part).values() if hasattr(part, "__dict__") else ()
    return sum(seen.values())


def bank_rows(rows: int, work: Path) -> Iterator[dict[str, Any]]:
    """Rows a second of a bank that is made, saved as a checkpoint saves it, and taken back."""
    known: dict[str, Any] = dict(rows=None, data_rows=rows, data_fingerprint="", classes=0, size=1)
    known |= dict(mean=(0.5,) * 3, std=(0.5,) * 3, dtype=torch.float32, fingerprint="")
    info = DataInfo(images=rows, seed=0, device=torch.device("cpu"), **known)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path, took = Path(folder) / "last.pt", {}
        begun = time.perf_counter()
        bank = Bank(info, DIM, dtype=torch.float32, sharded=False, momentum=0.5)
        took["made"] = time.perf_counter() - begun
        begun = time.perf_counter()
        state = bank.state_dict()
        assert checkpoint.all_finite(list(state.values()))
        checkpoint.save(path, {"method": state})
        took["saved"] = time.perf_counter() - begun
        begun = time.perf_counter()
        bank.load_state_dict(checkpoint.load(path)["method"])
        took["loaded"] = time.perf_counter() - begun
        for variant, seconds in took.items():
            yield row(
                "bank",
                f"float32 rows {variant}",
                **measure.middle([rows / seconds], "rows/s"),
                gb_per_s=rows * DIM * 4 / seconds / 1e9,
                bytes_a_row=path.stat().st_size / rows,
                place_bytes=bank.place.numel() * bank.place.element_size() / rows,
                shape={"rows": rows, "dim": DIM},
            )


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="scale", variant=variant, warmup=0, about=ABOUT, **fields)


# ---- a page's parts ----


def parts(rows: list[dict[str, Any]], pictures: int = PICTURES) -> list[tuple]:
    """Headings, tables and sentences for `pictures`, from rows that have their `line`; nothing where none is of scale.

    Raises KeyError where some of the theme's own rows are missing: they are written together.
    """
    mine = {(r["what"], r["variant"]): r for r in rows if r.get("theme") == "scale"}
    if not mine:
        return []
    loaders = {r["variant"]: r for r in rows if r["what"] == "loader" and r.get("mode") == "crops"}
    return [
        ("heading", f"{pictures:,} pictures"),
        ("text", "Arithmetic, not measured, on measured lines: each table names them."),
        *_of_order(mine, pictures),
        *_of_bank(mine, pictures),
        *_of_files(mine, loaders, pictures),
        *_of_conversion(mine, pictures),
    ]


def _of_order(mine: dict, pictures: int) -> Iterator[tuple]:
    table = [["order of", "made in", "memory", "a batch of 192", "an epoch's places", "lines"]]
    for images in (IMAGENET, PICTURES):
        one, many = (
            mine["order", f"{images:,} pictures, {n:,} places at once"]
            for n in (BATCH, sampler.CHUNK)
        )
        table.append(
            [
                f"{images:,} pictures, {'sorted' if one['sort'] else 'computed place by place'}",
                in_time(one["built_s"]),
                f"{in_bytes(one['held_bytes'])} (most {in_bytes(one['most_bytes'])})",
                f"{one['p50'] * BATCH / 1e3:.3g} ms",
                f"{in_time(many['p50'] / 1e6 * images)} over all ranks, asked {sampler.CHUNK:,} at a time",
                f"{one['line']}, {many['line']}",
            ]
        )
    yield "table", table
    most = mine["order", f"{PICTURES:,} pictures, {BATCH:,} places at once"]
    rate = 1e6 / most["p50"]
    yield (
        "text",
        f"Above {sampler.SORTED_UP_TO:,} pictures an order holds nothing, and any place of any epoch is computed by "
        f"itself: a run resumes at once. One core computes {rate:,.0f} places/s by batches of {BATCH} (line "
        f"{most['line']}), beside which a step is long.",
    )


def _of_bank(mine: dict, pictures: int) -> Iterator[tuple]:
    made, saved, loaded = (mine["bank", f"float32 rows {w}"] for w in ("made", "saved", "loaded"))
    lines = f"{made['line']}, {saved['line']}, {loaded['line']}"
    table = [
        ["bank", "in all", *(f"a rank of {n}" for n in RANKS), f"GPUs of {GPU_GB} GB to hold it"]
    ]
    places = made["place_bytes"] * pictures
    for name, size in (("float32", 4), ("bfloat16", 2)):
        whole = pictures * DIM * size
        room = (GPU_GB - KEPT_GB) * 1e9 - places
        gpus = f"{math.ceil(whole / room):,}" if room > 0 else "none has room"
        shares = (in_bytes(whole / n + places) for n in RANKS)
        table.append([f"{name} x {DIM}", in_bytes(whole), *shares, gpus])
    yield "table", table
    read = {
        name: BATCH * (NEGATIVES + 1) * DIM * size for name, size in (("float32", 4), ("bf16", 2))
    }
    seconds = {
        each["variant"].split()[-1]: pictures / each["p50"] for each in (made, saved, loaded)
    }
    yield (
        "list",
        [
            f"A rank's share (--method.bank sharded) is its rows and {in_bytes(places)} of places: {made['place_bytes']:g} "
            "bytes for each picture of all, on each rank. Where all pictures are trained a place is the picture's number over "
            "the ranks, so this table is what could go first.",
            f"A step reads {in_bytes(read['float32'])} of rows a rank, {in_bytes(read['bf16'])} in bfloat16: B (K + 1) D numbers, "
            "whatever the number of pictures. Rows lie farther apart; caches help less.",
            f"Made anew on one core: {in_time(seconds['made'])}, on every rank, since each draws all rows and keeps its own "
            f"(line {made['line']}).",
            f"A checkpoint holds all float32 rows, {in_bytes(pictures * saved['bytes_a_row'])}, gathered in rank 0's host memory: "
            f"saved in {in_time(seconds['saved'])} and loaded in {in_time(seconds['loaded'])} at this machine's "
            f"{saved['gb_per_s']:.2g} and {loaded['gb_per_s']:.2g} GB/s (lines {lines}). A bank of this size wants "
            "a file for each rank, which is not built.",
        ],
    )


def _of_files(mine: dict, loaders: dict, pictures: int) -> Iterator[tuple]:
    head = ["prepared as", "files", "beside them", "tables in memory", "GPUs to hold it"]
    table = [[*head, *(f"read at {rate:,} images/s" for rate in RATES), "line"]]
    for name in ("beton", "pack"):
        each = mine["prepared file", name]
        held = each["p50"] * pictures
        gpus = f"{math.ceil(held / 1e9 / (GPU_GB - KEPT_GB)):,}" if name == "pack" else ""
        reads = (f"{in_bytes(each['p50'] * rate)}/s" for rate in RATES)
        sizes = (
            in_bytes(held),
            in_bytes(each["beside"] * pictures),
            in_bytes(each["tables"] * pictures),
        )
        table.append([name, *sizes, gpus, *reads, str(each["line"])])
    yield "table", table
    quick = [r for r in loaders.values() if r.get("format") in ("beton", "pack") and "line" in r]
    quick = [r for r in quick if not r["variant"].startswith(("FFCV", "DALI"))]
    if quick:
        best = max(quick, key=lambda r: r["p50"])
        yield (
            "text",
            f"{best['variant']} gives {best['p50']:,.0f} images/s and core (line {best['line']}): "
            + ", ".join(f"{rate / best['p50']:.0f} cores for {rate:,} images/s" for rate in RATES)
            + ".",
        )
    opened = mine["loader opened", "over a .beton"]
    yield (
        "text",
        f"Tables in memory are held by each process that opens the data; a Loader looks at every picture's size once, which takes "
        f"{opened['p50']:.3g} bytes a picture, {in_bytes(opened['p50'] * pictures)}, while it opens, and holds {opened['held']:.2g} of "
        f"them (line {opened['line']}).",
    )


def _of_conversion(mine: dict, pictures: int) -> Iterator[tuple]:
    table = [["dataprep", "images/s and core", *(f"on {n:,} cores" for n in CORES), "line"]]
    for (what, variant), each in mine.items():
        if what == "conversion":
            hours = (in_time(pictures / each["p50"] / n) for n in CORES)
            table.append([variant, f"{each['p50']:,.0f}", *hours, str(each["line"])])
    yield "table", table
    yield (
        "text",
        "The writers' start is counted with few pictures, so their rates are low rather than high. Parts are written side by "
        "side and put together by name; a conversion that is broken off goes on.",
    )


# ---- the command ----


def main(args: list[str] | None = None) -> int:
    """Measure, print, append to the machine's file of results, and tell the arithmetic."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="class folders of original pictures")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--quick", action="store_true", help="a small bank; kept only with --out")
    asked = parser.parse_args(args)
    root = contestants.originals(asked.root)
    asked.work.mkdir(parents=True, exist_ok=True)
    formats = contestants.Formats(root, asked.work, entry.cores())
    made = [
        *order_rows(0.05 if asked.quick else 1.0),
        *file_rows(formats),
        opening_row(formats.beton(), QUICK_ROWS if asked.quick else ROWS),
        *bank_rows(QUICK_ROWS if asked.quick else ROWS, asked.work),
    ]
    for at, each in enumerate(made, 1):
        if asked.out or not asked.quick:
            measure.append(measure.results("cpu", asked.out), each)
        measure.say(each)
        each["line"] = at
    for kind, what in parts(made):
        for line in what if isinstance(what, list) else [what]:
            print(" | ".join(line) if kind == "table" else line)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
