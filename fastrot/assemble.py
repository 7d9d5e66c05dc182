"""The one module that knows every plug-in: from config types to parts.

A new method, backbone or data format is a new file, one line in a union of config.py, and one line here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastrot import config, dist
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.nin import nin
from fastrot.backbones.staged import Staged
from fastrot.config import Config, UsageError
from fastrot.core import Data, DataInfo, Method, View
from fastrot.data import crops
from fastrot.data.loader import Loader
from fastrot.entry import cores
from fastrot.methods.decoupling import Decoupling
from fastrot.methods.rotnet import RotNet
from fastrot.methods.supervised import Supervised

BACKBONES = {config.AlexNet: alexnet, config.Nin: nin}
METHODS = {
    config.RotNet: RotNet,
    config.Decoupling: Decoupling,
    config.Supervised: Supervised,
}


def backbone(cfg: config.Backbone, size: int) -> Staged:
    """The network of named stages, for square crops of `size` pixels."""
    return BACKBONES[type(cfg)](cfg, size)


def method(cfg: Config, info: DataInfo) -> Method:
    """The task and the network that it trains."""
    return METHODS[type(cfg.method)](cfg.method, backbone(cfg.backbone, info.size), info)


# ---- data ----


def open_data(
    path: str | Path,
    loader: str = "auto",
    *,
    knob: str = "--data",
    placement: config.Placement = "auto",
) -> Data:
    """Open prepared pictures: what one of FORMATS reads, or `synthetic[:IMAGES]`.

    The format picks the reader; `loader` overrides. `placement`: of a pack, see data/pack/read.py. Raises
    UsageError, naming `knob`, for what is no known format.
    """
    name, path = str(path), Path(path)
    if name.split(":")[0] == "synthetic":
        return _synthetic(name, loader, knob)
    if not path.exists():
        raise UsageError(
            f"{knob} {path} does not exist: name a .beton file, a .pack, a folder of shards or of pictures, or synthetic"
        )
    if loader == "dali":
        return _through_dali(open_data(path, knob=knob, placement=placement), f"{knob} {path}")
    held = format_of(path)
    kind = held if loader == "auto" else loader
    placed = kind in FORMATS and FORMATS[kind].placed
    if placement != "auto" and knob == "--data" and not placed:
        raise UsageError(
            f"--placement {placement} is for a .pack, and --data {path} is none: leave it out"
        )
    if kind in FORMATS and FORMATS[kind].fits(path):
        return FORMATS[kind].open(path, placement)
    if kind == "ffcv" and path.is_file():
        return _through_ffcv(path)
    if path.suffix in ARCHIVES:
        raise UsageError(
            f"{knob} {path} is an archive, which is read to prepare pictures: name it to dataprep/to_ffcv.py, "
            f"with --source {ARCHIVES[path.suffix]} --root {path}"
        )
    wanted = "beton" if loader == "ffcv" else loader
    wants = FORMATS[wanted].wants if wanted in FORMATS else "a known format"
    raise UsageError(
        f"{knob} {path} is not {wants}: name a .beton file (dataprep/to_ffcv.py writes one), a .pack "
        "(dataprep/to_pack.py), a folder of shards (dataprep/to_dali.py), an image folder, or synthetic"
    )


def _synthetic(name: str, loader: str, knob: str) -> Data:
    from fastrot.data.synthetic import IMAGES, Synthetic

    if loader == "dali":
        raise UsageError(_NOT_FOR_DALI.format(f"{knob} {name}"))
    count = name.partition(":")[2] or str(IMAGES)
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"{knob} got {name!r}: it wants synthetic, or synthetic:IMAGES")
    return Synthetic(int(count))


def _beton(path: Path, _: config.Placement) -> Data:
    from fastrot.data.beton.read import Beton

    return Beton(path)


def _tars(path: Path, _: config.Placement) -> Data:
    from fastrot.data.tars.read import Tars

    return Tars(path)


def _pack(path: Path, placement: config.Placement) -> Data:
    from fastrot.data.pack.read import Pack

    return Pack(path, placement)


def _folder(path: Path, _: config.Placement) -> Data:
    from fastrot.data.folder import Folder

    if next(path.glob("*.tar"), None) and not any(each.is_dir() for each in path.iterdir()):
        raise UsageError(
            f"{path} holds tars without an index of ours: dataprep/to_dali.py --source webdataset --root {path} "
            "writes shards that have one"
        )
    return Folder(path)


def _holds_parts(folder: Path) -> bool:
    """Whether dataprep/to_ffcv.py --keep-parts made, or is making, this folder."""
    named = folder.name.endswith((".beton.set", ".beton.parts"))
    return folder.is_dir() and (named or (folder / "set.json").exists())


def _holds_beton(path: Path) -> bool:
    return _holds_parts(path) or (path.suffix == ".beton" and path.is_file())


def _holds_pack(folder: Path) -> bool:
    """Whether dataprep/to_pack.py made, or is making, this folder."""
    named = folder.suffix == ".pack"  # many a folder of pictures has a meta.json of its own
    return folder.is_dir() and (
        named or all((folder / n).exists() for n in ("meta.json", "first.npy"))
    )


def _holds_shards(folder: Path) -> bool:
    """Whether dataprep/to_dali.py made this folder."""
    return (folder / "shards.json").exists()


ARCHIVES = {".tar": "tar", ".zip": "zip", ".parquet": "parquet"}  # sources, by their suffixes


@dataclass(frozen=True)
class Format:
    """A form of prepared pictures, and what reads it."""

    wants: str  # what --data must name
    holds: Callable[[Path], bool]  # whether a path looks like it, by itself
    fits: Callable[[Path], bool]  # whether a path can be it, where --loader says so
    open: Callable[[Path, config.Placement], Data]
    placed: bool = False  # whether --placement says where it is kept


FORMATS = {  # by the word of --loader, in the order in which a path is tried
    "beton": Format(
        "a .beton file", _holds_beton, lambda path: path.is_file() or _holds_parts(path), _beton
    ),
    "pack": Format("a .pack", _holds_pack, _holds_pack, _pack, placed=True),
    "tars": Format("a folder of tar shards with their index", _holds_shards, _holds_shards, _tars),
    "folder": Format("an image folder", Path.is_dir, Path.is_dir, _folder),
}


def format_of(path: Path) -> str | None:
    """Which of FORMATS a path looks like, by itself."""
    return next((kind for kind, each in FORMATS.items() if each.holds(path)), None)


def _through_ffcv(path: Path) -> Data:
    try:
        from fastrot.data.beton.ffcv import FfcvBeton
    except ImportError as error:  # not installed, or without its system libraries
        raise UsageError(
            f"--loader ffcv cannot import FFCV ({error}): run  make ffcv  to install it, or choose --loader beton"
        ) from None
    return FfcvBeton(path)


_NOT_FOR_DALI = (
    "--loader dali decodes JPEGs, and {} holds none: leave --loader out, or name tar shards, a folder or a "
    ".beton of JPEGs"
)


def _through_dali(data: Any, what: str) -> Data:
    """`data` decoded by DALI; `what`: its knob and name."""
    raw = data.format == "beton" and data.contents.raw.all()
    if data.format not in ("tars", "folder", "beton") or raw:
        raise UsageError(_NOT_FOR_DALI.format(what))
    try:
        from fastrot.data.tars.dali import ThroughDali
    except ImportError as error:  # not installed, or without its system libraries
        raise UsageError(
            f"--loader dali cannot import DALI ({error}): run  make dali  to install it, or choose another --loader"
        ) from None
    return ThroughDali(data)


def open_loader(
    data: Data | str | Path,
    view: View,
    *,
    batch: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    loader: str = "auto",
    enlarge: bool = False,
    on_bad_record: Literal["stop", "skip"] = "stop",
) -> Loader:
    """Open any data in one line: for training, evaluations, benchmarks and notebooks alike.

    batch          pictures per process
    workers        threads or processes that decode; None: the cores this process may use
    enlarge        allow crops larger than most pictures
    on_bad_record  what becomes of a picture that cannot be read: see Loader
    """
    if isinstance(data, (str, Path)):
        data = open_data(data, loader)
    return Loader(
        data,
        view,
        batch=batch,
        seed=seed,
        rank=rank,
        world=world,
        device=device,
        workers=cores() if workers is None else workers,
        enlarge=enlarge,
        on_bad_record=on_bad_record,
    )


def training_view(cfg: Config, rows: Path | None = None) -> View:
    kind = METHODS[type(cfg.method)]
    return View(
        crops=kind.crops(cfg.method),
        rows=rows,
        owned=kind.owned(cfg.method),
        blocks=config.blocks(cfg),
    )


def evaluation_view(cfg: Config, rows: Path | None = None) -> View:
    return View(crops=(crops.plain(cfg.method.crop),), shuffled=False, rows=rows)


# ---- what is trained ----


def data_info(
    cfg: Config, loader: Loader, val_loader: Loader | None, device: torch.device, dtype: torch.dtype
) -> DataInfo:
    """What the method may know, from the training loader. Refuses data that the method cannot learn from."""
    data = loader.data
    if METHODS[type(cfg.method)].wants_labels:
        for knob, each in (
            ("--data", data),
            ("--val", data if val_loader is None else val_loader.data),
        ):
            if missing := int((each.labels < 0).sum()):
                raise UsageError(
                    f"{cfg.preset} learns from labels, but {missing} of {each.rows} pictures of {knob} have "
                    "none: prepare them with --label-from folder, or choose rotnet-alexnet"
                )
        if val_loader is not None and val_loader.data.classes != data.classes:
            raise UsageError(
                f"--val has other classes than --data ({len(val_loader.data.classes)} and "
                f"{len(data.classes)}): both need the same class folders"
            )
    classes = len(data.classes) or int(data.labels.max()) + 1
    return DataInfo(
        images=loader.images,
        rows=loader.rows,
        data_rows=data.rows,
        data_fingerprint=data.fingerprint,
        classes=classes,
        mean=cfg.mean,
        std=cfg.std,
        size=cfg.method.crop.size,
        seed=cfg.seed,
        device=device,
        dtype=dtype,
        fingerprint=loader.fingerprint,
    )


def wrapped(net: nn.Module, cfg: Config, device: torch.device) -> Any:
    """The net as the step calls it: compiled where asked, under DDP where there are several ranks."""
    if cfg.compile:
        mode = None if cfg.compile_mode == "default" else cfg.compile_mode
        # shapes are fixed in training; a second form in one process would else be compiled for any shape
        net = torch.compile(net, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[assignment]
    if dist.world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        # rank 0's BatchNorm statistics are the run's: they are broadcast before a validation, not each step
        ddp = nn.parallel.DistributedDataParallel
        # torch 2.14 renamed the option and warns of its old name
        names = inspect.signature(ddp.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        # gradients lie where they are summed, so that none is copied there and back
        net = ddp(net, device_ids=ids, gradient_as_bucket_view=True, **options)
        if cfg.gradients == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            net.register_comm_hook(None, bf16_compress_hook)
    return net
