"""How many pictures of each class are classified right, by a supervised run or each head of a probe: `evaluate.py RUN classes`."""

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from fastrot import assemble, dist
from fastrot.config import RunError, UsageError
from fastrot.core import Method
from fastrot.data.loader import Loader
from fastrot.evals.asked import given, keep, loader_of, own_pictures, say, writable
from fastrot.evals.features import exact, followed
from fastrot.evals.knobs import Classes
from fastrot.evals.trained import net_of, trained_method
from fastrot.training.device import choose_device


def evaluate(run: str, knobs: Classes) -> int:
    """Print the shares, a class a row and a head a column."""
    net = net_of(run)
    if not assemble.METHODS[type(net.cfg.method)].wants_labels:
        told = f"{run} has learnt no classes ({type(net.cfg.method).__name__})"
        raise UsageError(f"{told}: name a supervised run or a probe")
    device = choose_device(knobs.device, dist.place())
    if knobs.data is None:
        pictures = own_pictures(run, net.cfg, "val", knobs.loader, "--data")
    else:
        pictures = given(knobs.data, knobs)
    names = pictures.data.classes
    learnt = net.identity.get("class_names", [*names])  # which older checkpoints do not tell
    if [*names] != learnt or len(names) != net.identity["classes"]:
        told = f"{pictures.name} has other classes than {run} has learnt"
        way = "prepare both from the same class folders"
        raise UsageError(f"--data: {told} ({len(names)} and {net.identity['classes']}): {way}")
    if knobs.json is not None:
        writable(knobs.json.parent, "--json")
    with dist.joined(device, "give the same command again"):
        method = trained_method(run, device)
        loader = loader_of(pictures.data, pictures.rows, net.cfg, knobs, device)
        labels = loader.data.labels if loader.rows is None else loader.data.labels[loader.rows]
        if without := int((labels < 0).sum()):
            told = f"{without:,} of {len(labels):,} pictures of {pictures.name} have no label"
            raise UsageError(f"{told}: prepare them with --label-from folder")
        right, count = _counted(method, loader, len(names))
    if not count.any():
        raise RunError(f"no picture of {pictures.name} can be read: prepare it anew")
    if unread := len(labels) - int(count.sum()):
        say(f"{unread:,} pictures of {pictures.name} cannot be read, and are left out")
    some = [(name, n) for n, name in enumerate(names) if count[n]]
    found = {
        head: {
            "top1": int(each.sum()) / int(count.sum()),
            "classes": {name: int(each[n]) / int(count[n]) for name, n in some},
        }
        for head, each in zip(method.heads, right, strict=True)
    }
    say(f"{run}: {int(count.sum()):,} pictures of {pictures.name}", _lines(found))
    keep({"run": run, "stages": found}, knobs.json)
    return 0


@torch.no_grad()
def _counted(
    method: Method, loader: Loader, classes: int
) -> tuple[Int64[Tensor, "h classes"], Int64[Tensor, " classes"]]:
    """Of each class, how many pictures each head classifies right, and how many there are; over all ranks."""
    found = torch.zeros(len(method.heads) + 1, classes, dtype=torch.int64)
    for batch in followed(loader):
        with exact():
            outputs = method.net(method.views(batch))
        truth = batch.label.cpu()
        found[-1] += truth.bincount(minlength=classes)
        for n, logits in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            right = logits.argmax(dim=1).cpu() == truth
            found[n] += truth[right].bincount(minlength=classes)
    found = dist.sum_over_ranks(found)
    return found[:-1], found[-1]


def _lines(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A row for each class, with a column for each head, and one for all."""
    first = next(iter(found.values()))
    rows = {name: [each["classes"][name] for each in found.values()] for name in first["classes"]}
    wide = max(7, *map(len, found))
    lines = {name: " ".join(f"{each:>{wide}.2%}" for each in row) for name, row in rows.items()}
    heads = {"class": " ".join(f"{head:>{wide}}" for head in found)}
    every = {"all classes": " ".join(f"{each['top1']:>{wide}.2%}" for each in found.values())}
    return heads | lines | every
