"""One run from its folder's point of view: begun or resumed, trained, summed up."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastrot import assemble, config, dist, machine
from fastrot.config import Config, RunError, UsageError
from fastrot.core import DTYPES, Batch, Data, View
from fastrot.data.keys import fold_of, held_out
from fastrot.data.loader import Loader
from fastrot.disk import locked, replace_bytes, write_atomically
from fastrot.entry import Preempted, PreemptionSignal, share_of_cores
from fastrot.evals import page
from fastrot.evals.rotation import rotation_guesses
from fastrot.presets import PRESETS
from fastrot.speed import bounds, memory
from fastrot.speed.bounds import Measured
from fastrot.speed.cost import StepCost, step_cost
from fastrot.speed.profile import Profile
from fastrot.speed.timer import StepTimer
from fastrot.training import checkpoint, loop
from fastrot.training.graph import WARM_UP
from fastrot.training.journal import Journal, table
from fastrot.training.loop import Run
from fastrot.training.optim import LRSchedule, check_apex
from fastrot.training.state import TrainState, build

LAST, PREVIOUS = "last.pt", "previous.pt"  # the latest checkpoint, and the one before it
SHOWN = 8  # held-out pictures in the run's contact sheet


def train(cfg: Config) -> int:
    """Train as the config says, from the folder's last checkpoint where there is one; with --folds each
    fold's net one by one.

    Raises Preempted when a warning signal reached a rank and all is saved.
    """
    here = dist.place()
    device = choose_device(cfg.device, here)
    if (threads := choose_threads(cfg.threads, here, device)) is not None:
        torch.set_num_threads(threads)
    cfg = dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device))
    check_fast_forms(cfg, here, device)
    runs = runs_of(cfg)
    for run, _ in runs:
        _made(run)
    with contextlib.closing(PreemptionSignal()) as preemption, joined(here, device):
        for run, each in runs:
            _train_one(each, run, here, device, preemption)
    return 0


def runs_of(cfg: Config) -> list[tuple[Path, Config]]:
    """The run's folder and config; with --folds those of each fold, but with --fold that one alone, in --out."""
    run = Path(cfg.out or f"runs/{cfg.preset}")
    if cfg.folds is None or cfg.fold is not None:
        if folds_in(run):
            own = "NEW" if cfg.fold is None else run / f"fold{cfg.fold}"
            raise UsageError(f"--out {run} holds the runs of --folds: use --out {own}")
        return [(run, cfg)]
    if (run / "checkpoints" / LAST).exists():
        raise UsageError(f"--out {run} holds a run without --folds: use --out NEW")
    folders = [run / f"fold{fold}" for fold in range(cfg.folds)]
    return [
        (folder, dataclasses.replace(cfg, fold=fold, out=str(folder)))
        for fold, folder in enumerate(folders)
    ]


def folds_in(folder: Path) -> list[Path]:
    """The runs of --folds that a folder holds, by their names."""
    return sorted(path.parent for path in folder.glob("fold[0-9]*/config.yaml"))


@contextlib.contextmanager
def joined(
    here: dist.Place,
    device: torch.device,
    again: str = "the same command goes on from the last checkpoint",
) -> Iterator[None]:
    """Among the other processes, from here to the end; raises PeerLost where one of them is gone.

    `again`: what the same command does then.
    """
    dist.start(here, device)
    together = False
    try:
        yield
        together = True
    except Preempted:
        together = True  # all ranks raise it, and rank 0 is the last to have saved
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and "killed" in str(error):
            raise RunError(
                f"a process that decodes was killed, perhaps for want of memory: {again}, with fewer "
                "--workers where that was the reason"
            ) from error
        if dist.lost(error):
            raise config.PeerLost(
                f"another process of this run has ended: see what it says, and {again}"
            ) from error
        raise
    finally:
        dist.stop(together=together)


