"""The training loop, the same for every method: step, validation, log lines, checkpoints."""

import collections
import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrot import config, dist, ranges
from fastrot.config import NotFinite, RunError
from fastrot.core import Batch, Losses
from fastrot.data.loader import Loader
from fastrot.entry import Preempted, PreemptionSignal, named
from fastrot.machine import Moment
from fastrot.training import checkpoint
from fastrot.training.journal import Journal
from fastrot.training.optim import set_lr
from fastrot.training.state import Progress, Session, TrainState
from fastrot.training.writer import Writer

Hook = Callable[[], object]
AGREE = 20  # steps between two questions to all ranks whether one of them was warned
DUE = 1  # the answer where none was, but a checkpoint is due: lower than any warning's number


def train_step(state: TrainState, batch: Batch) -> Losses:
    """One step at this step's rate, recorded where there is a graph. Its numbers hold until the next. Waits for nothing."""
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
    state: TrainState,
    loader: Loader,
    asked: Hook = lambda: None,
    alive: Hook = lambda: None,
) -> dict[str, float]:
    """The method's scores over a whole view: sums and counts over all ranks, divided once.

    Runs the net in eval mode, without DDP, with rank 0's BatchNorm statistics. All ranks call `asked` together, now and then;
    each calls `alive` with each batch.
    """
    net = state.method.net
    dist.broadcast_([b for b in net.buffers() if b.is_floating_point()])
    net.eval()
    nothing = functools.partial(torch.zeros, 2, dtype=torch.float64, device=state.device)
    sums: dict[str, Tensor] = collections.defaultdict(nothing)  # and counts
    often = 1 if dist.world() == 1 else AGREE
    questions = -(-loader.min_batches // often)  # on each rank, though one may skip whole batches
    for k, batch in enumerate(loader.epoch(0)):
        alive()
        for name, (total, count) in state.scores(batch, loader.batch).items():
            sums[name] += torch.stack([total, count]).double()
        if k % often == 0 and questions:
            questions -= 1
            asked()
    for _ in range(questions):
        asked()
    net.train()
    names = set().union(*dist.everyones(set(sums)))  # a rank whose share is empty has none
    for name in sorted(names):
        sums[name] = dist.sum_over_ranks(sums[name])
    if not sums:
        raise RunError(
            "no picture to be judged on can be read: prepare them anew, or give other --val"
        )
    return {name: (both[0] / both[1]).item() for name, both in sums.items()}


def fit(s: Session, journal: Journal, at_epoch: Hook, preemption: PreemptionSignal) -> None:
    """Train from the state's step to `s.end`; `at_epoch` draws the run's page.

    Raises Preempted when a rank was warned and all is saved, RunError where a number is not finite, OSError where a
    checkpoint could not be written. However it ends, no checkpoint is being written any more.
    """
    this = _Fit(s, journal, at_epoch, preemption)
    try:
        this.whole()
    except BaseException:
        this.writer.wait_beside()
        raise


class _Fit:
    """A call of `fit`: each method is a step of it, and leaves what it learns in the state."""

    def __init__(self, s: Session, journal: Journal, at_epoch: Hook, preemption: PreemptionSignal):
        self.s, self.state, self.cfg = s, s.state, s.cfg
        self.journal, self.at_epoch, self.preemption = journal, at_epoch, preemption
        self.batches = len(s.loader)  # of an epoch
        self.writer, every = Writer(s.state.device, preemption.unhurried), s.cfg.checkpoint_every
        self.seconds = ranges.seconds_of(every)  # from one checkpoint to the next; 0: steps
        steps = None if self.seconds else int(every)
        self.saved_every = [n for n in (steps, s.cfg.keep_every) if n]  # steps
        self.saved_at = time.monotonic()
        self.first = s.state.step + 1
        self.timer = _Timer(s.state.progress, s.state.device)
        self.left: Callable[[], dict[str, Any]] | None = None  # a log line yet to be written

    def whole(self) -> None:
        state, end = self.state, self.s.end
        self.alive()
        if self.s.val_loader is not None and state.step == 0:
            state.progress.val_first = self.validated({"step": 0, "epoch": 0})
        self.at_epoch()
        state.method.net.train()
        ended = state.step == end or state.step % self.batches == 0
        if ended and state.step > state.validated_step:  # a warning came as the epoch ended
            self.end_epoch()
        with _collector_on_call():
            while state.step < end:
                self.epoch()
                self.end_epoch()
                gc.collect()
        with self.pause():
            self.writer.wait()

    def epoch(self) -> None:
        """The steps that are left of an epoch, or up to the end."""
        state = self.state
        number, start = divmod(state.step, self.batches)
        self.timer.begin()
        with contextlib.closing(self.timer.waits(self.s.loader.epoch(number, start))) as batches:
            for batch in batches:
                self.step(batch)
                told = self.line_if_due(number)
                if state.step == self.s.end or state.step % self.batches == 0:
                    break  # what follows ends the epoch, and saves
                due = any(state.step % every == 0 for every in self.saved_every)
                if told or dist.world() == 1 or state.step % AGREE == 0:
                    due |= self.save_if_warned(late=self.is_late())
                if due:
                    self.stop()
                    self.save()
                    self.timer.begin()
        self.stop()

    def step(self, batch: Batch) -> None:
        state = self.state
        self.writer.check()
        self.preemption.alive(steps=True)
        try:
            with self.s.step_timer.step():
                losses = train_step(state, batch)
        except NotFinite:  # a CPU sees it at once; a GPU by its log lines
            raise self.not_finite(state.step) from None
        state.step += 1
        state.progress.images += len(batch.index) * dist.world()
        state.meter.add(losses)
        self.journal.advance(state.step)
        if state.step == self.first:  # all is compiled: what there is now, stays
            gc.collect()
            gc.freeze()

    def line_if_due(self, epoch: int) -> bool:
        """The means since the last log line, where one is due or all ends.

        A GPU has not come here yet: the line is left to be written when the next one is due, so that the device does not
        idle meanwhile. The one before is waited for, which also keeps the host from filling the memory with batches: it is
        never two lines ahead. Where --max-steps alone ends it, the line is `partial` and the running means go on.
        """
        state = self.state
        due = state.step % self.cfg.log_every == 0 or state.step == state.schedule.steps
        if due or state.step == self.s.end:
            means, lap = state.meter.take(keep=not due), self.timer.lap()
            self.s.step_timer.line()
            self.write_left()
            line = {"step": state.step, "epoch": epoch}
            more = {"lr": state.schedule(state.step - 1)} | ({} if due else {"partial": True})
            self.left = lambda: line | means() | lap() | more
            if not self.timer.late:
                self.write_left()
            gc.collect()
        return due

    def write_left(self) -> None:
        """The log line that is yet to be written, if any. Waits for the device to have come there."""
        if self.left is None:
            return
        line, self.left = self.left(), None
        self.journal.write(line)
        self.s.step_timer.rate(line["images_per_s"], line["wait_share"])
        if not math.isfinite(line["loss"]):
            raise self.not_finite(line["step"])

    def stop(self) -> None:
        """What follows is no training: a checkpoint, a validation. Waits for the device."""
        self.write_left()
        self.timer.stop()

    def end_epoch(self) -> None:
        """Validation, checkpoint, page."""
        state, judged = self.state, self.s.val_loader is not None
        epochs, inside = divmod(state.step, self.batches)
        due = inside == 0 and epochs % self.cfg.validate_every == 0
        due = due or state.step == state.schedule.steps
        if judged and (due or state.step == self.s.end):
            line = {"step": state.step, "epoch": epochs - (inside == 0)}
            state.progress.val = self.validated(line | ({} if due else {"partial": True}))
        best = due and judged and _merit(state.progress.val) > state.progress.best
        if best:
            state.progress.best = _merit(state.progress.val)
        state.validated_step = state.step
        self.save(best=best)
        if state.step < self.s.end:
            self.save_if_warned(saved=True)
        self.at_epoch()

    def validated(self, line: dict[str, Any]) -> dict[str, float]:
        assert self.s.val_loader is not None
        scores = validate(self.state, self.s.val_loader, self.save_if_warned, self.alive)
        if self.s.online is not None:
            scores |= self.s.online(self.alive)
        self.journal.write(line | {f"val_{name}": value for name, value in scores.items()})
        return scores

    def alive(self) -> None:
        self.preemption.alive(steps=self.state.step > 0)

    def is_late(self) -> bool:
        """Whether a checkpoint is due by the clock, which is rank 0's."""
        waited = time.monotonic() - self.saved_at
        return dist.rank() == 0 and 0 < self.seconds <= waited

    def save_if_warned(self, *, saved: bool = False, late: bool = False) -> bool:
        """Where a rank was warned: save, say so, raise Preempted. Called on all ranks at the same place.

        In the same breath: whether one of them is `late` with a checkpoint.
        """
        self.alive()
        number, state = dist.highest(self.preemption.got or DUE * late), self.state
        if number <= DUE:
            return number == DUE
        self.preemption.answered = True
        if state.step and not saved:
            self.stop()
            state.method.net.train()
            self.save()
        with self.pause():
            self.writer.wait()
        name, where, steps = named(number), f"saved at step {state.step}", state.schedule.steps
        sentence = f"{name}: {where} of {steps} to {self.s.folder}; the same command goes on there"
        if not state.step:
            sentence = f"{name}: ended before the first step of {steps}; the same command begins it"
        self.journal.say(sentence)
        raise Preempted(number, sentence)

    def save(self, *, best: bool = False) -> None:
        """step_N.pt and best.pt where asked, then last.pt: only of a state that is finite throughout, on all ranks.

        In this order, so that a run that is killed between two of them makes both again. They are written while
        training goes on; the loop waits for those before.
        """
        with self.pause():
            state, names = self.state, [checkpoint.LAST]
            self.count_skipped()
            parts = state.state_dict()
            kept = [*parts["net"].values(), *parts["method"].values()]
            if state.meter.sums is not None:
                kept.append(state.meter.sums[:1])  # the loss, over all steps since the last line
            if dist.highest(int(not checkpoint.all_finite(kept))):
                raise self.not_finite(state.step)
            if best and self.cfg.keep_best:
                names.insert(0, "best.pt")
            if self.cfg.keep_every and state.step % self.cfg.keep_every == 0:
                names.insert(0, f"step_{state.step}.pt")
            if dist.rank() == 0:
                parts |= {"config": config.to_plain(self.cfg), "run_identity": self.s.identity}
                folder = self.s.folder / "checkpoints"
                self.writer.begin(parts, [folder / name for name in names])
            self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Training stands still in here for the sake of a checkpoint."""
        begun = time.perf_counter()
        yield
        lost = time.perf_counter() - begun
        self.state.progress.seconds += lost
        self.state.progress.saving += lost

    def count_skipped(self) -> None:
        """Add the damaged records that any rank has skipped since the last time."""
        known, val_loader = set(self.state.progress.skipped), self.s.val_loader
        mine = known | self.s.loader.skipped | (val_loader.skipped if val_loader else set())
        if dist.highest(int(mine > known)):
            self.state.progress.skipped = sorted(set().union(*dist.everyones(mine)))

    def not_finite(self, step: int) -> RunError:
        self.writer.wait_beside()
        last = checkpoint.of_run(self.s.folder)
        found = (
            f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        )
        return RunError(
            f"the loss or a weight is not finite at step {step}; {found}: "
            "start again with a smaller --lr, or --precision fp32"
        )


def _merit(scores: dict[str, float]) -> float:
    """What the best checkpoint is the best by: accuracy, or a low loss where the task has no answers."""
    return scores.get("accuracy", -scores["loss"])


@contextlib.contextmanager
def _collector_on_call() -> Iterator[None]:
    """Python's garbage collector comes when it is called, not in the midst of steps to look through all of torch."""
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


class _Timer:
    """Training seconds and the share of them that the device spent waiting for data; adds both to the progress."""

    def __init__(self, progress: Progress, device: torch.device):
        self.progress, self.device = progress, device
        self.late = device.type == "cuda"  # it comes to a step after the host
        self.since: Moment | None = None  # when the lap began; None: stopped, as in a validation

    def begin(self) -> None:
        self.since, self.images = Moment(self.device), self.progress.images
        self.waited = list[tuple[Moment, Moment]]()

    def waits(self, batches: Any) -> Generator[Batch, None, None]:
        """The same batches, timed: how long each kept the device waiting. Closes them at the end.

        A GPU that is busy with earlier steps waits for no batch, however long the host does.
        """
        with contextlib.closing(batches):
            while True:
                asked = Moment(self.device)
                batch = next(batches, None)
                self.waited.append((asked, Moment(self.device)))
                if batch is None:
                    return
                yield batch

    def lap(self) -> Callable[[], dict[str, float]]:
        """images/s and wait share since the last lap, the steps under way included; the next one begins.

        Waits for nothing: a call of what is returned waits for the device to have come here.
        """
        assert self.since is not None
        since, waits, images = self.since, self.waited, self.progress.images - self.images
        self.begin()
        until = self.since

        def told() -> dict[str, float]:
            seconds = max(1e-9, until.since(since))  # 0 right behind a line
            waited = sum(came.since(asked) for asked, came in waits)
            self.progress.seconds += seconds
            self.progress.waited += waited
            return {"images_per_s": images / seconds, "wait_share": waited / seconds}

        return told

    def stop(self) -> None:
        """No lap is under way any more. Waits for the device."""
        if self.since is not None:
            self.lap()()
            self.since = None
