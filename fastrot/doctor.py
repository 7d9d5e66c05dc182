"""Doctor: `python fastrot/doctor.py DATA` tells in 20 seconds what a run on DATA would wait for, and what to change."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import contextlib
import dataclasses
import difflib
import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastrot import config, entry
from fastrot.config import Config, LoaderName, Precision, UsageError
from fastrot.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from fastrot.speed.probe import Measurements, Told

SPARE = (
    1.1  # times what the step takes: so much should loading give, for it is not always at its best
)
WORTH = 1.2  # times faster: so much another format must be, for a conversion to be advised
SHORTEST = 5  # seconds in which something can be told
SCRIPTS = {"beton": "to_ffcv.py", "pack": "to_pack.py"}
SOURCES = {
    "folder": "imagefolder",
    "beton": "beton",
    "tars": "webdataset",
}  # of dataprep, by format
MADE = "these pictures are made, not read: name your own"


Named = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Read, decode, copy and step for 20 seconds: what binds a run, which format, how many workers, what an epoch costs."""

    data: Named = ""  # FILE.beton, NAME.pack, a folder of shards or of pictures, or synthetic
    preset: str = "rotnet-alexnet"  # the run that is asked about, as of train.py
    val: str | None = None  # pictures to be judged on: a pass over them is then part of an epoch
    seconds: float = 20.0  # to look for; opening data, building and compiling a net are not counted
    batch: int | None = None  # pictures per process and step, before turning; default: the preset's
    image_size: int | None = None  # pixels a side of the crop; default: the recipe's
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
    from fastrot import assemble, machine
    from fastrot.dist import place
    from fastrot.speed import probe
    from fastrot.training.session import choose_device, choose_precision

    device = choose_device(cfg.device, place())
    cfg = dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device))
    begun = time.perf_counter()
    data = assemble.open_data(cfg.data or "", cfg.loader)
    opened = time.perf_counter() - begun
    val = None if cfg.val is None else assemble.open_data(cfg.val, knob="--val")
    workers = entry.cores() if cfg.workers is None else cfg.workers
    with _bar(wanted.seconds) as told:
        budget = probe.TimeBudget(wanted.seconds, told)
        found = probe.examine(cfg, data, device, workers=workers, budget=budget, val=val)
    found = dataclasses.replace(found, opened=opened + found.opened)
    subject = Subject(cfg, data.format, surroundings(device))
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
    own = {f.name for f in dataclasses.fields(Doctor)} & {
        f.name for f in dataclasses.fields(Config)
    }
    knobs = {name: getattr(wanted, name) for name in own - {"preset"}}
    cfg = dataclasses.replace(cfg, **{k: v for k, v in knobs.items() if v is not None})
    config.check(cfg)
    return config.resolved(cfg)


@contextlib.contextmanager
def _bar(seconds: float) -> Iterator["Told"]:
    """A progress bar on standard error, on a terminal alone; what it yields hears how it goes."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("opening", total=seconds)
        yield lambda stage, so_far: bar.update(task, description=stage, completed=so_far)


# ---- what the figures are of ----


@dataclass(frozen=True)
class Surroundings:
    """What a machine has."""

    device: "torch.device"
    cores: int
    memory: int  # bytes; 0: not known
    gpu: tuple[int, int] | None  # bytes free and in all; None: no GPU here


@dataclass(frozen=True)
class Subject:
    """What is judged: a run's config, the format of its data, and where."""

    cfg: Config
    format: str
    here: Surroundings

    @property
    def path(self) -> str:
        return self.cfg.data or ""


def surroundings(device: "torch.device") -> Surroundings:
    """Of this process."""
    import torch

    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    known = all(name in os.sysconf_names for name in names)
    memory = math.prod(os.sysconf(name) for name in names) if known else 0
    gpu = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    return Surroundings(device, entry.cores(), memory, gpu)


# ---- advice ----


def advice(found: "Measurements", subject: Subject) -> dict[str, str]:
    """A sentence for each thing to know, by its name."""
    return {
        "verdict": verdict(found, subject),
        "format": which_format(found, subject),
        "workers": how_many_workers(found, subject),
        "pack": whether_a_pack_fits(found, subject),
        "epoch": what_an_epoch_costs(found, subject),
    }


