"""Every knob, as frozen keyword-only dataclasses. Standard library only: the command line is read before torch.

A comment behind a knob is its help text. A knob marked `free` changes no number of a run, so a resumed run
may set it anew; every other knob must agree (see `differences`).
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


class UsageError(ValueError):
    """Wrong use, told in one sentence: the setting, what it got, the way out. Entries exit with status 2."""


class RunError(RuntimeError):
    """A run that cannot go on, told in one sentence. Entries exit with status 1."""


class NotFinite(RunError):
    """Numbers of a step are NaN or infinite."""


class PeerLost(RunError):
    """Another process of the run has ended; it knows why, so that it is let speak first."""


def free(default: Any) -> Any:
    """A knob that changes no number."""
    return field(default=default, metadata={"free": True})


# pictures a block, blocks a window: 3 to 7 MB a block of ImageNet's pictures, 0.7 to 1.8 GB a window; a batch of
# 256 takes one picture of each block, which mixes sorted classes as well as the full permutation
BLOCKS = (64, 256)
WIDEST_EMBEDDING = 1024  # numbers in a row of the memory bank that the kernels take


# ---- crops: which box of a picture is looked at ----


@dataclass(frozen=True, kw_only=True)
class RandomResized:
    """A box of random area and aspect, resampled to a square: torchvision's RandomResizedCrop."""

    size: int = 224  # pixels a side of the crop
    scale: tuple[float, float] = (0.08, 1.0)  # the box's share of the picture's area
    ratio: tuple[float, float] = (0.75, 4 / 3)  # the box's width / height, even in its logarithm
    flip: bool = True  # mirror with probability one half


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """A box of size x size pixels, shifted by up to `pad` pixels over the border, which is black (CIFAR)."""

    size: int = 32  # pixels a side of the crop
    pad: int = 4  # pixels
    flip: bool = True  # mirror with probability one half


@dataclass(frozen=True, kw_only=True)
class Within:
    """A square of side round(short side * size / short): resize to `short`, then crop `size`, in one step."""

    size: int = 224  # pixels a side of the crop
    short: int = 256  # pixels that the short side stands for
    random: bool = True  # False: centred
    flip: bool = True  # mirror with probability one half


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The whole picture, squashed to a square."""

    size: int = 32  # pixels a side of the crop
    flip: bool = False  # mirror with probability one half


Crop = RandomResized | Shifted | Within | Whole


# ---- networks ----


@dataclass(frozen=True, kw_only=True)
class AlexNet:
    """AlexNet with batch norm and without groups (Gidaris 2018), stages conv1 ... pool5, fc_block."""

    width: float = 1.0  # scales all channels: 64 192 384 256 256, and 4096 of the two linear layers
    kernel: int = 11  # side of the first convolution, pixels
    stride: int = 4  # of the first convolution, pixels
    space_to_depth: bool = False  # it reads stride x stride pixels as channels; the same weights
    fuse: bool = False  # batch norm, ReLU and pool as one op in training; untimed on a GPU


@dataclass(frozen=True, kw_only=True)
class Nin:
    """Network in network for 32x32 pictures (Gidaris 2018), stages conv1 ... convN."""

    width: float = 1.0  # scales all channels: 192 160 96
    stages: int = 4  # blocks of three convolutions
    pool_conv3: bool = False  # average-pool behind the third block, where there is a fourth


Backbone = AlexNet | Nin


# ---- methods ----


@dataclass(frozen=True, kw_only=True)
class RotNet:
    """Predict which of four rotations (0, 90, 180, 270 degrees) a picture has been given (Gidaris 2018)."""

    crop: Crop = RandomResized()


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Tell a picture's class from its label: the yardstick."""

    crop: Crop = RandomResized()


