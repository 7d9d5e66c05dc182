"""Time of the ops, and their share of what the machine's memory gives in the same run.

    python -m benchmarks.bench_ops [--only FAMILY ...] [--device cpu|cuda] [--out FILE.jsonl or FOLDER] [--quick]

On a GPU: reference, torch.compile of it, and kernel, in turns. On a CPU: the reference. L2 is not flushed between
calls: the default batch's views, 231 MB, and the memory bank, 656 MB, are larger than any L2.

NCE is timed with its gradient, beside the original's way in plain PyTorch: gather [B, K + 1, D], multiply, take the logs, go
back through all of it (`plain_nce`; checked against nce_loss before anything is timed). The original's bank is
float32, so ours of either kind of rows is compared with that. Its limit is the random gather: the fastest of
several ways of only reading as many random rows, taken in turns with the rest.
"""

import contextlib
import functools
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import billion, measure, runs
from benchmarks.measure import IMAGENET
from fastrot import entry, native
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.space_to_depth import space_to_depth_of
from fastrot.config import AlexNet, Augment, RandomResized
from fastrot.data import crops
from fastrot.data.pack import layout
from fastrot.ops import norm
from fastrot.ops.augment import DRAWS, augmented
from fastrot.ops.blocks import PackTensors, unpack_crops, unpack_crops_reference
from fastrot.ops.choice import using
from fastrot.ops.nce import Draw, estimate_z, nce_loss
from fastrot.ops.rotate import SpaceToDepth, rotated_views, rotated_views_reference
from fastrot.ops.rows import update_rows

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's builds for the CPU come without it
    triton = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROTATIONS = (0, 1, 2, 3)
