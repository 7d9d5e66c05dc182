"""What a training step costs at least: arithmetic and bytes, layer by layer, counted and not measured.

A layer is a matrix product (a convolution or a linear layer) with what follows up to the next one: BatchNorm, ReLU, pool.
A product of n outputs, each a sum of k terms, takes 2 n k operations forward, as many for the gradient of its weights, and
as many for that of its input, which the first layer's needs not. README.md says which bytes are counted.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastrot.config import Config, Optim, RMSprop
from fastrot.core import DTYPES, Batch, Method, View

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid)
PRODUCTS = (nn.Conv2d, nn.Linear)
SEEN = (*PRODUCTS, *NORMS, *POOLS, *ACTIVATIONS, nn.Flatten)
PLACE = 8  # bytes that a max pool notes for each value that it gives
FLOAT32 = 4  # bytes of a weight, its gradient and its momentum, whatever the arithmetic


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's share of a step, forward and backward."""

    name: str
    flop: int  # of its matrix products; a multiplication and its addition count as 2
    traffic: int  # bytes that other kernels move where what follows a product is fused
    traffic_unfused: int  # the same where each operation is a kernel of its own (eager)
    weights: int  # bytes of its parameters in float32


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step of training takes at least."""

    flop: int  # of matrix products
    traffic: int  # bytes that other kernels and the optimiser move


def step_cost(method: Method, view: View, cfg: Config, device: torch.device) -> StepCost:
    """A step of `cfg.batch` pictures in the form in which the config runs it: fused, or an operation a kernel.

    The network is not run, and no random number is drawn.
    """
    dtype, shapes = DTYPES[cfg.precision], views_shapes(method, view, cfg.batch, device)
    fused = cfg.compile or getattr(cfg.backbone, "fuse", False)
    each = layers(method.net, shapes, dtype)
    traffic = sum(layer.traffic if fused else layer.traffic_unfused for layer in each)
    traffic += optimiser_bytes(method.net, dtype, cfg.optim)
    return StepCost(flop=sum(layer.flop for layer in each), traffic=traffic)


def views_shapes(method: Method, view: View, images: int, device: torch.device) -> Any:
    """The shape of the views of so many pictures, or a tuple of shapes. No random number is drawn."""
    eager = torch.compiler.set_stance(
        "force_eager"
    )  # a form for one picture is not worth compiling
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eager:
        views = method.views(random_batch(view, 1, device))
    return tree_map(lambda each: (images * len(each), *each.shape[1:]), views)


def random_batch(view: View, images: int, device: torch.device) -> Batch:
    """Random pixels, always the same, in the shapes that a Loader of this view gives; of rows 0, 1, ..., class 0."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(images, crop.size, crop.size, 3) for crop in view.crops]
    crops = [torch.randint(256, shape, dtype=torch.uint8, generator=draw) for shape in shapes]
    return Batch(
        tuple(crop.to(device) for crop in crops),
        index=torch.arange(images, device=device),
        label=torch.zeros(images, dtype=torch.int64, device=device),
        epoch_step=torch.zeros(2, dtype=torch.int64, device=device),
    )


# ---- layer by layer ----


class Call(NamedTuple):
    """A module as the network calls it, and how many values it takes and gives."""

    name: str
    module: nn.Module
    taken: int
    given: int


def layers(
    net: nn.Module, views_shape: Sequence[Any], dtype: torch.dtype, *, training: bool = True
) -> list[Layer]:
    """The layers of `net`, in the order in which they run.

    views_shape  of the views that it takes, [v, channels, height, width]; a tuple of shapes for a tuple of views
    dtype        of the activations
    training     forward and backward; False: forward alone, as in a validation

    What is no module is not seen (an average over a map, the sum of two branches, a loss). A net with --backbone.space-to-depth or --backbone.fuse
    costs what the plain one does: an operation that only fills a matrix kernel's shape is none that the task asks for.
    """
    groups: list[list[Call]] = []
    for call in _calls(net, views_shape):
        if isinstance(call.module, PRODUCTS):
            groups.append([call])
        elif groups:
            groups[-1].append(call)
    # of a frozen trunk what no head reads is not called
    learning = {
        n for n, each in net.named_modules() if isinstance(each, PRODUCTS) and _trained(each)
    }
    unseen = learning - {group[0].name for group in groups}
    assert not unseen, f"not called as modules: {sorted(unseen)}"
    counts, below = [], False  # below: whether the gradient of a layer's input is asked for
    for group in groups:
        below = below and group[0].name != groups[0][0].name  # pixels have none
        passes = 1 + training * (_trained(group[0].module) + below)
        counts.append(_layer(group, dtype.itemsize, passes))
        below = below or any(_trained(call.module) for call in group)
    return counts


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def optimiser_bytes(net: nn.Module, dtype: torch.dtype, optim: Optim) -> int:
    """Bytes a step of the optimiser as one kernel: it reads and writes weight, momentum, and RMSprop's mean square, and reads the gradient.

    With activations of two bytes autocast also casts the weights of products before a step, and their gradients back.
    """
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    states = (optim.momentum > 0) + isinstance(optim, RMSprop)
    moved = (3 + 2 * states) * FLOAT32 * trained
    if dtype.itemsize < FLOAT32:
        products = (each for each in net.modules() if isinstance(each, PRODUCTS))
        cast = sum(p.numel() for each in products for p in each.parameters() if p.requires_grad)
        moved += 2 * (FLOAT32 + dtype.itemsize) * cast
    return moved


