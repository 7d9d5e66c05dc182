"""What was measured of data, machine and net, and what follows from it: a sentence for each thing to know."""

import dataclasses
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrot import config, machine, native
from fastrot.data.pack.read import KEPT_FOR_TRAINING, choose
from fastrot.entry import in_bytes, in_time, table
from fastrot.speed import bounds
from fastrot.speed.bounds import Measured, Subject, digits

# images/s and core of this project's loaders, crops of 224 pixels of the same pictures of ImageNet: the originals in the
# folder, prepared at short side 256 and JPEG quality 90 elsewhere. Rows of benchmarks/results/cpu_amd_epyc_2_cores.jsonl,
# "what" loader, "mode" crops, of commit 6a304f69: folder; tar shards; beton, C++ decoder; pack, C++ decoder
RATES = {"folder": 534.0, "tars": 1979.2, "beton": 3087.6, "pack": 13950.2}
RATES_WITHOUT_EXTENSION = {"beton": 1933.5, "pack": 612.9}  # beton; pack
COMMANDS = {"beton": "convert", "pack": "pack"}  # what writes a format
SOURCES = {"folder": "imagefolder", "beton": "beton", "tars": "webdataset"}  # its words for each
CALLED = {"beton": ".beton", "pack": ".pack", "tars": "tar shards"}
SPARE = 1.1  # times the step's images/s that loading should give: it is not always at its best
WORTH = 1.2  # times faster: so much another format must be, for a conversion to be advised
MADE = "these pictures are made, not read: name your own"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How pictures come out of the data, by all workers: images/s. None: they are made, not read."""

    bytes: float | None  # a picture, as the data holds it
    from_disk: float | None  # share of the bytes read; None: the system does not tell
    read: float | None  # for the first time
    decode: float  # crops, without reading

    @property
    def load(self) -> float:
        """Of pictures that are read for the first time and decoded."""
        return 1 / (1 / self.decode + (0 if self.read is None else 1 / self.read))


@dataclass(frozen=True, kw_only=True)
class Measurements(Loading):
    """Images/s of each further stage, and what they are of."""

    images: int  # of the data
    workers: int  # threads or processes that decode; 0: the one that trains
    batch: int  # pictures of the steps that were timed
    step: float  # on random pixels
    train: float  # on the data, all stages together
    steps: int  # that were timed so
    val_seconds: float | None  # of a validation pass; None: there is none
    median_short: int  # pixels, of the pictures' short sides
    short: int  # pixels of the short side that a converted picture should have
    pack_bytes: int  # of the whole data as a .pack of that short side
    damaged: tuple[str, ...]  # pictures that could not be read, a sentence each
    measured: Measured  # of a step on the data
    seconds: float  # that all of this took

    @property
    def epoch_seconds(self) -> float:
        """Of one process; with the validation pass, where there is one."""
        return self.images / self.train + (self.val_seconds or 0)


# ---- what follows ----


def advice(found: Measurements, subject: Subject) -> dict[str, str]:
    """A sentence for each thing to know, by its name."""
    made = subject.format == "synthetic"
    return {
        "verdict": bounds.verdict(found.measured, found.train, found.workers, subject),
        "format": MADE if made else which_format(found, subject),
        "workers": MADE if made else how_many_workers(found, subject),
        "pack": whether_a_pack_fits(found, subject),
        "epoch": what_an_epoch_costs(found),
    }


def which_format(found: Measurements, subject: Subject) -> str:
    """The one to choose, with the command that makes it."""
    ours = CALLED.get(subject.format, subject.format)
    if found.load >= SPARE * found.step:
        return f"keep the {ours}: it gives {digits(found.load)} images/s, {digits(found.load / found.step)} times what the step takes"
    if bounds.bound(found.measured) == "read":
        return f"keep the {ours} where its disk can be made faster: pictures wait to be read, not to be decoded"
    gains = _gains(subject.format)
    enough = [name for name, gain in gains.items() if gain * found.load >= SPARE * found.step]
    best = enough[0] if enough else max(gains, key=gains.__getitem__, default=None)
    if "pack" in gains and _gpu_holds_a_pack(found, subject):
        best = "pack"  # which the GPU decodes itself
    if best is None or gains[best] < WORTH:
        return f"keep the {ours}: no other format is much faster; smaller crops (--image-size) are cheaper to make"
    return (
        f"a .{best}, about {digits(gains[best])} times as fast as {ours} where both were measured: the {ours} gives "
        f"{digits(found.load)} images/s here, and the step takes {digits(found.step)}; to make it:  "
        + shlex.join(_conversion(best, subject, found.short))
    )


def _gains(format: str) -> dict[str, float]:
    """How many times faster than this one the formats are that it can be converted to, by RATES; smaller files first."""
    if format not in SOURCES:
        return {}
    rates = RATES if native.load() is not None else RATES | RATES_WITHOUT_EXTENSION
    return {name: rates[name] / rates[format] for name in COMMANDS if name != format}


def _conversion(name: str, subject: Subject, short: int) -> list[str]:
    """The command that prepares the data anew, beside what it is made from."""
    path = Path(subject.cfg.data or "")
    whole = path.resolve()
    out = str(whole.with_name(f"{whole.stem}-{short}.{name}"))
    out = out if path.is_absolute() else os.path.relpath(out)
    command = ["fastrot", COMMANDS[name], "--source", SOURCES[subject.format]]
    return [*command, "--root", str(path), "--out", out, "--short-side", str(short)]


def how_many_workers(found: Measurements, subject: Subject) -> str:
    """How many keep up with the step."""
    if subject.format == "pack" and subject.gpu is not None:
        return "one or two: the GPU decodes a pack itself"
    each = found.load / max(1, found.workers)
    enough, cores = math.ceil(SPARE * found.step / each), subject.cores
    said = f"--workers {enough} is enough, of {cores} cores"
    if enough > cores:
        said = f"--workers {cores}, all cores, and that is too few: {enough:,} would keep up"
    said += f" (a worker gives {digits(each)} images/s, the step takes {digits(found.step)}"
    if subject.gpu is None:
        return f"{said} where it has the cores to itself)"
    return f"{said}); each further GPU wants {enough:,} cores more"


def whether_a_pack_fits(found: Measurements, subject: Subject) -> str:
    """Into this GPU's memory."""
    pack = "this pack is" if subject.format == "pack" else "the data as one would be"
    what = f"{pack} {in_bytes(found.pack_bytes)}"
    if subject.gpu is None:
        least = in_bytes(found.pack_bytes / (1 - KEPT_FOR_TRAINING))
        return f"{what}; there is no GPU here: one of {least} or more would hold it"
    free, total = map(in_bytes, subject.gpu)
    gpu = f"this GPU, which has {free} of {total} free"
    if _gpu_holds_a_pack(found, subject):
        return f"{what}, which fits into {gpu}"
    if found.pack_bytes <= subject.memory:
        return f"{what}, which does not fit into {gpu}: --placement pinned keeps it in host memory"
    return (
        f"{what}, more than {gpu}, and more than host memory, which has {in_bytes(subject.memory)}"
    )