BATCH, NEGATIVES, DIM, PICTURES = 192, 4096, 128, IMAGENET  # of decoupling-alexnet
FEW = 100_000  # pictures of a quick look; their bank is still larger than a CPU's cache
RANKS = 64  # whose features a replicated bank takes in, in one step
TEMPERATURE, MOMENTUM, EPS = 0.07, 0.5, 1e-7
TIMES = {"cuda": 8.0, "cpu": 3.0}  # nce_loss over the plain gather
OF_GATHER = 0.8  # of the random-gather bandwidth, on a GPU
OF_MEMORY = 0.05  # of the plain gather's extra memory
SAVED_IN = 10.0  # seconds: "in seconds", for a row per picture of ImageNet
FIRST = (11, 4, 2)  # kernel, stride and padding of AlexNet's first convolution
IN_CELLS = "in cells"
COLOURS = {  # what is changed: the four in any order alone; PIRL's; all there is
    "jitter": Augment(photometric=0.0, grey=0.0), "default": Augment(), "all": Augment(blur=0.5),
}  # fmt: skip
PLAIN, AS_GRAPH, BOTH = "plain gather", "as a CUDA graph", "loss and gradient"
NORMED = [  # AlexNet's layers: channels, pixels a side where conv1 has 55, whether a pool follows
    ("conv1", 64, 55, True), ("conv2", 192, 27, True), ("conv3", 384, 13, False),
    ("conv4", 256, 13, False), ("conv5", 256, 13, True),
]  # fmt: skip
LANDSCAPE = (256, 341)  # height and width of a packed picture
PACKED, FEW_PACKED = 4096, 256  # pictures: 270 MB of tiles, larger than any L2; of a CPU
UNPACKED = {"cuda": 1e6, "cpu": 5e3}  # images a second at 224: their views; crops by a thread
CHUNK = 4096  # rows gathered into one reused buffer, which stays in the cache
MB = 2**20


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes a second, read and written, of copying half a gigabyte (64 MB on a CPU)."""
    source = torch.empty(
        (1 << 29) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source.fill_(1))
    times = measure.interleaved({"copy": lambda: target.copy_(source)}, device, seconds=seconds)
    spread = measure.spread(times["copy"])
    return 2 * source.numel() / (spread["p50"] / 1e3)


# ---- turned views ----


def bench_rotate(device: str, seconds: float, peak: float, shapes: list[tuple], dtype: torch.dtype):
    """Rows for each shape (images, pixels a side) and form."""
    for images, size in shapes:
        crops = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, device=device)

        def run(form: str, cells: SpaceToDepth | None = None, crops=crops):
            with using(form):
                rotated_views(crops, ROTATIONS, MEAN, STD, dtype, cells)

        cells = space_to_depth_of(size, *FIRST)
        assert cells is not None
        runs = {"reference": functools.partial(run, "reference")}
        runs[f"reference, {IN_CELLS}"] = functools.partial(run, "reference", cells)
        if device == "cuda":
            compiled = torch.compile(rotated_views_reference)
            runs["compiled reference"] = lambda crops=crops, compiled=compiled: compiled(
                crops, ROTATIONS, MEAN, STD, dtype
            )
            runs["kernel"] = functools.partial(run, "triton")
            runs[f"kernel, {IN_CELLS}"] = functools.partial(run, "triton", cells)
        written = len(ROTATIONS) * dtype.itemsize * images
        for form, times in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(times)
            view = cells.channels * cells.count**2 if form.endswith(IN_CELLS) else 3 * size**2
            moved = crops.numel() + written * view
            yield row(
                "rotated_views",
                form,
                mode="forward",
                shape={"images": images, "size": size, "rotations": len(ROTATIONS)},
                dtype=_name(dtype),
                **spread,
                **rates(moved, spread, copy=peak),
                images_per_s=images / (spread["p50"] / 1e3),
            )


# ---- colours ----


def bench_augment(device: str, seconds: float, peak: float, shapes: list[tuple]):
    """Rows for each shape (images, pixels a side) and kind of change."""
    for images, size in shapes:
        crops = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, device=device)
        draws = torch.rand(images, DRAWS, device=device)
        runs = {}
        for kind, how in COLOURS.items():
            run = functools.partial(augmented, crops, how, draws)
            runs[kind] = run
            if device == "cuda":
                runs[f"{kind}, compiled"] = functools.partial(
                    torch.compile(augmented, fullgraph=True, dynamic=False), *run.args
                )
        moved = 2 * crops.numel() + draws.nbytes
        for kind, times in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(times)
            yield row(
                "augmented",
                kind,
                mode="forward" + by(device),
                shape={"images": images, "size": size},
                dtype="uint8",
                **spread,
                **rates(moved, spread, copy=peak),
                images_per_s=images / (spread["p50"] / 1e3),
            )


# ---- the first convolution ----


def first_convolution(
    size: int, width: float, device: str, dtype: torch.dtype, space_to_depth: bool
):
    """AlexNet's, alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = alexnet(AlexNet(width=width, space_to_depth=space_to_depth), size)
    layer = trunk.get_submodule("conv1.conv").to(device, dtype)
    return layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def bench_first_convolution(
    device: str,
    seconds: float,
    shapes: list[tuple],
    dtype: torch.dtype,
    widths: tuple = (0.25, 1.0),
) -> Iterator[dict[str, Any]]:
    """Rows of conv1's output and its weights' gradient, in views of the kind that each takes from the turn kernel."""
    for (images, size), width in itertools.product(shapes, widths):
        crops = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, device=device)
        runs, results = {}, {}
        for form in ("plain", "folded"):
            fold = form == "folded"
            layer = first_convolution(size, width, device, dtype, fold)
            cells = space_to_depth_of(size, *FIRST) if fold else None
            views = rotated_views(crops, ROTATIONS, MEAN, STD, dtype, cells)
            runs[form] = functools.partial(there_and_back, layer, views)
            results[form] = runs[form]()
        for mine, other in zip(*results.values(), strict=True):
            loose = 1e-3 if dtype is torch.float32 else 3e-2
            assert (mine - other).float().norm() <= loose * other.float().norm()
        kernel = FIRST[0]
        out, _ = results["plain"]
        # two products of the matrices that the plain form has; the folded form's zeros are no work done
        flop = 2 * 2 * out.numel() * 3 * kernel**2
        shape = {"images": images, "size": size, "rotations": len(ROTATIONS), "width": width}
        for form, times in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(times)
            yield row(
                "conv1",
                form,
                mode="forward and backward" + by(device),
                shape=shape,
                dtype=_name(dtype),
                **spread,
                tflops=flop / (spread["p50"] / 1e3) / 1e12,
                images_per_s=images / (spread["p50"] / 1e3),
            )