@dataclass(frozen=True, kw_only=True)
class Decoupling:
    """Predict the rotation from half of the features, tell pictures apart by the other half (Feng 2019)."""

    crop: Crop = RandomResized()
    dim: int = 128  # numbers in a picture's embedding, and in its row of the memory bank
    negatives: int = 4096  # K: rows of other pictures that each picture is told from, each step
    temperature: float = 0.07  # T
    bank_momentum: float = 0.5  # share of the old row in a new one
    lambda_cls: float = 1.0  # weight of the rotation loss; a term at 0 is not built
    lambda_mse: float = (
        1.0  # weight of the spread of the other half over a picture's four rotations
    )
    lambda_nce: float = 1.0  # weight of telling pictures apart
    proximal: float = 0.0  # weight of |embedding - row|^2 (Wu 2018, eq 9); no original code has it
    contrast: Literal["nce", "infonce"] = "nce"  # nce: the original; infonce: a softmax over K + 1
    z: Literal["frozen", "ema"] = "frozen"  # nce's constant: of the first batch, or a moving mean
    exclude_self: bool = False  # never draw a picture's own row among its negatives
    bank: Literal["replicated", "sharded"] = "replicated"  # all rows on each rank, or its own
    bank_dtype: Literal["fp32", "bf16"] = "fp32"  # of its rows; bf16 takes half the memory
    pu_table: str | None = None  # rotation probabilities that evaluate.py wrote, or a prob.dat
    pu_from: int = 210  # epoch of the paper from which they weigh the rotation loss
    gamma: float = 2.0  # a rotated copy weighs 1 - p ** gamma, p: how upright it looks


MethodConfig = RotNet | Supervised | Decoupling


# ---- optimiser and schedule ----


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD as torch writes it: v = momentum v + g; w -= rate (g + momentum v) with nesterov."""

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norms: bool = True  # also decay biases and batch-norm weights, as the original codes do
    kernel: Literal["torch", "apex"] = "torch"  # whose SGD; apex: NVIDIA's FusedSGD, on a GPU


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over a run; a table keeps the paper's whole epochs, scaled to the run's."""

    kind: Literal["table", "cosine", "linear", "constant"] = "table"
    # (epoch behind it, rate) pairs; the other kinds begin with the first rate
    table: tuple[tuple[int, float], ...] = ((15, 0.01), (30, 0.001), (45, 1e-4), (50, 1e-5))
    epochs: int = 50  # the paper's epochs, to which the table refers
    as_published: bool = False  # keep the table's epochs as printed, whatever --epochs says
    steps: int | None = None  # length of the run in steps, instead of epochs
    warmup: float = 0.0  # epochs over which the rate rises from zero, step by step
    last: float = 0.0  # where cosine and linear end, as a share of the first rate


# ---- the run ----

