"""Every knob, as frozen keyword-only dataclasses. Standard library only: the command line is read before torch.

A comment behind a knob is its help text. A knob marked `free` changes no number of a run, so a resumed run
may set it anew; every other knob must agree (see `differences`).
"""

import dataclasses
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
    pad: int = 4  # pixels by which the box may leave the picture on each side
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
    space_to_depth: bool | None = None  # conv1 by squares of pixels; default: see --compile
    fuse: bool | None = None  # batch norm, ReLU and pool as one op; default: see --compile
    last: Literal["fc_block", "conv5"] = "fc_block"  # the last stage; behind conv5 nothing is built


@dataclass(frozen=True, kw_only=True)
class Nin:
    """Network in network for 32x32 pictures (Gidaris 2018), stages conv1 ... convN."""

    width: float = 1.0  # scales all channels: 192 160 96
    stages: int = 4  # blocks of three convolutions
    pool_conv3: bool = False  # average-pool behind the third block, where there is a fourth


@dataclass(frozen=True, kw_only=True)
class Named:
    """A network by its name, with random weights and named stages; the last is `embedding`."""

    # six-layer, resnet18, resnet50, mobilenet_v2, efficientnet_b0; or timm/NAME, any of timm's
    name: str = "resnet50"


Backbone = AlexNet | Nin | Named


def net_name(backbone: Backbone) -> str:
    """What people call a network: AlexNet, Nin, resnet50."""
    return backbone.name if isinstance(backbone, Named) else type(backbone).__name__


# ---- methods ----


@dataclass(frozen=True, kw_only=True)
class RotNet:
    """Predict which of four rotations (0, 90, 180, 270 degrees) a picture has been given (Gidaris 2018)."""

    crop: Crop = RandomResized()
    angles: tuple[int, ...] = (0, 90, 180, 270)  # degrees counter-clockwise; a class each
    # a picture's copies in a batch: in all angles, or in a single one, drawn anew each epoch
    copies: Literal["all", "one"] = "all"


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Tell a picture's class from its label: the yardstick."""

    crop: Crop = RandomResized()


@dataclass(frozen=True, kw_only=True)
class MemoryBank:
    """Knobs of methods that tell pictures apart by a row each."""

    dim: int = 128  # numbers in a picture's embedding, and in its row of the memory bank
    negatives: int = 4096  # K: rows of other pictures that each picture is told from, each step
    temperature: float = 0.07  # T: similarities are divided by it
    bank_momentum: float = 0.5  # share of the old row in a new one
    contrast: Literal["nce", "infonce"] = "nce"  # the original's loss, or a softmax over K + 1
    z: Literal["frozen", "ema"] = "frozen"  # nce's constant Z: of the first batch, or a moving mean
    exclude_self: bool = False  # never draw a picture's own row among its negatives
    bank: Literal["replicated", "sharded"] = "replicated"  # all rows on each rank, or its own
    bank_dtype: Literal["fp32", "bf16"] = "fp32"  # of its rows; bf16 takes half the memory


