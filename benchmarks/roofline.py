"""What a training step must take on this device: arithmetic, traffic and optimiser, layer by layer, over measured ceilings.

    python -m benchmarks.roofline [--preset PRESET] [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]

Counts are fastrot/speed/cost.py's; ceilings are a large matrix product in the run's precision and a large copy in the device's
memory, measured first. The three terms add up, since each is kernels that wait for those before:

    arithmetic   floating-point operations of matrix products and convolutions, over the product's rate
    traffic      bytes that all other kernels move, fused as far as they can be, over the copy's rate
    optimiser    bytes of SGD and of casting weights, over the copy's rate

An epoch is 1,281,167 pictures, whole batches of them, and a look at 50,000. Below these terms no arrangement of the same
kernels gets; where a step is quicker than its floor, a kernel does what the counts take for two. On a CPU the network has a
quarter of the width, and caches may well hold what is counted as traffic.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import forms, measure, runs
from benchmarks.measure import HELD_OUT, IMAGENET
from fastrot import assemble, entry
from fastrot.config import Config, Decoupling, Supervised
from fastrot.core import DTYPES
from fastrot.presets import PRESETS
from fastrot.speed import cost
from fastrot.speed.cost import Layer


def ceiling_rows(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The rates of a large matrix product and of a large copy, of random numbers: zeros would flatter."""
    large, seconds = device.type == "cuda", 0.2 if quick else 1.0
    side = 8192 if large else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = measure.interleaved({"": lambda: a @ b}, device.type, seconds=seconds)[""]
    rates = measure.middle([2 * side**3 / s / 1e12 for s in times], "TFLOP/s")
    of = {"mode": "ceiling", "dtype": _name(dtype)}
    yield row("matrix product", "square", shape={"side": side}, **of, **rates)
    source = torch.randint(256, (2**30 if large else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = {"": lambda: target.copy_(source)}
    times = measure.interleaved(copies, device.type, seconds=seconds)[""]
    rates = measure.middle([2 * source.numel() / s / 1e9 for s in times], "GB/s")
    yield row("copy", "in the device's memory", shape={"bytes": source.numel()}, **of, **rates)


def roofline_row(cfg: Config, net: nn.Module, tflops: float, gb_per_s: float) -> dict[str, Any]:
    """A step's and an epoch's floor at these ceilings, and what it is made of. `net`: what the method trains."""
    found = floor(cfg, net, tflops, gb_per_s)
    return row(
        "roofline",
        cfg.preset,
        mode="floor, from counts and ceilings",
        shape=shape_of(cfg),
        dtype=cfg.precision,
        preset=cfg.preset,
        **measure.middle([found["step_ms"]], "ms"),
        **{name: value for name, value in found.items() if name != "step_ms"},
        tflops=tflops,
        gb_per_s=gb_per_s,
    )


def floor(cfg: Config, net: nn.Module, tflops: float, gb_per_s: float) -> dict[str, Any]:
    """Milliseconds of a step, seconds of an epoch, and the terms that they are made of."""
    dtype, views = DTYPES[cfg.precision], views_shape(cfg)
    layers = [*beside(cfg), *cost.layers(net, views, dtype)]
    optimiser = cost.optimiser_bytes(net, dtype, cfg.optim)
    flop, traffic, unfused = (
        sum(getattr(layer, term) for layer in layers)
        for term in ("flop", "traffic", "traffic_unfused")
    )
    matrix_ms, per_byte = flop / tflops / 1e9, 1 / gb_per_s / 1e6  # of a millisecond
    step_ms = matrix_ms + (traffic + optimiser) * per_byte
    looked = [beside(cfg)[0], *cost.layers(net, views, dtype, training=False)]
    look_ms = sum(each.flop / tflops / 1e9 + each.traffic * per_byte for each in looked)
    return {
        "step_ms": step_ms,
        "matrix_ms": matrix_ms,
        "traffic_ms": traffic * per_byte,
        "traffic_unfused_ms": unfused * per_byte,
        "optimiser_ms": optimiser * per_byte,
        "look_ms": look_ms,
        "flop": flop,
        "optimiser_bytes": optimiser,
        "floor_epoch_s": (IMAGENET // cfg.batch * step_ms + HELD_OUT / cfg.batch * look_ms) / 1e3,
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }


def beside(cfg: Config) -> list[Layer]:
    """What no layer of the network moves: its views, read as uint8 and written once; the memory bank's rows."""
    size, batch = cfg.method.crop.size, cfg.batch
    views = 3 * size * size * batch * (1 + rotations(cfg) * DTYPES[cfg.precision].itemsize)
    moved = {"views": views}
    if isinstance(cfg.method, Decoupling):
        of_row = cfg.method.dim * DTYPES[cfg.method.bank_dtype].itemsize
        # the positive and the negatives are read; behind the step each picture's row is read and written
        moved["memory bank"] = batch * (cfg.method.negatives + 1 + 2) * of_row
    return [
        Layer(name=name, flop=0, traffic=each, traffic_unfused=each, weights=0)
        for name, each in moved.items()
    ]


def rotations(cfg: Config) -> int:
    """Views of a picture that enter the network."""
    return 1 if isinstance(cfg.method, Supervised) else 4


def views_shape(cfg: Config) -> tuple[int, int, int, int]:
    """Of a step: views, channels, height, width."""
    return cfg.batch * rotations(cfg), 3, cfg.method.crop.size, cfg.method.crop.size


def net_of(cfg: Config, device: torch.device) -> nn.Module:
    """What the preset's method trains, without a memory bank of any size."""
    of = {"batch": cfg.batch, "device": device}
    loader = assemble.open_loader(f"synthetic:{cfg.batch}", assemble.training_view(cfg), **of)
    return forms.state_of(cfg, loader, device, steps=1).method.net


def shape_of(cfg: Config) -> dict[str, Any]:
    return {"batch": cfg.batch, "size": cfg.method.crop.size, "width": cfg.backbone.width}


def _name(dtype: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each == dtype)


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="train", variant=variant, **{"warmup": 3, **fields})


def table(found: dict[str, Any]) -> str:
    """The row's layers for the eye: GFLOP and MB, and milliseconds at the ceilings."""
    head = f"{'':14}{'GFLOP':>9}{'ms':>8}{'MB':>9}{'ms':>8}{'MB eager':>10}{'weights MB':>12}"
    lines = [head]
    for each in found["layers"]:
        of = each["flop"] / found["tflops"] / 1e9, each["traffic"] / found["gb_per_s"] / 1e6
        lines.append(
            f"{each['name']:14}{each['flop'] / 1e9:9.1f}{of[0]:8.2f}{each['traffic'] / 1e6:9.1f}{of[1]:8.2f}"
            f"{each['traffic_unfused'] / 1e6:10.1f}{each['weights'] / 1e6:12.1f}"
        )
    lines.append(
        f"arithmetic {found['matrix_ms']:.2f} ms + traffic {found['traffic_ms']:.2f} ms (eager "
        f"{found['traffic_unfused_ms']:.2f}) + optimiser {found['optimiser_ms']:.2f} ms = {found['p50']:.2f} ms "
        f"a step, {found['floor_epoch_s']:,.0f} s an epoch"
    )
    return "\n".join(lines)


def main(args: list[str] | None = None) -> int:
    """Measure the ceilings, print the table, append the rows."""
    parser = runs.parser(__doc__, "device", "quick")
    parser.add_argument("--preset", choices=PRESETS, default=measure.PRESET)
    asked = parser.parse_args(args)
    device = torch.device(asked.device)
    cfg = forms.sized(asked.preset, device, quick=asked.quick)
    ceilings = list(ceiling_rows(device, DTYPES[cfg.precision], quick=asked.quick))
    found = roofline_row(cfg, net_of(cfg, device), *(each["p50"] for each in ceilings))
    runs.keep([*ceilings, found], asked)
    print(table(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
