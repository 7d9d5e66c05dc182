"""How long a run is: its schedule, and with --budget as many epochs as fit into a time."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from fastrot import dist, ranges
from fastrot.config import Config, UsageError
from fastrot.core import Batch
from fastrot.data.loader import Loader
from fastrot.machine import wait_for
from fastrot.training import checkpoint
from fastrot.training.graph import WARM_UP
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule
from fastrot.training.state import Session


def schedule_of(cfg: Config, epochs: int, batches: int) -> LRSchedule:
    """So many epochs of so many batches, or --schedule.steps."""
    steps = cfg.schedule.steps or epochs * batches
    epochs = math.ceil(steps / batches)
    return LRSchedule(cfg.schedule, epochs=epochs, batches=batches, steps=steps, lr=cfg.lr)


def set_length(s: Session) -> list[str]:
    """The run's length, told to its method; with --budget it is measured here. What is to be said of it."""
    saved, asked, state = s.saved or {}, set[int](), s.state
    before = saved.get("run_identity", {})
    first = before.get("budget") or saved.get("config", {}).get("budget")
    said = _by_budget(s, first) if s.cfg.budget else []
    schedule = state.schedule

    def begins(published: int) -> int:
        asked.add(published)
        return schedule.begins(published)

    state.method.set_schedule(schedule.epochs, begins)
    s.identity |= {"epochs": schedule.epochs, "steps": schedule.steps}
    s.identity["budget"] = s.cfg.budget or first  # a replay names the epochs that it came to
    s.identity["extended"] = list(before.get("extended", ()))
    if s.saved is None:
        return said
    was = dataclasses.replace(schedule, epochs=before["epochs"], steps=before["steps"])
    return said if was == schedule else said + _other_length(s, was, asked)


def _other_length(s: Session, was: LRSchedule, asked: set[int]) -> list[str]:
    """A line on a resumed run whose length is another than before.

    asked  the paper's epochs whose begin the method wanted to know

    Refused where it is shorter than what is done, and unless --extend where done steps would have been others in it.
    """
    now, done, run = s.state.schedule, s.saved["step"] if s.saved else 0, s.folder
    if now.steps < done:
        told = f"{run} has done {done} steps, and would end at step {now.steps}"
        raise UsageError(f"{told}: give it {_length(was)} as before or more, or use --out NEW")
    s.identity["budget"] = s.cfg.budget
    if _same_so_far(was, now, asked, done):
        return [f"{_length(was)} became {_length(now)}: the {done} steps done are the same in both"]
    if not s.cfg.extend:
        raise UsageError(
            f"{run} was to have {_length(was)}, and in a run of {_length(now)} the {done} steps done would "
            "have had other rates: add --extend to go on by the new schedule, or use --out NEW"
        )
    s.identity["extended"].append(
        f"extended at step {done}: by the schedule of {_length(was)} up to there, of {_length(now)} behind"
    )
    return s.identity["extended"][-1:]


def _same_so_far(was: LRSchedule, now: LRSchedule, asked: set[int], done: int) -> bool:
    """Whether so many steps have the same rates in both, and see the asked epochs of the paper begin at the same step."""

    def begun(each: LRSchedule) -> list[int]:
        return [min(each.begins(e) * each.batches, done) for e in asked]

    return all(was(k) == now(k) for k in range(done)) and begun(was) == begun(now)


def _length(schedule: LRSchedule) -> str:
    return f"{schedule.epochs} epoch(s) ({schedule.steps} steps)"


def _by_budget(s: Session, first: str | None) -> list[str]:
    """Measure, choose the epochs, say so. A resumed run keeps those chosen for its `first` budget where this is the same."""
    cfg, state, batches = s.cfg, s.state, len(s.loader)
    assert cfg.budget is not None
    if s.saved is not None and first == cfg.budget:
        state.schedule = schedule_of(cfg, s.saved["run_identity"]["epochs"], batches)
        return [f"--budget {cfg.budget}: {state.schedule.epochs} epochs, as first chosen"]
    seconds, epoch = ranges.seconds_of(cfg.budget), _epoch_seconds(s)
    epochs = max(1, int(seconds // epoch))
    state.schedule = schedule_of(cfg, epochs, batches)
    line = f"--budget {cfg.budget}: an epoch takes {epoch:.1f} s here, so {epochs} epoch(s)"
    return [line + (", which is longer than the budget" if epoch > seconds else "")]


def _epoch_seconds(s: Session) -> float:
    """The seconds of an epoch, its validation included, on rank 0.

    Measures 20 training steps and up to 5 validation batches after some to warm up; undoes what they did.
    """
    state, method = s.state, s.state.method
    random, weights = checkpoint.random_state(state.device), copy.deepcopy(method.net.state_dict())
    # not its state_dict: a sharded bank's is whole on rank 0 alone
    rest = {k: copy.deepcopy(v) for k, v in vars(method).items() if k != "net"}
    method.net.train()
    warm = 3 if state.graphed is None else WARM_UP + 2
    step = _seconds_each(s.loader, 20, warm, state.device, functools.partial(train_step, state))
    epoch = step * len(s.loader)
    method.net.load_state_dict(weights)
    vars(method).update(rest)
    for each in state.optimizer.state.values():
        each["momentum_buffer"].zero_()
    state.__post_init__()  # the gradient scaler begins anew
    state.fresh = True
    if state.graphed is not None:
        state.graphed.forget()
    if s.val_loader is not None:
        method.net.eval()
        look = functools.partial(state.scores, images=s.val_loader.batch)
        epoch += len(s.val_loader) * _seconds_each(s.val_loader, 5, 3, state.device, look)
    checkpoint.set_random_state(random, state.device)
    return dist.everyones(epoch)[0]


def _seconds_each(
    loader: Loader, steps: int, warm: int, device: torch.device, work: Callable[[Batch], Any]
) -> float:
    """Seconds a batch, loading included, after some batches to warm up; short epochs are begun again."""
    done, begun = 0, time.perf_counter()
    while done < warm + steps:
        before = done
        with contextlib.closing(loader.epoch(0)) as batches:
            for batch in itertools.islice(batches, warm + steps - done):
                if done == warm:
                    wait_for(device)
                    begun = time.perf_counter()
                work(batch)
                done += 1
        if done == before:
            return 0.0  # there is none: this rank's share is empty, or cannot be read
    wait_for(device)
    return (time.perf_counter() - begun) / steps
