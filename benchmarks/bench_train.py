"""Where a training step's time goes: views, forward, losses, NCE, backward, optimiser, bank, rest; and waiting for data.

    python -m benchmarks.bench_train [--preset PRESET] [--root FOLDER] [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]
    python -m benchmarks.bench_train --run -- demo --data FOLDER ...    a whole run, as the command gives it

The step is loop.train_step itself; marks at its borders are CUDA events (clock readings on a CPU), all read behind the
last step. Each form of the network (eager, compiled) sees a batch that stays on the device, synthetic pictures, and
--root's as .beton. Whole steps are then timed without marks, the forms in turns. A file profile_<form>.txt beside the
rows names the fifteen most costly operations. TFLOP/s count multiplications and additions of the network's forward and
backward; their share is of a large matrix product in the same precision, measured in the same run.

With --preset decoupling-alexnet, `nce` is the loss against the memory bank, its gradient included, and `bank` the bank's
write. The bank has ImageNet's 1,281,167 rows, however few pictures are learnt from. What it costs in all is told by
whole steps in turns with steps that lack NCE and write and train the same network: its head gets a trivial
gradient instead. On a CPU the network has a quarter of the width and sees 64 pixels.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import contextlib
import dataclasses
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants, measure
from fastrot import assemble, entry
from fastrot.config import AlexNet, Config, Decoupling, Stopped, resolved
from fastrot.core import DTYPES, Batch, Losses
from fastrot.loop import TrainState, train_step
from fastrot.methods.decoupling import Decoupling as DecouplingMethod
from fastrot.optim import Rates, sgd
from fastrot.presets import PRESETS
from fastrot.run import choose_precision

HELD = "one batch, held on the device"
WARM = 2  # batches before the clock starts
PARTS = ("views", "forward", "losses", "nce", "backward", "optimiser", "bank", "rest")
SMALL = {"batch": 64, "image_size": 64, "backbone": AlexNet(width=0.25, kernel=5, stride=2)}
QUICK = {**SMALL, "batch": 8}
BANK, QUICK_BANK = 1_281_167, 100_000  # rows
SHARE = 0.03  # of a step on a GPU, which the bank may take
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

        def marked(*args: Any) -> Any:
            out = function(*args)
            self(part)
            return out

        return marked

    def read(self, steps: int) -> dict[str, list[float]]:
        """Milliseconds of each part in each of the last steps. Waits for the device."""
        wait_for(self.device)
        gpu, each = self.device.type == "cuda", []
        for (_, begin), (part, end) in itertools.pairwise([("", None), *self.made]):
            if part == "":  # a step begins
                each.append(dict.fromkeys(PARTS, 0.0))
            elif each and part in PARTS:
                each[-1][part] += begin.elapsed_time(end) if gpu else 1e3 * (end - begin)
        self.made = []
        return {part: [step[part] for step in each[-steps:]] for part in PARTS}


class Trained:
    """A network in one form, and its steps; `bank`: rows of its memory bank, where it has one."""

    def __init__(self, cfg: Config, images: int, device: torch.device, bank: int = BANK):
        self.device = device
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        view = assemble.training_view(cfg)
        self.loader = assemble.open_loader(
            f"synthetic:{images}", view, batch=cfg.batch, device=device
        )
        dtype = DTYPES[cfg.precision]
        torch.manual_seed(cfg.seed)
        facts = assemble.facts(cfg, self.loader, None, device, dtype)
        if isinstance(cfg.method, Decoupling):
            facts = dataclasses.replace(facts, images=bank, data_rows=bank)
        method = assemble.method(cfg, facts)
        method.net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = TrainState(
            method=method,
            net=assemble.wrapped(method.net, cfg, device),
            optimizer=sgd(method.net, cfg.optim, 0.0),
            rates=Rates(cfg.schedule, epochs=1, batches=1, steps=10**9, lr=cfg.lr),
            device=device,
            dtype=dtype,
        )
        self.batch = next(self.loader.epoch(0))
        for _ in range(3):
            self.step(self.batch)  # compiles, and chooses kernels
        wait_for(device)
        self.peak_memory_mb = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.step(self.batch)
            self.peak_memory_mb = (torch.cuda.max_memory_allocated(device) - held) / MB
        self.marks = _marked(self.state, device)

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
    if isinstance(state.method, DecouplingMethod):
        terms = marks.behind("nce", state.method._instance_terms)
        state.method._instance_terms = lambda *args: (marks("losses"), terms(*args))[1]
    state.method.losses = marks.behind("losses", state.method.losses)
    state.optimizer.register_step_pre_hook(lambda *_: marks("backward"))
    state.optimizer.register_step_post_hook(lambda *_: marks("optimiser"))
    state.method.after_step = marks.behind("bank", state.method.after_step)
    return marks


@contextlib.contextmanager
def without_bank(trained: Trained) -> Iterator[None]:
    """Steps of the same network that neither contrast with the bank nor write it: its head gets a trivial gradient."""

    def terms(embedding: Tensor, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"loss_nce": embedding.mean()}, {}

    def nothing(outputs: Any, batch: Batch, losses: Losses) -> None:
        pass

    method: Any = trained.state.method
    kept = method._instance_terms, method.after_step
    method._instance_terms, method.after_step = terms, nothing
    try:
        yield
    finally:
        method._instance_terms, method.after_step = kept


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- rows ----


def step_rows(
    cfg: Config,
    beton: Path | None,
    device: torch.device,
    *,
    steps: int,
    reps: int,
    out: Path,
    bank: int = BANK,
) -> Iterator[dict[str, Any]]:
    """Rows of all forms on all data, each as soon as it is measured; profiles as text into the folder `out`."""
    peak, about = matrix_peak(device, DTYPES[cfg.precision]), {"dtype": cfg.precision}
    yield row("matrix product", "square", mode="ceiling", **about, **peak)
    forms = {"eager": cfg}
    if cfg.compile:
        forms = {"eager": dataclasses.replace(cfg, compile=False), "compiled": cfg}
    images = (WARM + steps) * cfg.batch
    trained = {form: Trained(each, images, device, bank) for form, each in forms.items()}
    flop = flop_of(trained["eager"])
    net = {"batch": cfg.batch, "size": cfg.method.crop.size, "width": cfg.backbone.width}
    if isinstance(cfg.method, Decoupling):
        net |= {"negatives": cfg.method.negatives, "bank": bank}
        form, each = list(trained.items())[-1]  # compiled, where that is asked for
        yield bank_row(f"{cfg.preset} {form}", each, steps, reps, shape=net, **about)
    for name, source in sources(cfg, beton, device, steps).items():
        for form, each in trained.items():
            each.marks.on = True
            each.run(source(each.batch))
            each.marks.on = False
            for part, times in each.marks.read(steps).items():
                if not any(times):
                    continue  # NCE, in a method that has none
                variant = f"{cfg.preset} {form}, {name}: {part}"
                time_of = measure.middle(times, "ms")
                yield row("step part", variant, mode="with marks", shape=net, **about, **time_of)
        found = {form: [] for form in trained}
        for _ in range(reps):
            for form, each in trained.items():
                found[form].append(each.run(source(each.batch)))
        for form, each in trained.items():
            seconds = measure.middle([1e3 * s for s, _ in found[form]], "ms")
            tflops = flop / (seconds["p50"] / 1e3) / 1e12
            yield row(
                "step",
                f"{cfg.preset} {form}, {name}",
                mode=f"without marks, {steps} steps a repetition",
                shape=net,
                **about,
                **seconds,
                images_per_s=cfg.batch / (seconds["p50"] / 1e3),
                wait_share=measure.middle([w for _, w in found[form]], "")["p50"],
                peak_memory_mb=each.peak_memory_mb,
                tflops=tflops,
                matrix_tflops=peak["p50"],
                share_of_matrix=tflops / peak["p50"],
            )
    for form, each in trained.items():
        (out / f"profile_{form}.txt").write_text(profile(each))


def sources(
    cfg: Config, beton: Path | None, device: torch.device, steps: int
) -> dict[str, Callable[[Batch], Iterator[Batch]]]:
    """Where batches come from, by name: `steps` of them each time."""
    view, images = assemble.training_view(cfg), (WARM + steps) * cfg.batch
    data: dict[str, Any] = {"synthetic": assemble.open_data(f"synthetic:{images}")}
    if beton is not None:
        pictures = assemble.open_data(beton)
        data["beton"] = contestants.Repeated(pictures, -(-images // pictures.rows))

    def opened(each: Any) -> Callable[[Batch], Iterator[Batch]]:
        loader = assemble.open_loader(each, view, batch=cfg.batch, device=device, enlarge=True)
        return lambda held: loader.epoch(0)

    return {
        HELD: lambda held: iter([held] * (WARM + steps)),
        **{name: opened(each) for name, each in data.items()},
    }


def bank_row(variant: str, trained: Trained, steps: int, reps: int, **of: Any) -> dict[str, Any]:
    """What NCE and the bank's write take of a step: whole steps with them, in turns with steps without."""
    held = [trained.batch] * (WARM + steps)
    with_it, without = [], []
    for _ in range(2 * reps):
        with_it.append(trained.run(iter(held))[0])
        with without_bank(trained):
            without.append(trained.run(iter(held))[0])
    shares = [1 - less / whole for whole, less in zip(with_it, without, strict=True)]
    target = {"target": SHARE, "better": "lower"} if trained.device.type == "cuda" else {}
    return row(
        "bank's share of a step",
        variant,
        mode=f"NCE and write, by steps with and without, {steps} steps a repetition",
        **of,
        **measure.middle(shares, "share"),
        with_ms=measure.spread(with_it)["p50"],
        without_ms=measure.spread(without)["p50"],
        **target,
        about=f"the bank has {of['shape']['bank']:,} rows, however few pictures are learnt from; steps without it "
        "train the same network, whose head gets a trivial gradient",
    )


