"""Made-up rows of every kind that the page of throughput reads, of a processor and of a card that do not exist."""

import functools
import os
from unittest import mock

from benchmarks import aims, measure

CPU, CARD = "Quill Q1", "Abacus 3"  # their names
LOADERS = ("held", "synthetic", "beton", "shards", "pack")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "embed")
ALEXNET = {"preset": aims.PRESET}
LOADED = {  # images/s and core
    "beton": 1933.0,
    "beton, C++ decoder": 3088.0,
    "tar shards": 1979.0,
    "pack": 613.0,
    "pack, C++ decoder": 13950.0,
    "folder": 418.0,
    "torchvision uint8": 265.0,
    "torchvision normalised float": 186.0,
    "FFCV, its own pipeline": 1442.0,
    "DALI, its own pipeline, same JPEGs": 1008.0,
}


def cpu_rows():
    """All that a CPU has to have."""
    return [
        *loader_rows(per_core=1.0, gpu=False),
        *training_rows(
            speed=1.0, forms=("eager", "compiled", "eager + folded", "eager + fused"), gpu=False
        ),
    ]


def gpu_rows():
    """As much of a card, and what only a card has."""
    forms = ("eager", "compiled", "compiled + folded + fused + graph")
    return [
        *loader_rows(per_core=0.7, gpu=True),
        *training_rows(speed=137.3, forms=forms, gpu=True),
    ]


@functools.cache
def origin():
    with mock.patch.dict(os.environ, {"COMMIT": "f" * 40, "DIRTY": "0"}):
        return measure.row("")


def made(what, variant, value, unit, *, gpu, theme="train", **fields):
    of = {"gpu": CARD if gpu else None, "cpu": CPU, "cores": 16 if gpu else 2}
    spread = {"unit": unit, "p20": 0.93 * value, "p50": value, "p80": 1.04 * value, "reps": 5}
    return {**origin(), "what": what, "theme": theme, "variant": variant, **spread, **fields, **of}


def size_of(gpu):
    small = {"batch": 64, "size": 64, "width": 0.25}
    return {"batch": 192, "size": 224, "width": 1.0} if gpu else small


def loader_rows(*, per_core, gpu):
    cores = 16 if gpu else 2
    of = {"theme": "loaders", "gpu": gpu}
    for name, rate in LOADED.items():
        core = rate * per_core
        wall = {"images_per_s": core * cores, "images_per_s_p20": 0.9 * core * cores}
        wall["images_per_s_p80"] = 1.05 * core * cores
        yield made("loader", name, core, "images/s and core", mode="crops", **wall, **of)
        beside = {"mode": "crops, beside a stand-in for the step", "waited": 0.2}
        yield made("loader", name, 0.85 * core * cores, "images/s", **beside, **of)
    if gpu:
        wall = {"images_per_s": 1.1e6, "images_per_s_p20": 1.0e6, "images_per_s_p80": 1.2e6}
        core = 1.1e6 / cores
        yield made(
            "loader", "pack, resident", core, "images/s and core", mode="crops", **wall, **of
        )