def _train_one(
    cfg: Config, run: Path, here: dist.Place, device: torch.device, preemption: PreemptionSignal
) -> None:
    with contextlib.ExitStack() as until_the_end:
        if here.rank == 0:  # the one that writes
            refusal = f"another run writes into {run}: wait for it, end it, or use --out NEW"
            until_the_end.enter_context(locked(run, refusal))
        begun = time.perf_counter()
        dist.barrier()  # all meet here: nobody writes while they read the checkpoint
        saved = _last_checkpoint(run)
        places = dist.everyones(saved and (saved["step"], saved["validated_step"]))
        if any(place != places[0] for place in places):
            raise UsageError(
                f"--out {run} is not the same folder for all ranks: choose one on a file system "
                "that all machines share"
            )
        if saved is not None:
            _compare(saved, cfg, here, run)
        _deterministic(cfg)
        built = memory.Built()
        try:
            _train(cfg, run, saved, here, device, begun, preemption, built)
        except RuntimeError as error:
            if not memory.is_full(error):
                raise
            memory.forget(error)
            raise memory.out_of_memory_error(cfg, device, built) from None


def _train(
    cfg: Config,
    run: Path,
    saved: dict[str, Any] | None,
    here: dist.Place,
    device: torch.device,
    begun: float,
    preemption: PreemptionSignal,
    built: memory.Built,
) -> None:
    data = assemble.open_data(cfg.data or "", cfg.loader, placement=cfg.placement)
    cfg = _with_statistics(cfg, data)
    loader, val_loader = _loaders(cfg, data, run, saved, here, device)
    built.loader = loader
    run_identity = run_identity_of(cfg, data, loader, here, device)
    if saved is not None:
        _same_data(saved["facts"], run_identity, run)
    info = assemble.data_info(cfg, loader, val_loader, device, DTYPES[cfg.precision])
    state = build(cfg, info, _schedule(cfg, cfg.epochs or 1, len(loader)))
    method = state.method
    run_identity["method"] = method.resume_contract()
    if saved is not None and saved["facts"]["method"] != run_identity["method"]:
        raise UsageError(
            f"{run} disagrees with what its method needs (was {saved['facts']['method']}, now "
            f"{run_identity['method']}): use --out NEW"
        )
    if saved is None and cfg.start_from is not None:
        _start_from(method.net, cfg.start_from)
    built.state, built.step_timer = state, StepTimer(device)
    said = _set_length(state, cfg, saved, loader, val_loader)
    run_identity |= {"epochs": state.schedule.epochs, "steps": state.schedule.steps}
    run_identity |= {"classes": info.classes}
    method.set_schedule(state.schedule.epochs, state.schedule.begins)
    if here.world > 1:
        loop.warm_up_ddp(state, next(iter(loader.epoch(0))))
    if saved is not None:
        state.load_state_dict(saved)
        for part in ("net", "optimizer", "method"):
            del saved[part]  # or a second bank would stay in host memory to the end
    end = min(state.schedule.steps, cfg.max_steps or state.schedule.steps)
    begun_at = {"resumed_at": state.step, "validated_step": state.validated_step}
    journal = Journal(run, steps=end, **begun_at, tensorboard=cfg.tensorboard)
    try:
        if dist.rank() == 0:
            plain = config.to_plain(cfg)
            if cfg.budget is not None:  # what it came to, so that a replay is the same run
                plain |= {"budget": None, "epochs": state.schedule.epochs}
            replace_bytes(run / "config.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
            environment = json.dumps(machine.environment(device, here.world), indent=1)
            replace_bytes(run / "environment.json", environment.encode())
        journal.say(*_greeting(cfg, state, loader, val_loader, run, run_identity, saved), *said)
        journal.say(*_other_machine(saved, run_identity))

        def save(name: str, parts: dict[str, Any]) -> None:
            if dist.rank() == 0:
                parts = {"config": config.to_plain(cfg), "facts": run_identity, **parts}
                folder = run / "checkpoints"
                previous = folder / PREVIOUS if name == LAST else None
                checkpoint.save(folder / name, parts, previous=previous)

        shown = _shown(cfg, run, val_loader, device) if dist.rank() == 0 else None
        drawn, cost = -math.inf, 0.0  # when the page was last drawn, and the seconds that it took

        def at_epoch() -> None:
            """The run's page, unless it were to cost more than a twentieth of the time."""
            nonlocal drawn, cost
            now = time.perf_counter()
            if dist.rank() == 0 and now - drawn > 20 * cost:
                _draw(run, state, shown)
                drawn, cost = time.perf_counter(), time.perf_counter() - now

        step_timer = built.step_timer
        if cfg.profile and dist.rank() == 0 and state.step < end:
            step_timer.around = Profile(state, run / "profile", end - state.step, journal.say)
        least = step_cost(method, loader.view, cfg, device)
        loop.fit(
            state, Run(loader, val_loader, journal, cfg, save, at_epoch, preemption, step_timer)
        )
        if dist.rank() == 0:
            summary = _summary(cfg, state, info.classes, device, time.perf_counter() - begun)
            summary |= _bound(cfg, state, step_timer, least, loader, _before(run, state.step))
            replace_bytes(run / "summary.json", json.dumps(summary, indent=1).encode())
            _draw(run, state, shown)
            journal.say(*_describe(summary, run))
    finally:
        journal.close()


# ---- what the run is made of ----


def choose_device(wish: str, here: dist.Place) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda, but torch sees no GPU: use --device cpu, or torch with CUDA"
        )
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ and "SLURM_GPUS_PER_TASK" in os.environ:
        return torch.device("cuda", 0)  # srun lets each task see its own alone
    if here.local >= torch.cuda.device_count():
        raise UsageError(
            f"there are {here.local_world} processes on this machine but {torch.cuda.device_count()} "
            "GPU(s): start one process a GPU, or use --device cpu"
        )
    torch.cuda.set_device(here.local)
    return torch.device("cuda", here.local)