@dataclass(frozen=True, kw_only=True)
class Decoupling(MemoryBank):
    """Predict the rotation from half of the features, tell pictures apart by the other half (Feng 2019)."""

    crop: Crop = RandomResized()
    lambda_cls: float = 1.0  # weight of the rotation loss; a term at 0 is not built
    lambda_mse: float = 1.0  # weight of the other half's spread over a picture's four rotations
    lambda_nce: float = 1.0  # weight of telling pictures apart
    proximal: float = 0.0  # weight of |embedding - row|^2 (Wu 2018, eq 9); no original code has it
    pu_table: str | None = None  # rotation probabilities: of evaluate --table, or prob.dat
    pu_from: int = 210  # epoch of the paper from which they weigh the rotation loss
    gamma: float = 2.0  # a rotated copy weighs 1 - p ** gamma, p: how upright it looks


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Tell classes from stages of the network that --start-from names, each by a head of its own: how good they are."""

    crop: Crop = Within()
    # linear: a linear layer; nonlinear: all that follows the stage, learnt anew; mlp: three linear
    # layers; conv: three convolutions
    head: Literal["linear", "nonlinear", "mlp", "conv"] = "linear"
    # which; f1 and f2 are the last one's halves, of a decoupling run the rotation's and the other
    stages: tuple[str, ...] = ("conv1", "conv2", "conv3", "conv4", "conv5")
    tune: bool = False  # train the network too
    random: bool = False  # in place of --start-from: a network that has learnt nothing


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How a view's colours change on the device, drawn by (seed, epoch, row, view): the authors' of PIRL (Misra 2020)."""

    brightness: float = 0.4  # a factor of 1 - this to 1 + this; the first four in any order
    contrast: float = 0.4  # such a factor of the distance from the mean grey
    saturation: float = 0.4  # such a factor of the distance from each pixel's grey
    hue: float = 0.2  # shifted by up to this share of the colour circle
    photometric: float = 0.66  # how often fewer bits, sharpness, solarised, auto-contrast, all four
    grey: float = 0.2  # how often without colour
    blur: float = 0.0  # how often blurred by a Gaussian, of .1 to 2 pixels in 224


@dataclass(frozen=True, kw_only=True)
class Pirl(MemoryBank):
    """Make a picture's features like those of its transform, unlike those of others (PIRL, Misra 2020; NPID, Wu 2018)."""

    crop: Crop = RandomResized()
    transform: Literal["rotation", "jigsaw", "both"] = "rotation"  # of a second crop
    lambda_transform: float = 0.5  # its loss's weight; the picture's has the rest; 0: NPID
    head: Literal["linear", "mlp"] = "linear"  # what embeds features; mlp: a hidden layer as wide
    permutations: int | None = None  # of the patches, far apart; default: all 362,880
    patch_scale: tuple[float, float] = (0.6, 1.0)  # share of the area that patches are cut of
    negatives: int = 32000  # K, as above, of each view
    augment: Augment = Augment()


@dataclass(frozen=True, kw_only=True)
class Jigsaw:
    """Predict in which of some orders a picture's nine patches are shown (Noroozi 2016, Goyal 2019)."""

    crop: Crop = RandomResized(scale=(0.6, 1.0))  # patches are cut of one 255/224 as large
    permutations: int = 2000  # orders of the patches, far apart; a class each
    augment: Augment = Augment()


MethodConfig = RotNet | Supervised | Decoupling | Pirl | Jigsaw | Probe


# ---- optimiser and schedule ----


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD as torch writes it: v = momentum v + g; w -= rate (g + momentum v) with nesterov."""

    momentum: float = 0.9  # share of the last step's direction that is kept
    nesterov: bool = True  # look one step of momentum ahead
    weight_decay: float = 5e-4  # share of each weight that is added to its gradient
    decay_norms: bool = True  # also decay biases and batch-norm weights, as the original codes do
    kernel: Literal["torch", "apex"] = "torch"  # whose SGD; apex: NVIDIA's FusedSGD, on a GPU


@dataclass(frozen=True, kw_only=True)
class RMSprop:
    """RMSprop as torch writes it: a = .99 a + .01 g^2; v = momentum v + g / (sqrt(a) + 1e-8); w -= rate v."""

    momentum: float = 0.5  # share of the last step's direction that is kept
    weight_decay: float = 0.0  # share of each weight that is added to its gradient
    decay_norms: bool = True  # also decay biases and batch-norm weights


Optim = Sgd | RMSprop


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over a run; a table keeps the paper's whole epochs, scaled to the run's."""

    # the table's steps, a fall from the first rate to the last, or no fall at all
    kind: Literal["table", "cosine", "linear", "exponential", "constant"] = "table"
    # (epoch behind it, rate) pairs; the other kinds begin with the first rate
    table: tuple[tuple[int, float], ...] = ((15, 0.01), (30, 0.001), (45, 1e-4), (50, 1e-5))
    epochs: int = 50  # the paper's epochs, to which the table refers
    as_published: bool = False  # keep the table's epochs as printed, whatever --epochs says
    steps: int | None = None  # length of the run in steps, instead of epochs
    warmup: float = 0.0  # epochs over which the rate rises from zero, step by step
    last: float = 0.0  # where a fall ends, as a share of the first rate


