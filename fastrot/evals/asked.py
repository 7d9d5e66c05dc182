"""Pictures whose classes are known, with what the stages of a trained network say of them: what searches ask about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot import assemble, dist, entry, paths
from fastrot.arrays import Numbers
from fastrot.config import Config, UsageError
from fastrot.core import Data
from fastrot.data.loader import Loader
from fastrot.disk import replace_bytes
from fastrot.evals.features import features
from fastrot.evals.knobs import Asked, Knn, OfStages, Retrieval
from fastrot.evals.trained import Trunk, load, nets_of
from fastrot.training import checkpoint
from fastrot.training.device import choose_device

T = TypeVar("T")


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

    def told(self) -> str:
        queries, gallery = self.queries, self.gallery
        among = f"{len(gallery.rows):,} of {gallery.name}"
        return f"{self.run}: {len(queries.rows):,} pictures of {queries.name} among {among}"


def searched(
    run: str,
    knobs: Knn | Retrieval,
    check: Callable[[int], None],
    ask: Callable[[Search], dict[str, T]],
) -> tuple[Search, dict[str, T]]:
    """What was asked of --val among --data, with what `ask` found by stage. Called on all ranks, as `ask` is.

    `check` hears among how many pictures is searched, before anything is.
    """
    device = choose_device(knobs.device, dist.place())
    trunk = load(run, device)
    gallery = _named(run, trunk, knobs.data, "data", knobs)
    same = knobs.val is None and knobs.data is not None
    queries = gallery if same else _named(run, trunk, knobs.val, "val", knobs)
    assemble.check_labels(type(knobs).__name__.lower(), gallery.data, queries.data)
    begin(trunk, knobs)
    check(gallery.pictures - same)
    with dist.joined(device, "give the same command again"):
        mine = seen(trunk, gallery, knobs, device)
        theirs = mine if same else seen(trunk, queries, knobs, device)
        search = Search(run, trunk, theirs, mine, device, same)
        return search, ask(search)


def begin(trunk: Trunk, knobs: OfStages) -> None:
    """Refuse what would be refused at the end."""
    for stage in () if knobs.stages == ("all",) else knobs.stages:
        trunk.net.check_stage(stage)
    if knobs.json is not None:
        writable(knobs.json.parent, "--json")


def writable(folder: Path, knob: str) -> None:
    """Make a folder to be written into, or refuse it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{knob}: {folder} cannot be made ({error.strerror}): name another"
        ) from None


def say(title: str, found: dict[str, T] | None = None, words: Callable[[T], str] = str) -> None:
    """Print what was found by stage, by rank 0."""
    if dist.place().rank == 0:
        print(title)
        if found:
            print(*entry.table((stage, words(each)) for stage, each in found.items()), sep="\n")


def keep(found: dict[str, Any], file: Path | None) -> None:
    """Write numbers where they are asked for, by rank 0."""
    if file is not None and dist.place().rank == 0:
        replace_bytes(file, json.dumps(found, indent=1).encode())
        print(f"written to {file}")


class Named(NamedTuple):
    """Data, and the file of rows that are meant; None: all."""

    data: Data
    name: str
    rows: Path | None

    @property
    def pictures(self) -> int:
        return self.data.rows if self.rows is None else len(np.load(self.rows))


def given(name: str, knobs: Asked, knob: str = "--data") -> Named:
    """All of the data that a knob names."""
    return Named(assemble.open_data(name, knobs.loader, knob=knob, labelled=True), name, None)


def own_pictures(
    run: str | Path, cfg: Config, which: str, loader: str = "auto", way_out: str = "--val"
) -> Named:
    """Of a run's data those rows that it learnt from (`train`), or was judged on (`val`).

    Raises UsageError where it held none out, and where the data has changed since.
    """
    folder, held = checkpoint.of_run(run).parent.parent, which == "val"
    separate = held and cfg.val is not None
    typed, knob = (cfg.val, "--val") if separate else (cfg.data, "--data")
    name = paths.seen_from_here(str(typed), paths.typed_in(folder), knob)
    rows: Path | None = folder / f"rows-{which}.npy"
    if separate or not rows.exists():
        rows = None
    if held and not separate and rows is None:
        raise UsageError(f"{run} held no pictures out: name some, by {way_out}")
    labelled = assemble.METHODS[type(cfg.method)].wants_labels
    data = assemble.open_data(name, loader, knob=knob, labelled=labelled)
    before = nets_of(run)[0].identity.get("data_fingerprint")
    if rows is not None and before != data.fingerprint:
        told = f"{name} holds other pictures than {run} was trained on"
        raise UsageError(f"{told}: name pictures, by {way_out}")
    return Named(data, name, rows)


def _named(run: str, trunk: Trunk, name: str | None, knob: str, knobs: OfStages) -> Named:
    if name is None:
        which = "val" if knob == "val" else "train"
        return own_pictures(run, trunk.config, which, knobs.loader, f"--{knob}")
    return given(name, knobs, f"--{knob}")


def loader_of(
    data: Data, rows: Path | Numbers | None, cfg: Config, knobs: Asked, device: torch.device
) -> Loader:
    """This rank's share of rows (see `View.rows`), in data order, as a run of `cfg` is judged."""
    here = dist.place()
    workers = entry.share_of_cores(here.local_world) if knobs.workers is None else knobs.workers
    how: dict[str, Any] = {"rank": here.rank, "world": here.world, "device": device}
    how |= {"batch": knobs.batch or cfg.batch, "enlarge": cfg.enlarge, "workers": workers}
    view = assemble.evaluation_view(cfg, rows)
    return assemble.open_loader(data, view, **how, on_bad_record=knobs.on_bad_record)


def seen(trunk: Trunk, named: Named, knobs: OfStages, device: torch.device) -> Pictures:
    """What could be read of them, with its features. Called on all ranks."""
    data = named.data
    loader = loader_of(data, named.rows, trunk.config, knobs, device)
    stages = trunk.stages if knobs.stages == ("all",) else knobs.stages
    found = features(trunk, loader, stages, knobs.pool)
    read = found.read
    if unread := int((~read).sum()):
        say(f"{unread:,} pictures of {named.name} cannot be read, and are left out")
    rows = (np.arange(data.rows) if loader.rows is None else loader.rows)[read.numpy()]
    unit = {stage: torch.nn.functional.normalize(each[read]) for stage, each in found.items()}
    return Pictures(data, named.name, rows, torch.from_numpy(data.labels[rows]), unit)
