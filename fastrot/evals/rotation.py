"""What nets say of pictures' rotations: `evaluate.py RUN rotation`, and a few pictures' probabilities for a run's page."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor
from torch.utils._pytree import tree_map

from fastrot import assemble, dist, entry, paths
from fastrot.config import RunError, UsageError
from fastrot.core import Batch, Data, Method
from fastrot.data.keys import fold_of
from fastrot.data.loader import Loader
from fastrot.evals.asked import loader_of
from fastrot.evals.features import exact, followed
from fastrot.evals.knobs import Rotation
from fastrot.evals.trained import Trained, nets_of, trained_method
from fastrot.methods import rotation_table
from fastrot.methods.rotation_table import ROTATIONS
from fastrot.training.device import choose_device

Fold = Int8[np.ndarray, " rows"]  # whose net never saw the row; -1: there is one net for all
Answers = Float32[np.ndarray, "rows 4 4"]  # probabilities: row, rotation given, net's rotation
Right = UInt8[np.ndarray, "rows 4"]  # 1: the likeliest rotation is the one that was given


def evaluate(run: str, knobs: Rotation) -> int:
    """Print how often the nets of a run are right, and write the table where one is asked for."""
    if knobs.table is not None:
        rotation_table.check_name(knobs.table, "--table")
    nets = nets_of(run)
    for net in nets:
        if not assemble.METHODS[type(net.cfg.method)].predicts_rotation(net.cfg.method):
            told = f"{net.source} predicts no rotations ({type(net.cfg.method).__name__})"
            raise UsageError(f"{told}: name a run of rotnet or decoupling")
    device = choose_device(knobs.device, dist.place())
    told = str(nets[0].cfg.data), nets[0].identity.get("folder")
    name = knobs.data or paths.seen_from_here(*told, "--data")
    data = assemble.open_data(name, knobs.loader)
    fold = _folds(nets, data, name)
    with dist.joined(device, "give the same command again"):
        answers, right = _answers(nets, knobs, data, fold, device)
    if dist.place().rank:
        return 0
    read = answers.any(axis=(1, 2))  # a picture that cannot be read has zeros
    if not read.any():
        raise RunError(f"no picture of {name} can be read: prepare it anew")
    print(f"{run}: {data.rows:,} pictures of {name}, each rotated four ways")
    shares = _shares_right(right[read], fold[read], nets)
    print(*shares, *_cautions(nets, data, data.rows - len(right[read])), sep="\n")
    if knobs.table is not None:
        found = rotation_table.RotationTable(answers, fold, data.fingerprint)
        rotation_table.write(knobs.table, found)
        print(f"written to {knobs.table}")
    return 0


def _folds(nets: list[Trained], data: Data, name: str) -> Fold:
    if len(nets) == 1:
        return np.full(data.rows, -1, np.int8)
    for net in nets:
        if net.identity["data_fingerprint"] != data.fingerprint:
            told = f"--data {name} holds other pictures than {net.source} was trained on"
            raise UsageError(f"{told}: give the same --data, or name {net.source} alone")
    return fold_of(data.keys, len(nets))


def _answers(
    nets: list[Trained], knobs: Rotation, data: Data, fold: Fold, device: torch.device
) -> tuple[Answers, Right]:
    """What the nets say of all rows, each of those of its fold; on every rank."""
    answers = np.zeros((data.rows, ROTATIONS, ROTATIONS), np.float32)
    right = np.zeros((data.rows, ROTATIONS), np.uint8)
    for number, net in enumerate(nets):
        rows = np.flatnonzero(fold == number) if len(nets) > 1 else None
        loader = loader_of(data, rows, net.cfg, knobs, device)
        _ask(trained_method(net.source, device), loader, answers, right)
    # the shares of ranks do not overlap: each sum is exact
    whole = [dist.sum_over_ranks(torch.from_numpy(mine)).numpy() for mine in (answers, right)]
    return whole[0], whole[1]


@torch.no_grad()
def _ask(method: Method, loader: Loader, answers: Answers, right: Right) -> None:
    """Write what a net says of this rank's share of a view in data order into the rows of `answers` and `right`.

    Convolutions are in full float32, by algorithms that give the same bits each time.
    """
    for batch in followed(loader):
        with exact():
            logits = rotation_logits(method, _filled(batch, loader.batch))
        assert logits is not None
        logits, rows = logits[: len(batch.index)], batch.index.cpu().numpy()
        likeliest = logits.argmax(dim=2)
        answers[rows] = logits.softmax(dim=2).cpu().numpy()
        right[rows] = (likeliest == torch.arange(ROTATIONS, device=logits.device)).cpu().numpy()


def _filled(batch: Batch, size: int) -> Batch:
    """A batch of `size`, its last picture repeated: libraries may choose by shape how they add up."""
    places = torch.arange(size, device=batch.index.device).clamp(max=len(batch.index) - 1)
    crops = tuple(crop[places.to(crop.device)] for crop in batch.crops)
    return Batch(crops, batch.index[places], batch.label[places], batch.epoch_step)


def rotation_guesses(method: Method, batch: Batch) -> Float[Tensor, "b 4 4"] | None:
    """Probabilities [picture, rotation it was given, rotation the net says], on the CPU in float32.

    None for a method that does not guess rotations. The net is left in the mode that it was in.
    """
    logits = rotation_logits(method, batch)
    return None if logits is None else logits.softmax(dim=2).cpu()


@torch.no_grad()
def rotation_logits(method: Method, batch: Batch) -> Float[Tensor, "b 4 4"] | None:
    """What the net says, of each picture in each rotation; see `rotation_guesses`."""
    training = method.net.training
    method.net.eval()
    outputs = method.net(tree_map(Tensor.float, method.views(batch)))
    method.net.train(training)
    logits = method.rotation_logits(outputs)
    return None if logits is None else logits.float().unflatten(0, (-1, ROTATIONS))


# ---- what is printed ----


def _shares_right(right: Right, fold: Fold, nets: list[Trained]) -> list[str]:
    """A table of them, of all pictures that could be read."""
    rows = [("all rotations", f"{right.mean():.2%}")]
    for rotation, share in enumerate(right.mean(axis=0)):
        rows.append((f"rotated {90 * rotation} degrees" if rotation else "upright", f"{share:.2%}"))
    for number, net in enumerate(nets if len(nets) > 1 else ()):
        mine = right[fold == number]
        share = f"{mine.mean():.2%}" if len(mine) else "nothing"
        rows.append((f"fold {number}", f"{share} of {len(mine):,} pictures, by {net.source}"))
    return entry.table(rows)


def _cautions(nets: list[Trained], data: Data, unread: int) -> list[str]:
    """What to know before these numbers are used."""
    lines = []
    if unread:
        words = "their probabilities are 0, so that PU weights leave them as they are"
        lines.append(f"{unread:,} of {data.rows:,} pictures cannot be read: {words}")
    begun = next((net.cfg.start_from for net in nets if net.cfg.start_from), None)
    if len(nets) > 1 and begun:
        words = "if it was trained on these pictures, no net is one that never saw them"
        lines.append(f"these nets began with the weights of {begun}: {words}")
    if len(nets) == 1 and nets[0].identity.get("data_fingerprint") in (None, data.fingerprint):
        words = "for PU weights train with --folds 2"
        lines.append(f"of pictures that it was trained on the net is too sure: {words}")
    return lines