def _gpu_holds_a_pack(found: Measurements, subject: Subject) -> bool:
    gpu = subject.gpu
    return gpu is not None and choose("auto", found.pack_bytes, *gpu, "") == "resident"


def what_an_epoch_costs(found: Measurements) -> str:
    """From the steps on the data that were timed."""
    steps = f"{found.steps:,} step{'s'[: found.steps != 1]} of {found.batch}"
    said = f"{in_time(found.epoch_seconds)} for {found.images:,} pictures, by {steps}"
    if found.val_seconds is None:
        return f"{said}; without a validation pass"
    return f"{said}; {in_time(found.val_seconds)} of it are the validation pass"


# ---- in words ----


def describe(found: Measurements, subject: Subject) -> list[str]:
    """All of it, as lines."""
    cfg = subject.cfg
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    kind = CALLED.get(subject.format, subject.format)
    kind += "" if found.bytes is None else f", {in_bytes(found.bytes)} each"
    run = f"{cfg.preset}, crops of {cfg.method.crop.size} pixels, {cfg.precision}"
    about = {
        "data": f"{cfg.data}: {found.images:,} pictures, {kind}, short side {found.median_short} pixels (median)",
        "run": f"{run}, compiled" if cfg.compile else run,
        "machine": machine.device_name(subject.device),
        "versions": f"{versions}, commit {machine.commit()}",
        "looked": f"{found.seconds:.0f} s",
    }
    if found.damaged:
        about["damaged"] = f"{len(found.damaged):,} of those looked at; {found.damaged[0]}"
    rows = [("stage", "images/s", ""), *stages(found, subject)]
    rates = table((name, f"{rate:>9}  {said}".rstrip()) for name, rate, said in rows)
    return [*table(about.items()), "", *rates, "", *table(advice(found, subject).items())]


def stages(found: Measurements, subject: Subject) -> Iterator[tuple[str, str, str]]:
    """Name, images/s, and what there is to say of it."""
    if found.read is None or found.bytes is None:
        yield "read", "-", "they are made, not read"
    else:
        disk = "the system does not tell how much of it came from a disk"
        if found.from_disk is not None:
            disk = f"{found.from_disk:.0%} of it came from a disk, the rest was in memory"
        yield "read", digits(found.read), f"{in_bytes(found.read * found.bytes)}/s; {disk}"
    by_gpu = subject.format == "pack" and subject.gpu is not None
    workers = f"{found.workers} worker{'s'[: found.workers != 1]}"
    yield "decode + crop", digits(found.decode), "by the GPU" if by_gpu else workers
    if found.measured.copy is not None:
        yield "copy to the GPU", digits(found.batch / found.measured.copy), ""
    batches = f"batches of {found.batch}"
    yield "step on random pixels", digits(found.step), batches
    waits = f"{found.measured.wait / found.measured.step:.0%} of the time waiting for data"
    yield "train on the data", digits(found.train), f"{batches}; {waits}"


def in_json(found: Measurements, subject: Subject) -> dict[str, Any]:
    """All of it, in plain data; images/s, seconds and bytes."""
    here = {name: value for name, value in vars(subject).items() if name != "cfg"}
    also = {"load": found.load, "bound": bounds.bound(found.measured)}
    return {
        "config": config.to_plain(subject.cfg),
        "here": here | {"device": str(subject.device)},
        "found": dataclasses.asdict(found) | also,
        "epoch_s": found.epoch_seconds,
        "advice": advice(found, subject),
    }
