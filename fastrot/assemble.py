"""The one module that knows every plug-in: from config types to parts.

A new method, backbone or data format is a new file, one line in a union of config.py, and one line here.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrot import config
from fastrot.arrays import Numbers
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.named import named
from fastrot.backbones.nin import nin
from fastrot.backbones.staged import Staged
from fastrot.config import Config, Placement, UsageError
from fastrot.core import Data, DataInfo, Method, View
from fastrot.data import crops
from fastrot.data.beton.read import Beton
from fastrot.data.folder import Folder
from fastrot.data.loader import Loader
from fastrot.data.pack.read import Pack
from fastrot.data.synthetic import IMAGES, Synthetic
from fastrot.data.tars.read import Tars
from fastrot.entry import cores
from fastrot.methods.decoupling import Decoupling
from fastrot.methods.jigsaw import Jigsaw
from fastrot.methods.pirl import Pirl
from fastrot.methods.probe import Probe
from fastrot.methods.rotnet import RotNet
from fastrot.methods.supervised import Supervised

BACKBONES = {config.AlexNet: alexnet, config.Nin: nin, config.Named: named}
METHODS = {
    config.RotNet: RotNet,
    config.Decoupling: Decoupling,
    config.Supervised: Supervised,
    config.Pirl: Pirl,
    config.Jigsaw: Jigsaw,
    config.Probe: Probe,
}


def backbone(cfg: config.Backbone, size: int) -> Staged:
    """The network of named stages, for square crops of `size` pixels."""
    return BACKBONES[type(cfg)](cfg, size)


def method(cfg: Config, info: DataInfo) -> Method:
    """The task and the network that it trains."""
    return METHODS[type(cfg.method)](cfg.method, backbone(cfg.backbone, info.size), info)


# ---- data ----


class Format(NamedTuple):
    """A form of prepared pictures."""

    holds: Callable[[Path], bool]  # whether a path looks like it, by itself
    open: Callable[[Path, Placement, bool], Data]  # placement and labelled as in open_data


def data_of(cfg: Config) -> tuple[Data, Data | None]:
    """A run's --data, and its --val: where it is of another format, --loader is not for it."""
    labelled = METHODS[type(cfg.method)].wants_labels
    how: dict[str, Any] = {"placement": cfg.placement, "labelled": labelled}
    data = open_data(cfg.data or "", cfg.loader, **how)
    if cfg.val is None:
        return data, None
    kinds = {(each.suffix, format_of(each)) for each in map(Path, (cfg.data or "", cfg.val))}
    return data, open_data(cfg.val, cfg.loader if len(kinds) == 1 else "auto", knob="--val", **how)


def open_data(
    path: str | Path,
    loader: str = "auto",
    *,
    knob: str = "--data",
    placement: Placement = "auto",
    labelled: bool = False,
) -> Data:
    """Open prepared pictures: what one of FORMATS reads, or `synthetic[:IMAGES]`.

    The format picks the reader; `loader` overrides. `placement`: of a pack, see data/pack/read.py. `labelled`:
    of a folder, see data/folder.py. Raises UsageError, naming `knob`, for what is no known format.
    """
    named, path = f"{knob} {path}", Path(os.path.expanduser(path))
    if loader == "dali":
        opened = open_data(path, knob=knob, placement=placement, labelled=labelled)
        return _through_dali(opened, named)
    if str(path).split(":")[0] == "synthetic":
        return _synthetic(str(path), knob)
    if not path.exists():
        raise UsageError(f"{named} does not exist: {CHOICES}")
    kind = format_of(path) if loader == "auto" else loader
    if placement != "auto" and knob == "--data" and kind != "pack":
        raise UsageError(f"--placement {placement} is for a .pack, not for {named}: leave it out")
    if kind in ("beton", "ffcv") and path.is_file():  # whatever its suffix
        return Beton(path) if kind == "beton" else _referee("ffcv", "beton.ffcv").FfcvBeton(path)
    if kind in FORMATS and FORMATS[kind].holds(path):
        return FORMATS[kind].open(path, placement, labelled)
    if path.suffix in ARCHIVES:
        way = f"fastrot convert --source {ARCHIVES[path.suffix]} --root {path}"
        raise UsageError(f"{named} is an archive: prepare its pictures first, by {way}")
    wanted = "a known format" if loader == "auto" else f"for --loader {loader}"
    raise UsageError(f"{named} is not {wanted}: {CHOICES}")


def _synthetic(name: str, knob: str) -> Data:
    count = name.partition(":")[2] or str(IMAGES)
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"{knob} got {name!r}: it wants synthetic, or synthetic:IMAGES")
    return Synthetic(int(count))


def _folder(path: Path, _: Placement, labelled: bool) -> Data:
    if next(path.glob("*.tar"), None) and not any(each.is_dir() for each in path.iterdir()):
        way = f"fastrot shards --source webdataset --root {path} writes shards that have one"
        raise UsageError(f"{path} holds tars without an index of ours: {way}")
    return Folder(path, labelled=labelled)


def _holds_beton(path: Path) -> bool:
    """A file, or the folder that fastrot convert --keep-parts made, or is making."""
    if not path.is_dir():
        return path.suffix == ".beton"
    return path.name.endswith((".beton.set", ".beton.parts")) or (path / "set.json").exists()


