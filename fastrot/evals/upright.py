"""Which photographs of a folder lie on their side or head: `evaluate.py RUN upright FOLDER`.

A photograph is shown to the net in four rotations, and what is said of each is turned back and averaged. Degrees are those
by which it seems to have been turned counter-clockwise, as it opens today: EXIF orientation applied.
"""

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastrot import assemble, dist, entry
from fastrot.config import Config, UsageError
from fastrot.core import Batch, Data, Method
from fastrot.data.files import one_line
from fastrot.disk import replace_bytes
from fastrot.evals import exif
from fastrot.evals.asked import own_pictures, writable
from fastrot.evals.features import exact, followed
from fastrot.evals.knobs import Upright
from fastrot.evals.picture import turned_sheet
from fastrot.evals.rotation import rotation_logits
from fastrot.evals.trained import Trained, net_of, trained_method
from fastrot.methods.rotation_table import ROTATIONS
from fastrot.training.device import choose_device

PRECISIONS = (0.90, 0.95, 0.99)
HELD = 5_000  # pictures of the hold-out by which confidence is calibrated, at most
SHOWN = 60  # pictures of the sheet


class Answer(NamedTuple):
    """Of a photograph."""

    path: str  # relative to the folder
    degrees: int  # 0, 90, 180, 270
    confidence: float


def evaluate(run: str, knobs: Upright) -> int:
    """Write upright.csv, the sheet of what seems turned, and copies where they are asked for; print what to think of them."""
    if dist.place().world > 1:
        raise UsageError("upright runs in one process: start it without torchrun")
    net, folder = _one(run), knobs.folder.resolve()
    device = choose_device(knobs.device, dist.place())
    for knob, to in (("--copy-to", knobs.copy_to), ("--out", knobs.out)):
        if to is not None and folder in (to.resolve(), *to.resolve().parents):
            raise UsageError(f"{knob} {to} is inside of {knobs.folder}: name another")
    data: Any = assemble.open_data(folder, "folder", knob="FOLDER")
    writable(knobs.out, "--out")
    method, how = trained_method(net.source, device), _how(net.cfg, knobs, device)
    about = {"run": str(Path(run).resolve()), "step": net.step, "folder": str(folder)}
    known = _begun(knobs.out, about)
    if known is None:
        print(f"{run}: asking it of pictures that stand upright first")
        known = about | _calibration(run, net.cfg, knobs, method, how)
        replace_bytes(knobs.out / "about.json", json.dumps(known, indent=1).encode())
    answers, skipped = _asked(data, net.cfg, method, how, known["temperature"], knobs.out)
    turned = [each for each in answers if each.degrees and each.confidence >= knobs.sure]
    turned.sort(key=lambda each: -each.confidence)
    unread = [f"{path}: {reason}" for path, reason in data.rejected] + sorted(skipped)
    print(*_said(known, answers, turned, knobs, unread), sep="\n")
    rows = {data.name(row): row for row in range(data.rows)}
    turned_sheet(
        [(each.path, each.degrees, each.confidence) for each in turned[:SHOWN]],
        lambda path: data.picture(rows[path]),
        knobs.out / "turned.png",
        of=len(turned),
    )
    if knobs.copy_to is not None:
        print(*_copies(data, turned, knobs.copy_to), sep="\n")
    return 0


def _one(run: str) -> Trained:
    net = net_of(run)
    if not assemble.METHODS[type(net.cfg.method)].predicts_rotation(net.cfg.method):
        kind = type(net.cfg.method).__name__
        raise UsageError(
            f"{run} predicts no rotations ({kind}): name a run of rotnet or decoupling"
        )
    return net


def _how(cfg: Config, knobs: Upright, device: torch.device) -> dict[str, Any]:
    workers = entry.cores() if knobs.workers is None else knobs.workers
    how: dict[str, Any] = {"batch": knobs.batch or cfg.batch, "workers": workers, "device": device}
    return how | {"enlarge": True, "on_bad_record": "skip"}


# ---- what the net says ----


def evidence(method: Method, batch: Batch) -> Float[Tensor, "b 4"]:
    """For each rotation that a picture may have been given the mean log-probability of it over the four views."""
    logits = rotation_logits(method, batch)
    assert logits is not None
    said = logits.log_softmax(dim=2)  # [picture, rotation on top, what the net says]
    # a picture turned by t, and by r on top of it, is turned by t + r
    each = torch.stack([said[:, r].roll(-r, dims=1) for r in range(ROTATIONS)])
    return each.mean(dim=0).float().cpu()


