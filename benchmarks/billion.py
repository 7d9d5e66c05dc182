"""A billion pictures: what an order, the memory bank, prepared files, their making and a checkpoint then cost.

    python -m benchmarks.billion [--root FOLDER] [--work FOLDER] [--out FILE.jsonl or FOLDER] [--quick]

Measured here, as rows of the theme `scale`: an order's places and its memory at a billion rows (those of a real epoch:
nothing of it is scaled up), bytes a picture of prepared files, of what lies beside them and of tables in memory,
pictures a second and core of both writers, seconds to make, save and load a bank. All else is arithmetic on these rows: the page of the report tells it.
"""

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contestants, measure, runs
from benchmarks.measure import IMAGENET
from fastrot import assemble, entry
from fastrot.config import RandomResized
from fastrot.core import DataInfo, View
from fastrot.data import sampler
from fastrot.methods.bank import Bank
from fastrot.training import checkpoint

PICTURES = 1_000_000_000
BATCH, DIM = 192, 128  # of decoupling-alexnet
ROWS, QUICK_ROWS = 1_000_000, 20_000  # of the bank that is measured
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
            words = contestants.conversion(root, formats.workers, *knobs)
            runs.run(f"dataprep/{script}", *words, "--out", out, quiet=True)
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


def bank_times(rows: int, device: str, folder: Path) -> tuple[dict[str, float], Bank, int]:
    """Seconds to make a bank, to check and save it as a checkpoint does, to take it back; the bank, and the file's bytes."""
    known: dict[str, Any] = dict(rows=None, data_rows=rows, data_fingerprint="", classes=0, size=1)
    known |= dict(mean=(0.5,) * 3, std=(0.5,) * 3, dtype=torch.float32, fingerprint="")
    info = DataInfo(images=rows, seed=0, device=torch.device(device), **known)
    path, clock = folder / "last.pt", [time.perf_counter()]
    bank = Bank(info, DIM, dtype=torch.float32, sharded=False, momentum=0.5)
    clock.append(time.perf_counter())
    state = bank.state_dict()
    assert checkpoint.all_finite(list(state.values()))
    checkpoint.save(path, {"method": state})
    clock.append(time.perf_counter())
    bank.load_state_dict(checkpoint.load(path)["method"])
    clock.append(time.perf_counter())
    took = dict(zip(("made", "saved", "loaded"), np.diff(clock).tolist(), strict=True))
    return took, bank, path.stat().st_size


def bank_rows(rows: int, work: Path) -> Iterator[dict[str, Any]]:
    """Rows a second of a bank that is made, saved as a checkpoint saves it, and taken back."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        took, bank, size = bank_times(rows, "cpu", Path(folder))
    for variant, seconds in took.items():
        yield row(
            "bank",
            f"float32 rows {variant}",
            **measure.middle([rows / seconds], "rows/s"),
            gb_per_s=rows * DIM * 4 / seconds / 1e9,
            bytes_a_row=size / rows,
            place_bytes=bank.place.numel() * bank.place.element_size() / rows,
            shape={"rows": rows, "dim": DIM},
        )


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="scale", variant=variant, warmup=0, about=ABOUT, **fields)


# ---- the command ----


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "root", "work", "quick")
    asked = parser.parse_args(args)
    root = contestants.originals(asked.root)
    asked.work.mkdir(parents=True, exist_ok=True)
    formats = contestants.Formats(root, asked.work, entry.cores())
    rows = QUICK_ROWS if asked.quick else ROWS
    for made in (
        order_rows(0.05 if asked.quick else 1.0),
        file_rows(formats),
        [opening_row(formats.beton(), rows)],
        bank_rows(rows, asked.work),
    ):
        runs.keep(made, asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