def there_and_back(layer: torch.nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output, and its weight's gradient for an output's gradient of the output itself."""
    out = layer(views)
    return out.detach(), torch.autograd.grad(out, layer.weight, out.detach())[0]


# ---- batch norm, ReLU and pool ----


def bench_norm(
    device: str, seconds: float, peak: float, images: int, side: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Each of AlexNet's layers behind its convolution, forward alone and with its backward, for so many views.

    plain: what torch has, the convolution's bias included; both move what the docstring of ops/norm.py counts, so
    that their GB/s compare.
    """
    for name, channels, times, pool in NORMED:
        size = max(3, side * times // 55)
        y = torch.randn(images, channels, size, size, device=device, dtype=dtype)
        y = y.contiguous(memory_format=torch.channels_last).requires_grad_()
        learnt = [torch.ones(channels, device=device, requires_grad=True) for _ in range(3)]
        running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        runs, moved = {}, {}
        for variant, of in (("fused", fused_norm), ("plain", plain_norm)):
            out = functools.partial(of, y, *learnt, *running, pool)
            runs["forward", variant] = out
            runs["forward and backward", variant] = functools.partial(
                pulled, out, out().detach(), (y, *learnt)
            )
        places = out().numel() if pool else None
        n, s, q = y.numel(), dtype.itemsize, places or 0
        moved["forward and backward"] = (4 if pool else 8) * s * n + (5 * s + 3) * q
        moved["forward"] = (2 if pool else 3) * s * n + (2 * s + 1) * q
        for (mode, variant), took in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(took)
            yield row(
                "norm_relu_pool",
                variant,
                mode=mode + by(device),
                shape={"layer": name, "images": images, "channels": channels, "size": size},
                dtype=_name(dtype),
                **spread,
                **rates(moved[mode], spread, copy=peak),
            )


def fused_norm(y, weight, bias, shift, mean, var, pool: bool) -> Tensor:
    return norm.norm_relu(y, weight, bias, mean, var, shift=shift, pool=pool)


def plain_norm(y, weight, bias, shift, mean, var, pool: bool) -> Tensor:
    whole = y + shift.to(y.dtype)[:, None, None]
    out = F.batch_norm(whole, mean, var, weight, bias, training=True).relu_()
    return F.max_pool2d(out, 3, 2) if pool else out


def pulled(call: Callable[[], Tensor], pull: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(call(), leaves, pull)


# ---- out of a pack ----


def some_pack(pictures: int, device: str) -> PackTensors:
    """Random tiles, which decode as fast as any: landscapes of a short side of 256."""
    sizes = np.tile(np.array(LANDSCAPE, np.int32), (pictures, 1))
    first = torch.from_numpy(layout.firsts(sizes, "ycc")).to(device)
    tiles = torch.randint(0, 256, (int(first[-1]), 48), dtype=torch.uint8, device=device)
    return PackTensors(tiles, first, torch.from_numpy(sizes).to(device))


def unpack_in_c(pack: PackTensors, boxes: np.ndarray, size: int) -> np.ndarray:
    """As a pack's loader has it on a CPU, in the caller's own thread."""
    out = np.empty((len(boxes), size, size, 3), np.uint8)
    arrays = (each.numpy() for each in (pack.tiles, pack.first, pack.sizes))
    with contextlib.closing(native.Pool(0)) as pool:
        assert not pool.pack_crops(*arrays, boxes, out).wait().any()
    return out


def bench_unpack(device: str, seconds: float, peak: float, shapes: list[tuple], dtype: torch.dtype):
    """Crops on a CPU, one thread; on a GPU also their four views."""
    gpu = device == "cuda"
    pack = some_pack(PACKED if gpu else FEW_PACKED, device)
    sizes = pack.sizes.cpu().numpy()
    for images, size in shapes:
        index = np.arange(images) * 31 % len(sizes)
        rows = crops.boxes(RandomResized(size=size), sizes[index], seed=0, epoch=0, index=index)
        box = rows[:, 1:5]
        boxes = torch.from_numpy(rows).to(device)
        ends = -(-(box[:, :2] + box[:, 2:]) // layout.SIDE)
        read = 48 * int((ends - box[:, :2] // layout.SIDE).prod(axis=1).sum())
        crop, rest = 3 * images * size**2, (ROTATIONS, MEAN, STD, dtype)

        def unpacked(boxes=boxes, size=size):
            return unpack_crops(pack, boxes, size)

        runs, moved = {}, {}
        if gpu:
            runs["crops"] = unpacked
            runs["views"] = lambda run=unpacked, rest=rest: rotated_views(run(), *rest)
            moved["views"] = read + 2 * crop + len(ROTATIONS) * dtype.itemsize * crop
        else:
            runs["crops, reference"] = functools.partial(unpack_crops_reference, pack, boxes, size)
            if native.load() is not None:
                runs["crops, C++"] = functools.partial(unpack_in_c, pack, rows, size)
        for form, times in measure.interleaved(runs, device, seconds=seconds).items():
            spread = measure.spread(times)
            rate = UNPACKED[device] if form in ("views", "crops, C++") else None
            yield row(
                "unpack",
                form,
                shape={"images": images, "size": size},
                dtype="uint8" if form.startswith("crops") else _name(dtype),
                **spread,
                **rates(moved.get(form, read + crop), spread, copy=peak),
                images_per_s=images / (spread["p50"] / 1e3),
                **(
                    {}
                    if rate is None or size != 224
                    else {"target": 1e3 * images / rate, "better": "lower"}
                ),
            )


# ---- NCE: the original's way ----


def plain_nce(x: Tensor, rows: Tensor, index: Tensor, z: Tensor | None, population: int) -> Tensor:
    """Loss of each image [B] as the original computes it; InfoNCE where there is no z.

    x [B, D], rows [N, D], index [B, K + 1]: the image's own row first.
    """
    b, k = len(index), index.shape[1] - 1
    gathered = rows.index_select(0, index.flatten()).view(b, k + 1, -1)  # [B, K + 1, D]
    scores = torch.bmm(gathered, x[:, :, None])[:, :, 0] / TEMPERATURE
    if z is None:
        return F.cross_entropy(scores, index.new_zeros(b), reduction="none")
    p, noise = scores.exp() / z, k / population
    own = p[:, 0] / (p[:, 0] + noise + EPS)
    others = noise / (p[:, 1:] + noise + EPS)
    return -(own.log() + others.log().sum(dim=1))


def plain_index(positive: Tensor, k: int, rows: int) -> Tensor:
    """[B, K + 1]: K + 1 uniform draws, of which the image's own row replaces the first."""
    index = torch.randint(rows, (len(positive), k + 1), device=positive.device)
    index[:, 0] = positive
    return index


def plain_update(rows: Tensor, index: Tensor, features: Tensor) -> None:
    blend = MOMENTUM * rows.index_select(0, index) + (1 - MOMENTUM) * features
    rows.index_copy_(0, index, blend / blend.pow(2).sum(dim=1, keepdim=True).sqrt())


def check_plain(device: str) -> None:
    """The plain loss, its gradient and the plain write are ours. Raises AssertionError where they differ."""
    case = Case(device, batch=8, k=32, dim=16, pictures=100)
    index = plain_index(case.positive, case.k, len(case.rows))
    for kind, z in (("nce", case.z), ("infonce", None)):
        plain = plain_nce(case.x, case.rows, index, z, len(case.rows))
        ours = case.loss(case.rows, index[:, 1:].contiguous(), kind)
        for one, other in ((plain, ours), (case.gradient(plain), case.gradient(ours))):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other, places = case.rows.clone(), torch.arange(len(case.x), device=device)
    plain_update(other, places, case.x.detach())
    update_rows(case.rows, places, case.x, MOMENTUM)
    torch.testing.assert_close(case.rows, other)


# ---- NCE: ours ----


class Case:
    """A batch of unit features, a bank as it is at the start, and what to do with them."""

    def __init__(self, device: str, *, batch: int, k: int, dim: int, pictures: int):
        self.device, self.k = device, k
        draw = torch.Generator(device).manual_seed(0)
        bound = (3 / dim) ** 0.5
        self.rows = torch.empty(pictures, dim, device=device).uniform_(
            -bound, bound, generator=draw
        )
        x = torch.randn(batch, dim, device=device, generator=draw)
        self.x = F.normalize(x, dim=1).requires_grad_()
        self.positive = torch.randint(pictures, (batch,), device=device, generator=draw)
        self.explicit = torch.randint(pictures, (batch, k), device=device, generator=draw)
        self.draw = Draw(k, 0, self.positive, torch.zeros((), dtype=torch.int64, device=device))
        self.z = torch.full((), 2.2193 * pictures, device=device)  # what a fresh bank gives

    def loss(self, rows: Tensor, negatives: Tensor | Draw, kind: Any = "nce") -> Tensor:
        of = {"temperature": TEMPERATURE, "z": None if kind == "infonce" else self.z}
        return nce_loss(self.x, rows, self.positive, negatives, kind=kind, eps=EPS, **of)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), self.x)[0]

    def plain(self, kind: str = "nce") -> Tensor:
        """Loss and gradient of the plain form, its draw included."""
        index = plain_index(self.positive, self.k, len(self.rows))
        z = None if kind == "infonce" else self.z
        return self.gradient(plain_nce(self.x, self.rows, index, z, len(self.rows)))

    def ours(self, form: str, rows: Tensor, negatives: Tensor | Draw, kind: str = "nce") -> Tensor:
        with using(form):
            return self.gradient(self.loss(rows, negatives, kind))

    def z_of(self, form: str, rows: Tensor) -> Tensor:
        with using(form):
            return estimate_z(self.x, rows, self.positive, self.draw, temperature=TEMPERATURE)

    def moved(self, what: str, rows: Tensor) -> int:
        """Bytes that any way must move: each row once, x in and its gradient out."""
        negatives = self.explicit.numel() * rows.shape[1] * rows.itemsize
        if what == "random gather":
            return negatives
        own = self.x.numel() * rows.itemsize
        return negatives + own + 2 * self.x.numel() * self.x.itemsize


def bench_nce(case: Case, seconds: float, peak: float) -> Iterator[dict[str, Any]]:
    """Rows of the random gather, of NCE in all its forms, and of how they compare."""
    gpu = case.device == "cuda"
    banks = {_name(each.dtype): each for each in (case.rows, case.rows.bfloat16())}
    sides: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for dtype, rows in banks.items():
        for way, read in gathers(rows, case.explicit.flatten()).items():
            sides["random gather", way, dtype] = read
    sides["nce_loss", PLAIN, "float32"] = case.plain
    for form, (variant, dtype, rows) in _forms(banks, gpu):
        drawn = functools.partial(case.ours, form, rows, case.draw)
        given = functools.partial(case.ours, form, rows, case.explicit)
        sides["nce_loss", variant, dtype] = drawn
        sides["nce_loss", f"{variant}, negatives given", dtype] = given
        sides["infonce", variant, dtype] = functools.partial(drawn, "infonce")
        sides["estimate_z", variant, dtype] = functools.partial(case.z_of, form, rows)
    sides["infonce", PLAIN, "float32"] = functools.partial(case.plain, "infonce")
    if gpu:
        sides |= _replayed_too(sides)
    yield from nce_rows(case, banks, sides, seconds, peak)
    threads = torch.get_num_threads()
    if not gpu and threads > 1:  # and by one core, since busy neighbours touch that less
        torch.set_num_threads(1)
        kept = [key for key in sides if key[0] in ("random gather", "nce_loss")]
        yield from nce_rows(case, banks, {key: sides[key] for key in kept}, seconds, peak)
        torch.set_num_threads(threads)


def nce_rows(
    case: Case, banks: dict[str, Tensor], sides: dict, seconds: float, peak: float
) -> Iterator[dict[str, Any]]:
    shape = {"batch": len(case.positive), "negatives": case.k, "dim": case.rows.shape[1]}
    shape |= {"pictures": len(case.rows)}
    times = measure.interleaved(sides, case.device, seconds=seconds, warmup=2)
    spreads = {key: measure.spread(each) for key, each in times.items()}
    limit = dict.fromkeys(banks, 0.0)  # bytes a second of the fastest gather
    for (what, _, dtype), spread in spreads.items():
        if what == "random gather":
            rate = case.moved(what, banks[dtype]) / (spread["p50"] / 1e3)
            limit[dtype] = max(limit[dtype], rate)
    modes = {"random gather": "rows read, nothing kept", "estimate_z": "no gradient"}
    for (what, variant, dtype), spread in spreads.items():
        yield row(
            what,
            variant,
            mode=modes.get(what, BOTH) + by(case.device),
            shape=shape,
            dtype=dtype,
            **spread,
            **rates(case.moved(what, banks[dtype]), spread, copy=peak, gather=limit[dtype]),
        )
    yield from ratio_rows(times, case.device, shape)
    for dtype, rows in banks.items():
        spread = spreads.get(("nce_loss", f"kernel, {AS_GRAPH}", dtype))
        if spread is not None:
            yield share_row(dtype, case.moved("nce_loss", rows) / limit[dtype], spread, shape)


def ratio_rows(times: dict, device: str, shape: dict) -> Iterator[dict[str, Any]]:
    """Plain over ours, round by round: the kernel's on a GPU, called alike and replayed alike."""
    ours = "kernel" if device == "cuda" else "reference"
    ends = ("", f", {AS_GRAPH}") if device == "cuda" else ("",)
    for what in ("nce_loss", "infonce"):
        for dtype in ("float32", "bfloat16"):
            for end in ends:
                plain = times.get((what, PLAIN + end, "float32"))
                fast = times.get((what, ours + end, dtype))
                if plain is None or fast is None:
                    continue
                target = {"target": TIMES[device], "better": "higher"}
                yield row(
                    "ratio",
                    f"{what} / {PLAIN}, {dtype} rows{end}",
                    mode=BOTH + by(device),
                    shape=shape,
                    dtype=dtype,
                    **measure.middle(
                        [slow / each for slow, each in zip(plain, fast, strict=True)], "times"
                    ),
                    **(target if what == "nce_loss" else {}),
                )


def share_row(dtype: str, least: float, spread: dict, shape: dict) -> dict[str, Any]:
    """The kernel's share of the random gather, which takes `least` seconds; replayed, so without the host's launches."""
    share = [least / (spread[name] / 1e3) for name in ("p80", "p50", "p20")]
    return row(
        "share of random gather",
        f"nce_loss, {dtype} rows, {AS_GRAPH}",
        mode=BOTH,
        shape=shape,
        dtype=dtype,
        unit="share",
        **dict(zip(("p20", "p50", "p80"), share, strict=True)),
        reps=spread["reps"],
        target=OF_GATHER,
        better="higher",
    )


def bench_update(case: Case, seconds: float, peak: float) -> Iterator[dict[str, Any]]:
    """Rows of the bank's write: one rank's features, and those of many ranks."""
    banks = {_name(each.dtype): each for each in (case.rows.clone(), case.rows.bfloat16())}
    pictures, dim = case.rows.shape
    for ranks in (1, RANKS):
        b = len(case.positive) * ranks
        index = torch.randperm(pictures, device=case.device)[:b]
        features = F.normalize(torch.randn(b, dim, device=case.device), dim=1)
        plain = functools.partial(plain_update, banks["float32"], index, features)
        sides: dict[tuple[str, str], Callable[[], Any]] = {("plain", "float32"): plain}
        for form, (variant, dtype, rows) in _forms(banks, case.device == "cuda"):

            def run(form=form, rows=rows, index=index, features=features):
                with using(form):
                    update_rows(rows, index, features, MOMENTUM, eps=1e-12)

            sides[variant, dtype] = run
        for (variant, dtype), times in measure.interleaved(
            sides, case.device, seconds=seconds
        ).items():
            spread = measure.spread(times)
            moved = b * (8 + dim * (4 + 2 * banks[dtype].itemsize))
            yield row(
                "update_rows",
                variant,
                mode="in place",
                shape={"batch": b, "dim": dim, "pictures": pictures},
                dtype=dtype,
                **spread,
                **rates(moved, spread, copy=peak),
            )


def _forms(banks: dict[str, Tensor], gpu: bool) -> Iterator[tuple[str, tuple[str, str, Tensor]]]:
    """Each form with each bank: what `using` calls it, what a row calls it, the bank's dtype, the bank."""
    for form, variant in (("triton", "kernel"), ("reference", "reference")):
        if form == "reference" or gpu:
            for dtype, rows in banks.items():
                yield form, (variant, dtype, rows)


# ---- the limit: rows that are only read ----


if triton is not None:

    @triton.jit
    def _sum_of_rows(
        rows, picks, out, count, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Each program reads BLOCK random rows and keeps their sum."""
        program = tl.program_id(0).to(tl.int64)
        places = program * BLOCK + tl.arange(0, BLOCK)
        column = tl.arange(0, COLUMNS)
        within = (places < count)[:, None] & (column < DIM)[None, :]
        pick = tl.load(picks + places, mask=places < count, other=0)
        near = tl.load(rows + pick[:, None] * DIM + column[None, :], mask=within, other=0.0)
        tl.store(out + program * DIM + column, tl.sum(near.to(tl.float32), 0), mask=column < DIM)


def gathers(rows: Tensor, picks: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways of reading these rows [p] of the bank and keeping next to nothing: the fastest is the limit."""

    def selected(buffer: Tensor) -> None:
        for some in picks.split(len(buffer)):
            torch.index_select(rows, 0, some, out=buffer[: len(some)])

    ways: dict[str, Callable[[], Any]] = {}
    if not rows.is_cuda:
        buffer = torch.empty(CHUNK, rows.shape[1], dtype=rows.dtype)
        ways[f"index_select, {CHUNK} rows into one buffer"] = functools.partial(selected, buffer)
    starts = torch.arange(0, len(picks), 64, device=picks.device)
    ways["embedding_bag, sums of 64"] = lambda: F.embedding_bag(picks, rows, starts, mode="sum")
    if rows.is_cuda and triton is not None:
        for block in (16, 32, 64):
            name = f"kernel, sums of {block}"
            ways[name] = functools.partial(sum_of_rows, rows, picks, block)
    return ways


def sum_of_rows(rows: Tensor, picks: Tensor, block: int) -> Tensor:
    """Sums of `block` rows each, float32 [ceil(p / block), D]."""
    dim, count = rows.shape[1], len(picks)
    programs = -(-count // block)
    out = torch.empty(programs, dim, device=rows.device)
    _sum_of_rows[(programs,)](
        rows, picks, out, count, DIM=dim, COLUMNS=triton.next_power_of_2(dim), BLOCK=block
    )
    return out


def _replayed_too(sides: dict) -> dict:
    """What is called from the host, once more as a CUDA graph: the device's own time."""
    more = {}
    for (what, variant, dtype), call in sides.items():
        if what != "random gather" and variant not in (PLAIN, "kernel"):
            continue
        try:
            more[what, f"{variant}, {AS_GRAPH}", dtype] = replayed(call)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            print(f"{what}, {variant}, {dtype}: no CUDA graph of it ({said})", flush=True)
    return more


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, captured once."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- memory ----


def bench_memory(device: str, knobs: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Rows of the extra memory of one call, loss and gradient, and their ratio."""
    shape = {"batch": knobs["batch"], "negatives": knobs["k"], "dim": knobs["dim"]}
    shape |= {"pictures": knobs["pictures"]}
    ours = "kernel" if device == "cuda" else "reference"
    mode = "of one call, loss and gradient" + (
        ", in a fresh process" if device == "cpu" else ", as torch allots it"
    )
    found = {}
    for variant in (PLAIN, ours):
        if device == "cuda":
            found[variant] = extra_memory(device, variant, knobs)
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[variant] = pool.submit(extra_memory, device, variant, knobs).result()
        of = measure.middle([found[variant]], "MB")
        yield row("peak extra memory", variant, mode=mode, shape=shape, dtype="float32", **of)
    yield row(
        "extra memory",
        f"nce_loss over the {PLAIN}'s",
        mode=mode,
        shape=shape,
        dtype="float32",
        **measure.middle([found[ours] / found[PLAIN]], "share"),
        target=OF_MEMORY,
        better="lower",
    )


def extra_memory(device: str, variant: str, knobs: dict[str, int]) -> float:
    """MB that one call needs at its height, beyond what it is given. On a CPU: of the process, so in a new one."""
    tiny = Case(device, **(knobs | {"batch": 4, "pictures": 10}))
    case = Case(device, **knobs)

    def call(case: Case) -> None:
        if variant == PLAIN:
            case.plain()
        else:
            case.ours("triton" if variant == "kernel" else "reference", case.rows, case.draw)

    call(tiny)  # libraries load, and threads start
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(case)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / MB
    held = measure.memory("VmRSS")
    call(case)
    return measure.memory("VmHWM") - held


# ---- a bank in the checkpoint ----


def bench_saved_bank(device: str, knobs: dict[str, int], reps: int) -> Iterator[dict[str, Any]]:
    """Seconds to check a bank for what is not finite and write it, as a checkpoint does, and to take it back."""
    with tempfile.TemporaryDirectory() as folder:
        each = [billion.bank_times(knobs["pictures"], device, Path(folder))[0] for _ in range(reps)]
    shape = {"dim": knobs["dim"], "pictures": knobs["pictures"]}
    for variant in ("saved", "loaded"):
        took = measure.middle([times[variant] for times in each], "s")
        wanted = {"target": SAVED_IN, "better": "lower"} if variant == "saved" else {}
        yield row("bank in a checkpoint", variant, shape=shape, dtype="float32", **took, **wanted)


# ---- the command ----


def row(what: str, variant: str, **fields: Any) -> dict[str, Any]:
    return measure.row(what, variant=variant, **{"warmup": 3, **fields})


def rates(
    moved: int, spread: dict, *, copy: float, gather: float | None = None
) -> dict[str, float]:
    """Bytes a second, beside the copy's and the random gather's."""
    rate = moved / (spread["p50"] / 1e3)
    found = {"bytes": moved, "gb_per_s": rate / 1e9}
    found |= {"copy_gb_per_s": copy / 1e9, "share_of_peak": rate / copy}
    if gather is None:
        return found
    return found | {"gather_gb_per_s": gather / 1e9, "share_of_gather": rate / gather}


def by(device: str) -> str:
    """How many threads, on a CPU."""
    threads = torch.get_num_threads()
    return "" if device == "cuda" else f", {threads} thread{'s' * (threads > 1)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FAMILIES = ("nce", "bank", "views", "unpack", "norm")


def rows_of(families: list[str], device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of each family of ops, measured as they are drawn."""
    gpu = device == "cuda"
    seconds = 0.5 if quick else 2.0 if gpu else 5.0
    knobs = {"batch": BATCH, "k": NEGATIVES, "dim": DIM, "pictures": FEW if quick else PICTURES}
    if gpu:
        shapes = [(64, 64)] if quick else [(192, 224), (512, 224), (1024, 128), (64, 64)]
    else:
        shapes = [(16, 64)] if quick else [(64, 64), (32, 128), (16, 224)]
    peak = copy_bandwidth(device, seconds)
    print(f"copy: {peak / 1e9:.1f} GB/s")
    of_case = knobs | {"batch": BATCH // 8} if quick and not gpu else knobs
    if "nce" in families:
        check_plain(device)
        yield from bench_nce(Case(device, **of_case), seconds, peak)
        yield from bench_memory(device, knobs)
    if "bank" in families:
        yield from bench_update(Case(device, **of_case), seconds, peak)
        yield from bench_saved_bank(device, knobs, 1 if quick else 3)
    of_views = torch.bfloat16 if gpu else torch.float32
    if "views" in families:
        yield from bench_rotate(device, seconds, peak, shapes, of_views)
        yield from bench_augment(device, seconds, peak, shapes)
        small = shapes[0] if gpu else (4, shapes[0][1])
        firsts = [small if quick else (BATCH if gpu else 4, 224)]
        yield from bench_first_convolution(device, seconds, firsts, of_views)
    if "unpack" in families:
        yield from bench_unpack(device, seconds, peak, shapes, torch.bfloat16)
    if "norm" in families:
        views = BATCH * len(ROTATIONS) if gpu else 16
        few = (4, 15) if quick else (views, 55)
        yield from bench_norm(device, seconds / 4, peak, *few, of_views)


def describe(row: dict[str, Any]) -> str:
    """What `measure.say` leaves out."""
    of = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    told = [f" of {of}, {row['dtype']}"]
    told += [f"{row['gb_per_s']:.1f} GB/s"] if "gb_per_s" in row else []
    told += [f"{row['share_of_peak']:.0%} of copy"] if "share_of_peak" in row else []
    told += [f"{row['share_of_gather']:.0%} of gather"] if "share_of_gather" in row else []
    return ", ".join(told)


def main(args: list[str] | None = None) -> int:
    """Measure, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "device", "quick")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    asked = parser.parse_args(args)
    runs.keep(rows_of(asked.only, asked.device, asked.quick), asked, describe)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