def _holds_pack(folder: Path) -> bool:
    parts = "meta.json", "first.npy"  # many a folder of pictures has a meta.json of its own
    complete = all((folder / part).exists() for part in parts)
    return folder.is_dir() and (folder.suffix == ".pack" or complete)


CHOICES = (
    "name a .beton file (fastrot convert writes one), a .pack (fastrot pack), a folder of shards "
    "(fastrot shards), an image folder, or synthetic"
)
ARCHIVES = {".tar": "tar", ".zip": "zip", ".parquet": "parquet"}  # sources, by their suffixes
FORMATS = {  # by the word of --loader, in the order in which a path is tried
    "beton": Format(_holds_beton, lambda path, *_: Beton(path)),
    "pack": Format(_holds_pack, lambda path, placement, _: Pack(path, placement)),
    "tars": Format(lambda path: (path / "shards.json").exists(), lambda path, *_: Tars(path)),
    "folder": Format(Path.is_dir, _folder),
}


def format_of(path: Path) -> str | None:
    """Which of FORMATS a path looks like, by itself."""
    return next((kind for kind, each in FORMATS.items() if each.holds(path)), None)


def _through_dali(data: Data, named: str) -> Data:
    """`data` decoded by DALI; `named`: its knob and name."""
    raw = isinstance(data, Beton) and data.contents.raw.all()
    if data.format not in ("tars", "folder", "beton") or raw:
        way = "leave --loader out, or name tar shards, a folder or a .beton of JPEGs"
        raise UsageError(f"--loader dali decodes JPEGs, and {named} holds none: {way}")
    return _referee("dali", "tars.dali").ThroughDali(data)


def _referee(loader: str, module: str) -> Any:
    """The module that reads by another library; refused where that is not installed, or lacks its system libraries."""
    try:
        return importlib.import_module(f"fastrot.data.{module}")
    except ImportError as error:
        told = f"--loader {loader} cannot import {loader.upper()} ({error})"
        way = f"run  make {loader}  to install it, or choose another --loader"
        raise UsageError(f"{told}: {way}") from None


def open_loader(
    data: Data | str | Path,
    view: View,
    *,
    batch: int,
    workers: int | None = None,
    loader: str = "auto",
    **how: Any,
) -> Loader:
    """Open any data in one line: for training, evaluations, benchmarks and notebooks alike.

    batch    pictures per process
    workers  threads or processes that decode; None: the cores this process may use
    how      seed, rank, world, device, enlarge, on_bad_record: see Loader
    """
    if isinstance(data, (str, Path)):
        data = open_data(data, loader)
    return Loader(data, view, batch=batch, workers=cores() if workers is None else workers, **how)


def training_view(cfg: Config, rows: Path | Numbers | None = None) -> View:
    kind, own = METHODS[type(cfg.method)], cfg.method
    how: dict[str, Any] = {"owned": kind.owned(own), "blocks": config.blocks(cfg)}
    return View(crops=kind.crops(own), rows=rows, asked=own.crop.size, **how)


def evaluation_view(cfg: Config, rows: Path | Numbers | None = None) -> View:
    return View(crops=(crops.plain(cfg.method.crop),), shuffled=False, rows=rows)


def check_labels(who: str, data: Data, val: Data, way_out: str = "") -> None:
    """Refuse pictures without a label, and those of --val that have other classes; `who` learns from them."""
    for knob, each in (("--data", data), ("--val", val)):
        if missing := int((each.labels < 0).sum()):
            few = f"{missing} of {each.rows} pictures of {knob} have none"
            way = f"prepare them with --label-from folder (of VOC and COCO: --categories all){way_out}"
            raise UsageError(f"{who} learns from labels, but {few}: {way}")
    if val.classes != data.classes:
        told, way = "the same names in another order", "prepare both from the same list"
        if only := sorted({*val.classes} ^ {*data.classes}):
            told = f"not in both: {', '.join(only[:3])}{', ...' if only[3:] else ''}"
            way = "both need the same class folders, with a picture in each"
        told = f"({len(val.classes)} and {len(data.classes)}; {told})"
        raise UsageError(f"--val has other classes than --data {told}: {way}")


# ---- what is trained ----


def data_info(
    cfg: Config, loader: Loader, val_loader: Loader | None, device: torch.device, dtype: torch.dtype
) -> DataInfo:
    """What the method may know, from the training loader. Refuses data that the method cannot learn from."""
    data = loader.data
    val = data if val_loader is None else val_loader.data
    if METHODS[type(cfg.method)].wants_labels:
        check_labels(cfg.preset, data, val, ", or choose rotnet-alexnet")
    return DataInfo(
        images=loader.images,
        rows=loader.rows,
        data_rows=data.rows,
        data_fingerprint=data.fingerprint,
        classes=len(data.classes) or int(data.labels.max()) + 1,
        mean=cfg.mean,
        std=cfg.std,
        size=cfg.method.crop.size,
        seed=cfg.seed,
        device=device,
        dtype=dtype,
        fingerprint=loader.fingerprint,
    )
