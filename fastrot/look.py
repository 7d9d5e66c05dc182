"""What is in prepared data: `fastrot look FILE.beton` prints it, and draws crops rotated four ways.

    --verify    read and decode every record; each bad one is named, and the exit status is 1

Works for image folders, sets of parts (FILE.beton.set) and packs (NAME.pack) too.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from fastrot import cli, entry
from fastrot.config import RunError, UsageError

if TYPE_CHECKING:  # torch takes seconds: the command line is read before
    from PIL import Image

    from fastrot.core import Batch, Data
    from fastrot.data.pack.read import Pack

ROTATIONS = ("upright", "90°", "180°", "270°")
GAP, MARGIN, LINE = 6, 28, 26  # pixels; LINE: for the class name under a row
TASK = 64  # pictures a thread verifies at once


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is in prepared data or an image folder: facts, checks, and a sheet of crops rotated four ways."""

    # FILE.beton, FILE.beton.set, NAME.pack, a folder of shards or of pictures
    data: Path = field(metadata=cli.first("DATA"))
    out: Path | None = None  # PNG of the crops; default: NAME-look.png beside the data, or here
    size: int = 128  # pixels a side of the crops
    pictures: int = 12  # on the sheet
    seed: int = 0  # of the order and the crops
    verify: bool = False  # read and decode every record, and name each that is damaged


def main(argv: list[str] | None = None) -> int:
    options = cli.parse(Look, argv, "fastrot look")
    from fastrot.assemble import open_data

    for name, got in (("size", options.size), ("pictures", options.pictures)):
        if got < 1:
            raise UsageError(f"--{name} got {got}: it wants at least 1")
    start = time.perf_counter()
    data = open_data(options.data)
    opened = time.perf_counter() - start
    for name, words in facts(data, options.data, opened):
        print(f"{name:<12}{words}")
    bad = 0
    if options.verify:
        start = time.perf_counter()
        bad, what, which = verify_pack(data) if is_pack(data) else verify(data)
        state = f"{bad:,}{which} DAMAGED" if bad else "all whole"
        print(f"{'verified':<12}{what} in {time.perf_counter() - start:.1f} s: {state}")
    if not bad:
        out = options.out or beside(options.data)
        draw(data, options, out)
        print(f"{'sheet':<12}{out}")
    return 1 if bad else 0


# ---- in words ----


def facts(data: "Data", path: Path, opened: float) -> Iterator[tuple[str, str]]:
    yield "data", f"{path}, {data.rows:,} pictures, opened in {1000 * opened:.0f} ms"
    sizes = data.sizes(np.arange(data.rows))
    short, long = spread(sizes.min(axis=1)), spread(sizes.max(axis=1))
    yield "pixels", f"short side {short}, long side {long} (least / median / most)"
    if hasattr(data, "contents"):
        yield from of_file(data, path)
    if is_pack(data):
        yield from of_pack(data)
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None:
            yield name, " ".join(f"{v:.4f}" for v in values) + "  (red, green, blue; 0 to 1)"
    if rejected := data.rejected:
        yield "rejected", f"{len(rejected):,}, the first {rejected[0][0]!r}: {rejected[0][1]}"
    yield from of_labels(data)
    yield "fingerprint", data.fingerprint


def of_file(data, path: Path) -> Iterator[tuple[str, str]]:
    """Header, records and what lies beside a .beton."""
    c, facts = data.contents, data.manifest
    kinds = {0: "float", 1: "int", 2: "image", 3: "bytes", 4: "array", 5: "json", 6: "tensor"}
    fields = ", ".join(f"{name} ({kinds[kind]})" for name, kind in c.fields)
    parts = facts.get("parts", [])
    size = facts["bytes"] if parts else path.stat().st_size
    of = f" in {len(parts):,} part{'s'[: len(parts) != 1]}" if parts else ""
    yield "file", f"{size / 1e6:,.1f} MB{of}, pages of {c.page / 2**20:g} MiB: {fields}"
    raw = int(c.raw.sum())
    sizes = (c.size.min(), np.median(c.size), c.size.max())
    kilobytes = " / ".join(f"{v / 1000:.1f}" for v in sizes)
    yield "records", f"{data.rows - raw:,} jpg, {raw:,} raw, {kilobytes} kB (least / median / most)"
    if not facts:
        yield "beside it", "nothing: no checksums, no class names, no paths"
        yield "checked", "header, rows and table fit together; records only by --verify"
        return
    yield from made(facts)
    whole = "header, rows and table fit together and have their checksums"
    yield "checked", f"{whole}; so have the path hashes"