def choose_threads(wish: int | None, here: dist.Place, device: torch.device) -> int | None:
    """Torch's threads of this process; None: as many as torch takes itself, OMP_NUM_THREADS or all cores.

    torchrun sets OMP_NUM_THREADS to 1 for several processes where nobody has set it, which suits GPUs. Without one
    that 1 is taken for torchrun's, and the process has its share of the cores; --threads 1 means 1.
    """
    lowered = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if wish is None and device.type == "cpu" and lowered and here.local_world > 1:
        return share_of_cores(here.local_world)
    return wish


def choose_precision(wish: config.Precision, device: torch.device) -> config.Precision:
    """bf16 where the device multiplies in it, else float16 on a GPU and float32 on a CPU."""
    if wish != "auto":
        return wish
    if machine.multiplies_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def check_fast_forms(cfg: Config, here: dist.Place, device: torch.device) -> None:
    """Refuse faster forms of a step that this device, or what else is asked for, does not admit."""
    if cfg.optim.kernel == "apex":
        if device.type != "cuda":
            raise UsageError(
                "--optim.kernel apex wants a GPU, and this run is on a CPU: use --optim.kernel torch"
            )
        check_apex()
    if not cfg.graph:
        return
    without = "leave --graph out"
    for holds, reason, way in (
        (device.type != "cuda", "this run is on a CPU", without),
        (here.world > 1, f"there are {here.world} processes", f"start one alone, or {without}"),
        (
            cfg.precision == "fp16",
            "--precision fp16 looks at its gradients in each step",
            f"use --precision bf16, or {without}",
        ),
        (
            cfg.optim.kernel == "apex",
            "--optim.kernel apex has no rate that a graph can read",
            f"use --optim.kernel torch, or {without}",
        ),
        (
            os.environ.get("FASTROT_OPS") == "reference",
            "FASTROT_OPS=reference has forms that wait for the GPU",
            f"unset it, or {without}",
        ),
        (
            cfg.deterministic,
            "nobody has compared the bits that --deterministic promises with a graph's",
            f"leave out --deterministic, or {without}",
        ),
    ):
        if holds:
            raise UsageError(
                f"--graph records the step of one process on a GPU, but {reason}: {way}"
            )


