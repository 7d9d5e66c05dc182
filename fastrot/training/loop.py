"""The training loop, the same for every method: step, validation, log lines, checkpoints."""

import contextlib
import copy
import functools
import gc
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrot import dist
from fastrot.config import Config, NotFinite, RunError
from fastrot.core import Batch, Losses
from fastrot.data.loader import Loader
from fastrot.entry import Preempted, PreemptionSignal
from fastrot.speed.timer import StepTimer
from fastrot.training import checkpoint
from fastrot.training.graph import WARM_UP
from fastrot.training.journal import Journal
from fastrot.training.optim import set_lr
from fastrot.training.state import Progress, TrainState

AGREE = 20  # steps between two questions to all ranks whether one of them was warned


def train_step(state: TrainState, batch: Batch) -> Losses:
    """One step at this step's rate, recorded where there is a graph. Waits for nothing.

    Its numbers hold until the next step.
    """
    set_lr(state.optimizer, state.schedule(state.step))
    if state.graphed is None:
        return _step(state, batch)
    return state.graphed(functools.partial(_step, state), batch)


def _step(state: TrainState, batch: Batch) -> Losses:
    """Views, network, losses, descent, the method's own writes: all that a graph records."""
    views = state.method.views(batch)
    with state.autocast():
        outputs = state.net(views)
    if state.fresh:
        state.method.before_first_step(outputs, batch)
        state.fresh = False
    losses = state.method.losses(outputs, batch)
    state.descend(losses.total)
    state.method.after_step(outputs, batch, losses)
    return losses.detached()