def verdict(found: "Measurements", subject: Subject) -> str:
    """What binds, by how much, what to change."""
    from fastrot.speed import bounds

    if found.bound != "read":
        setting = bounds.Setting(
            workers=found.workers,
            format=subject.format,
            precision=subject.cfg.precision,
            compiled=subject.cfg.compile,
        )
        return bounds.verdict(found.measured, subject.here.device, found.together, setting)
    assert found.read is not None
    assert found.bytes is not None
    waits = found.measured.wait / found.measured.step
    told = "" if found.from_disk is None else f", {found.from_disk:.0%} of it from a disk"
    ways = ["smaller pictures (--short-side of dataprep)"]
    if found.workers < subject.here.cores:
        ways.insert(0, f"--workers {subject.here.cores} instead of {found.workers}")
    if subject.format == "folder":
        ways.insert(0, "a .beton, which is read in larger pieces")
    elif subject.cfg.order == "full" and subject.format != "pack":
        ways.insert(0, "--order blocks, which reads neighbours together")
    return (
        f"bound by reading at {_rate(found.together)} images/s: {waits:.0%} of the time goes into waiting for data, "
        f"and {_rate(found.read)} images/s can be read ({entry.in_bytes(found.read * found.bytes)}/s{told}) where "
        f"{_rate(found.decoding)} could be decoded; try a faster disk, {' or '.join(ways)}"
    )


def which_format(found: "Measurements", subject: Subject) -> str:
    """The one to choose, with the command that makes it."""
    if subject.format == "synthetic":
        return MADE
    now, best_now = found.loading, _with_all_cores(found, subject.here.cores)
    wanted, ours = SPARE * found.step, _called(subject.format)
    if now >= wanted:
        return f"keep the {ours}: it gives {_rate(now)} images/s, {_rate(now / found.step)} times what the step takes"
    if best_now >= wanted:
        return (
            f"keep the {ours}: with all {subject.here.cores} cores about {_rate(best_now)} images/s are to be had, "
            f"more than the {_rate(found.step)} of the step"
        )
    other = _best_other(found, subject)
    if other is None or subject.format not in SOURCES:
        return (
            f"keep the {ours}: no other format would give much more than its {_rate(best_now)} images/s, "
            f"though the step takes {_rate(found.step)}; smaller crops (--image-size) are cheaper to make"
        )
    name, expected = other
    form = found.forms[name]
    whole = form.bytes * found.images
    pieces = [
        f"a .{name} of short side {found.short}: about {_rate(expected)} images/s where the {ours} gives "
        f"{_rate(now)} and the step takes {_rate(found.step)}",
        f"it is {entry.in_bytes(whole)} and takes about {entry.in_time(found.images * form.convert / subject.here.cores)} to make:  "
        + shlex.join(_conversion(name, subject, found.short)),
    ]
    if subject.here.memory and whole > subject.here.memory:
        pieces.append(
            "it is larger than memory here, so add --shuffle 0 and train with --order blocks"
        )
    if expected < wanted and subject.here.gpu is not None:
        pieces.append(
            "tar shards (dataprep/to_dali.py), whose JPEGs the GPU decodes with --loader dali, may give more"
        )
    return "; ".join(pieces)


def _with_all_cores(found: "Measurements", cores: int) -> float:
    """images/s that the data would give with a worker a core, as far as one may scale what was measured."""
    return found.loading * max(1, cores / max(1, found.workers))


def expected(found: "Measurements", name: str, cores: int) -> float:
    """images/s of another format: its bytes at the rate at which bytes were read, its decoder on all cores."""
    form = found.forms[name]
    decode = (
        form.decode_one
        * cores
        * min(1, found.decode_all / found.decode_one / max(1, found.workers))
    )
    read = 0 if not (found.read and found.bytes) else form.bytes / (found.read * found.bytes)
    return 1 / (1 / decode + read)


