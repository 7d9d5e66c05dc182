"""One run from its folder's point of view: begun or resumed, trained, summed up."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastrot import assemble, config, dist, machine, ranges
from fastrot.arrays import Numbers
from fastrot.config import Config, UsageError
from fastrot.core import DTYPES, Batch, Data
from fastrot.data.keys import few_of_each, fold_of, held_out
from fastrot.data.loader import Loader
from fastrot.disk import locked, replace_bytes, write_atomically
from fastrot.entry import PreemptionSignal, share_of_cores
from fastrot.evals.online import OnlineKnn
from fastrot.evals.page import LivePage
from fastrot.speed import memory
from fastrot.speed.profile import Profile
from fastrot.speed.timer import StepTimer
from fastrot.training import budget, checkpoint, loop, report, resume
from fastrot.training.device import choose, choose_form
from fastrot.training.journal import Journal
from fastrot.training.state import Session, build, warm_up_ddp

SHOWN = 8  # held-out pictures in the run's contact sheet


def train(cfg: Config) -> int:
    """Train as the config says, from the last checkpoint where there is one; with --folds each fold's net in turn.

    Raises Preempted when a warning signal reached a rank and all is saved.
    """
    cfg, device = choose(resume.with_trunk(cfg))
    runs, made = runs_of(cfg), set[Path]()
    try:
        for folder, _ in runs:
            _make(folder, made)
        with contextlib.closing(PreemptionSignal()) as preemption, dist.joined(device):
            made.update(*dist.everyones(made))
            for folder, each in runs:
                _train_one(each, folder, device, preemption, fresh=folder in made)
    except BaseException:
        for path in sorted(made, reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()  # what holds nothing: see _train_one
        raise
    return 0


def runs_of(cfg: Config) -> list[tuple[Path, Config]]:
    """The run's folder and config; with --folds those of each fold, but with --fold that one alone, in --out."""
    run = resume.run_folder(cfg)
    if cfg.folds is None or cfg.fold is not None:
        if checkpoint.folds_in(run):
            own = "NEW" if cfg.fold is None else run / f"fold{cfg.fold}"
            raise UsageError(f"--out {run} holds the runs of --folds: use --out {own}")
        return [(run, cfg)]
    if checkpoint.of_run(run).exists():
        raise UsageError(f"--out {run} holds a run without --folds: use --out NEW")
    each = [(run / f"fold{fold}", fold) for fold in range(cfg.folds)]
    return [(path, dataclasses.replace(cfg, fold=fold, out=str(path))) for path, fold in each]


def _make(run: Path, made: set[Path]) -> None:
    """Make the run's folder, which must be one that can be written; `made` gets it and its parents that were not there."""
    made.update(path for path in (run, *run.parents) if not os.path.exists(path))
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {run} cannot be made ({error.strerror}): name another") from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise UsageError(f"--out {run} cannot be written: name a folder of your own")


def _train_one(
    cfg: Config, folder: Path, device: torch.device, preemption: PreemptionSignal, *, fresh: bool
) -> None:
    """`fresh`: this start made the folder, and where it fails before the first step takes away what is in it; no checkpoint."""
    preemption.alive(steps=False)  # of this fold
    refusal = f"another run writes into {folder}: wait for it, end it, or use --out NEW"
    with locked(folder, refusal) if dist.rank() == 0 else contextlib.nullcontext():
        begun, s = time.perf_counter(), None
        fresh = fresh and dist.rank() == 0 and os.listdir(folder) == ["lock"]
        try:
            dist.barrier()  # all meet here: nobody writes while they read the checkpoint
            saved = resume.last_checkpoint(folder)
            cfg, form = choose_form(cfg, saved and saved["config"], device)
            resume.check_settings(saved, cfg, folder)
            s = _built(cfg, folder, saved, begun, device)
            said = [*form, *_begun_or_resumed(s)]
            at = {"step": s.state.step, "validated_step": s.state.validated_step, "steps": s.end}
            journal = Journal(folder, tensorboard=cfg.tensorboard, **at)
            with contextlib.closing(journal):
                _write_setting(s)
                journal.say(*report.greeting(s), *said)
                _trained(s, journal, preemption)
        except BaseException as error:
            if fresh and not (s and s.state.step) and not checkpoint.of_run(folder).exists():
                shutil.rmtree(folder, ignore_errors=True)
            if not memory.is_full(error):
                raise
            memory.forget(error)
            built = None if s is None else (s.state, s.loader.view, s.step_timer)
            raise memory.out_of_memory_error(cfg, device, built) from None


def _built(
    cfg: Config, folder: Path, saved: dict[str, Any] | None, begun: float, device: torch.device
) -> Session:
    """The parts of a run; refused where they are not those that were saved."""
    data, val = assemble.data_of(cfg)
    if cfg.statistics == "data":
        if data.mean is None or data.std is None:
            raise UsageError(
                f"--statistics data, but {cfg.data} carries none: use --statistics preset"
            )
        cfg = dataclasses.replace(cfg, mean=tuple(data.mean), std=tuple(data.std))
    loader, val_loader = _loaders(cfg, data, val, folder, saved, device)
    if saved is not None:
        resume.check_pictures(saved["run_identity"], cfg, loader, folder)
    info = assemble.data_info(cfg, loader, val_loader, device, DTYPES[cfg.precision])
    state = build(cfg, info, budget.schedule_of(cfg, cfg.epochs or 1, len(loader)))
    identity = resume.run_identity_of(cfg, loader, info, state.method)
    if saved is not None:
        resume.check_method(saved["run_identity"], identity, folder)
    elif cfg.start_from is not None:
        resume.start_from(state.method.net, cfg.start_from)
    timer = StepTimer(device)
    return Session(cfg, folder, saved, begun, loader, val_loader, state, identity, timer)


