"""Which format to choose for which machine: arithmetic from the measured bytes and rates of a page's rows."""

import math
from typing import Any

from benchmarks import contestants
from benchmarks.aims import EPOCH_S
from fastrot.entry import in_bytes, in_time

COLLECTIONS = {  # pictures
    "ImageNet-1k": contestants.IMAGENET,
    "ImageNet-21k": 14_197_122,  # of the autumn 2011 release
    "a billion pictures": 1_000_000_000,
}
CORES = 16  # of the machine that the hours are told for
GPU_GB, KEPT_GB = 141, 20  # an H200's memory, and what net, bank and views take of it
FORMATS = ("root", "beton", "raw", "shards", "pack")  # that a run can be pointed at


def parts(rows: list[dict[str, Any]]) -> list[tuple]:
    """Which format for which machine, by arithmetic from the measured bytes and rates."""
    best: dict[str, dict[str, Any]] = {}
    for row in filter(_ours, rows):
        name = row["format"]
        if name not in best or row["p50"] > best[name]["p50"]:
            best[name] = row
    if not best:
        return []
    said = [("heading", "Which format to choose"), ("list", sentences(best))]
    for collection, pictures in COLLECTIONS.items():
        said += [
            ("text", f"{collection}, {pictures:,} pictures:"),
            ("table", _sums(best, pictures)),
        ]
    return [
        *said,
        (
            "text",
            f"Arithmetic, not measured: disk is the measured bytes a picture times the pictures; an epoch is "
            f"the pictures over the measured images/s and core (its line is named) times {CORES} cores; from "
            f"the disk or the network is what must come in each second to keep up with {_per_s():,.0f} images/s, "
            f"ImageNet-1k in {EPOCH_S} s. What lies in the page cache or in GPU memory is read once.",
        ),
        *_not_measured(rows),
    ]


def _not_measured(rows: list[dict[str, Any]]) -> list[tuple]:
    seen = {row["variant"] for row in rows if row["what"] == "loader"}
    absent = [name for name in contestants.CONTESTANTS | contestants.ON_A_GPU if name not in seen]
    return [("text", f"Not measured on this machine: {'; '.join(absent)}.")] if absent else []


OTHERS = ("torchvision", "webdataset", "DataLoader", "FFCV", "DALI, its own")  # variants not ours


def _ours(row: dict[str, Any]) -> bool:
    """Whether it is the rate of a loader of ours, by itself."""
    alone = row["what"] == "loader" and row["mode"] == "crops" and row.get("format") in FORMATS
    return alone and not row["variant"].startswith(OTHERS)


def _per_s() -> float:
    return COLLECTIONS["ImageNet-1k"] / EPOCH_S


def _sums(best: dict[str, dict[str, Any]], pictures: int) -> list[list[str]]:
    head = [
        "format",
        "loader",
        "disk, or page cache",
        "GPUs to hold it",
        f"epoch on {CORES} cores",
        "cores to keep up",
    ]
    table = [[*head, "from the disk", "line"]]
    for name in filter(best.get, FORMATS):
        row, held = best[name], best[name]["bytes_per_image"] * pictures
        gpus = math.ceil(held / 1e9 / (GPU_GB - KEPT_GB)) if name == "pack" else 0
        table.append(
            [
                "originals" if name == "root" else name,
                row["variant"],
                in_bytes(held),
                f"{gpus:,}" if gpus else "",
                in_time(pictures / (row["p50"] * CORES)),
                f"{_per_s() / row['p50']:.1f}",
                f"{in_bytes(row['bytes_per_image'] * _per_s())}/s",
                str(row["line"]),
            ]
        )
    return table


def sentences(best: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each machine, with the figures that it follows from."""
    said, total = [], COLLECTIONS["ImageNet-1k"]

    def held(name: str) -> float:
        return best[name]["bytes_per_image"] * total

    if "pack" in best:
        fits = "fits" if held("pack") / 1e9 <= GPU_GB - KEPT_GB else "does not fit"
        said.append(
            f"One large GPU: a pack. ImageNet-1k takes {in_bytes(held('pack'))} and {fits} into {GPU_GB} GB of GPU memory "
            f"beside {KEPT_GB} GB for net, bank and views: no processor is in the loop. Where it does not fit, "
            "--placement pinned keeps it in host memory."
        )
    if "beton" in best:
        row = best["beton"]
        said.append(
            f"Any machine with memory for {in_bytes(held('beton'))} of page cache, and a laptop: a .beton, "
            f"{row['p50']:,.0f} images/s and core with {row['variant']}; {_per_s() / row['p50']:.0f} cores keep up "
            f"with ImageNet-1k in {EPOCH_S} s."
        )
        each = row["bytes_per_image"]
        said.append(
            f"Data larger than memory: a .beton written with --shuffle and read with --order blocks, {in_bytes(each)} a "
            f"picture: a disk of 3 GB/s brings {3e9 / each:,.0f} images/s."
        )
    if "shards" in best:
        said.append(
            "Object stores, other WebDataset tools, or originals that may not be encoded again: tar shards, "
            f"{best['shards']['p50']:,.0f} images/s and core with {best['shards']['variant']} on this processor; on a GPU "
            "its JPEG decoder takes their place."
        )
    if "root" in best:
        row = best["root"]
        said.append(
            f"A first try, or a few thousand pictures: the folder itself, {row['p50']:,.0f} images/s and core; "
            f"ImageNet-1k takes {in_time(total / (row['p50'] * CORES))} an epoch on {CORES} cores."
        )
    return said
