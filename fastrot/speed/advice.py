"""What was measured of data, machine and net, and what follows from it: a sentence for each thing to know."""

import contextlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrot import native
from fastrot.config import Config
from fastrot.data.pack.read import KEPT_FOR_TRAINING, choose
from fastrot.entry import in_bytes, in_time
from fastrot.speed import bounds
from fastrot.speed.bounds import Measured, digits

# images/s and core of this project's loaders, crops of 224 pixels of the same pictures of ImageNet: the originals in the
# folder, prepared at short side 256 and JPEG quality 90 elsewhere. Rows of benchmarks/results/cpu_amd_epyc_2_cores.jsonl,
# "what" loader, "mode" crops, of commit 6a304f69: folder; tar shards; beton, C++ decoder; pack, C++ decoder
RATES = {"folder": 534.0, "tars": 1979.2, "beton": 3087.6, "pack": 13950.2}
RATES_WITHOUT_EXTENSION = {"beton": 1933.5, "pack": 612.9}  # beton; pack
SCRIPTS = {"beton": "to_ffcv.py", "pack": "to_pack.py"}  # of dataprep: what writes a format
SOURCES = {"folder": "imagefolder", "beton": "beton", "tars": "webdataset"}  # its words for each
CALLED = {"beton": ".beton", "pack": ".pack", "tars": "tar shards"}
SPARE = (
    1.1  # times the step's images/s: so much should loading give, which is not always at its best
)
WORTH = 1.2  # times faster: so much another format must be, for a conversion to be advised
MADE = "these pictures are made, not read: name your own"


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Images/s of each stage, and what they are of. None: there is no such stage, or it was not measured."""

    images: int  # of the data
    workers: int  # threads or processes that decode; 0: the one that trains
    batch: int  # pictures of the steps that were timed
    bytes: float | None  # a picture, as the data holds it; None: it is made, not read
    from_disk: float | None  # share of the bytes read; None: the system does not tell
    read: float | None  # by all workers, for the first time
    decode: float  # crops by all workers, without reading
    step: float  # on random pixels
    train: float  # on the data, all stages together
    steps: int  # that were timed so
    val_seconds: float | None  # of a validation pass
    median_short: int  # pixels, of the pictures' short sides
    short: int  # pixels of the short side that a converted picture should have
    pack_bytes: int  # of the whole data as a .pack of that short side
    damaged: tuple[str, ...]  # pictures that could not be read, a sentence each
    measured: Measured  # of a step on the data
    seconds: float  # that all of this took

    @property
    def load(self) -> float:
        """By all workers, who read each picture for the first time and decode it."""
        return 1 / (1 / self.decode + (0 if self.read is None else 1 / self.read))

    @property
    def epoch_seconds(self) -> float:
        """Of one process; with the validation pass, where there is one."""
        return self.images / self.train + (self.val_seconds or 0)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the advice is for: a run's config, the format of its data, and the machine."""

    cfg: Config
    format: str
    device: torch.device
    cores: int
    memory: int  # bytes; 0: not known
    gpu: tuple[int, int] | None  # bytes free and in all; None: no GPU here


def advice(found: Measurements, subject: Subject) -> dict[str, str]:
    """A sentence for each thing to know, by its name."""
    return {
        "verdict": verdict(found, subject),
        "format": which_format(found, subject),
        "workers": how_many_workers(found, subject),
        "pack": whether_a_pack_fits(found, subject),
        "epoch": what_an_epoch_costs(found),
    }


def verdict(found: Measurements, subject: Subject) -> str:
    """What binds, by how much, what to change."""
    has = {"precision": subject.cfg.precision, "compiled": subject.cfg.compile}
    setting = bounds.Setting(workers=found.workers, format=subject.format, **has)
    return bounds.verdict(found.measured, subject.device, found.train, setting)


def which_format(found: Measurements, subject: Subject) -> str:
    """The one to choose, with the command that makes it."""
    if subject.format == "synthetic":
        return MADE
    ours = CALLED.get(subject.format, subject.format)
    if found.load >= SPARE * found.step:
        return f"keep the {ours}: it gives {digits(found.load)} images/s, {digits(found.load / found.step)} times what the step takes"
    if bounds.bound(found.measured) == "read":
        return f"keep the {ours} where its disk can be made faster: pictures wait to be read, not to be decoded"
    gains = _gains(subject.format)
    enough = [name for name, gain in gains.items() if gain * found.load >= SPARE * found.step]
    best = next(iter(enough), max(gains, key=gains.__getitem__, default=None))
    if subject.gpu is not None and "pack" in gains and _placement(found, subject) == "resident":
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
    return {name: rates[name] / rates[format] for name in SCRIPTS if name != format}


def _conversion(name: str, subject: Subject, short: int) -> list[str]:
    """The command that prepares the data anew."""
    path = Path(subject.cfg.data or "")
    out = path.resolve().parent / f"{path.resolve().stem}-{short}.{name}"
    if not path.is_absolute():
        with contextlib.suppress(ValueError):
            out = out.relative_to(Path.cwd())
    command = ["python", f"dataprep/{SCRIPTS[name]}", "--source", SOURCES[subject.format]]
    return [*command, "--root", str(path), "--out", str(out), "--short-side", str(short)]


def how_many_workers(found: Measurements, subject: Subject) -> str:
    """How many keep up with the step."""
    if subject.format == "synthetic":
        return MADE
    if subject.format == "pack" and subject.gpu is not None:
        return "one or two: the GPU decodes a pack itself"
    each = found.load / max(1, found.workers)
    enough = math.ceil(SPARE * found.step / each)
    said = f"--workers {enough} is enough, of {subject.cores} cores"
    if enough > subject.cores:
        said = (
            f"--workers {subject.cores}, all cores, and that is too few: {enough:,} would keep up"
        )
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
    if _placement(found, subject) == "resident":
        return f"{what}, which fits into {gpu}"
    if found.pack_bytes <= subject.memory:
        return f"{what}, which does not fit into {gpu}: --placement pinned keeps it in host memory"
    host = f"host memory, which has {in_bytes(subject.memory)}"
    return f"{what}, more than {gpu}, and more than {host}"


def _placement(found: Measurements, subject: Subject) -> str:
    assert subject.gpu is not None
    return choose("auto", found.pack_bytes, *subject.gpu, "")


def what_an_epoch_costs(found: Measurements) -> str:
    """From the steps on the data that were timed."""
    said = (
        f"{in_time(found.epoch_seconds)} for {found.images:,} pictures, by "
        f"{found.steps:,} step{'s'[: found.steps != 1]} of {found.batch}"
    )
    if found.val_seconds is None:
        return f"{said}; without a validation pass"
    return f"{said}; {in_time(found.val_seconds)} of it are the validation pass"
