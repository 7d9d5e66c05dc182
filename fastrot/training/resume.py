"""What a run goes on from: its last checkpoint, and what must agree with it."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from fastrot import assemble, config, dist, machine, paths
from fastrot.backbones.staged import HALVES, LAST
from fastrot.config import Config, UsageError
from fastrot.core import DataInfo, Method
from fastrot.data.loader import Loader
from fastrot.methods.probe import ProbeNet
from fastrot.training import checkpoint
from fastrot.training.foreign import exported, original_weights, read_exported


def last_checkpoint(run: Path) -> dict[str, Any] | None:
    """The latest checkpoint; refused where it is damaged, with the name of the one before it."""
    folder = run / "checkpoints"
    last, previous = folder / checkpoint.LAST, folder / checkpoint.PREVIOUS
    if not last.exists():
        last = previous  # somebody took a damaged one away
    if not last.exists():
        return None
    try:
        return checkpoint.load(last)
    except UsageError as error:
        kept = sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem[5:]))
        older = [path for path in (*kept, previous) if path.exists() and path != last]
        way = f"move {older[-1]} in its place" if older else "remove it to begin anew"
        raise UsageError(f"{error}; {way}, or use --out NEW") from error


def check_settings(saved: dict[str, Any] | None, cfg: Config, run: Path) -> None:
    """Refuse knobs that would make it another run, before any part is built; and another folder of another rank."""
    places = dist.everyones(saved and (saved["step"], saved["validated_step"]))
    if any(place != places[0] for place in places):
        raise UsageError(
            f"--out {run} is not the same folder for all ranks: choose one that all machines share"
        )
    if saved is None:
        return
    leave = {"batch"}  # the global batch is what counts
    leave |= {"epochs", "budget", "schedule.steps"}  # see training/budget.py: what they come to
    if not cfg.graph:
        leave.add("graph")  # where a step cannot be recorded, the run goes on all the same
    if saved["config"]["statistics"] == "data":
        leave |= {"mean", "std"}  # will come again
    found = config.differences(saved["config"], config.to_plain(cfg))
    folder = saved["run_identity"].get("folder")
    for name in {"start_from", "method.pu_table"} & found.keys():
        if all(found[name]) and paths.same_file(found[name][0], folder, found[name][1]):
            leave.add(name)
    found = {config.knob(name): both for name, both in found.items() if name not in leave}
    before, now = saved["run_identity"]["global_batch"], cfg.batch * dist.world()
    if before != now:
        found["batch x processes"] = (before, now)
    if found:
        each = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in found.items())
        raise UsageError(
            f"{run} holds a run of other settings ({each}): use --out NEW for a new run, "
            f"--out NEW --start-from {run} to begin one with its weights, or the settings it had"
        )


def check_pictures(before: dict[str, Any], cfg: Config, loader: Loader, run: Path) -> None:
    """Refuse other pictures or another order of them, before a net or a bank is built for them."""
    if before["fingerprint"] != loader.fingerprint:
        raise UsageError(
            f"{run} was trained on other pictures ({before['data']}, {before['images']} of them; now "
            f"{cfg.data}, {loader.images}): give the same --data, or --out NEW"
        )


def check_method(before: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """Refuse what the method itself says that a resumed run must agree with."""
    if before["method"] != now["method"]:
        raise UsageError(
            f"{run} disagrees with what its method needs (was {before['method']}, now {now['method']}): "
            "use --out NEW"
        )


def with_trunk(cfg: Config) -> Config:
    """Where the method stands on another run's trunk: with that run's backbone, size of image, mean and std."""
    source = assemble.METHODS[type(cfg.method)].trunk(cfg)
    if source is None:
        return cfg
    # a run that goes on holds all of it, wherever the other run may be by now
    own = checkpoint.of_run(run_folder(cfg))
    known = (checkpoint.load(own) if own.exists() else _begun_with(source)).get("config")
    if known is None:
        return cfg
    theirs = config.from_plain(known)
    own = {name: getattr(theirs, name) for name in ("backbone", "image_size", "mean", "std")}
    crop = config.with_size(cfg.method.crop, theirs.method.crop.size)
    method = dataclasses.replace(cfg.method, crop=crop)
    return dataclasses.replace(cfg, method=method, statistics="preset", **own)


def run_folder(cfg: Config) -> Path:
    return Path(cfg.out or f"runs/{cfg.preset}")


def other_machine(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line where something differs that changes bits but not what is computed."""
    before = {"decoder": now["decoder"], **before}  # older runs did not tell
    names = ("ranks", "threads", "device", "torch", "data", "decoder")
    other = [f"{n} were {before[n]}, now {now[n]}" for n in names if before[n] != now[n]]
    return [f"bits may differ from an unbroken run: {'; '.join(other)}"] if other else []


def start_from(net: torch.nn.Module, source: str) -> None:
    """The weights of another run or checkpoint: all of them, or where its head is another task's its trunk's."""
    begun: Any = _begun_with(source)
    mine, theirs = net.state_dict(), begun["net"]
    if mine.keys() == theirs.keys() and all(mine[k].shape == theirs[k].shape for k in mine):
        net.load_state_dict(theirs)
    else:
        trunk, weights = net.get_submodule("trunk"), checkpoint.trunk_weights(theirs)
        linears = {k: v for k, v in trunk.state_dict().items() if k.startswith("fc_block.")}
        if linears and "config" not in begun and not linears.keys() & weights.keys():  # VISSL's
            heads = {*net.heads} if isinstance(net, ProbeNet) and net.frozen else set()
            if heads & {"fc_block", LAST, *HALVES}:
                told = f"--start-from: {source} has no fc_block"
                raise UsageError(f"{told}: leave it and its halves out of --method.stages")
            logging.getLogger("fastrot").warning("%s has no fc_block: it begins anew", source)
            weights |= linears
        checkpoint.load_weights(trunk, weights, source)


def _begun_with(source: str) -> dict[str, Any]:
    """A checkpoint of ours, or what was exported of one; or of the papers' code, whose weights alone are known."""
    path = checkpoint.of_run(source)
    try:
        if (file := exported(source)) is not None:
            return read_exported(file)
        try:
            return checkpoint.load(path)
        except UsageError:
            if (weights := original_weights(path)) is not None:
                return {"net": weights}
            raise
    except UsageError as error:
        raise UsageError(f"--start-from: {error}") from error


def run_identity_of(cfg: Config, loader: Loader, info: DataInfo, method: Method) -> dict[str, Any]:
    """What decides a run's numbers beside its config; goes into checkpoints."""
    data, ranks = loader.data, dist.world()
    return {
        "fingerprint": loader.fingerprint,
        "data_fingerprint": data.fingerprint,
        "images": loader.images,
        "global_batch": cfg.batch * ranks,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "device": machine.device_name(info.device),
        "torch": str(torch.__version__),
        "decoder": data.decoder,
        "data": f"{data.format} {cfg.data}",
        "method": method.resume_contract(),
        "classes": info.classes,
        "class_names": list(data.classes),
        "folder": os.getcwd(),  # to which the config's paths are relative
    }