def _deterministic(cfg: Config) -> None:
    if cfg.deterministic:
        # filling fresh memory would cost time and decide no bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # chooses kernels by timing


def _with_statistics(cfg: Config, data: Data) -> Config:
    if cfg.statistics == "preset":
        return cfg
    if data.mean is None or data.std is None:
        raise UsageError(
            f"--statistics data, but {cfg.data} carries none: use --statistics preset, or a .beton "
            "that dataprep/to_ffcv.py wrote"
        )
    return dataclasses.replace(cfg, mean=tuple(data.mean), std=tuple(data.std))


def _loaders(
    cfg: Config,
    data: Data,
    run: Path,
    saved: dict[str, Any] | None,
    here: dist.Place,
    device: torch.device,
) -> tuple[Loader, Loader | None]:
    """The training loader, and what the run is judged on: --val, or the pictures set aside."""
    share = share_of_cores(here.local_world)

    def opened(data: Data, view: View) -> Loader:
        return assemble.open_loader(
            data,
            view,
            batch=cfg.batch,
            seed=cfg.seed,
            rank=here.rank,
            world=here.world,
            device=device,
            workers=share if cfg.workers is None else cfg.workers,
            enlarge=cfg.enlarge,
            on_bad_record=cfg.on_bad_record,
        )

    val_data = None if cfg.hold_out == 0 else data
    if cfg.val is not None:
        val, data_path = Path(cfg.val), Path(cfg.data or "")
        alike = val.suffix == data_path.suffix
        alike = alike and assemble.format_of(val) == assemble.format_of(data_path)
        val_data = assemble.open_data(
            cfg.val, cfg.loader if alike else "auto", knob="--val", placement=cfg.placement
        )
    files = {}
    for name, rows in _chosen(cfg, data.keys).items():
        path = files[name] = run / f"rows-{name}.npy"
        if saved is not None and not (path.exists() and np.array_equal(np.load(path), rows)):
            raise UsageError(
                f"{run} was trained on other pictures ({saved['facts']['data']}): "
                "give the same --data and --val, or --out NEW"
            )
        if here.rank == 0 and saved is None:
            _save_rows(path, rows)
    dist.barrier()
    loader = opened(data, assemble.training_view(cfg, files.get("train")))
    if val_data is None:
        return loader, None
    return loader, opened(val_data, assemble.evaluation_view(cfg, files.get("val")))


def _chosen(cfg: Config, keys: np.ndarray) -> dict[str, np.ndarray]:
    """The rows to learn from, and those set aside to judge by, where these are not all and --val."""
    chosen, left_out = {}, np.zeros(len(keys), bool)
    if cfg.val is None and cfg.hold_out:
        left_out = held_out(keys, cfg.hold_out)
        chosen["val"] = np.flatnonzero(left_out)
    if cfg.folds is not None:
        fold = fold_of(keys, cfg.folds)
        empty = np.flatnonzero(np.bincount(fold, minlength=cfg.folds) == 0)
        if len(empty):
            raise UsageError(
                f"--folds {cfg.folds} leaves fold {empty[0]} of {len(keys)} pictures empty: use fewer folds"
            )
        left_out = left_out | (fold == cfg.fold)
    return chosen | ({"train": np.flatnonzero(~left_out)} if left_out.any() else {})


def _save_rows(path: Path, rows: np.ndarray) -> None:
    write_atomically(path, lambda file: np.save(file, rows.astype(np.int64)))


def run_identity_of(
    cfg: Config, data: Data, loader: Loader, here: dist.Place, device: torch.device
) -> dict[str, Any]:
    """What decides a run's numbers beside its config; goes into checkpoints."""
    return {
        "fingerprint": loader.fingerprint,
        "data_fingerprint": data.fingerprint,
        "images": loader.images,
        "global_batch": cfg.batch * here.world,
        "ranks": here.world,
        "threads": torch.get_num_threads(),
        "device": machine.device_name(device),
        "torch": str(torch.__version__),
        "decoder": data.decoder,
        "data": f"{data.format} {cfg.data}",
    }