Precision = Literal["auto", "bf16", "fp16", "fp32"]
LoaderName = Literal["auto", "beton", "dali", "ffcv", "folder", "pack", "synthetic", "tars"]
Placement = Literal["auto", "resident", "pinned"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: what is trained, on what, for how long."""

    data: str | None = free(
        None
    )  # FILE.beton, NAME.pack, a folder of shards or pictures, or synthetic
    val: str | None = free(None)  # pictures to be judged on; without it --hold-out sets some aside
    out: str | None = free(None)  # the run's folder; default runs/PRESET
    epochs: int | None = None  # passes over the data; default: the schedule's
    max_steps: int | None = free(None)  # stop after this many steps; the schedule stays as it is
    budget: str | None = None  # time for the run, as 30min or 2h: 20 steps choose the epochs
    batch: int = 192  # pictures per process and step, before turning
    lr: float | None = None  # scales the schedule so that it begins with this rate
    seed: int = 0  # of order, crops and weights
    order: Literal["full", "blocks"] = "full"  # blocks: for data larger than memory
    order_block: int | None = None  # neighbouring pictures that --order blocks reads together; 64
    order_window: int | None = None  # blocks that it mixes with each other, kept in memory; 256
    workers: int | None = free(None)  # threads or processes that decode; default: one a core
    threads: int | None = free(
        None
    )  # of torch on a CPU; default: this process's share of the cores
    image_size: int | None = None  # pixels a side of the crop; default: the recipe's
    precision: Precision = "auto"  # of the network's arithmetic; auto: bf16 where the device has it
    hold_out: float = 0.05  # share of the pictures to be judged on, where there is no --val
    folds: int | None = None  # train so many nets, OUT/fold0 ..., each without one fold of the data
    fold: int | None = None  # with --folds: train this one alone, in OUT itself
    log_every: int = free(20)  # steps
    checkpoint_every: int = free(500)  # steps; a checkpoint is also written at each epoch's end
    keep_every: int | None = free(None)  # steps; keep a checkpoint step_N.pt at each multiple
    keep_best: bool = free(False)  # keep best.pt, by validation accuracy; without one, by loss
    validate_every: int = free(1)  # epochs
    deterministic: bool = False  # the same bits on a GPU too, at some cost
    compile: bool = False  # torch.compile the network
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # of --compile
    graph: bool = False  # the whole step as one CUDA graph: one process on a GPU
    gradients: Literal["fp32", "bf16"] = "fp32"  # what several processes send each other
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = free("auto")  # what reads the data; auto: by its format
    placement: Placement = free("auto")  # of a .pack for a GPU: in its memory, or in the host's
    on_bad_record: Literal["stop", "skip"] = free(
        "stop"
    )  # a picture that cannot be read; skip counts
    enlarge: bool = False  # allow crops larger than most pictures
    start_from: str | None = None  # begin with the weights of another run or checkpoint
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of red, green, blue; 0 to 1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # of red, green, blue; 0 to 1
    statistics: Literal["preset", "data"] = "preset"  # data: mean and std of the prepared file
    tensorboard: bool = free(True)  # write TensorBoard files
    profile: bool = free(False)  # trace five steps: RUN/profile/trace.json and table.txt
    preset: str = "rotnet-alexnet"  # names the run's folder; set by the preset
    method: MethodConfig = RotNet()
    backbone: Backbone = AlexNet()
    optim: Sgd = Sgd()
    schedule: Schedule = Schedule()


def check(cfg: Config) -> None:
    """Refuse what no run could use. Checks that need the data or the machine come later, where these are known."""
    for name, least in {
        "epochs": 1,
        "max_steps": 1,
        "batch": 1,
        "workers": 0,
        "threads": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "keep_every": 1,
        "validate_every": 1,
        "image_size": 1,
        "order_block": 1,
        "order_window": 1,
        "seed": 0,
    }.items():
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise UsageError(f"{knob(name)} got {value}: it wants at least {least}")
    if cfg.compile_mode != "default" and not cfg.compile:
        raise UsageError(f"--compile-mode got {cfg.compile_mode}: it wants --compile")
    if cfg.lr is not None and not 0 < cfg.lr < math.inf:
        raise UsageError(f"--lr got {cfg.lr}: it wants a number above 0")
    if cfg.seed >= 2**63:
        raise UsageError(f"--seed got {cfg.seed}: it wants a number below 2**63")
    if not 0 <= cfg.optim.momentum < 1:
        raise UsageError(f"--optim.momentum got {cfg.optim.momentum}: it wants 0 to below 1")
    if not 0 <= cfg.optim.weight_decay < math.inf:
        raise UsageError(f"--optim.weight-decay got {cfg.optim.weight_decay}: it wants 0 or more")
    if not 0 <= cfg.hold_out < 1:
        raise UsageError(
            f"--hold-out got {cfg.hold_out}: it wants a share from 0 (none) to below 1, such as 0.05"
        )
    if not all(0 < s < math.inf for s in cfg.std):
        raise UsageError(f"--std got {cfg.std}: each of the three must be above 0")
    if not all(math.isfinite(m) for m in cfg.mean):
        raise UsageError(
            f"--mean got {cfg.mean}: it wants three numbers, such as 0.485 0.456 0.406"
        )
    if cfg.folds is not None and not 2 <= cfg.folds <= 100:
        raise UsageError(f"--folds got {cfg.folds}: it wants 2 to 100")
    if cfg.fold is not None and not (cfg.folds is not None and 0 <= cfg.fold < cfg.folds):
        raise UsageError(
            f"--fold got {cfg.fold}: it wants --folds, and a number from 0 to below that"
        )
    for name in ("order_block", "order_window"):
        if cfg.order == "full" and getattr(cfg, name) is not None:
            raise UsageError(f"{knob(name)} got {getattr(cfg, name)}: it wants --order blocks")
    if cfg.epochs is not None and cfg.budget is not None:
        raise UsageError(
            f"--epochs {cfg.epochs} and --budget {cfg.budget} both set the length: give one"
        )
    for name, value in (("steps", cfg.schedule.steps), ("epochs", cfg.schedule.epochs)):
        if value is not None and value < 1:
            raise UsageError(f"--schedule.{name} got {value}: it wants at least 1")
    for name, value in (("warmup", cfg.schedule.warmup), ("last", cfg.schedule.last)):
        if not 0 <= value < math.inf:
            raise UsageError(f"--schedule.{name} got {value}: it wants 0 or more")
    rates = [rate for _, rate in cfg.schedule.table]
    ends = [end for end, _ in cfg.schedule.table]
    if (
        not rates
        or any(not 0 <= rate < math.inf for rate in rates)
        or ends != sorted(set(ends))
        or rates[0] == 0
    ):
        raise UsageError(
            f"--schedule.table got {cfg.schedule.table}: it wants (epoch, rate) pairs, epochs rising, "
            "rates of 0 or more, the first above 0"
        )
    if not 0 < cfg.backbone.width <= 64:
        raise UsageError(
            f"--backbone.width got {cfg.backbone.width}: it wants a number above 0 and up to 64, such as 0.25"
        )
    if isinstance(cfg.method, Decoupling):
        _check_decoupling(cfg.method)
    crop = cfg.method.crop
    if isinstance(crop, RandomResized):
        low, high = crop.scale
        if not 0 < low <= high <= 1:
            raise UsageError(
                f"--method.crop.scale got {crop.scale}: it wants two shares, 0 < low <= high <= 1"
            )
        if not 0 < crop.ratio[0] <= crop.ratio[1]:
            raise UsageError(f"--method.crop.ratio got {crop.ratio}: it wants 0 < low <= high")
    if isinstance(crop, Within) and crop.short < crop.size:
        raise UsageError(
            f"--method.crop.short got {crop.short}: it wants at least the crop's size, {crop.size}"
        )
    if isinstance(crop, Shifted) and crop.pad < 0:
        raise UsageError(f"--method.crop.pad got {crop.pad}: it wants 0 or more pixels")
    if crop.size < 1:
        raise UsageError(f"--method.crop.size got {crop.size}: it wants at least 1 pixel")


def _check_decoupling(method: Decoupling) -> None:
    def refuse(name: str, wants: str) -> None:
        value = getattr(method, name)
        raise UsageError(f"{knob('method.' + name)} got {value}: it wants {wants}")

    if not 0 < method.temperature < math.inf:
        refuse("temperature", "a number above 0, such as 0.07")
    if not 1 <= method.dim <= WIDEST_EMBEDDING:
        refuse("dim", f"1 to {WIDEST_EMBEDDING}, such as 128")
    if not 1 <= method.negatives < 2**31 - 2**12:
        refuse("negatives", "1 to 2**31 - 4097, such as 4096")
    if not 0 <= method.bank_momentum <= 1:
        refuse("bank_momentum", "a share from 0 to 1")
    weights = ("lambda_cls", "lambda_mse", "lambda_nce", "proximal", "gamma")
    for name in weights:
        if not 0 <= getattr(method, name) < math.inf:
            refuse(name, "0 or more")
    if not any(getattr(method, name) for name in weights[:4]):
        refuse("lambda_cls", "a number above 0, since all other terms are 0 too")
    if method.pu_from < 0:
        refuse("pu_from", "an epoch of the paper, 0 or more")
    if method.pu_table is not None and not method.lambda_cls:
        refuse("pu_table", "--method.lambda-cls above 0, the loss that it weighs")


def resolved(cfg: Config) -> Config:
    """The same run with its shorthands carried out, so that what is spelt out and what is meant compare equal.

    --image-size goes into the crop recipe; --epochs and --budget take the place of --schedule.steps;
    without any of them the schedule's own epochs are the run's, and without --lr its first rate.
    """
    schedule, epochs = cfg.schedule, cfg.epochs
    if epochs is not None or cfg.budget is not None:
        schedule = dataclasses.replace(schedule, steps=None)
    elif schedule.steps is None:
        epochs = schedule.epochs
    lr = schedule.table[0][1] if cfg.lr is None else cfg.lr
    size = cfg.method.crop.size if cfg.image_size is None else cfg.image_size
    method = dataclasses.replace(cfg.method, crop=with_size(cfg.method.crop, size))
    block, window = blocks(cfg) or (None, None)
    return dataclasses.replace(
        cfg,
        image_size=size,
        method=method,
        schedule=schedule,
        epochs=epochs,
        lr=lr,
        order_block=block,
        order_window=window,
    )


def blocks(cfg: Config) -> tuple[int, int] | None:
    """Pictures a block and blocks a window, of --order blocks."""
    if cfg.order == "full":
        return None
    return cfg.order_block or BLOCKS[0], cfg.order_window or BLOCKS[1]


def with_size(crop: Crop, size: int) -> Crop:
    """The same recipe for another number of pixels a side."""
    if isinstance(crop, Within):
        return dataclasses.replace(crop, size=size, short=round(crop.short * size / crop.size))
    return dataclasses.replace(crop, size=size)


def knob(path: str) -> str:
    """The way a knob is written on the command line: `max_steps` -> `--max-steps`."""
    return "--" + path.replace("_", "-")


# a knob's earlier name and today's, by their places in the config.
# Kept for one version: a config.yaml or checkpoint is read by either, the command line answers with the new one.
OLD_KNOBS: dict[str, str] = {"backbone.fold": "backbone.space_to_depth"}


def refuse_old_knobs(argv: list[str]) -> None:
    """Raises UsageError for a knob that has another name today: also as --no-NAME, and with = or underscores."""
    today = {knob(old): knob(new) for old, new in OLD_KNOBS.items()}
    for word in argv:
        given = word.split("=")[0]
        plain = given.replace("_", "-")
        new = today.get(plain) or today.get(plain.replace("--no-", "--").replace(".no-", "."))
        if new is not None:
            raise UsageError(f"{given} is called {new} now: write that instead")


# ---- to and from plain data (config.yaml, checkpoints) ----


def to_plain(part: Any) -> Any:
    """Dataclasses as dicts with their `type`, tuples as lists: what YAML and a checkpoint hold."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {f.name: to_plain(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return {"type": type(part).__name__, **fields}
    if isinstance(part, (tuple, list)):
        return [to_plain(item) for item in part]
    return part


def from_plain(plain: Any, hint: Any = Config, name: str = "") -> Any:
    """What `to_plain` wrote, read back by the type hints; unknown names are refused by name."""
    if plain is None:
        if type(None) in typing.get_args(hint):
            return None
        raise UsageError(f"{name or 'the config'} got null: give it a value, or leave the line out")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = [c for c in typing.get_args(hint) if c is not type(None)]
        if isinstance(plain, dict):
            named = [c for c in choices if c.__name__ == plain.get("type")]
            if not named:
                known = ", ".join(c.__name__ for c in choices)
                raise UsageError(f"{name} has type {plain.get('type')!r}: it wants one of {known}")
            return from_plain(plain, named[0], name)
        return from_plain(plain, choices[0], name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(plain, dict):
            raise UsageError(f"{name or 'the config'} got {plain!r}: it wants a table of knobs")
        hints = typing.get_type_hints(hint)
        values = {_today(name, k): v for k, v in plain.items() if k != "type"}
        if unknown := sorted(set(values) - set(hints)):
            raise UsageError(f"{name or 'the config'} has no knob {unknown[0]!r}: remove it")
        return hint(
            **{k: from_plain(v, hints[k], f"{name}.{k}" if name else k) for k, v in values.items()}
        )
    if typing.get_origin(hint) is tuple:
        if not isinstance(plain, list):
            raise UsageError(f"{name} got {plain!r}: it wants a list")
        inner = typing.get_args(hint)
        each = [inner[0]] * len(plain) if inner[-1] is Ellipsis else list(inner)
        if len(each) != len(plain):
            raise UsageError(f"{name} got {plain!r}: it wants {len(each)} values")
        return tuple(from_plain(v, h, name) for v, h in zip(plain, each, strict=True))
    if typing.get_origin(hint) is Literal:
        if plain not in typing.get_args(hint):
            raise UsageError(
                f"{name} got {plain!r}: it wants one of {', '.join(typing.get_args(hint))}"
            )
        return plain
    if hint is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    assert isinstance(hint, type)
    if not isinstance(plain, hint):
        raise UsageError(f"{name} got {plain!r}: it wants {hint.__name__}")
    return plain


def _today(place: str, field: str) -> str:
    """Today's name of a field that a config.yaml or checkpoint may hold under its old one."""
    old = f"{place}.{field}" if place else field
    return OLD_KNOBS.get(old, old).rpartition(".")[2]


def differences(before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """Knobs that are not free and differ between two plain configs: name -> (before, now).

    A knob that `before` does not know yet had its default.
    """
    loose = {f.name for f in dataclasses.fields(Config) if f.metadata.get("free")}
    old, new = _flat(to_plain(from_plain(before))), _flat(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old | new)
        if name.split(".")[0] not in loose and old.get(name) != new.get(name)
    }


def _flat(plain: dict, at: str = "") -> dict[str, Any]:
    out = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{at}{name}.")
        else:
            out[at + name] = value
    return out