def matrix_peak(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """TFLOP/s of a large matrix product of random numbers, which zeros would flatter."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = measure.interleaved({"": lambda: a @ b}, device.type, seconds=1.0)[""]
    return {
        "shape": {"side": side},
        **measure.middle([2 * side**3 / s / 1e12 for s in times], "TFLOP/s"),
    }


def flop_of(trained: Trained) -> int:
    """Multiplications and additions of one step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counted:
        trained.step(trained.batch)
    return counted.get_total_flops()


def profile(trained: Trained, steps: int = 5) -> str:
    """The operations that cost most, as a table."""
    gpu = trained.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=[*kinds, torch.profiler.ProfilerActivity.CUDA] if gpu else kinds
    ) as seen:
        trained.run(iter([trained.batch] * (WARM + steps)))
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=90)


def run_row(command: list[str]) -> dict[str, Any]:
    """A whole run of fastrot/train.py in a process of its own, from its summary."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(measure.ROOT / "fastrot" / "train.py")
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, script, *command, "--out", folder])
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise Stopped(f"{command[0]} ended with status {done.returncode}: see what it printed")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    told = ("images_per_s", "wait_share", "val_accuracy", "val_accuracy_first", "chance", "verdict")
    return row(
        "run",
        summary["preset"],
        mode="whole command, start included",
        shape={"steps": summary["steps"], "images": summary["images"]},
        **measure.middle([seconds], "s"),
        **{name: summary[name] for name in told},
    )


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, theme="train", variant=variant, **{"warmup": 1, **fields})


def config_of(asked: argparse.Namespace, device: torch.device) -> Config:
    """The preset, small on a CPU and smaller where a quick look is asked for."""
    small = QUICK if asked.quick else SMALL if device.type == "cpu" else {}
    cfg = dataclasses.replace(PRESETS[asked.preset](), **small)
    precision = choose_precision(cfg.precision, device)
    return resolved(dataclasses.replace(cfg, compile=asked.compile, precision=precision))


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    alexnets = [name for name, make in PRESETS.items() if isinstance(make().backbone, AlexNet)]
    parser.add_argument("--preset", choices=alexnets, default="rotnet-alexnet")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--root", type=Path, help="class folders of originals, to learn from too")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for prepared files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--quick", action="store_true", help="a small network, few steps")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: where there is a GPU"
    )
    parser.add_argument("--run", action="store_true", help="time a run: its command follows --")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args(args)
    if asked.compile is None:
        asked.compile = asked.device == "cuda"
    device = torch.device(asked.device)
    torch.backends.cudnn.benchmark = True  # as a run has it
    file = measure.results(asked.device, asked.out)
    file.parent.mkdir(parents=True, exist_ok=True)
    if asked.run:
        rows = iter([run_row([*asked.command, "--device", asked.device])])
    else:
        beton = None
        if asked.root is not None:
            root = contestants.originals(asked.root)
            beton = contestants.Formats(root, asked.work, entry.cores()).beton()
        steps, reps = (3, 2) if asked.quick else (60, 4) if asked.device == "cuda" else (5, 3)
        cfg = config_of(asked, device)
        bank = QUICK_BANK if asked.quick else BANK
        rows = step_rows(cfg, beton, device, steps=steps, reps=reps, out=file.parent, bank=bank)
    for each in rows:
        measure.append(file, each)
        measure.say(each)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
