"""What people are told of a run: at its beginning, and as its summary."""

import json
import time
from typing import Any

import numpy as np

from fastrot import assemble, machine
from fastrot.config import net_name
from fastrot.entry import table
from fastrot.presets import PRESETS
from fastrot.speed import bounds
from fastrot.speed.cost import step_cost
from fastrot.training.graph import WARM_UP
from fastrot.training.state import Session


def greeting(s: Session) -> list[str]:
    """What the run is, a line each."""
    cfg, state, who = s.cfg, s.state, s.identity
    trained = sum(p.numel() for p in state.method.net.parameters() if p.requires_grad)
    judged = "none" if s.val_loader is None else f"{s.val_loader.images:,}"
    on_cpu = state.device.type == "cpu"
    threads = f", {who['threads']} thread(s) for the network" if on_cpu else ""
    lines = [
        f"{cfg.preset}: {type(cfg.method).__name__} with {net_name(cfg.backbone)}, "
        f"{trained:,} parameters, {cfg.precision} on {who['device']}",
        f"{s.loader.images:,} pictures of {cfg.data}, judged on {judged}",
        *_judged_by_what_it_learns_from(s),
    ]
    if cfg.rows:
        labels = s.loader.data.labels[slice(None) if s.loader.rows is None else s.loader.rows]
        _, count = np.unique(labels, return_counts=True)
        each = " to ".join(f"{n:,}" for n in sorted({count.min(), count.max()}))
        lines.append(f"--rows {cfg.rows}: {each} pictures in each of {len(count)} classes")
    if cfg.folds:
        lines.append(f"fold {cfg.fold} of 0 to {cfg.folds - 1} is left out of training")
    if trunk := assemble.METHODS[type(cfg.method)].trunk(cfg):
        lines.append(f"--backbone, --image-size, --mean and --std are those of its trunk, {trunk}")
    lines += [
        f"global batch {who['global_batch']} ({cfg.batch} x {who['ranks']}), "
        f"{state.schedule.epochs} epochs of {len(s.loader)} steps, {state.schedule.steps} steps in all",
        f"{s.loader.workers} worker(s) for pictures{threads}",
        *s.loader.data.describe(),
        *state.schedule.describe(),
        *state.method.describe(),
    ]
    if cfg.graph:
        lines.append(f"each step is one CUDA graph, recorded after {WARM_UP} steps of this start")
    paper = PRESETS[cfg.preset]().batch if cfg.preset in PRESETS else who["global_batch"]
    if who["global_batch"] != paper:
        lines.append(f"the preset's global batch is {paper}: --lr does not follow by itself")
    last = f"writing to {s.folder}" if s.saved is None else f"resumed at step {state.step}"
    return [*lines, last]


def _judged_by_what_it_learns_from(s: Session) -> list[str]:
    """A line where the names of most pictures of --val are names of pictures that are trained on."""
    if s.cfg.val is None or s.val_loader is None:
        return []
    learnt, judged = s.loader, s.val_loader
    if any(np.array_equal(x.data.keys, np.arange(x.data.rows)) for x in (learnt, judged)):
        return []  # nameless
    asked, known = (
        x.data.keys[slice(None) if x.rows is None else x.rows] for x in (judged, learnt)
    )
    shared = int(np.isin(asked, known).sum())
    if shared <= judged.images / 2:
        return []
    return [
        f"{shared:,} of the {judged.images:,} pictures of --val are named as pictures that are trained on: "
        "accuracy on them is none on pictures never seen, unless they are others of the same names"
    ]


def summary(s: Session) -> dict[str, Any]:
    """summary.json: where the run has come to, and what bound it."""
    state, progress = s.state, s.state.progress
    return {
        "preset": s.cfg.preset,
        "steps": state.step,
        "epochs": state.step / state.schedule.batches,
        "images": progress.images,
        "seconds": round(progress.seconds, 3),
        "seconds_in_all": round(time.perf_counter() - s.begun, 3),
        "images_per_s": progress.images_per_s(),
        "wait_share": progress.wait_share(),
        "saving_seconds": round(progress.saving, 3),
        "saving_share": progress.saving_share(),
        "val_accuracy_first": progress.val_first.get("accuracy"),
        "val_accuracy": progress.val.get("accuracy"),
        "val_loss": progress.val.get("loss"),
        "val": progress.val,
        "chance": state.method.headline.chance,
        "extended": s.identity["extended"],
        "method": state.method.describe(),
        "skipped_records": progress.skipped,
        "device": machine.device_name(state.device),
        "versions": machine.versions(),
        **_bound(s),
    }


def _bound(s: Session) -> dict[str, str | None]:
    """What bound the run, and the sentence on it: None where this start was too short to tell.

    Of a run that had ended already, what was said then.
    """
    state, path = s.state, s.folder / "summary.json"
    if not s.step_timer.enough():
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = s.step_timer.steps == 0 and before.get("steps") == state.step
        return {name: before.get(name) if same else None for name in ("bound", "verdict")}
    m = s.step_timer.measured(s.cfg.batch)
    least = step_cost(state.method, s.loader.view, s.cfg, state.device)
    subject = bounds.subject_of(s.cfg, s.loader.data, state.device)
    m = bounds.with_floors(m, least, s.loader.view, subject)
    said = bounds.verdict(m, state.progress.images_per_s(), s.loader.workers, subject)
    return {"bound": bounds.bound(m), "verdict": said}


def last_words(summary: dict[str, Any], s: Session) -> list[str]:
    """The summary for people, and where all of it stands."""
    run, headline, progress = s.folder, s.state.method.headline, s.state.progress
    score = headline.score
    first, last = headline.say(progress.val_first.get(score)), headline.say(progress.val.get(score))
    chance = "" if headline.chance is None else f", chance {headline.say(headline.chance)}"
    speed = f"{summary['images_per_s']:,.0f} images/s, {summary['images']:,} images in {summary['seconds']:.0f} s"
    rows = [
        (f"{score} on held-out pictures", f"{last} (before training {first}{chance})"),
        *by_stage(progress.val),
        ("speed", speed),
        ("waiting for data", f"{summary['wait_share']:.1%}"),
        ("saving checkpoints", f"{summary['saving_share']:.1%}, {summary['saving_seconds']:.1f} s"),
        *([("verdict", summary["verdict"])] if summary["verdict"] else ()),
        *(("method", line) for line in summary["method"]),
    ]
    if skipped := summary["skipped_records"]:
        rows.append(("damaged records skipped", f"{len(skipped):,}, named in summary.json"))
    files = {
        "checkpoint": run / "checkpoints" / "last.pt",
        "curves and pictures": run / "index.html",
        "pictures": run / "plots",
        "numbers": run / "metrics.jsonl",
        "TensorBoard": run / "tb",
    }
    rows += [(name, str(path)) for name, path in files.items() if path.exists()]
    return ["", f"{summary['preset']} is done after {summary['steps']} steps", *table(rows)]


def by_stage(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Rows of a table: a probe's scores, a stage each."""
    stages = [name.removeprefix("top1_") for name in scores if name.startswith("top1_")]
    return [
        (stage, f"top-1 {scores[f'top1_{stage}']:.1%}, top-5 {scores[f'top5_{stage}']:.1%}")
        for stage in stages
    ]