def _asked(
    data: Data, cfg: Config, method: Method, how: dict[str, Any], temperature: float, out: Path
) -> tuple[list[Answer], set[str]]:
    """All answers, those of an earlier call included, and what could not be read.

    Each is in the file before the next batch is asked.
    """
    file = out / "upright.csv"
    known = _read(file)
    left = [row for row in range(data.rows) if data.name(row) not in known]
    there = {data.name(row) for row in range(data.rows)}
    _write(file, list(known.values()))
    if not left:
        return [each for path, each in known.items() if path in there], set()
    end: Any = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with file.open("a", **end) as to:
        view = assemble.evaluation_view(cfg, np.array(left))
        loader = assemble.open_loader(data, view, **how)
        for batch in followed(loader):
            with exact():
                shares = (evidence(method, batch) / temperature).softmax(dim=1)
            best, rows_of = shares.max(dim=1), batch.index.tolist()
            fresh = [
                Answer(data.name(row), 90 * turn, round(share, 4))
                for row, turn, share in zip(
                    rows_of, best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]
            csv.writer(to).writerows(fresh)
            to.flush()
            known |= {each.path: each for each in fresh}
    return [each for path, each in known.items() if path in there], loader.skipped


def _write(file: Path, answers: list[Answer]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([Answer._fields, *answers])
    replace_bytes(file, text.getvalue().encode("utf-8", "surrogateescape"))


def _read(file: Path) -> dict[str, Answer]:
    """What stands in the file, but for a last line that was not written to its end."""
    if not file.exists():
        return {}
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    found = {}
    with contextlib.suppress(csv.Error):  # a quoted name that was not written to its end
        for row in csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True):
            with contextlib.suppress(ValueError):  # the heading, and what others have made of it
                path, turn, share = row
                found[path] = Answer(path, int(turn), float(share))
    return found


# ---- how far it is to be believed ----


def _begun(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call found of the net; None: there was none. Refuses answers of another net, or on other pictures."""
    file = out / "about.json"
    if not file.exists():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is damaged: remove {out}, or name another --out") from error
    if any(known.get(name) != value for name, value in about.items()):
        of = f"{known.get('folder')} by {known.get('run')} at step {known.get('step')}"
        raise UsageError(f"--out {out} holds answers on {of}: name another --out")
    return known


def _calibration(
    run: str, cfg: Config, knobs: Upright, method: Method, how: dict[str, Any]
) -> dict[str, Any]:
    """Temperature, accuracy, and the confidence from which so many of its answers are right, on the run's hold-out or --data.

    Of pictures that stand upright: the mean over four views is the same for one and for its turned copies.
    """
    if knobs.data is None:
        data, name, file = own_pictures(run, cfg, "val", way_out="--data")
    else:
        data, name, file = assemble.open_data(knobs.data), knobs.data, None
    held = np.arange(data.rows) if file is None else np.load(file)
    held = held[np.linspace(0, len(held) - 1, min(HELD, len(held))).round().astype(int)]
    loader = assemble.open_loader(data, assemble.evaluation_view(cfg, held), **how)
    with exact():
        found = [evidence(method, batch) for batch in followed(loader)]
    if not found:
        raise UsageError(f"no picture of {name} can be read: name others, by --data")
    t = temperature(said := torch.cat(found))
    best = (said / t).softmax(dim=1).max(dim=1)
    right = (best.indices == 0).numpy()
    decided = [decides(best.values.numpy(), right, each) for each in PRECISIONS]
    return {
        "temperature": t,
        "held_out": len(said),
        "of": name,
        "accuracy": float(right.mean()),
        "decides": [[p, *each] for p, each in zip(PRECISIONS, decided, strict=True)],
    }


def temperature(said: Float[Tensor, "n 4"]) -> float:
    """By which log-probabilities are divided, so that those of class 0, the truth, are likeliest (Guo 2017).

    Golden-section search over its logarithm, from .05 to 20.
    """

    def loss(log: float) -> float:
        return -float((said / math.exp(log)).log_softmax(dim=1)[:, 0].double().mean())

    low, high, golden = math.log(0.05), math.log(20), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2)


def decides(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], precision: float
) -> tuple[float, float]:
    """The largest share of the answers, the surest first, of which that many are right; and their least confidence."""
    order = np.argsort(-confidence, kind="stable")
    so_far = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # equal confidences are decided together
    ends = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((so_far >= precision) & ends)
    if not len(enough):
        return 0.0, 1.0
    return (enough[-1] + 1) / len(order), float(confidence[order[enough[-1]]])


# ---- what is told, and written ----


def _said(
    known: dict[str, Any],
    answers: list[Answer],
    turned: list[Answer],
    knobs: Upright,
    unread: list[str],
) -> Iterator[str]:
    yield (
        f"of {known['held_out']:,} pictures of {known['of']} it tells {known['accuracy']:.1%} right; "
        "of photographs of another kind nobody knows"
    )
    for precision, share, least in known["decides"]:
        here = sum(each.confidence >= least for each in answers) / max(1, len(answers))
        told = (
            f"it decides {share:.0%} of those, and {here:.0%} of these"
            if share
            else "it decides none"
        )
        yield f"  to be right {precision:.0%} of the time {told}" + (
            f" (confidence {least:.2f} or more)" if share else ""
        )
    yield f"{len(turned):,} of {len(answers):,} photographs seem turned, with a confidence of {knobs.sure:g} or more"
    if unread:
        yield f"{len(unread):,} cannot be read, and are left:"
        yield from (f"  {entry.printable(each)}" for each in unread)
    yield f"{knobs.out / 'upright.csv'}, {knobs.out / 'turned.png'}"


def _copies(data: Any, turned: list[Answer], folder: Path) -> Iterator[str]:
    """Copies of what seems turned, under the same paths; what stands there already stays."""
    written, there, left = 0, 0, []
    for each in turned:
        try:
            fresh = exif.upright_copy(Path(data.root) / each.path, folder / each.path, each.degrees)
            written, there = written + fresh, there + (not fresh)
        except (OSError, ValueError) as error:
            left.append(f"  {entry.printable(each.path)}: {one_line(error)}")
    yield f"{written:,} copies that open upright in {folder}"
    if there:
        yield f"{there:,} had a file of their name there, which stays"
    if left:
        yield f"{len(left):,} could not be copied:"
        yield from left
