"""Checkpoints: written whole or not at all, read without unpickling code, refused where they are damaged."""

import contextlib
import functools
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from fastrot import dist
from fastrot.config import UsageError
from fastrot.disk import write_atomically

LAST, PREVIOUS = "last.pt", "previous.pt"  # the latest of a run, and the one before it
VERSION = 3  # of the file's keys
RENAMED = {"judged": "validated_step", "story": "progress", "facts": "run_identity"}  # version 2's


def save(path: Path, state: dict[str, Any]) -> None:
    """Write plain values and tensors; an older file of that name stands until the new one is safe on disk.

    Beside a new last.pt the older one stays as previous.pt, where the file system has links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed as it wrote
        left.unlink(missing_ok=True)
    write_atomically(path, functools.partial(_write, path, {"version": VERSION, **state}))


def _write(path: Path, state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save says of a full disk only that a write failed: what the system said is raised instead."""
    said: list[OSError] = []

    def write(data: Any) -> int:
        try:
            return file.write(data)
        except OSError as error:
            said.append(error)
            raise

    try:
        torch.save(state, cast(Any, SimpleNamespace(write=write, flush=file.flush)))
    except Exception as error:
        raise (said[0] if said else error) from None
    if path.name == LAST and path.exists():
        _link(path, path.with_name(PREVIOUS))


def _link(path: Path, other: Path) -> None:
    """A second name for a file; never without one of the two."""
    with contextlib.suppress(OSError):
        link = other.with_name(f".{other.name}.link.tmp")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, other)


def of_run(source: str | Path) -> Path:
    """The last checkpoint of a run's folder, or of its checkpoints/; a file is itself."""
    path = Path(os.path.expanduser(source))
    inside = path / "checkpoints"
    if not path.is_dir():
        return path
    return (path if (path / LAST).exists() and not inside.exists() else inside) / LAST


def folds_in(folder: Path) -> list[Path]:
    """The runs of --folds that a folder holds, by their names."""
    return sorted(path.parent for path in folder.glob("fold[0-9]*/config.yaml"))


def trunk_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a net's weights that belong to its trunk, under the trunk's own names."""
    return {k.removeprefix("trunk."): v for k, v in weights.items() if k.startswith("trunk.")}


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint into host memory, each entry checked against its CRC first."""
    if not path.exists():
        folder = path.parent.parent
        if path.name == LAST and folder.is_dir() and (folds := folds_in(folder)):
            raise UsageError(
                f"{folder} holds a run for each of its --folds: name one, as {folds[0]}"
            )
        told = f"there is no checkpoint {path}"
        raise UsageError(f"{told}: name a run's folder, such as runs/demo, or a .pt file of one")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise  # says nothing of the file's bytes
    except Exception as error:  # damaged bytes make zipfile and the unpickler raise anything
        raise UsageError(
            f"{path} is cut short, changed or no checkpoint ({type(error).__name__})"
        ) from error
    found = state.get("version") if isinstance(state, dict) else None
    if found is None:
        way = "name a run's folder, such as runs/demo, or a .pt file of its checkpoints/"
        raise UsageError(f"{path} is no checkpoint of a fastrot run: {way}")
    if found not in (VERSION - 1, VERSION):
        raise UsageError(
            f"{path} has version {found!r}, not {VERSION - 1} or {VERSION}: use the fastrot that wrote it"
        )
    return {str(RENAMED.get(k, k)): v for k, v in state.items()} | {"version": VERSION}


def random_state(device: torch.device) -> list[dict[str, Tensor]]:
    """Generator states of all ranks, in order. Called on all ranks."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    return dist.everyones(mine)


def set_random_state(states: list[dict[str, Tensor]], device: torch.device) -> None:
    """What `random_state` gave, for this rank; with another number of ranks there is nothing to restore."""
    if len(states) != dist.world():
        return
    mine = states[dist.rank()]
    torch.set_rng_state(mine["cpu"])
    if device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], device)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite. Waits for the device."""
    sums: dict[torch.device, list[Tensor]] = {}  # a bank that was gathered lies in host memory
    for each in tensors:
        if each.is_floating_point() and each.numel():
            sums.setdefault(each.device, []).append(each.detach().sum(dtype=torch.float32))
    return all(bool(torch.isfinite(torch.stack(each)).all()) for each in sums.values())


def load_weights(net: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Put weights into a net of the same keys and shapes, or say in one sentence what does not fit."""
    mine = net.state_dict()
    missing, spare = sorted(mine.keys() - weights.keys()), sorted(weights.keys() - mine.keys())
    if missing or spare:
        raise UsageError(
            f"{name} has other layers than this net (missing {missing[:2]}, unknown {spare[:2]}): "
            "use the --backbone and method it was trained with"
        )
    for key, own in mine.items():
        if weights[key].shape != own.shape:
            raise UsageError(
                f"{name} does not fit: {key} is {list(weights[key].shape)}, this net's is {list(own.shape)}; "
                "use the --image-size and --backbone.width it was trained with"
            )
    net.load_state_dict(weights)