def _schedule(cfg: Config, epochs: int, batches: int) -> LRSchedule:
    steps = epochs * batches
    if cfg.schedule.steps is not None:
        steps = cfg.schedule.steps
        epochs = math.ceil(steps / batches)
    return LRSchedule(cfg.schedule, epochs=epochs, batches=batches, steps=steps, lr=cfg.lr)


def _set_length(
    state: TrainState,
    cfg: Config,
    saved: dict[str, Any] | None,
    loader: Loader,
    val_loader: Loader | None,
) -> list[str]:
    """With --budget: measure, choose the epochs, say so. A resumed run keeps those first chosen."""
    if cfg.budget is None:
        return []
    if saved is not None:
        state.schedule = _schedule(cfg, saved["facts"]["epochs"], len(loader))
        return [f"--budget {cfg.budget}: {state.schedule.epochs} epochs, as first chosen"]
    seconds = seconds_of(cfg.budget)
    epochs, epoch = loop.epochs_within(seconds, state, loader, val_loader)
    state.schedule = _schedule(cfg, epochs, len(loader))
    line = f"--budget {cfg.budget}: an epoch takes {epoch:.1f} s here, so {epochs} epoch(s)"
    return [line + (", which is longer than the budget" if epoch > seconds else "")]


def seconds_of(text: str) -> float:
    """`90s`, `30min`, `1.5h` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", text.strip())
    if not match or float(match[1]) == 0:
        raise UsageError(f"--budget got {text!r}: it wants a time such as 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]]


def _start_from(net: torch.nn.Module, source: str) -> None:
    try:
        state = checkpoint.load(checkpoint.of_run(source))
    except UsageError as error:
        raise UsageError(f"--start-from: {error}") from error
    mine, theirs = net.state_dict(), state["net"]
    if mine.keys() == theirs.keys() and all(mine[k].shape == theirs[k].shape for k in mine):
        net.load_state_dict(theirs)
        return
    trunk = net.get_submodule("trunk")  # another task's head: its trunk alone
    checkpoint.load_weights(trunk, assemble.trunk_weights(theirs), source)


# ---- resuming ----


def _compare(saved: dict[str, Any], cfg: Config, here: dist.Place, run: Path) -> None:
    """Refuse knobs that would make it another run, each by name, before any part is built."""
    found = config.differences(saved["config"], config.to_plain(cfg))
    found.pop("batch", None)  # the global batch is what counts
    if saved["config"]["statistics"] == "data":
        found = {k: v for k, v in found.items() if k not in ("mean", "std")}  # will come again
    before, now = saved["facts"]["global_batch"], cfg.batch * here.world
    if before != now:
        found["batch x processes"] = (before, now)
    if found:
        each = "; ".join(
            f"{name if ' ' in name else config.knob(name)} was {old}, now {new}"
            for name, (old, new) in found.items()
        )
        raise UsageError(
            f"{run} holds a run of other settings ({each}): use --out NEW for a new run, "
            f"--out NEW --start-from {run} to begin one with its weights, or the settings it had"
        )


def _made(run: Path) -> None:
    """The run's folder, which must be one that can be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {run} cannot be made ({error.strerror}): name another folder"
        ) from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise UsageError(f"--out {run} cannot be written: name a folder of your own")


def _last_checkpoint(run: Path) -> dict[str, Any] | None:
    """The latest checkpoint; refused where it is damaged, with the name of the one before it."""
    folder = run / "checkpoints"
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and previous.exists():  # somebody took a damaged one away
        last = previous
    if not last.exists():
        return None
    try:
        return checkpoint.load(last)
    except UsageError as error:
        kept = sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem[5:]))
        older = [path for path in (*kept, previous) if path.exists() and path != last]
        way = f"move {older[-1]} in its place" if older else "remove it to begin anew"
        raise UsageError(f"{error}; {way}, or use --out NEW") from error


