"""Doctor: `python fastrot/doctor.py DATA` tells in 20 seconds what a run on DATA would wait for, and what to change."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastrot import config, entry
from fastrot.config import Config, LoaderName, Precision, UsageError
from fastrot.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from fastrot.speed.advice import Measurements, Subject

SHORTEST = 5  # seconds in which something can be told
Named = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Read, decode, copy and step for 20 seconds: what binds a run, which format, how many workers, what an epoch costs."""

    data: Named = ""  # FILE.beton, NAME.pack, a folder of shards or of pictures, or synthetic
    preset: str = "rotnet-alexnet"  # the run that is asked about, as of train.py
    val: str | None = None  # pictures to be judged on: a pass over them is then part of an epoch
    seconds: float = 20.0  # to look for; opening data, building and compiling a net are not counted
    batch: int | None = None  # pictures per process and step; default: the preset's
    image_size: int | None = None  # pixels a side of the crop; default: the preset's
    workers: int | None = None  # threads or processes that decode; default: one a core
    precision: Precision = "auto"  # of the network's arithmetic; auto: bf16 where the device has it
    compile: bool = False  # torch.compile the network
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = "auto"  # what reads the data; auto: by its format
    enlarge: bool = False  # allow crops larger than most pictures
    json: Path | None = None  # also write all of it there, as one JSON object


def main(argv: list[str] | None = None) -> int:
    with entry.told_once():
        wanted = tyro.cli(Doctor, args=argv, prog="doctor.py")
    cfg = config_of(wanted)
    from rich.console import Console

    from fastrot import assemble, machine
    from fastrot.dist import place
    from fastrot.speed import probe
    from fastrot.training.device import choose_device, choose_precision

    device = choose_device(cfg.device, place())
    cfg = dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device))
    data = assemble.open_data(cfg.data or "", cfg.loader)
    val = None if cfg.val is None else assemble.open_data(cfg.val, knob="--val")
    workers = entry.cores() if cfg.workers is None else cfg.workers
    with Console(stderr=True).status("opening") as status:  # on a terminal alone
        how: dict[str, Any] = {"workers": workers, "seconds": wanted.seconds, "val": val}
        found = probe.measure(cfg, data, device, told=status.update, **how)
    subject = subject_of(cfg, data, device)
    print("\n".join(entry.printable(line) for line in describe(found, subject)))
    if wanted.json is not None:
        from fastrot.disk import replace_bytes

        whole = {"environment": machine.environment(device, 1), **in_json(found, subject)}
        replace_bytes(wanted.json, json.dumps(whole, indent=1).encode())
        print(f"written to {wanted.json}")
    return 0


def config_of(wanted: Doctor) -> Config:
    """The run that is asked about. Raises UsageError for what no run could use."""
    if not wanted.data:
        raise UsageError(
            "doctor.py wants data: name a .beton file, a .pack, a folder of shards or of pictures, or synthetic"
        )
    if wanted.preset not in PRESETS:
        near = difflib.get_close_matches(wanted.preset, PRESETS, n=1)
        way = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise UsageError(f"--preset got {wanted.preset!r}: {way}")
    if not SHORTEST <= wanted.seconds < math.inf:
        raise UsageError(
            f"--seconds got {wanted.seconds:g}: it wants {SHORTEST} or more, such as 20"
        )
    cfg = PRESETS[wanted.preset]()
    ours = {f.name for f in dataclasses.fields(Config)} - {"preset"}
    knobs = {k: v for k, v in vars(wanted).items() if k in ours and v is not None}
    cfg = dataclasses.replace(cfg, **knobs)
    config.check(cfg)
    return config.resolved(cfg)


def subject_of(cfg: Config, data: Any, device: "torch.device") -> "Subject":
    """What the advice is for: this run, on this machine."""
    import torch

    from fastrot.speed.advice import Subject

    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    known = all(name in os.sysconf_names for name in names)
    memory = math.prod(os.sysconf(name) for name in names) if known else 0
    gpu = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    here: dict[str, Any] = {"device": device, "cores": entry.cores(), "memory": memory, "gpu": gpu}
    return Subject(cfg=cfg, format=data.format, **here)


# ---- in words ----


def describe(found: "Measurements", subject: "Subject") -> list[str]:
    """All of it, as lines."""
    from fastrot import machine
    from fastrot.speed.advice import CALLED, advice
    from fastrot.training.journal import table

    cfg = subject.cfg
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    size = "" if found.bytes is None else f", {entry.in_bytes(found.bytes)} each"
    about = {
        "data": f"{cfg.data}: {found.images:,} pictures, {CALLED.get(subject.format, subject.format)}{size}, "
        f"short side {found.median_short} pixels (median)",
        "run": f"{cfg.preset}, crops of {cfg.method.crop.size} pixels, {cfg.precision}"
        + (", compiled" if cfg.compile else ""),
        "machine": machine.device_name(subject.device),
        "versions": f"{versions}, commit {machine.commit()}",
        "looked": f"{found.seconds:.0f} s",
    }
    if found.damaged:
        about["damaged"] = f"{len(found.damaged):,} of those looked at; {found.damaged[0]}"
    rows = [("stage", "images/s", ""), *stages(found, subject)]
    wide, wider = (max(len(row[k]) for row in rows) for k in (0, 1))
    lines = [f"  {a:<{wide}}  {b:>{wider}}  {c}".rstrip() for a, b, c in rows]
    return [*table(about.items()), "", *lines, "", *table(advice(found, subject).items())]


def stages(found: "Measurements", subject: "Subject") -> Iterator[tuple[str, str, str]]:
    """Name, images/s, and what there is to say of it."""
    from fastrot.speed.bounds import digits

    if found.read is None or found.bytes is None:
        yield "read", "-", "they are made, not read"
    else:
        disk = "the system does not tell how much of it came from a disk"
        if found.from_disk is not None:
            disk = f"{found.from_disk:.0%} of it came from a disk, the rest was in memory"
        yield "read", digits(found.read), f"{entry.in_bytes(found.read * found.bytes)}/s; {disk}"
    by_gpu = subject.format == "pack" and subject.gpu is not None
    workers = f"{found.workers} worker{'s'[: found.workers != 1]}"
    yield "decode + crop", digits(found.decode), "by the GPU" if by_gpu else workers
    if found.measured.copy is not None:
        yield "copy to the GPU", digits(found.batch / found.measured.copy), ""
    batches = f"batches of {found.batch}"
    yield "step on random pixels", digits(found.step), batches
    waits = f"{found.measured.wait / found.measured.step:.0%} of the time waiting for data"
    yield "train on the data", digits(found.train), f"{batches}; {waits}"


def in_json(found: "Measurements", subject: "Subject") -> dict[str, Any]:
    """All of it, in plain data; images/s, seconds and bytes."""
    from fastrot.speed import advice, bounds

    here = {name: value for name, value in vars(subject).items() if name != "cfg"}
    also = {"load": found.load, "bound": bounds.bound(found.measured)}
    return {
        "config": config.to_plain(subject.cfg),
        "here": here | {"device": str(subject.device)},
        "found": dataclasses.asdict(found) | also,
        "epoch_s": found.epoch_seconds,
        "advice": advice.advice(found, subject),
    }


if __name__ == "__main__":
    sys.exit(entry.status(main))
