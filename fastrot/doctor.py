"""Doctor: `python fastrot/doctor.py DATA` tells in 20 seconds what a run on DATA would wait for, and what to change."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import dataclasses
import json
import math
from typing import Literal

from fastrot import cli, config, entry, ranges
from fastrot.config import Config, LoaderName, Precision, UsageError
from fastrot.presets import PRESETS

SHORTEST = 5  # seconds in which something can be told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Read, decode, copy and step for 20 seconds: what binds a run, which format, how many workers, what an epoch costs."""

    # FILE.beton, NAME.pack, a folder of shards or of pictures, or synthetic
    data: str | None = dataclasses.field(default=None, metadata=cli.first("DATA"))
    preset: str = "rotnet-alexnet"  # the run that is asked about
    val: str | None = None  # pictures to be judged on: a pass over them is then part of an epoch
    seconds: float = 20.0  # to look for; opening data, building and compiling a net are not counted
    batch: int | None = None  # pictures per process and step; default: the preset's
    image_size: int | None = None  # pixels a side of the crop; default: the preset's
    workers: int | None = None  # threads or processes that decode; default: one a core
    precision: Precision = "auto"  # of the network's arithmetic; auto: bf16 where the device has it
    compile: bool | None = None  # torch.compile the network; default: as a run on this device
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = "auto"  # what reads the data; auto: by its format
    enlarge: bool = False  # allow crops larger than most pictures
    json: Path | None = None  # also write all of it there, as one JSON object


def main(argv: list[str] | None = None) -> int:
    wanted = cli.parse(Doctor, argv, "fastrot doctor")
    cfg = config_of(wanted)
    from rich.console import Console

    from fastrot import assemble, disk, machine
    from fastrot.dist import place
    from fastrot.speed import advice, bounds, probe
    from fastrot.training.device import choose_device, choose_form, choose_precision, time_kernels

    device = choose_device(cfg.device, place())
    cfg = dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device))
    cfg, _ = choose_form(cfg, None, device)
    time_kernels(device)
    data, val = assemble.data_of(cfg)
    with Console(stderr=True).status("opening", spinner="line") as status:  # on a terminal alone
        found = probe.measure(cfg, data, val, device, wanted.seconds, status.update)
    subject = bounds.subject_of(cfg, data, device)
    print("\n".join(entry.printable(line) for line in advice.describe(found, subject)))
    if wanted.json is not None:
        whole = {"environment": machine.environment(device, 1), **advice.in_json(found, subject)}
        disk.replace_bytes(wanted.json, json.dumps(whole, indent=1).encode())
        print(f"written to {wanted.json}")
    return 0


def config_of(wanted: Doctor) -> Config:
    """The run that is asked about. Raises UsageError for what no run could use."""
    if not wanted.data:
        raise UsageError(
            "fastrot doctor wants data: name a .beton file, a .pack, a folder, or synthetic"
        )
    if wanted.preset not in PRESETS:
        raise UsageError(cli.choose("--preset got", PRESETS, wanted.preset))
    if not SHORTEST <= wanted.seconds < math.inf:
        raise UsageError(f"--seconds got {wanted.seconds:g}: it wants {SHORTEST} or more")
    ours = {field.name for field in dataclasses.fields(Config)} - {"preset"}
    knobs = {k: v for k, v in vars(wanted).items() if k in ours and v is not None}
    cfg = dataclasses.replace(PRESETS[wanted.preset](), **knobs)
    ranges.check(cfg)
    return config.resolved(cfg)


if __name__ == "__main__":
    sys.exit(entry.status(main))
