"""What knobs may be: refused in a sentence where they are not, before anything is built. Standard library only."""

import functools
import math
import re
from typing import Any

from fastrot.config import (
    WIDEST_EMBEDDING,
    Config,
    Decoupling,
    Pirl,
    Probe,
    RotNet,
    UsageError,
    Within,
    knob,
)

SHARE = "a share from 0 to 1", lambda v: 0 <= v <= 1
RANGES = (  # knobs, what each must be, and whether its value is that
    ("epochs max_steps batch threads image_size method.crop.size", "at least 1", lambda v: v >= 1),
    ("log_every keep_every validate_every", "at least 1", lambda v: v >= 1),
    ("budget", "a time such as 90s, 30min or 2h", lambda v: seconds_of(v) > 0),
    ("checkpoint_every", "a time such as 10min, or steps such as 500", lambda v: _is_interval(v)),
    ("order_block order_window schedule.steps schedule.epochs", "at least 1", lambda v: v >= 1),
    ("k pool pictures", "at least 1", lambda v: v >= 1),
    ("threshold", "0 or more", lambda v: 0 <= v < math.inf),
    ("sigma", "a number above 0", lambda v: 0 < v < math.inf),
    ("sure", *SHARE),
    ("at", "numbers of at least 1", lambda v: min(v, default=0) >= 1),
    ("costs", "numbers above 0", lambda v: all(0 < cost < math.inf for cost in v)),
    ("workers method.crop.pad method.pu_from", "at least 0", lambda v: v >= 0),
    ("seed", "0 to below 2**63", lambda v: 0 <= v < 2**63),
    ("lr method.temperature", "a number above 0", lambda v: 0 < v < math.inf),
    ("optim.momentum", "0 to below 1", lambda v: 0 <= v < 1),
    ("optim.weight_decay schedule.warmup schedule.last", "0 or more", lambda v: 0 <= v < math.inf),
    ("method.lambda_cls method.lambda_mse", "0 or more", lambda v: 0 <= v < math.inf),
    ("method.permutations", "2 to 362,880, which is 9!", lambda v: 2 <= v <= 362_880),
    ("method.augment.brightness method.augment.contrast", "0 or more", lambda v: 0 <= v < math.inf),
    ("method.augment.saturation", "0 or more", lambda v: 0 <= v < math.inf),
    ("method.augment.hue", "a share from 0 to 0.5", lambda v: 0 <= v <= 0.5),
    ("method.augment.photometric method.augment.grey", *SHARE),
    ("method.augment.blur", *SHARE),
    ("method.lambda_nce method.proximal method.gamma", "0 or more", lambda v: 0 <= v < math.inf),
    ("method.bank_momentum method.lambda_transform", *SHARE),
    ("method.dim", f"1 to {WIDEST_EMBEDDING}, such as 128", lambda v: 1 <= v <= WIDEST_EMBEDDING),
    ("method.negatives", "1 to 2**31 - 4097, such as 4096", lambda v: 1 <= v < 2**31 - 2**12),
    (
        "method.crop.scale method.patch_scale",
        "two shares, 0 < low <= high <= 1",
        lambda v: 0 < v[0] <= v[1] <= 1,
    ),
    ("method.crop.ratio", "0 < low <= high", lambda v: 0 < v[0] <= v[1]),
    ("backbone.width", "a number above 0 and up to 64, such as 0.25", lambda v: 0 < v <= 64),
    ("hold_out", "a share from 0 (none) to below 1, such as 0.05", lambda v: 0 <= v < 1),
    ("rows", "pictures a class such as 20, or a share such as 1%", lambda v: few(v) > 0),
    ("folds", "2 to 100", lambda v: 2 <= v <= 100),
    ("std", "three numbers above 0", lambda v: all(0 < s < math.inf for s in v)),
    ("mean", "three numbers, such as 0.485 0.456 0.406", lambda v: all(map(math.isfinite, v))),
)


def check_ranges(knobs: Any) -> None:
    """Refuse a number that is not in its range: of a run's knobs, or of others by the same names."""
    for paths, words, right in RANGES:
        for path in paths.split():
            value = _value(knobs, path)
            _want(knobs, path, value is None or right(value), words)