def _begun_or_resumed(s: Session) -> list[str]:
    """The state as the first step wants it; what is to be said of the run's length."""
    state = s.state
    said = budget.set_length(s)
    warm_up_ddp(state, s.loader)
    if s.saved is not None:
        state.load_state_dict(s.saved)
        said += resume.other_machine(s.saved["run_identity"], s.identity)
        s.saved.clear()  # or a second bank would stay in host memory to the end
    return said


def _write_setting(s: Session) -> None:
    """config.yaml and environment.json, by rank 0."""
    if dist.rank():
        return
    plain = config.to_plain(s.cfg)
    if s.cfg.budget is not None:  # what it came to, so that a replay is the same run
        plain |= {"budget": None, "epochs": s.state.schedule.epochs}
    text = "".join(f"# {line}\n" for line in s.identity["extended"])
    text += yaml.safe_dump(plain, sort_keys=False)
    replace_bytes(s.folder / "config.yaml", text.encode())
    environment = machine.environment(s.state.device, dist.world())
    replace_bytes(s.folder / "environment.json", json.dumps(environment, indent=1).encode())


def _trained(s: Session, journal: Journal, preemption: PreemptionSignal) -> None:
    """From the step at hand to the end; then rank 0 writes summary, page and last words."""
    writes, left = dist.rank() == 0, s.end - s.state.step
    if s.cfg.online_probe == "knn":
        s.online = OnlineKnn(s)
    page = LivePage(s.folder, s.state.method, _shown(s) if writes else None)
    if s.cfg.profile and writes and left > 0:
        s.step_timer.around = Profile(s.state, s.folder / "profile", left, journal.say)
    loop.fit(s, journal, page.at_epoch, preemption)
    if writes:
        summary = report.summary(s)
        replace_bytes(s.folder / "summary.json", json.dumps(summary, indent=1).encode())
        page.draw()
        journal.say(*report.last_words(summary, s))


# ---- data ----


def _loaders(
    cfg: Config, data: Data, val: Data | None, run: Path, saved: dict[str, Any] | None, device: Any
) -> tuple[Loader, Loader | None]:
    """The training loader, and what the run is judged on: --val, or the pictures set aside."""
    here = dist.place()
    how = {name: getattr(cfg, name) for name in ("batch", "seed", "enlarge", "on_bad_record")}
    how |= {"rank": here.rank, "world": here.world, "device": device}
    how["workers"] = share_of_cores(here.local_world) if cfg.workers is None else cfg.workers
    files = {}
    for name, rows in _chosen(cfg, data).items():
        path = files[name] = run / f"rows-{name}.npy"
        if saved is not None and not (path.exists() and np.array_equal(np.load(path), rows)):
            raise UsageError(
                f"{run} was trained on other pictures ({saved['run_identity']['data']}): "
                "give the same --data and --val, or --out NEW"
            )
        if here.rank == 0 and saved is None:
            write_atomically(path, lambda file, rows=rows: np.save(file, rows))
    dist.barrier()
    loader = Loader(data, assemble.training_view(cfg, files.get("train")), **how)
    if val is None and cfg.hold_out == 0:
        return loader, None
    return loader, Loader(val or data, assemble.evaluation_view(cfg, files.get("val")), **how)


def _chosen(cfg: Config, data: Data) -> dict[str, Numbers]:
    """The rows to learn from, and those set aside to judge by, where these are not all and --val."""
    keys, chosen, left_out = data.keys, {}, np.zeros(data.rows, bool)
    if cfg.val is None and cfg.hold_out:
        left_out = held_out(keys, cfg.hold_out)
        chosen["val"] = np.flatnonzero(left_out)
    if cfg.folds is not None:
        fold = fold_of(keys, cfg.folds)
        if len(empty := np.setdiff1d(np.arange(cfg.folds), fold)):
            raise UsageError(f"--folds {cfg.folds} leaves fold {empty[0]} empty: use fewer folds")
        left_out = left_out | (fold == cfg.fold)
    if cfg.rows is not None:
        left_out |= ~few_of_each(keys, data.labels, left_out, ranges.few(cfg.rows), cfg.seed)
    return chosen | ({"train": np.flatnonzero(~left_out)} if left_out.any() else {})


def _shown(s: Session) -> Batch | None:
    """A few held-out pictures, evenly spread over the view, for the run's contact sheet."""
    if s.val_loader is None:
        return None
    images = s.val_loader.images
    rows = np.linspace(0, images - 1, min(SHOWN, images)).round().astype(np.int64)
    if s.val_loader.rows is not None:
        rows = s.val_loader.rows[rows]
    how = {"device": s.state.device, "enlarge": True, "on_bad_record": s.cfg.on_bad_record}
    view = assemble.evaluation_view(s.cfg, rows)
    few = Loader(s.val_loader.data, view, batch=len(rows), workers=0, **how)
    return next(few.epoch(0), None)