def _best_other(found: "Measurements", subject: Subject) -> tuple[str, float] | None:
    """The format to convert to, and its images/s: one that stays in the GPU's memory, else the first that is fast
    enough, else the fastest; None: none is worth it.
    """
    cores = subject.here.cores
    rates = {name: expected(found, name, cores) for name in found.forms if name != subject.format}
    if (
        subject.here.gpu is not None
        and "pack" in rates
        and _fits(found, subject.here) == "resident"
    ):
        return "pack", rates["pack"]
    enough = [name for name, rate in rates.items() if rate >= SPARE * found.step]
    name = next(iter(enough), max(rates, key=rates.__getitem__, default=None))
    if name is None or rates[name] < WORTH * _with_all_cores(found, cores):
        return None
    return name, rates[name]


def _conversion(name: str, subject: Subject, short: int) -> list[str]:
    """The command that prepares the data anew."""
    path = Path(subject.path)
    out = path.resolve().parent / f"{path.resolve().stem}-{short}.{name}"
    if not path.is_absolute():
        with contextlib.suppress(ValueError):
            out = out.relative_to(Path.cwd())
    command = ["python", f"dataprep/{SCRIPTS[name]}", "--source", SOURCES[subject.format]]
    return [*command, "--root", str(path), "--out", str(out), "--short-side", str(short)]


def how_many_workers(found: "Measurements", subject: Subject) -> str:
    """How many keep up with the step."""
    here = subject.here
    if subject.format == "synthetic":
        return MADE
    if subject.format == "pack" and here.gpu is not None:
        return "one or two: the GPU decodes a pack itself"
    each = found.loading / max(1, found.workers)
    enough = math.ceil(SPARE * found.step / each)
    said = f"a worker gives {_rate(each)} images/s, the step takes {_rate(found.step)}"
    if here.gpu is None:
        said += " where it has the cores to itself"
    if enough > here.cores:
        found_out = (
            f"--workers {here.cores}, all cores, and that is too few: {enough:,} would keep up"
        )
    else:
        found_out = f"--workers {enough} is enough, of {here.cores} cores"
    several = "" if here.gpu is None else f"; each further GPU wants {enough:,} cores more"
    return f"{found_out} ({said}){several}"


def _fits(found: "Measurements", here: Surroundings) -> str:
    from fastrot.data.pack.read import choose

    assert here.gpu is not None
    return choose("auto", found.pack_bytes, *here.gpu, "")


def whether_a_pack_fits(found: "Measurements", subject: Subject) -> str:
    """Into this GPU's memory."""
    from fastrot.data.pack.read import KEPT_FOR_TRAINING

    if subject.format == "pack":
        what = f"this pack is {entry.in_bytes(found.pack_bytes)}"
    else:
        what = f"of short side {found.short} or less it would be {entry.in_bytes(found.pack_bytes)}"
    if subject.here.gpu is None:
        least = found.pack_bytes / (1 - KEPT_FOR_TRAINING)
        return f"{what}; there is no GPU here: one of {entry.in_bytes(least)} or more would hold it"
    free, total = subject.here.gpu
    gpu = f"this GPU, which has {entry.in_bytes(free)} of {entry.in_bytes(total)} free"
    if _fits(found, subject.here) == "resident":
        return f"{what}, which fits into {gpu}"
    if found.pack_bytes <= subject.here.memory:
        return f"{what}, which does not fit into {gpu}: --placement pinned keeps it in host memory"
    return f"{what}, more than {gpu}, and more than host memory, which has {entry.in_bytes(subject.here.memory)}"


def epoch_seconds(found: "Measurements") -> float:
    """Of one process; with the validation pass, where there is one."""
    return found.images / found.together + (found.val_seconds or 0)


def what_an_epoch_costs(found: "Measurements", subject: Subject) -> str:
    """Extrapolated from the steps that were taken together."""
    said = f"{entry.in_time(epoch_seconds(found))} for {found.images:,} pictures, {_taken(found)}"
    if found.val_seconds is None:
        return f"{said}; without a validation pass"
    return f"{said}; {entry.in_time(found.val_seconds)} of it are the validation pass"