@torch.no_grad()
def validate(
    state: TrainState, loader: Loader, asked: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The method's scores over a whole view: sums and counts over all ranks, divided once.

    Runs the bare net, in eval mode, with rank 0's BatchNorm statistics. `asked()` is called now and then,
    by all ranks together.
    """
    net = state.method.net
    dist.broadcast_([b for b in net.buffers() if b.is_floating_point()])
    net.eval()
    sums: dict[str, Tensor] = {}
    often = 1 if dist.world() == 1 else AGREE
    questions = -(
        -loader.min_batches // often
    )  # as many on each rank, though one may skip whole batches
    for k, batch in enumerate(loader.epoch(0)):
        with state.autocast():
            outputs = net(state.method.views(batch))
            scores = state.method.score(outputs, batch)
        for name, (total, count) in scores.items():
            both = torch.stack([total, count]).double()
            sums[name] = sums[name] + both if name in sums else both
        if k % often == 0 and questions:
            questions -= 1
            asked()
    for _ in range(questions):
        asked()
    net.train()
    for name in sorted(dist.together(set(sums))):  # a rank whose share is empty has no names
        nothing = torch.zeros(2, dtype=torch.float64, device=state.device)
        sums[name] = dist.sum_over_ranks(sums.get(name, nothing))
    if not sums:
        raise RunError(
            "no picture to be judged on can be read: give --val others, or prepare them anew"
        )
    return {name: (both[0] / both[1]).item() for name, both in sums.items()}


@dataclass
class Run:
    """What `fit` trains with beside the state."""

    loader: Loader
    val_loader: Loader | None
    journal: Journal
    cfg: Config
    save: Callable[[str, dict[str, Any]], None]  # writes checkpoints/NAME
    at_epoch: Callable[[], None]  # draws the run's page
    preemption: PreemptionSignal  # of this process
    step_timer: StepTimer  # times it


def fit(state: TrainState, run: Run) -> None:
    """Train from `state.step` to the end, which is `state.schedule.steps` or --max-steps.

    Where --max-steps alone ends it, the last lines are marked `partial` and the running means go on. Raises
    Preempted when a rank was warned and all is saved, RunError where a number is not finite.
    """
    cfg = run.cfg
    end = (
        state.schedule.steps if cfg.max_steps is None else min(state.schedule.steps, cfg.max_steps)
    )
    if run.val_loader is not None and state.step == 0:
        state.progress.val_first = _validated(state, run, {"step": 0, "epoch": 0})
    run.at_epoch()
    state.method.net.train()
    if state.step > state.validated_step and (
        state.step == end or state.step % len(run.loader) == 0
    ):
        _end_epoch(state, run, end)  # a warning came in its middle
    first = state.step + 1
    with _collector_on_call():
        while state.step < end:
            _train_epoch(state, run, end, first)
            _end_epoch(state, run, end)
            gc.collect()


@contextlib.contextmanager
def _collector_on_call() -> Iterator[None]:
    """Python's garbage collector looks at what there is a last time, and from here on when it is called.

    By itself it would come in the midst of steps, to look through all of torch's objects again.
    """
    enabled = gc.isenabled()
    gc.disable()
    _collect_for_good()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _collect_for_good() -> None:
    """Collect, and never look at the survivors again."""
    gc.collect()
    gc.freeze()


def _train_epoch(state: TrainState, run: Run, end: int, first: int) -> None:
    """The steps that are left of an epoch, up to `end`; behind step `first` all is compiled."""
    cfg, batches = run.cfg, len(run.loader)
    number, start = divmod(state.step, batches)
    timer = _Timer(state.progress, state.device)
    with contextlib.closing(timer.waits(run.loader.epoch(number, start))) as drawn:
        for batch in drawn:
            try:
                with run.step_timer.step():
                    losses = train_step(state, batch)
            except NotFinite:  # a CPU sees it at once; a GPU at the next log line
                _go_on_only_if_finite(False, state, run.journal.run)
                raise
            state.step += 1
            state.progress.images += len(batch.index) * dist.world()
            state.meter.add(losses)
            run.journal.advance(state.step)
            if state.step == first:
                _collect_for_good()
            due = state.step % cfg.log_every == 0 or state.step == state.schedule.steps
            if due or state.step == end:
                means = state.meter.read(keep=not due)
                line = {"step": state.step, "epoch": number, **means, **timer.lap()}
                line |= {"lr": state.schedule(state.step - 1)} | ({} if due else {"partial": True})
                run.journal.write(line)
                run.step_timer.line(line["images_per_s"], line["wait_share"])
                _go_on_only_if_finite(math.isfinite(means["loss"]), state, run.journal.run)
                gc.collect()
            if state.step == end or state.step % batches == 0:
                break  # what follows ends the epoch, and saves
            if due or dist.world() == 1 or state.step % AGREE == 0:
                _save_if_warned(state, run, timer)
            if _checkpoint_is_due(state.step, cfg):
                timer.lap()
                _save(state, run)
                timer.begin()
    timer.lap()


def _end_epoch(state: TrainState, run: Run, end: int) -> None:
    """Validation, checkpoint, page."""
    epochs, inside = divmod(state.step, len(run.loader))
    due = state.step == state.schedule.steps or (
        inside == 0 and epochs % run.cfg.validate_every == 0
    )
    if run.val_loader is not None and (due or state.step == end):
        line = {"step": state.step, "epoch": epochs - (inside == 0)}
        state.progress.val = _validated(state, run, line | ({} if due else {"partial": True}))
    best = due and run.val_loader is not None and _merit(state.progress.val) > state.progress.best
    if best:
        state.progress.best = _merit(state.progress.val)
    state.validated_step = state.step
    _save(state, run, best=best)
    if state.step < end:
        _end_if_warned(state, run)
    run.at_epoch()


def _merit(scores: dict[str, float]) -> float:
    """What the best checkpoint is the best by: accuracy, or a low loss where the task has no answers."""
    return scores.get("accuracy", -scores["loss"])


def _validated(state: TrainState, run: Run, line: dict[str, Any]) -> dict[str, float]:
    assert run.val_loader is not None
    scores = validate(state, run.val_loader, lambda: _save_if_warned(state, run))
    run.journal.write(line | {f"val_{name}": value for name, value in scores.items()})
    return scores


def _save_if_warned(state: TrainState, run: Run, timer: "_Timer | None" = None) -> None:
    """Where a rank was warned: save, say so, raise Preempted. Called on all ranks at the same place."""
    if not dist.highest(run.preemption.got):
        return
    if timer is not None:
        timer.lap()
    if state.step:
        state.method.net.train()
        _save(state, run)
    _end_if_warned(state, run)


def _end_if_warned(state: TrainState, run: Run) -> None:
    number = dist.highest(run.preemption.got)
    if not number:
        return
    name = signal.Signals(number).name
    where = f"saved at step {state.step}" if state.step else "ended before the first step"
    sentence = f"{name}: {where} of {state.schedule.steps}; the same command goes on there"
    run.journal.say(sentence)
    raise Preempted(number, sentence)


def _checkpoint_is_due(step: int, cfg: Config) -> bool:
    return step % cfg.checkpoint_every == 0 or bool(cfg.keep_every and step % cfg.keep_every == 0)


def _save(state: TrainState, run: Run, *, best: bool = False) -> None:
    """step_N.pt and best.pt where asked, then last.pt: only of a state that is finite throughout, on all ranks.

    In this order, so that a run that is killed between two of them makes both again.
    """
    _count_skipped(state.progress, run)
    parts = state.state_dict()
    since = state.meter.sums  # over all steps since the last log line; the loss is their first
    kept = [*parts["net"].values(), *parts["method"].values()]
    kept += [] if since is None else [since[:1]]
    finite = not dist.highest(int(not checkpoint.all_finite(kept)))
    _go_on_only_if_finite(finite, state, run.journal.run)
    if run.cfg.keep_every and state.step % run.cfg.keep_every == 0:
        run.save(f"step_{state.step}.pt", parts)
    if best and run.cfg.keep_best:
        run.save("best.pt", parts)
    run.save("last.pt", parts)


def _count_skipped(progress: Progress, run: Run) -> None:
    """Add the damaged records that any rank has skipped since the last time."""
    mine = run.loader.skipped | (run.val_loader.skipped if run.val_loader else set())
    if dist.highest(int(not mine <= set(progress.skipped))):
        progress.skipped = sorted(dist.together(mine | set(progress.skipped)))


def _go_on_only_if_finite(finite: bool, state: TrainState, run: Path) -> None:
    if not finite:
        last = run / "checkpoints" / "last.pt"
        good = (
            f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        )
        raise RunError(
            f"the loss or a weight is not finite at step {state.step}; {good}: "
            "start again with a smaller --lr, or --precision fp32"
        )


def warm_up_ddp(state: TrainState, batch: Batch) -> None:
    """One forward and backward through DDP, forgotten again; before the first step of every start.

    DDP puts its gradients into other buckets after its first backward. The order of a sum over three or
    more ranks follows the buckets, so a resumed run that began with the first ones would differ in the
    last bits from one that was never broken off.
    """
    if dist.world() == 1:
        return
    buffers = [(b, b.clone()) for b in state.method.net.buffers()]
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices), state.autocast():
        outputs = state.net(state.method.views(batch))
    pulled(outputs).backward()
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.data.copy_(before)


def pulled(outputs: Any) -> Tensor:
    """A number whose gradient reaches all outputs of a net, whatever its losses are."""
    leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().mean() for t in leaves]).sum()


class _Timer:
    """Training seconds and the share of them spent waiting for data; adds both to the progress."""

    def __init__(self, progress: Progress, device: torch.device):
        self.progress, self.device = progress, device
        self.begin()

    def begin(self) -> None:
        """Forget what went by since the last lap: a checkpoint, a validation."""
        self.since, self.waited, self.images = time.perf_counter(), 0.0, self.progress.images

    def waits(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """The same batches, timed: how long each kept the loop waiting. Closes them at the end."""
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - asked
                if batch is None:
                    return
                yield batch
        finally:
            _close(batches)

    def lap(self) -> dict[str, float]:
        """images/s and wait share since the last lap, the steps under way included."""
        _wait_for(self.device)
        seconds, waited = time.perf_counter() - self.since, self.waited
        images = self.progress.images - self.images
        self.progress.seconds += seconds
        self.progress.waited += waited
        self.begin()
        return {"images_per_s": images / seconds, "wait_share": waited / seconds}


def epochs_within(
    seconds: float, state: TrainState, loader: Loader, val_loader: Loader | None
) -> tuple[int, float]:
    """How many epochs fit into `seconds` (at least 1), and the seconds of one, its validation included.

    Measures 20 training steps and up to 5 validation batches after some to warm up; undoes what they did.
    """
    weights = {k: v.clone() for k, v in state.method.net.state_dict().items()}
    rest = {k: copy.deepcopy(v) for k, v in vars(state.method).items() if k != "net"}
    random = checkpoint.random_state(state.device)
    state.method.net.train()
    warm = 3 if state.graphed is None else WARM_UP + 2
    step = _seconds_each(loader, 20, warm, state.device, lambda batch: train_step(state, batch))
    epoch = step * len(loader)
    state.method.net.load_state_dict(weights)
    vars(state.method).update(rest)
    state.optimizer.state.clear()
    state.__post_init__()  # the gradient scaler begins anew
    state.fresh = True
    state._put_elsewhere()
    if val_loader is not None:
        state.method.net.eval()
        epoch += len(val_loader) * _seconds_each(
            val_loader, 5, 3, state.device, lambda b: _look(state, b)
        )
    checkpoint.set_random_state(random, state.device)
    return dist.agree((max(1, int(seconds // epoch)), epoch))


@torch.no_grad()
def _look(state: TrainState, batch: Batch) -> None:
    with state.autocast():
        state.method.score(state.method.net(state.method.views(batch)), batch)


def _seconds_each(
    loader: Loader, steps: int, warm: int, device: torch.device, work: Callable[[Batch], Any]
) -> float:
    """Seconds a batch, loading included, after some batches to warm up; short epochs are begun again."""
    done, begun = 0, time.perf_counter()
    while done < warm + steps:
        batches, before = loader.epoch(0), done
        for batch in batches:
            if done == warm:
                _wait_for(device)
                begun = time.perf_counter()
            work(batch)
            done += 1
            if done == warm + steps:
                break
        _close(batches)
        if done == before:
            return 0.0  # there is none: this rank's share is empty, or cannot be read
    _wait_for(device)
    return (time.perf_counter() - begun) / steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _close(batches: Iterator[Batch]) -> None:
    close = getattr(batches, "close", None)  # a generator's: ends the workers behind it
    if close is not None:
        close()
