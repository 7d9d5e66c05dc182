"""Pictures whose classes are known, with what the stages of a trained network say of them: what searches ask about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot import assemble, dist, entry, paths
from fastrot.config import UsageError
from fastrot.core import Data
from fastrot.disk import replace_bytes
from fastrot.evals.features import features
from fastrot.evals.knobs import Knn, OfStages, Retrieval
from fastrot.evals.trained import Trunk, load
from fastrot.training import checkpoint
from fastrot.training.device import choose_device


class Pictures(NamedTuple):
    """Pictures in some order, which the rows of all arrays have."""

    data: Data
    name: str  # of the data, as it was given
    rows: Int64[np.ndarray, " n"]  # of the data
    labels: Int64[Tensor, " n"]
    features: dict[str, Float[Tensor, "n d"]]  # by stage, each of unit length


class Search(NamedTuple):
    """Queries, and among what each is searched."""

    run: str
    trunk: Trunk
    queries: Pictures
    gallery: Pictures
    device: torch.device
    same: bool  # queries and gallery are the same pictures: none is to find itself


def searched(
    run: str, knobs: Knn | Retrieval, ask: Callable[[Search], dict[str, Any] | None]
) -> int:
    """Ask of --val among --data; rank 0 gets numbers by stage, and writes them where --json says. Called on all ranks."""
    device = choose_device(knobs.device, dist.place())
    trunk = load(run, device)
    gallery = _named(run, trunk, knobs.data, "data", knobs)
    same = knobs.val is None and knobs.data is not None
    queries = gallery if same else _named(run, trunk, knobs.val, "val", knobs)
    assemble.check_labels(type(knobs).__name__.lower(), gallery[0], queries[0])
    with dist.joined(device, "give the same command again"):
        mine = _seen(trunk, gallery, knobs, device)
        theirs = mine if same else _seen(trunk, queries, knobs, device)
        keep(ask(Search(run, trunk, theirs, mine, device, same)), knobs.json)
    return 0


def keep(found: dict[str, Any] | None, file: Path | None) -> None:
    """Write numbers where they are asked for, by rank 0."""
    if file is not None and found is not None and dist.place().rank == 0:
        replace_bytes(file, json.dumps(found, indent=1).encode())
        print(f"written to {file}")


def looked_at(run: str, knobs: OfStages, device: torch.device) -> tuple[Trunk, Pictures]:
    """The trunk, and all pictures of --data. Called on all ranks."""
    trunk = load(run, device)
    return trunk, _seen(trunk, _named(run, trunk, knobs.data, "data", knobs), knobs, device)


Named = tuple[Data, str, Path | None]  # with the file of rows that are meant; None: all


def _named(run: str, trunk: Trunk, given: str | None, knob: str, knobs: OfStages) -> Named:
    """Data that was given; else the run's own, and of it those rows that it learnt from, or was judged on."""
    if given is not None:
        return assemble.open_data(given, knobs.loader, knob=f"--{knob}"), given, None
    folder, cfg = checkpoint.of_run(run).parent.parent, trunk.config
    typed = cfg.val if knob == "val" and cfg.val else cfg.data
    name = paths.seen_from_here(str(typed), paths.typed_in(folder), f"--{knob}")
    rows = folder / f"rows-{'val' if knob == 'val' else 'train'}.npy"
    if knob == "val" and cfg.val is None and not rows.exists():
        raise UsageError(f"{run} held no pictures out: name some, by --val")
    return (
        assemble.open_data(name, knobs.loader, knob=f"--{knob}"),
        name,
        rows if rows.exists() else None,
    )


def _seen(trunk: Trunk, named: Named, knobs: OfStages, device: torch.device) -> Pictures:
    data, name, file = named
    here, cfg = dist.place(), trunk.config
    workers = entry.share_of_cores(here.local_world) if knobs.workers is None else knobs.workers
    how: dict[str, Any] = {"rank": here.rank, "world": here.world, "device": device}
    how |= {"batch": knobs.batch or cfg.batch, "enlarge": cfg.enlarge, "workers": workers}
    view = assemble.evaluation_view(cfg, file)
    loader = assemble.open_loader(data, view, **how, on_bad_record=knobs.on_bad_record)
    stages = trunk.stages if knobs.stages == ("all",) else knobs.stages
    found = features(trunk, loader, stages, knobs.pool)
    for each in found.values():
        torch.nn.functional.normalize(each, out=each)
    rows = np.arange(data.rows) if loader.rows is None else loader.rows
    return Pictures(data, name, rows, torch.from_numpy(data.labels[rows]), found)