def _same_data(before: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    if before["fingerprint"] != now["fingerprint"]:
        raise UsageError(
            f"{run} was trained on other pictures ({before['data']}, {before['images']} of them; now "
            f"{now['data']}, {now['images']}): give the same --data, or --out NEW"
        )


def _other_machine(saved: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """One line where something differs that changes bits but not what is computed."""
    if saved is None:
        return []
    names = ("ranks", "threads", "device", "torch", "data", "decoder")
    before = {"decoder": now["decoder"], **saved["facts"]}  # older runs did not tell
    other = [f"{n} were {before[n]}, now {now[n]}" for n in names if before[n] != now[n]]
    return [f"bits may differ from an unbroken run: {'; '.join(other)}"] if other else []


# ---- what people are told ----


_GRAPH = f"each step is one CUDA graph, recorded after {WARM_UP} steps of this start"


def _greeting(cfg, state: TrainState, loader, val_loader, run, run_identity, saved) -> list[str]:
    trained = sum(p.numel() for p in state.method.net.parameters() if p.requires_grad)
    lines = [
        f"{cfg.preset}: {type(cfg.method).__name__} with {type(cfg.backbone).__name__}, "
        f"{trained:,} parameters, {cfg.precision} on {run_identity['device']}",
        f"{loader.images:,} pictures of {cfg.data}, judged on "
        + (f"{val_loader.images:,}" if val_loader is not None else "none"),
        *_judged_by_what_it_learns_from(cfg, loader, val_loader),
        *(
            [f"fold {cfg.fold} of 0 to {cfg.folds - 1} is left out of training"]
            if cfg.folds
            else []
        ),
        f"global batch {run_identity['global_batch']} ({cfg.batch} x {run_identity['ranks']}), "
        f"{state.schedule.epochs} epochs of {len(loader)} steps, {state.schedule.steps} steps in all",
        f"{_counted(loader.workers, 'worker')} for pictures"
        + (
            f", {_counted(run_identity['threads'], 'thread')} for the network"
            if state.device.type == "cpu"
            else ""
        ),
        *loader.data.describe(),
        *state.schedule.describe(),
        *state.method.describe(),
        *([_GRAPH] if cfg.graph else []),
    ]
    paper = PRESETS[cfg.preset]().batch if cfg.preset in PRESETS else run_identity["global_batch"]
    if run_identity["global_batch"] != paper:
        lines.append(
            f"the preset's global batch is {paper}: the learning rate does not follow by itself, set --lr"
        )
    if saved is not None:
        return [*lines, f"resumed at step {state.step}"]
    return [*lines, f"writing to {run}"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _judged_by_what_it_learns_from(cfg: Config, loader: Loader, val_loader) -> list[str]:
    """A line where the names of most pictures of --val are names of pictures that are trained on."""
    if cfg.val is None or val_loader is None:
        return []
    each = [
        side.data.keys if side.rows is None else side.data.keys[side.rows]
        for side in (loader, val_loader)
    ]
    nameless = any(
        np.array_equal(s.data.keys, np.arange(s.data.rows)) for s in (loader, val_loader)
    )
    shared = 0 if nameless else int(np.isin(each[1], each[0]).sum())
    if shared <= len(each[1]) / 2:
        return []
    return [
        f"{shared:,} of the {len(each[1]):,} pictures of --val are named as pictures that are trained on: "
        "accuracy on them is none on pictures never seen, unless they are others of the same names"
    ]


def _shown(cfg: Config, run: Path, val_loader: Loader | None, device: torch.device) -> Batch | None:
    """A few held-out pictures, evenly spread over the view, for the run's contact sheet."""
    if val_loader is None:
        return None
    rows = (
        np.linspace(0, val_loader.images - 1, min(SHOWN, val_loader.images))
        .round()
        .astype(np.int64)
    )
    if val_loader.view.rows is not None:
        rows = np.load(val_loader.view.rows)[rows]
    path = run / "rows-shown.npy"
    _save_rows(path, rows)
    few = assemble.open_loader(
        val_loader.data,
        assemble.evaluation_view(cfg, path),
        batch=len(rows),
        device=device,
        workers=0,
        enlarge=True,
        on_bad_record=cfg.on_bad_record,
    )
    return next(iter(few.epoch(0)), None)


def _draw(run: Path, state: TrainState, shown: Batch | None) -> None:
    guesses = None if shown is None else rotation_guesses(state.method, shown)
    images = None if shown is None else shown.images.cpu()
    page.draw(run, net=state.method.net, images=images, guesses=guesses)


def _summary(
    cfg: Config, state: TrainState, classes: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    progress = state.progress
    answers = classes if state.method.wants_labels else 4
    return {
        "preset": cfg.preset,
        "steps": state.step,
        "epochs": state.step / state.schedule.batches,
        "images": progress.images,
        "seconds": round(progress.seconds, 3),
        "seconds_in_all": round(seconds, 3),
        "images_per_s": progress.images_per_s(),
        "wait_share": progress.wait_share(),
        "val_accuracy_first": progress.val_first.get("accuracy"),
        "val_accuracy": progress.val.get("accuracy"),
        "val_loss": progress.val.get("loss"),
        "val": progress.val,
        "chance": 1 / answers,
        "method": state.method.describe(),
        "skipped_records": progress.skipped,
        "device": machine.device_name(device),
        "versions": machine.versions(),
    }


def _bound(
    cfg: Config,
    state: TrainState,
    step_timer: StepTimer,
    least: StepCost,
    loader: Loader,
    before: dict,
) -> dict[str, str]:
    """What bound the run, and the sentence on it. `before`: the summary of a run that had ended already."""
    m = step_timer.measured(cfg.batch)
    if m is None:  # no step was taken
        if {"bound", "verdict"} <= before.keys():
            return {name: before[name] for name in ("bound", "verdict")}
        step = state.progress.seconds / max(1, state.step)
        m = Measured(step=step or 1.0, wait=step * state.progress.wait_share())
    m = bounds.with_floors(m, least, loader.view, cfg, state.device)
    setting = bounds.Setting(
        workers=loader.workers,
        format=loader.data.format,
        placement=loader.data.chosen,
        precision=cfg.precision,
        compiled=cfg.compile,
        graphed=cfg.graph if dist.world() == 1 else None,
        fused=getattr(cfg.backbone, "fuse", None),
    )
    said = bounds.verdict(m, state.device, state.progress.images_per_s(), setting)
    return {"bound": bounds.bound(m), "verdict": said}


def _before(run: Path, step: int) -> dict[str, Any]:
    """The summary that the run's folder holds, where it is of this step."""
    path = run / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get("steps") == step else {}


def _describe(summary: dict[str, Any], run: Path) -> list[str]:
    def share(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.1%}"

    files = {
        "checkpoint": "checkpoints/last.pt",
        "curves and pictures": "index.html",
        "pictures": "plots",
        "numbers": "metrics.jsonl",
        "TensorBoard": "tb",
    }
    rows = [
        (
            "accuracy on held-out pictures",
            f"{share(summary['val_accuracy'])} (before training {share(summary['val_accuracy_first'])}, "
            f"chance {summary['chance']:.1%})",
        ),
        (
            "speed",
            f"{summary['images_per_s']:,.0f} images/s, {summary['images']:,} images in "
            f"{summary['seconds']:.0f} s",
        ),
        ("waiting for data", share(summary["wait_share"])),
        ("verdict", summary["verdict"]),
        *(("method", line) for line in summary["method"]),
        *(
            [("damaged records skipped", f"{len(skipped):,}, named in {run / 'summary.json'}")]
            if (skipped := summary["skipped_records"])
            else []
        ),
        *((name, str(run / file)) for name, file in files.items() if (run / file).exists()),
    ]
    return ["", f"{summary['preset']} is done after {summary['steps']} steps", *table(rows)]
