"""The forms that a training step can be run in, by name, and what trains in one of them.

A name is words joined by " + ", each of which sets knobs of the config: "compiled + folded + fused + graph". What is
called eager or compiled sets all that make a form, so that nothing is left to what this GPU has by default.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastrot import assemble, config
from fastrot.config import AlexNet, Config, MemoryBank, UsageError, resolved
from fastrot.core import DTYPES
from fastrot.data.loader import Loader
from fastrot.presets import PRESETS
from fastrot.training.device import PLAIN, choose_precision, with_knobs
from fastrot.training.graph import WARM_UP
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build

WORDS: dict[str, dict[str, Any]] = {
    "eager": PLAIN,
    "compiled": PLAIN | {"compile": True},
    "compiled tuned": PLAIN | {"compile": True, "compile_mode": "max-autotune-no-cudagraphs"},
    "folded": {"backbone.space_to_depth": True},
    "fused": {"backbone.fuse": True},
    "graph": {"graph": True},
    "float32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
}
FORMS = ("eager", "compiled", "eager + folded", "eager + fused")  # of a look; gpu.py has a GPU's
SMALL = {"batch": 32, "backbone": AlexNet(width=0.25)}  # for a CPU
QUICK = {"batch": 8, "image_size": 64, "backbone": AlexNet(width=0.25, kernel=5, stride=2)}


def sized(preset: str, device: torch.device, *, quick: bool = False, **knobs: Any) -> Config:
    """The preset as a benchmark runs it: whole on a GPU, of a quarter of the width on a CPU, small where quick."""
    made = PRESETS[preset]()
    if isinstance(made.backbone, AlexNet):
        small = QUICK if quick else SMALL if device.type == "cpu" else {}
        net = dataclasses.replace(small.get("backbone", made.backbone), last=made.backbone.last)
        knobs = {**small, "backbone": net, **knobs}
    cfg = dataclasses.replace(made, **knobs)
    return resolved(
        dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device), device="auto")
    )


def words(form: str) -> list[str]:
    """The words of a form's name, joined by " + " or a space. Raises UsageError for one that is none."""
    parts = form.split(" + ")
    found = [word for part in parts for word in ([part] if part in WORDS else part.split())]
    if unknown := [word for word in found if word not in WORDS]:
        raise UsageError(
            f"--forms got {unknown[0]!r}: it wants words of {', '.join(WORDS)}, joined by +"
        )
    return found


def knobs(form: str) -> dict[str, Any]:
    """What a form sets, by the knobs' paths."""
    return {name: value for word in words(form) for name, value in WORDS[word].items()}


def config_in(form: str, cfg: Config) -> Config:
    """The same run in a form."""
    return with_knobs(cfg, knobs(form))


def words_of(form: str) -> list[str]:
    """The form on the command line of a run."""
    said = []
    for name, value in knobs(form).items():
        name = re.sub(r"(\w+)$", r"no_\1", name) if value is False else name
        said += [config.knob(name), *([] if isinstance(value, bool) else [str(value)])]
    return said


def present(forms: Iterable[str], device: torch.device) -> Iterator[str]:
    """Those that this device has; the others are told in a line each."""
    for form in forms:
        if "graph" in words(form) and device.type != "cuda":
            print(f"left out: {form}, since only a GPU has graphs", flush=True)
        else:
            yield form


def state_of(
    cfg: Config, loader: Loader, device: torch.device, *, steps: int, bank: int | None = None
) -> TrainState:
    """What trains, as a run builds it. `bank`: rows of the memory bank; None: one a picture of the loader's data."""
    info = assemble.data_info(cfg, loader, None, device, DTYPES[cfg.precision])
    if bank is not None and isinstance(cfg.method, MemoryBank):
        info = dataclasses.replace(info, images=bank, data_rows=bank)
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=len(loader), steps=steps, lr=cfg.lr)
    return build(cfg, info, schedule)


def warm_steps(cfg: Config) -> int:
    """Steps until nothing is compiled or captured any more."""
    return WARM_UP + 2 if cfg.graph else 3