# ---- the run ----

Precision = Literal["auto", "bf16", "fp16", "fp32"]
LoaderName = Literal["auto", "beton", "dali", "ffcv", "folder", "pack", "synthetic", "tars"]
Placement = Literal["auto", "resident", "pinned"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: what is trained, on what, for how long."""

    data: str | None = free(None)  # a .beton, a .pack, a folder of tars or pictures, or synthetic
    val: str | None = free(None)  # validation pictures; without them --hold-out sets some aside
    out: str | None = free(None)  # the run's folder; default: runs/PRESET, or --config's own
    epochs: int | None = None  # passes over the data; default: the schedule's
    max_steps: int | None = free(None)  # stop after this many steps; the schedule stays as it is
    budget: str | None = None  # time for the run, as 30min or 2h: 20 steps choose the epochs
    extend: bool = free(False)  # go on with more epochs where steps done had the rates of fewer
    batch: int = 192  # pictures per process and step, each before its rotations
    lr: float | None = None  # scales the schedule to begin with this rate; default: its own
    seed: int = 0  # of order, crops and weights
    order: Literal["full", "blocks"] = "full"  # blocks: for data larger than memory
    order_block: int | None = None  # neighbours that --order blocks reads together; default: 64
    order_window: int | None = None  # blocks that it mixes, kept in memory; default: 256
    workers: int | None = free(None)  # threads or processes that decode; default: one a core
    threads: int | None = free(None)  # of torch's arithmetic; default: a share of the cores
    image_size: int | None = None  # pixels a side of the crop; default: the preset's
    precision: Precision = "auto"  # of the network's arithmetic; auto: bf16 where the device has it
    hold_out: float = 0.05  # share of the pictures kept for validation, without --val
    rows: str | None = None  # learn from so many pictures a class (20), or a share of each (1%)
    folds: int | None = None  # train so many nets, OUT/fold0 ..., each without one fold of the data
    fold: int | None = None  # with --folds: train this one alone, in OUT itself
    log_every: int = free(20)  # steps from one log line to the next
    checkpoint_every: str = free("10min")  # a time or steps; each epoch's end writes one too
    keep_every: int | None = free(None)  # steps; keep a checkpoint step_N.pt at each multiple
    keep_best: bool = free(False)  # keep best.pt, by validation accuracy; without one, by loss
    validate_every: int = free(1)  # epochs from one validation to the next
    online_probe: Literal["knn"] | None = free(None)  # judge features at each validation too
    deterministic: bool = False  # the same bits on a GPU too, at some cost
    compile: bool | None = None  # torch.compile the network; default: as measured on such a GPU
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = None  # of --compile
    graph: bool | None = None  # one CUDA graph a step: one process; default: see --compile
    gradients: Literal["fp32", "bf16"] = "fp32"  # what several processes send each other
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = free("auto")  # what reads the data; auto: by its format
    placement: Placement = free("auto")  # of a .pack for a GPU: in its memory, or in the host's
    on_bad_record: Literal["stop", "skip"] = free("stop")  # at a picture that cannot be read
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
    optim: Optim = Sgd()
    schedule: Schedule = Schedule()


def resolved(cfg: Config) -> Config:
    """The same run with its shorthands carried out, so that what is spelt out and what is meant compare equal.

    --image-size goes into the crop; --epochs and --budget take the place of --schedule.steps;
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
    meant = dict(image_size=size, method=method, schedule=schedule, epochs=epochs, lr=lr)
    return dataclasses.replace(cfg, **meant, order_block=block, order_window=window)


def blocks(cfg: Config) -> tuple[int, int] | None:
    """Pictures a block and blocks a window, of --order blocks."""
    if cfg.order == "full":
        return None
    return cfg.order_block or BLOCKS[0], cfg.order_window or BLOCKS[1]


def with_size(crop: Crop, size: int) -> Crop:
    """The same crop for another number of pixels a side."""
    if isinstance(crop, Within):
        return dataclasses.replace(crop, size=size, short=round(crop.short * size / crop.size))
    return dataclasses.replace(crop, size=size)


def knob(path: str) -> str:
    """The way a knob is written on the command line: `max_steps` -> `--max-steps`."""
    return "--" + path.replace("_", "-")


# a knob's earlier name and today's: for one version, by which a config.yaml or checkpoint is read by either
OLD_KNOBS: dict[str, str] = {"backbone.fold": "backbone.space_to_depth"}


def refuse_old_knobs(argv: list[str]) -> None:
    """Raises UsageError for a knob that has another name today: also as --no-NAME, and with = or underscores."""
    today = {knob(old): knob(new) for old, new in OLD_KNOBS.items()}
    for word in argv:
        given = word.split("=")[0]
        plain = given.replace("_", "-").replace("--no-", "--").replace(".no-", ".")
        if new := today.get(plain):
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
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if plain is None and type(None) in inner:
            return None
        choices = {c.__name__: c for c in inner if c is not type(None)}
        chosen = str(plain.get("type")) if isinstance(plain, dict) else next(iter(choices))
        if chosen not in choices:
            raise UsageError(f"{name} has type {chosen}: it wants one of {', '.join(choices)}")
        return from_plain(plain, choices[chosen], name)
    if hint in (float, str) and type(plain) is int:
        return hint(plain)
    if kind is None and isinstance(plain, hint):
        return plain
    if dataclasses.is_dataclass(hint) and isinstance(plain, dict):
        hints, at = typing.get_type_hints(hint), f"{name}." if name else ""
        named = {f"{at}{k}": v for k, v in plain.items() if k != "type"}
        values = {OLD_KNOBS.get(k, k).removeprefix(at): v for k, v in named.items()}
        if unknown := sorted(set(values) - set(hints)):
            raise UsageError(f"{name or 'the config'} has no knob {unknown[0]!r}: remove it")
        return hint(**{k: from_plain(v, hints[k], at + k) for k, v in values.items()})
    if kind is tuple and isinstance(plain, list):
        each = inner[:1] * len(plain) if inner[-1] is Ellipsis else inner
        if len(each) == len(plain):
            return tuple(from_plain(v, h, name) for v, h in zip(plain, each, strict=True))
    if kind is Literal and plain in inner:
        return plain
    if kind is Literal:
        words = f"one of {', '.join(inner)}"
    elif dataclasses.is_dataclass(hint):
        words = "a table of knobs"
    else:
        words = str(hint) if inner else hint.__name__
    got = "null" if plain is None else repr(plain)
    raise UsageError(f"{name or 'the config'} got {got}: it wants {words}")


def differences(before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """Knobs that are not free and differ between two plain configs: name -> (before, now).

    A knob that `before` does not know yet had its default.
    """
    loose = {f.name for f in dataclasses.fields(Config) if f.metadata.get("free")}
    old, new = flat(to_plain(from_plain(before))), flat(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old | new)
        if name.split(".")[0] not in loose and old.get(name) != new.get(name)
    }


def flat(plain: dict, at: str = "") -> dict[str, Any]:
    """Nested tables as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for name, value in plain.items():
        out |= flat(value, f"{at}{name}.") if isinstance(value, dict) else {f"{at}{name}": value}
    return out
