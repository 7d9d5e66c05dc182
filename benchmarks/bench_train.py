"""Where a training step's time goes, for each form of the step and each loader; and an epoch of ImageNet's size.

    python -m benchmarks.bench_train [--preset PRESET] [--forms FORM ...] [--loaders LOADER ...] [--root FOLDER]
                                     [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]
    python -m benchmarks.bench_train --epoch [--form FORM]      an epoch of 1,281,167 pictures: see full_epoch.py

The step is loop.train_step itself; marks at its borders are CUDA events (clock readings on a CPU), all read behind the
last step. A captured step has no borders: of it there is only the whole. Forms are named in forms.py; each sees a batch
that stays on the device (held), synthetic pictures, and --root's in each prepared format. Whole steps are then timed
without marks. A form's rows are written as soon as it is built and measured; one that cannot be built ends the command, so
that gpu.py gives each a process of its own. profiles.txt beside the rows names the fifteen most costly operations of each.

    wait        milliseconds of a step that the host waited for data; the other parts are the device's own time
    tflops      operations of the network's matrix products and convolutions, forward and backward (fastrot/speed/cost.py), over
                the whole step; their share is of a large matrix product in the same precision, measured in the same run
    idle_share  of whole steps without marks: 1 - the time in which a kernel or a copy was at work, which the profiler
                tells of some steps, over what steps take without it. A GPU's only

With a preset that has a memory bank, `nce` is the loss against the memory bank, its gradient included, and `bank` the bank's
write. The bank has ImageNet's 1,281,167 rows, however few pictures are learnt from. On a CPU the network has a quarter of the
width and a batch 32 pictures.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants, forms, full_epoch, measure, roofline, runs
from fastrot import assemble, entry
from fastrot.config import AlexNet, Config, MemoryBank, UsageError
from fastrot.core import DTYPES, Batch
from fastrot.machine import wait_for
from fastrot.presets import PRESETS
from fastrot.speed import cost
from fastrot.training.device import time_kernels
from fastrot.training.loop import train_step
from fastrot.training.state import TrainState

HELD, SYNTHETIC = "held", "synthetic"
LOADERS = (HELD, SYNTHETIC, "beton", "shards", "pack")
WARM = 2  # batches before the clock starts
PARTS = ("views", "forward", "losses", "nce", "backward", "optimiser", "bank", "rest")
PROFILED = 10  # steps
BANK, QUICK_BANK = measure.IMAGENET, 100_000  # rows
MB = 2**20


class Marks:
    """Marks on the device's clock, at the borders between a step's parts; none while `on` is False."""

    def __init__(self, device: torch.device):
        self.device, self.on = device, False
        self.made: list[tuple[str, Any]] = []  # the part that ends here, and when

    def __call__(self, part: str) -> None:
        if not self.on:
            return
        if self.device.type != "cuda":
            self.made.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.made.append((part, event))

    def behind(self, part: str, function: Callable) -> Callable:
        """The same function, with a mark when it returns."""

        def marked(*args: Any, **how: Any) -> Any:
            out = function(*args, **how)
            self(part)
            return out

        return marked

    def read(self, steps: int) -> dict[str, list[float]]:
        """Milliseconds of each part in each of the last steps. Waits for the device."""
        wait_for(self.device)
        gpu, each = self.device.type == "cuda", []
        start: list[tuple[str, Any]] = [("", None)]
        for (_, begin), (part, end) in itertools.pairwise([*start, *self.made]):
            if part == "":  # a step begins
                each.append(dict.fromkeys(PARTS, 0.0))
            elif each and part in PARTS:
                each[-1][part] += begin.elapsed_time(end) if gpu else 1e3 * (end - begin)
        self.made = []
        return {part: [step[part] for step in each[-steps:]] for part in PARTS}


class Trained:
    """A network in one form, and its steps; `bank`: rows of its memory bank, where it has one."""

    def __init__(self, cfg: Config, images: int, device: torch.device, bank: int = BANK):
        self.cfg, self.device = cfg, device
        gpu = device.type == "cuda"
        held = torch.cuda.memory_allocated(device) if gpu else 0
        if gpu:
            torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device) if gpu else 0
        view = assemble.training_view(cfg)
        loader = assemble.open_loader(f"synthetic:{images}", view, batch=cfg.batch, device=device)
        self.state = forms.state_of(cfg, loader, device, steps=10**9, bank=bank)
        self.batch = next(loader.epoch(0))
        for _ in range(forms.warm_steps(cfg)):
            self.step(self.batch)  # compiles, captures, and chooses kernels
        wait_for(device)
        self.peak_memory_mb = None
        if gpu and cfg.graph:  # a captured step's memory is set aside as a whole
            torch.cuda.empty_cache()
            self.peak_memory_mb = (torch.cuda.memory_reserved(device) - reserved) / MB
        elif gpu:
            torch.cuda.reset_peak_memory_stats(device)
            self.step(self.batch)
            self.peak_memory_mb = (torch.cuda.max_memory_allocated(device) - held) / MB
        self.marks = Marks(device) if cfg.graph else _marked(self.state, device)

    def step(self, batch: Batch) -> None:
        """What the loop does with a batch, but for its log lines."""
        losses = train_step(self.state, batch)
        self.state.step += 1
        self.state.meter.add(losses)

    def run(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Seconds a step over these batches, and the share of them that the host waited for data.

        The clock starts behind the first batches, which also wait for workers to start.
        """
        for _ in range(WARM):
            self.step(next(batches))
        wait_for(self.device)
        steps = waited = 0.0
        begun = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            self.marks("")
            self.step(batch)
            self.marks("rest")
            steps += 1
        wait_for(self.device)
        seconds = time.perf_counter() - begun
        return seconds / steps, waited / seconds