def is_pack(data: "Data") -> "TypeGuard[Pack]":
    return data.format == "pack"


def of_pack(data: "Pack") -> Iterator[tuple[str, str]]:
    """What meta.json tells."""
    what = "tiles of 8x8 pixels" if data.encoding == "ycc" else "pixels"
    size = data.tiles.nbytes / 1e6
    yield "file", f"{size:,.1f} MB of {data.encoding}: {len(data.tiles):,} {what}"
    yield from made(data.meta)
    whole = "arrays fit together, all but the pictures' by checksum"
    yield "checked", f"{whole}; these only by --verify"


def made(facts: dict) -> Iterator[tuple[str, str]]:
    """How, by what, and from how much."""
    chosen = {k: v for k, v in facts["options"].items() if k != "listing" and v is not None}
    yield "made with", ", ".join(f"{k.replace('_', '-')} {v}" for k, v in chosen.items())
    yield "by", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    counts = {"seen": "seen", "rejected": "rejected", "skipped": "left out", "rows": "written"}
    yield "source", ", ".join(f"{facts[k]:,} {words}" for k, words in counts.items())
    if "beside" in facts:
        yield "by row", ", ".join(facts["beside"])


def of_labels(data: "Data") -> Iterator[tuple[str, str]]:
    """A bar for each class, or for the largest and the smallest of many."""
    count = np.bincount(data.labels[data.labels >= 0], minlength=len(data.classes))
    without = int((data.labels < 0).sum())
    if without:
        yield "labels", f"{without:,} pictures have none"
    if not count.any():
        return
    order = np.argsort(-count, kind="stable")
    few, most, mid = count.min(), count.max(), np.median(count)
    each = f"{few:,} / {mid:,.0f} / {most:,} pictures (least / median / most)"
    yield "classes", f"{len(count):,} with {each}"
    shown = order if len(order) <= 12 else np.concatenate([order[:5], order[-3:]])
    for place, label in enumerate(shown):
        if len(order) > 12 and place == 5:
            yield "", "..."
        bar = "█" * max(1, round(30 * count[label] / most)) if count[label] else ""
        yield "", f"{name_of(data, int(label))[:24]:<24} {count[label]:>9,} {bar}"


def spread(values: np.ndarray) -> str:
    return f"{values.min()} / {np.median(values):.0f} / {values.max()}"


def name_of(data: "Data", label: int) -> str:
    return "no label" if label < 0 else data.classes[label] if data.classes else str(label)


# ---- every record ----


def verify(data) -> tuple[int, str, str]:
    """Read and decode every record, and name the bad ones; how many those are, of what, and how they are called."""
    from fastrot.data.files import BadPicture
    from fastrot.entry import cores

    def task(start: int) -> list[str]:
        found = []
        for row in range(start, min(start + TASK, data.rows)):
            try:
                data.picture(row)  # checks its size, and its checksum where it has one
            except (BadPicture, RunError, OSError) as error:
                words = str(error)
                named = "" if words.startswith("row ") else f"row {row} ({data.name(row)}): "
                found.append(entry.printable(named + words))
        return found

    bad = 0
    with ThreadPoolExecutor(cores()) as pool:
        for found in pool.map(task, range(0, data.rows, TASK)):
            bad += len(found)
            print("".join(line + "\n" for line in found), end="", file=sys.stderr)
    return bad, f"{data.rows:,} records read and decoded", ""


