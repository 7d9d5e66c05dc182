"""Time of the ops, and their share of the copy bandwidth measured in the same run.

    python -m benchmarks.bench_ops [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]

On a GPU: reference, torch.compile of it, and kernel, in turns. On a CPU: the reference. L2 is not flushed between
calls; the default batch's views, 231 MB, are larger than any L2.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse

import torch

from benchmarks import measure
from fastrot.ops.choice import using
from fastrot.ops.turns import turned_views, turned_views_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TURNS = (0, 1, 2, 3)


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes a second, read and written, of copying half a gigabyte (64 MB on a CPU)."""
    source = torch.empty(
        (1 << 29) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source.fill_(1))
    times = measure.interleaved({"copy": lambda: target.copy_(source)}, device, seconds=seconds)
    spread = measure.spread(times["copy"])
    return 2 * source.numel() / (spread["p50"] / 1e3)


def bench_turns(device: str, seconds: float, peak: float, shapes: list[tuple], dtype: torch.dtype):
    """Rows for each shape (images, pixels a side) and form."""
    for images, size in shapes:
        crops = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, device=device)

        def run(form: str, crops=crops):
            with using(form):
                turned_views(crops, TURNS, MEAN, STD, dtype)

        runs = {"reference": lambda run=run: run("reference")}
        if device == "cuda":
            compiled = torch.compile(turned_views_reference)
            runs["compiled reference"] = lambda crops=crops, compiled=compiled: compiled(
                crops, TURNS, MEAN, STD, dtype
            )
            runs["kernel"] = lambda run=run: run("triton")
        moved = crops.numel() * (1 + len(TURNS) * dtype.itemsize)
        for form, times in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(times)
            rate = moved / (spread["p50"] / 1e3)
            yield measure.row(
                "turned_views",
                variant=form,
                mode="forward",
                shape={"images": images, "size": size, "turns": len(TURNS)},
                dtype=str(dtype).removeprefix("torch."),
                **spread,
                warmup=3,
                bytes=moved,
                gb_per_s=rate / 1e9,
                copy_gb_per_s=peak / 1e9,
                share_of_peak=rate / peak,
                images_per_s=images / (spread["p50"] / 1e3),
            )


def main() -> None:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<device's name>.jsonl"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, half a second each")
    asked = parser.parse_args()
    out = measure.results(asked.device, asked.out)
    seconds = 0.5 if asked.quick else 5.0
    if asked.device == "cuda":
        shapes = [(64, 64)] if asked.quick else [(192, 224), (512, 224), (1024, 128), (64, 64)]
        dtype = torch.bfloat16
    else:
        shapes = [(16, 64)] if asked.quick else [(64, 64), (32, 128), (16, 224)]
        dtype = torch.float32
    peak = copy_bandwidth(asked.device, seconds)
    print(f"copy: {peak / 1e9:.1f} GB/s")
    for row in bench_turns(asked.device, seconds, peak, shapes, dtype):
        measure.append(out, row)
        print(
            f"{row['what']} {row['variant']:18} {row['shape']} {row['dtype']}: {row['p50']:.3f} ms "
            f"({row['p20']:.3f} to {row['p80']:.3f}), {row['images_per_s']:,.0f} images/s, "
            f"{row['gb_per_s']:.1f} GB/s, {row['share_of_peak']:.0%} of copy"
        )


if __name__ == "__main__":
    main()