def _marked(state: TrainState, device: torch.device) -> Marks:
    """Put marks at the borders of the real step: the functions are the same, each ends with a mark."""
    marks = Marks(device)
    state.method.views = marks.behind("views", state.method.views)
    state.net = marks.behind("forward", state.net)
    if (contrast := getattr(state.method, "contrast", None)) is not None:
        loss = marks.behind("nce", contrast.loss)
        contrast.loss = lambda *args, **how: (marks("losses"), loss(*args, **how))[1]
    state.method.losses = marks.behind("losses", state.method.losses)
    state.optimizer.register_step_pre_hook(lambda *_: marks("backward"))
    state.optimizer.register_step_post_hook(lambda *_: marks("optimiser"))
    state.method.after_step = marks.behind("bank", state.method.after_step)
    return marks


# ---- rows ----


def step_rows(
    cfg: Config,
    names: Iterable[str],
    data: dict[str, Any],
    device: torch.device,
    *,
    steps: int,
    reps: int,
    out: Path,
    bank: int = BANK,
) -> Iterator[dict[str, Any]]:
    """Rows of each form on all `data` (by the loader's name: see `opened`), as soon as it is built.

    Profiles go as text into the folder `out`.
    """
    rates = []
    for each in roofline.ceiling_rows(device, DTYPES[cfg.precision], quick=steps < 10):
        rates.append(each["p50"])
        yield each
    images = (WARM + steps) * cfg.batch
    for form in names:
        trained = Trained(forms.config_in(form, cfg), images, device, bank)
        for name, each in data.items():
            loader = None if name == HELD else opened(cfg, each, device, images)
            found = measured(trained, loader, steps, reps)
            yield step_row(trained, form, name, found, matrix_tflops=rates[0], bank=bank)
        with (out / "profiles.txt").open("a") as file:
            file.write(f"{form}\n{profile(trained)}\n")