def seconds_of(text: str) -> float:
    """`90s`, `30min`, `1.5h` in seconds; 0 for what is no such time."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", str(text).strip())
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]] if match else 0.0


def few(text: str) -> float:
    """`20` pictures as 20, `1%` as .01; 0 for what is neither."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", str(text).strip())
    if match is None:
        return 0.0
    share = float(match[2] or 0) / 100
    return float(match[1] or 0) or (share if share < 1 else 0.0)


def _is_interval(text: str) -> bool:
    return seconds_of(text) > 0 or (text.isdecimal() and int(text) > 0)


def _value(knobs: Any, path: str) -> Any:
    """A knob's value; None where the chosen parts have no such knob."""
    return functools.reduce(lambda at, name: getattr(at, name, None), path.split("."), knobs)


def _want(knobs: Any, path: str, right: bool, words: str) -> None:
    if not right:
        raise UsageError(f"{knob(path)} got {_value(knobs, path)}: it wants {words}")


def check(cfg: Config) -> None:
    """Refuse what no run could use. Checks that need the data or the machine come later, where these are known."""
    check_ranges(cfg)
    want, method, crop = functools.partial(_want, cfg), cfg.method, cfg.method.crop
    want("compile_mode", cfg.compile or cfg.compile_mode in (None, "default"), "--compile")
    judged = cfg.online_probe is None or cfg.val is not None or cfg.hold_out > 0
    want("online_probe", judged, "held-out pictures: --val, or --hold-out above 0")
    inside = cfg.fold is None or 0 <= cfg.fold < (cfg.folds or 0)
    want("fold", inside, "--folds, and a number from 0 to below that")
    want("order_block", cfg.order_block is None or cfg.order == "blocks", "--order blocks")
    want("order_window", cfg.order_window is None or cfg.order == "blocks", "--order blocks")
    one = cfg.epochs is None or cfg.budget is None
    want("budget", one, f"no --epochs {cfg.epochs} beside it: each sets the length")
    ends, rates = [end for end, _ in cfg.schedule.table], [rate for _, rate in cfg.schedule.table]
    rising = bool(ends) and ends == sorted(set(ends)) and rates[0] > 0
    words = "(epoch, rate) pairs, epochs rising, rates of 0 or more, the first above 0"
    want("schedule.table", rising and all(0 <= rate < math.inf for rate in rates), words)
    falls = cfg.schedule.kind != "exponential" or cfg.schedule.last > 0
    want("schedule.last", falls, "a number above 0 for an exponential fall, such as 0.1")
    if isinstance(crop, Within):
        words = f"at least the crop's size, {crop.size}"
        want("method.crop.short", crop.short >= crop.size, words)
    if isinstance(method, Decoupling):
        some = method.lambda_cls or method.lambda_mse or method.lambda_nce or method.proximal
        want("method.lambda_cls", some > 0, "a number above 0: all other terms are 0 too")
        weighed = method.pu_table is None or method.lambda_cls > 0
        want("method.pu_table", weighed, "--method.lambda-cls above 0, the loss that it weighs")
    if isinstance(method, Pirl):
        puzzles = method.lambda_transform > 0 and method.transform != "rotation"
        words = "--method.transform jigsaw or both, and a lambda above 0"
        want("method.permutations", puzzles or method.permutations is None, words)
        want("method.patch_scale", puzzles or method.patch_scale == Pirl.patch_scale, words)
    if isinstance(method, RotNet):
        angles = {angle % 360 for angle in method.angles}
        apart = 2 <= len(method.angles) == len(angles)
        want("method.angles", apart, "two or more, each another rotation")
        room = (cfg.image_size or crop.size) >= 24 or not any(angle % 90 for angle in angles)
        want("method.angles", room, "crops of 24 pixels or more, or multiples of 90 degrees")
    if isinstance(method, Probe):
        one = (cfg.start_from is None) == method.random
        want("start_from", one, "the run whose network is probed, or instead --method.random")
        once = 0 < len(method.stages) == len(set(method.stages))
        want("method.stages", once, "one name or more, each once")