def verify_pack(data: "Pack") -> tuple[int, str, str]:
    """Compare all checksums, and name the damaged stretches and their pictures; gives what `verify` gives."""
    from fastrot.data.pack.layout import BLOCK

    bad = 0
    for block in data.damaged(data.array):
        bad += 1
        rows = data.rows_in(block)
        first, last = (f"row {row:,} ({data.name(row)})" for row in (rows[0], rows[-1]))
        where = f"bytes {block * BLOCK:,} to {(block + 1) * BLOCK:,} of {data.array}"
        print(entry.printable(f"{where}: {first} to {last}"), file=sys.stderr)
    read = f"{data.rows:,} pictures, {data.tiles.nbytes / 1e6:,.1f} MB read"
    return bad, read, " stretch" if bad == 1 else " stretches"


# ---- the sheet ----


def beside(path: Path) -> Path:
    """NAME-look.png beside the data where one may write there, else in the current folder."""
    path = path.resolve()
    folder = path.parent if os.access(path.parent, os.W_OK) else Path.cwd()
    return folder / f"{path.stem if path.is_file() else path.name}-look.png"


def draw(data: "Data", options: Look, out: Path) -> None:
    """The crops that the first step of a training run would see, each rotated four ways."""
    from fastrot.assemble import open_loader
    from fastrot.config import RandomResized
    from fastrot.core import View
    from fastrot.disk import write_atomically

    view = View(crops=(RandomResized(size=options.size),))
    shown = min(options.pictures, data.rows)
    loader = open_loader(data, view, batch=shown, seed=options.seed, workers=0, enlarge=True)
    batches = loader.epoch(0)
    drawn = sheet(data, next(batches), options)
    batches.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: drawn.save(file, "PNG"))


def sheet(data: "Data", batch: "Batch", options: Look) -> "Image.Image":
    """Two pictures side by side, four rotations each (numpy.rot90), the class name under them."""
    from PIL import Image, ImageDraw, ImageFont

    from fastrot.evals.picture import FAINT, INK, legible

    font, bold = ImageFont.load_default(13), ImageFont.load_default(20)
    size, count = options.size, len(batch.images)
    beside_each_other = 1 if count == 1 else 2
    block = 4 * size + 3 * GAP
    lines, top = -(-count // beside_each_other), 84
    width = beside_each_other * block + (beside_each_other + 1) * MARGIN
    page = Image.new("RGB", (width, top + lines * (size + LINE + GAP) + MARGIN // 2), "white")
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 16), legible(options.data.resolve().name), fill=INK, font=bold)
    words = f"crops as training sees them (RandomResized, {size} pixels, seed {options.seed})"
    if width > 900:  # else it would meet the name
        pen.text((width - MARGIN, 22), words, fill=FAINT, font=font, anchor="ra")
    for column in range(beside_each_other):
        for rotation, heading in enumerate(ROTATIONS):
            at = MARGIN + column * (block + MARGIN) + rotation * (size + GAP)
            pen.text((at, top - 24), heading, fill=FAINT, font=font)
    for i, crop in enumerate(batch.images.numpy()):
        x = MARGIN + i % beside_each_other * (block + MARGIN)
        y = top + i // beside_each_other * (size + LINE + GAP)
        for rotation in range(4):
            rotated = Image.fromarray(np.ascontiguousarray(np.rot90(crop, rotation)))
            page.paste(rotated, (x + rotation * (size + GAP), y))
        row, label = int(batch.index[i]), int(batch.label[i])
        pen.text((x, y + size + 5), legible(name_of(data, label)), fill=INK, font=font)
        pen.text((x + block, y + size + 5), f"row {row:,}", fill=FAINT, font=font, anchor="ra")
    return page


if __name__ == "__main__":
    sys.exit(main())