def _taken(found: "Measurements") -> str:
    if not found.steps:
        return "foretold: there was no time for steps on the data"
    fewer = f" of {found.together_batch} pictures" if found.together_batch != found.batch else ""
    return f"extrapolated from {found.steps:,} step{'s'[: found.steps != 1]}{fewer}"


# ---- in words ----


def describe(found: "Measurements", subject: Subject) -> list[str]:
    """All of it, as lines."""
    from fastrot import machine
    from fastrot.training.journal import table

    cfg, here = subject.cfg, subject.here
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    size = "" if found.bytes is None else f", {entry.in_bytes(found.bytes)} each"
    about = {
        "data": f"{subject.path}: {found.images:,} pictures, {_called(subject.format)}{size}, short side "
        f"{found.median_short} pixels (median), opened in {entry.in_time(found.opened)}",
        "run": f"{cfg.preset}, crops of {cfg.method.crop.size} pixels, {cfg.precision}"
        + (", compiled" if cfg.compile else ""),
        "machine": machine.device_name(here.device),
        "versions": f"{versions}, commit {machine.commit()}",
        "looked": f"{found.seconds:.0f} s",
    }
    if found.damaged:
        about["damaged"] = f"{len(found.damaged):,} of those looked at; {found.damaged[0]}"
    rows = [("stage", "images/s", ""), *stages(found, subject)]
    wide, wider = (max(len(row[k]) for row in rows) for k in (0, 1))
    lines = [f"  {a:<{wide}}  {b:>{wider}}  {c}".rstrip() for a, b, c in rows]
    return [*table(about.items()), "", *lines, "", *table(advice(found, subject).items())]


def stages(found: "Measurements", subject: Subject) -> Iterator[tuple[str, str, str]]:
    """Name, images/s, and what there is to say of it."""
    if found.read is None or found.bytes is None:
        yield "read", "-", "they are made, not read"
    else:
        disk = "the system does not tell how much of it came from a disk"
        if found.from_disk is not None:
            disk = f"{found.from_disk:.0%} of it came from a disk, the rest was in memory"
        yield "read", _rate(found.read), f"{entry.in_bytes(found.read * found.bytes)}/s; {disk}"
    own = subject.format == "pack" and subject.here.gpu is not None
    by = "by the GPU" if own else "crops of pictures that were just read"
    yield "decode + crop, one worker", _rate(found.decode_one), by
    if found.workers > 1:
        yield f"decode + crop, {found.workers} workers", _rate(found.decode_all), ""
    for name, form in found.forms.items():
        yield (
            f"the same as a .{name}, one worker",
            _rate(form.decode_one),
            f"of short side {found.short} or less, {entry.in_bytes(form.bytes)} each",
        )
    if found.copy is None:
        yield "copy to the device", "-", "there is no GPU"
    else:
        yield "copy to the device", _rate(found.copy), ""
    yield "step on held pictures", _rate(found.step), _of_batch(found, found.step_batch)
    waits = found.measured.wait / found.measured.step
    how = _of_batch(found, found.together_batch) if found.steps else "foretold from the lines above"
    yield (
        "all together",
        _rate(found.together),
        f"{how}; {waits:.0%} of the time waiting for data",
    )


def _of_batch(found: "Measurements", timed: int) -> str:
    return f"batches of {found.batch}" + (
        "" if timed == found.batch else f", from steps of {timed}"
    )


def in_json(found: "Measurements", subject: Subject) -> dict[str, Any]:
    """All of it, in plain data; images/s, seconds and bytes."""
    derived = {name: getattr(found, name) for name in ("decoding", "loading", "bound")}
    here = dataclasses.asdict(subject.here) | {"device": str(subject.here.device)}
    return {
        "config": config.to_plain(subject.cfg),
        "format": subject.format,
        "here": here,
        "found": dataclasses.asdict(found) | derived,
        "epoch_s": epoch_seconds(found),
        "advice": advice(found, subject),
    }


def _called(format: str) -> str:
    return {"beton": ".beton", "pack": ".pack", "tars": "tar shards", "folder": "folder"}.get(
        format, format
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(entry.status(main))
