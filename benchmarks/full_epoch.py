"""An epoch of ImageNet's size: 1,281,167 pictures to learn from and 50,000 to be judged on, through the Loader and the loop.

    python -m benchmarks.bench_train --epoch [--preset PRESET] [--form FORM] --root FOLDER

The pictures are those of FOLDER, packed and then physically copied in the GPU's memory until they are as many as
ImageNet's: each row has bytes of its own, no index wraps round, and an epoch reads as many different bytes as ImageNet's
would. Which picture a row shows changes nothing that is timed. What trains is built as a run builds it, the memory bank
with a row a picture; `loop.fit` trains with a log line every 20 steps and saves as a run does, every 10 minutes and at the
epoch's end, and `loop.validate` judges. The pauses for checkpoints are part of the time. What is not: compiling and
capturing, in steps before the clock starts, and the wait for the last file (`written`), which a next epoch would hide.

On a CPU an epoch would take days: a few steps and looks are timed in the same way and multiplied (`extrapolated`), of a
network of a quarter of the width.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants, forms, measure, roofline
from benchmarks.measure import HELD_OUT, IMAGENET
from fastrot import assemble, entry
from fastrot.config import Config, UsageError
from fastrot.data.loader import Loader
from fastrot.entry import PreemptionSignal
from fastrot.machine import wait_for
from fastrot.speed.timer import StepTimer
from fastrot.training import loop
from fastrot.training.journal import Journal
from fastrot.training.state import Session, TrainState

STEPS, LOOKS = 3, 2  # batches on a CPU, where the whole is extrapolated
SPARE = 12e9  # bytes of a GPU's memory that training takes beside the pictures, at batch 192


def rows(
    preset: str,
    form: str,
    root: Path,
    work: Path,
    device: torch.device,
    *,
    quick: bool = False,
    **knobs: Any,
) -> Iterator[dict[str, Any]]:
    """The epoch's row. Raises UsageError where the pictures do not fit into the GPU's memory."""
    cfg = sized(preset, form, device, quick=quick, **knobs)
    pack = contestants.Formats(root, work, entry.cores()).pack()
    whole = device.type == "cuda" and not quick
    count = IMAGENET if whole else STEPS * cfg.batch
    looks = HELD_OUT if whole else LOOKS * cfg.batch
    data, held_out = contestants.FullPack(pack, count), contestants.FullPack(pack, looks)
    if device.type == "cuda":
        must_fit(data.nbytes + held_out.nbytes, torch.cuda.mem_get_info(device)[0])
    how = {"batch": cfg.batch, "device": device, "enlarge": True}
    loader = assemble.open_loader(data, assemble.training_view(cfg), **how)
    val_loader = assemble.open_loader(held_out, assemble.evaluation_view(cfg), **how)
    state = forms.state_of(cfg, loader, device, steps=len(loader), bank=IMAGENET)
    warm_up(state, cfg, loader)
    loop.validate(state, val_loader)  # which compiles as well
    split, written = timed(state, cfg, loader, val_loader)
    yield row(
        *(cfg, form, data, state, split),
        written=written,
        steps=len(loader),
        looked=looks,
        whole=whole,
    )


def sized(
    preset: str, form: str, device: torch.device, *, quick: bool = False, **knobs: Any
) -> Config:
    """The run that is timed: at the preset's own batch and size, also on a CPU."""
    if device.type == "cpu" and not quick:
        knobs = {"batch": 192} | knobs
    cfg = forms.config_in(form, forms.sized(preset, device, quick=quick, **knobs))
    return dataclasses.replace(cfg, log_every=20)


def must_fit(wanted: int, free: int) -> None:
    """Refuse pictures that leave the training no room."""
    if wanted + SPARE > free:
        raise UsageError(
            f"--epoch wants {wanted / 1e9:.0f} GB of GPU memory for its pictures and {SPARE / 1e9:.0f} GB to train, "
            f"but {free / 1e9:.0f} GB are free: use a GPU that has them, or bench_train without --epoch"
        )


def warm_up(state: TrainState, cfg: Config, loader: Loader) -> None:
    """Steps that compile, and choose kernels; the optimiser's count of steps stays at 0."""
    with contextlib.closing(loader.epoch(1)) as batches:  # type: ignore[type-var]
        for batch in itertools.islice(batches, forms.warm_steps(cfg)):
            loop.train_step(state, batch)


def timed(
    state: TrainState, cfg: Config, loader: Loader, val_loader: Loader
) -> tuple[dict[str, float], float]:
    """Seconds of the loop's own training over the loader's epoch, of its pauses to save, and of its validation; then those
    that it waited at the end for the last checkpoint to be written.
    """
    clock: list[tuple[float, float]] = []

    def now() -> None:
        wait_for(state.device)
        clock.append((time.perf_counter(), state.progress.saving))

    with contextlib.ExitStack() as until_the_end:
        folder = Path(until_the_end.enter_context(tempfile.TemporaryDirectory()))
        journal = Journal(folder, steps=len(loader))
        until_the_end.callback(journal.close)
        preemption = until_the_end.enter_context(contextlib.closing(PreemptionSignal()))
        journal.say(*loader.data.describe())  # type: ignore[attr-defined]
        timer = StepTimer(state.device)
        s = Session(cfg, folder, None, time.perf_counter(), loader, None, state, {}, timer)
        # it would draw a page at its begin, and where the epoch's end has been saved
        loop.fit(s, journal, now, preemption)
        now()
        assert state.step == len(loader)
        loop.validate(state, val_loader)
        now()
    (begun, _), (trained, saving), (ended, whole), (judged, _) = clock
    split = {"train": trained - begun - saving, "saving": saving, "validation": judged - ended}
    return split, whole - saving


def row(
    cfg: Config,
    form: str,
    data: contestants.FullPack,
    state: TrainState,
    split: dict[str, float],
    *,
    written: float,
    steps: int,
    looked: int,
    whole: bool,
) -> dict[str, Any]:
    """`steps` were trained and `looked` pictures judged in the seconds of `split`; `whole`: that is the epoch.

    written  seconds from the epoch's last pause until its checkpoint was on disk
    """
    if not whole:
        times = {
            "train": IMAGENET // cfg.batch / steps,
            "saving": 1,
            "validation": HELD_OUT / looked,
        }
        split = {part: seconds * times[part] for part, seconds in split.items()}
    different = f"{data.few.rows:,} different pictures"
    copied = f"{different}, physically copied to {data.rows:,} in the device's memory; no index wraps round"
    from_few = f"extrapolated from {steps} steps and a look at {looked:,} pictures: {copied}"
    return measure.row(
        "epoch",
        theme="train",
        variant=f"{cfg.preset}, pack",
        mode="loop.fit and loop.validate, log lines every 20 steps, checkpoints",
        preset=cfg.preset,
        images=IMAGENET,
        size=cfg.method.crop.size,
        rotations=roofline.rotations(cfg),
        batch=cfg.batch,
        width=cfg.backbone.width,
        loader="pack",
        extrapolated=not whole,
        validation=True,
        form=form,
        dtype=cfg.precision,
        warmup=forms.warm_steps(cfg),
        **measure.middle([sum(split.values())], "s"),
        split=split,
        written=written,
        images_per_s=IMAGENET / (split["train"] + split["saving"]),
        wait_share=state.progress.wait_share(),
        steps=steps,
        judged=looked,
        different_pictures=data.few.rows,
        about=copied if whole else from_few,
    )