def opened(cfg: Config, data: Any, device: torch.device, images: int) -> Any:
    """The loader of a training view over `data` (a path, or synthetic pictures), of so many pictures an epoch."""
    if data != SYNTHETIC:
        pictures = assemble.open_data(data)
        data = contestants.Repeated(pictures, -(-images // pictures.rows))
    else:
        data = f"{SYNTHETIC}:{images}"
    view = assemble.training_view(cfg)
    return assemble.open_loader(data, view, batch=cfg.batch, device=device, enlarge=True)


def measured(trained: Trained, loader: Any, steps: int, reps: int) -> dict[str, Any]:
    """`split`, milliseconds by part; `steps`, seconds of a step in each repetition; `waits`, their shares; `busy`."""

    def batches(count: int = steps) -> Iterator[Batch]:
        drawn = itertools.repeat(trained.batch) if loader is None else loader.epoch(0)
        try:
            yield from itertools.islice(drawn, WARM + count)
        finally:
            getattr(drawn, "close", lambda: None)()  # a loader's workers end

    found: dict[str, Any] = {"split": None, "busy": None}
    if not trained.cfg.graph:
        trained.marks.on = True
        whole, wait = trained.run(batches())
        trained.marks.on = False
        parts = {part: times for part, times in trained.marks.read(steps).items() if any(times)}
        each = {part: measure.middle(times, "")["p50"] for part, times in parts.items()}
        found["split"] = {"wait": 1e3 * whole * wait, **each}
    if trained.device.type == "cuda":
        found["busy"] = busy_seconds(trained, batches(PROFILED))
    every = [trained.run(batches()) for _ in range(reps)]
    return found | dict(zip(("steps", "waits"), map(list, zip(*every, strict=True)), strict=True))


def step_row(
    trained: Trained,
    form: str,
    loader: str,
    found: dict[str, Any],
    *,
    matrix_tflops: float,
    bank: int,
) -> dict[str, Any]:
    """The row of one form over one loader."""
    cfg, seconds = trained.cfg, measure.middle(found["steps"], "s")["p50"]
    method, dtype = trained.state.method, DTYPES[cfg.precision]
    views = cost.views_shapes(method, assemble.training_view(cfg), cfg.batch, trained.device)
    flop = sum(layer.flop for layer in cost.layers(method.net, views, dtype))
    shape: dict[str, Any] = roofline.shape_of(cfg)
    if isinstance(cfg.method, MemoryBank):
        shape |= {"negatives": cfg.method.negatives, "bank": bank}
    tflops, busy = flop / seconds / 1e12, found["busy"]
    return row(
        "step",
        f"{cfg.preset} {form}, {loader}",
        mode="whole steps, without marks",
        shape=shape,
        dtype=cfg.precision,
        preset=cfg.preset,
        form=form,
        loader=loader,
        **roofline.shape_of(cfg),
        **measure.spread(found["steps"]),
        images_per_s=cfg.batch / seconds,
        wait_share=measure.middle(found["waits"], "")["p50"],
        idle_share=None if busy is None else max(0.0, 1 - busy / seconds),
        tflops=tflops,
        flop=flop,
        matrix_tflops=matrix_tflops,
        share_of_matrix=tflops / matrix_tflops,
        peak_memory_mb=trained.peak_memory_mb,
        split=found["split"],
    )


# ---- what the profiler tells ----


def profiled(trained: Trained, batches: Iterator[Batch]) -> tuple[torch.profiler.profile, int]:
    """Steps under the profiler, those that warm up left out; and how many these are."""
    gpu = trained.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    for _ in range(WARM):
        trained.step(next(batches))
    wait_for(trained.device)
    steps = 0
    with torch.profiler.profile(
        activities=[*kinds, torch.profiler.ProfilerActivity.CUDA] if gpu else kinds
    ) as seen:
        for batch in batches:
            trained.step(batch)
            steps += 1
        wait_for(trained.device)
    return seen, steps


def busy_seconds(trained: Trained, batches: Iterator[Batch]) -> float:
    """Seconds of a step in which the device is at work: kernels and copies of all streams, counted once."""
    seen, steps = profiled(trained, batches)
    on_device = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type.name != "CPU" and not event.is_user_annotation
    ]
    return covered(on_device) / 1e6 / steps


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of a line that spans (begin, end) cover, each stretch once."""
    length, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def profile(trained: Trained) -> str:
    """The operations that cost most, as a table."""
    seen, _ = profiled(trained, itertools.repeat(trained.batch, WARM + 5))
    order = "self_device_time_total" if trained.device.type == "cuda" else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=90)


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="train", variant=variant, **{"warmup": 1, **fields})


def data_of(loaders: list[str] | None, root: Path | None, work: Path) -> dict[str, Any]:
    """What each loader reads; --root's pictures are prepared under `work` where this has not been done."""
    names = loaders or (LOADERS if root is not None else LOADERS[:2])
    read = [name for name in names if name not in LOADERS[:2]]
    if root is None and read:
        raise UsageError(f"--loaders got {read[0]}: it wants --root DIR, class folders of pictures")
    formats = contestants.Formats(root and contestants.originals(root), work, entry.cores())  # type: ignore[arg-type]
    return {name: formats.of(name) if name in read else name for name in names}


def parsed(args: list[str] | None) -> argparse.Namespace:
    parser = runs.parser(__doc__, "root", "work", "device", "quick")
    alexnets = [name for name, make in PRESETS.items() if isinstance(make().backbone, AlexNet)]
    parser.add_argument("--preset", choices=alexnets, default=measure.PRESET)
    parser.add_argument("--batch", type=int, help="pictures a step; default: the preset's")
    parser.add_argument("--forms", nargs="+", help=f"of the step, of {', '.join(forms.WORDS)}")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS)
    parser.add_argument("--epoch", action="store_true", help="an epoch of ImageNet's size")
    parser.add_argument("--form", default="eager", help="of the step, with --epoch")
    return parser.parse_args(args)


def rows_of(asked: argparse.Namespace, out: Path) -> Iterator[dict[str, Any]]:
    """What the command asks for."""
    device = torch.device(asked.device)
    knobs = {} if asked.batch is None else {"batch": asked.batch}
    if asked.epoch:
        yield from full_epoch.rows(
            asked.preset, asked.form, contestants.originals(asked.root), asked.work, device,
            quick=asked.quick, **knobs,
        )  # fmt: skip
        return
    steps, reps = (3, 2) if asked.quick else (40, 3) if asked.device == "cuda" else (4, 3)
    cfg = forms.sized(asked.preset, device, quick=asked.quick, **knobs)
    wanted = asked.forms or forms.FORMS[: 1 if asked.quick else None]
    yield from step_rows(
        cfg,
        list(forms.present(wanted, device)),
        data_of(asked.loaders, asked.root, asked.work),
        device,
        steps=steps,
        reps=reps,
        out=out,
        bank=QUICK_BANK if asked.quick else BANK,
    )


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    asked = parsed(args)
    time_kernels(torch.device(asked.device))  # as a run does
    out = measure.results(asked.device, asked.out).parent
    out.mkdir(parents=True, exist_ok=True)
    runs.keep(rows_of(asked, out), asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