def _calls(net: nn.Module, views_shape: Sequence[Any]) -> list[Call]:
    """Each module that counts, as it is called: by a copy of the net that has no numbers."""
    empty: dict[int, Any] = {id(b): b.to("meta") for b in net.buffers()}
    empty |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in net.parameters()}
    hollow = copy.deepcopy(net, empty).eval()  # where a fused layer calls its parts as modules
    calls = []

    def noted(name: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        calls.append(Call(name, module, given[0].numel(), out.numel()))

    for name, module in hollow.named_modules():
        if isinstance(module, SEEN):
            module.register_forward_hook(functools.partial(noted, name))
    with torch.no_grad():
        hollow(_meta(views_shape))
    return calls


def _meta(shape: Sequence[Any]) -> Any:
    """Tensors without numbers: one, or a tuple of them for a tuple of shapes."""
    if isinstance(shape[0], int):
        return torch.empty(*shape, device="meta")
    return tuple(map(_meta, shape))


def _layer(group: list[Call], itemsize: int, passes: int) -> Layer:
    """`passes`: products of the forward's size that it takes; 1: forward alone."""
    product = group[0].module
    assert isinstance(product, PRODUCTS)
    return Layer(
        name=group[0].name.removeprefix("trunk.").removesuffix(".conv"),
        flop=passes * 2 * group[0].given * math.prod(product.weight.shape[1:]),
        traffic=_fused(group, itemsize, passes > 1),
        traffic_unfused=_eager(group, itemsize, passes > 1),
        weights=FLOAT32 * sum(p.numel() for call in group for p in call.module.parameters()),
    )


def _fused(group: list[Call], itemsize: int, training: bool) -> int:
    """Bytes that the kernels behind a product move, where these are fused. n, m: values of the product, of the layer."""
    (product, *rest), n, m = group, group[0].given, group[-1].given

    def has(*kinds: type[nn.Module]) -> bool:
        return any(isinstance(call.module, kinds) for call in rest)

    if not has(*NORMS, *POOLS, *ACTIVATIONS):
        return training * _has_bias(product) * n * itemsize
    if not training:
        return (n + m) * itemsize
    if not has(*NORMS):
        return ((n + m) + (n + m + n)) * itemsize
    if has(nn.MaxPool2d):
        sums = (2 * itemsize + 1) * m
        return n * itemsize + (n * itemsize + sums) + sums + (2 * n * itemsize + (itemsize + 1) * m)
    return (n + (n + m) + (n + m) + (n + m + n)) * itemsize


def _eager(group: list[Call], itemsize: int, training: bool) -> int:
    """Bytes that the kernels behind a product move, where each operation is one."""
    (product, *rest), passes = group, 1 + training
    moved = places = 0  # values; places that max pools note
    if _has_bias(product):
        moved += (2 * isinstance(product.module, nn.Conv2d) + training) * product.given
    for _, module, taken, given in rest:
        if isinstance(module, NORMS):
            moved += taken + given + training * (5 * taken + given)
        elif isinstance(module, ACTIVATIONS):
            moved += (2 + 3 * training) * given
        elif isinstance(module, POOLS):
            moved += passes * (taken + given)
            places += passes * given * isinstance(module, nn.MaxPool2d)
        else:  # flattened
            moved += passes * 2 * given
    return moved * itemsize + PLACE * places


def _has_bias(product: Call) -> bool:
    return getattr(product.module, "bias", None) is not None