def training_rows(*, speed, forms, gpu):
    size = size_of(gpu)
    of = {"gpu": gpu}
    tflops, gb_per_s = 0.4337 * speed * 12, 11.3 * speed * 2
    yield made("matrix product", "square", tflops, "TFLOP/s", dtype="bf16", **of)
    yield made("copy", "", gb_per_s, "GB/s", dtype="bf16", **of)
    layers = [
        {
            "name": name,
            "flop": 2.2e9 * (1 + 3 * (i % 4)) * (speed if gpu else 1),
            "traffic": 31e6 * (1 + (7 - i) % 5) * (speed if gpu else 1),
            "traffic_unfused": 83e6 * (1 + (7 - i) % 5) * (speed if gpu else 1),
            "weights": 1.7e6 * (1 + i),
        }
        for i, name in enumerate(LAYERS)
    ]
    matrix = sum(layer["flop"] for layer in layers) / tflops / 1e9
    traffic = sum(layer["traffic"] for layer in layers) / gb_per_s / 1e6
    unfused = sum(layer["traffic_unfused"] for layer in layers) / gb_per_s / 1e6
    floor = matrix + traffic + 0.41
    yield made(
        *("roofline", aims.PRESET, floor, "ms"),
        **{"matrix_ms": matrix, "traffic_ms": traffic, "optimiser_ms": 0.41},
        **{"traffic_unfused_ms": unfused, "layers": layers, "tflops": tflops},
        **{"gb_per_s": gb_per_s, "floor_epoch_s": floor * aims.IMAGENET / size["batch"] / 1e3},
        **(size | of),
    )
    step = 0.0
    for i, form in enumerate(forms):
        for j, loader in enumerate(LOADERS):
            wait = 0.3 if loader == "shards" else 0.004 * j
            parts = dict(views=1.9, forward=31.7, losses=0.83, nce=17.3, backward=49.1)
            parts |= dict(optimiser=3.37, bank=0.97, rest=0.61)
            faster = floor / 41.3 if gpu else 1.0
            split = {part: ms * faster * (1 - 0.13 * i) for part, ms in parts.items()}
            split["wait"] = wait / (1 - wait) * sum(split.values())
            step = sum(split.values()) * 0.97
            rate = size["batch"] / step * 1e3
            if "graph" in form:
                split = None
            yield made(
                *("step", f"{aims.PRESET} {form}, {loader}", step, "ms"),
                **{"form": form, "loader": loader, "images_per_s": rate, "wait_share": wait},
                **{"idle_share": 0.037 if gpu else None, "tflops": 0.39 * tflops, "split": split},
                **{"share_of_matrix": 0.39, "peak_memory_mb": 7321.0 if gpu else None},
                **(ALEXNET | size | of),
            )
    bank = f"{aims.PRESET} {forms[-1]}"
    yield made("bank's share of a step", bank, 0.0213, "share", shape=size, **of)
    for form in forms[:1] + forms[-1:]:
        seconds = 1e-3 * step * aims.IMAGENET / size["batch"]
        yield made(
            *("epoch", f"{aims.PRESET}, pack", seconds * 1.03, "s"),
            **{
                "loader": "pack",
                "form": form,
                "about": "97 pictures, copied 3 times",
                "images": aims.IMAGENET,
                "turns": 4,
            },
            **{"extrapolated": not gpu, "validation": True},
            **{"split": {"train": seconds, "validation": 0.03 * seconds}},
            **(ALEXNET | size | of),
        )
    yield from baseline_rows(speed, size, gpu)
    for ranks in (2, 4):
        kinds = {"gradients": 14_730_112, "features": 98_304 * ranks, "other": 0}
        name = f"{ranks} ranks, {aims.PRESET}"
        yield made("communication", name, sum(kinds.values()), "bytes", counted=kinds, **of)
    for gpus, share in ((8, 0.98), (64, 0.43)):
        rate = size["batch"] / step * 1e3 * gpus * share
        more = {"full_overlap": {"images_per_s": rate * 1.2}, "step_on": "Quill Q1"}
        yield made(
            *("scaling", f"{gpus} GPUs", rate, "images/s"),
            **{"modelled": True, "seconds_per_epoch": aims.IMAGENET / rate, "bytes": 14_926_744},
            **{"link_gb_per_s": 50.0, "link": "an assumption: a link of 400 Gb/s (a data sheet)"},
            **{"step_ms": step, **more, **of},
        )
    for i, form in enumerate(("float32 eager", "bf16 eager")):
        for task, preset in (("", "demo"), ("decoupling, ", aims.PRESET)):
            curves = [
                [
                    {"step": 50 * t, "accuracy": 0.25 + (0.33 - 0.02 * i) * t / (t + 4 + seed)}
                    | {"loss": 1.4 - 0.06 * t**0.5 - 0.021 * (seed + i)}
                    for t in range(9)
                ]
                for seed in range(3 if gpu else 1)
            ]
            yield made(
                *("learning", f"{task}{form}", curves[0][-1]["accuracy"], "share"),
                **{"preset": preset, "form": form, "seeds": len(curves), "curves": curves},
                **{"judgement": f"{form} learns", "about": "97 steps", **of},
            )
    yield made("collector", "frozen", 118.7, "ms", before=121.3, **of)


def baseline_rows(speed, size, gpu):
    of = size | {"gpu": gpu}
    ways = {"num_workers 0": 31.0, "num_workers 8": 43.0, "step alone": 71.0}
    sides = {f"original's way, {way}": rate for way, rate in ways.items()}
    sides |= {"ours, eager, .beton": 171.0, "ours, eager, step alone": 193.0}
    for way, rate in sides.items():
        rate *= speed**0.5
        told = {"step_ms": size["batch"] / rate * 1e3}
        if not way.endswith("alone"):
            train, look = aims.IMAGENET / rate, aims.VALIDATION / rate / 3
            told |= {"epoch_s": train + look, "extrapolated": True, "images": aims.IMAGENET}
        yield made("baseline", way, rate, "images/s", **told, **of)
    for n in (0, 8):
        ratio = f"ours, eager, .beton / original's way, num_workers {n}"
        yield made("baseline ratio", ratio, 5.31 - 0.17 * n, "times", **of)
