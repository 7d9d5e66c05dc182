"""What a training step costs at least: arithmetic and bytes, layer by layer, counted and not measured.

A layer is a matrix product (a convolution or a linear layer) with what follows up to the next one: BatchNorm, ReLU, pool.

Arithmetic.  A product of n outputs, each a sum of k terms, takes 2 n k operations forward, as many for the gradient of its
             weights, and as many for that of its input, which the first layer's needs not.
Traffic.     Bytes that other kernels move in the device's memory, each value once for each kernel that reads or writes it.
             n: what the product gives, m: what the layer gives (fewer behind a pool), of `itemsize` bytes each.

    eager, forward    bias: reads and writes n (a convolution's; a linear layer adds it as it multiplies)
                      BatchNorm: reads n for its statistics, reads and writes n
                      ReLU, in place: reads and writes n
                      pool: reads n, writes m; a max pool also 8 bytes a place, which value it was
                      flattening behind a map, channels last: reads and writes m
           backward   flattening: the same; pool: reads m and the places, writes n
                      ReLU: reads its gradient and its output, writes n
                      BatchNorm: reads gradient and input for two sums, reads both again, writes n
                      bias: reads n
    fused, forward    one kernel reads n for the statistics, one reads n and writes m; there is no bias
           backward   one reads n and m for the two sums, one reads both again and writes n; which values were cut off
                      by the ReLU is seen in n again
                      behind a max pool: with each value that it gives, forward also writes what it was made of and,
                      in a byte, where it stood; the sums read these two and the gradient, the last one place and gradient
                      without BatchNorm: reads n, writes m; reads n and m, writes n
    judged            forward alone, BatchNorm by its running statistics: eager as above but for these, fused one kernel
                      that reads n and writes m

What a matrix kernel itself reads and writes is not counted: it is hidden behind its arithmetic, where that is the larger.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
PRODUCTS = (nn.Conv2d, nn.Linear)
SEEN = (*PRODUCTS, *NORMS, *POOLS, nn.ReLU, nn.Flatten)
PLACE = 8  # bytes that a max pool notes for each value that it gives
MASTER = (
    4  # bytes of a weight, of its gradient and of its momentum: float32, whatever the arithmetic
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's share of a step, forward and backward.

    flop             operations of its matrix products, a multiplication and its addition counted as 2
    traffic          bytes that other kernels move where what follows a product is fused
    traffic_unfused  the same where each operation is a kernel of its own (eager)
    weights          bytes of its parameters in float32
    """

    name: str
    flop: int
    traffic: int
    traffic_unfused: int
    weights: int


def layers(
    net: nn.Module, views_shape: Sequence[int], dtype: torch.dtype, *, training: bool = True
) -> list[Layer]:
    """The layers of `net` for views of this shape, [v, channels, height, width], in the order in which they run.

    dtype     of the activations
    training  forward and backward; False: forward alone, as in a validation

    The net is left alone: a copy without numbers is run. What is no module is not seen (an average over a map, a
    loss). A net whose layers are folded or fused costs what the plain one does: an operation that only fills a matrix
    kernel's shape is none that the task asks for.
    """
    groups: list[list[tuple[str, nn.Module, int, int]]] = []
    for call in _calls(net, views_shape):
        if isinstance(call[1], PRODUCTS):
            groups.append([call])
        elif groups:
            groups[-1].append(call)
    counted = {name for (name, *_), *_ in groups}
    products = {name for name, each in net.named_modules() if isinstance(each, PRODUCTS)}
    assert counted == products, f"not called as modules: {sorted(products - counted)}"
    passes = [1 if not training else 2 if k == 0 else 3 for k in range(len(groups))]
    return [
        _layer(group, dtype.itemsize, times) for group, times in zip(groups, passes, strict=True)
    ]


def optimiser_bytes(net: nn.Module, dtype: torch.dtype, *, momentum: bool = True) -> int:
    """Bytes a step of SGD as one kernel: it reads weight, gradient and momentum, writes weight and momentum.

    With activations of two bytes autocast also casts the weights of products before a step, and their gradients back.
    """
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    moved = (5 if momentum else 3) * MASTER * trained
    if dtype.itemsize < MASTER:
        products = (each for each in net.modules() if isinstance(each, PRODUCTS))
        cast = sum(p.numel() for each in products for p in each.parameters() if p.requires_grad)
        moved += 2 * (MASTER + dtype.itemsize) * cast
    return moved


def _calls(net: nn.Module, views_shape: Sequence[int]) -> list[tuple[str, nn.Module, int, int]]:
    """Each module that counts, as it is called: its name, itself, the values that it takes and gives."""
    kept = (*net.parameters(), *net.buffers())
    empty: dict[int, Any] = {}
    for tensor in kept:
        hollow = tensor.detach().to("meta")
        empty[id(tensor)] = nn.Parameter(hollow) if isinstance(tensor, nn.Parameter) else hollow
    hollow_net = copy.deepcopy(
        net, empty
    ).eval()  # in eval a fused layer calls its parts as modules
    calls = []

    def note(name: str):
        def noted(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            calls.append((name, module, given[0].numel(), out.numel()))

        return noted

    for name, module in hollow_net.named_modules():
        if isinstance(module, SEEN):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        hollow_net(torch.empty(*views_shape, device="meta"))
    return calls


def _layer(group: list[tuple[str, nn.Module, int, int]], itemsize: int, passes: int) -> Layer:
    """`passes`: products of the forward's size that it takes; 1: forward alone."""
    name, product, _, n = group[0]
    assert isinstance(product, PRODUCTS)
    terms = math.prod(product.weight.shape[1:])
    of = [module for _, module, _, _ in group[1:]]
    weights = sum(p.numel() for module in (product, *of) for p in module.parameters())
    return Layer(
        name=name.removeprefix("trunk.").removesuffix(".conv"),
        flop=passes * 2 * n * terms,
        traffic=_fused(group, itemsize, passes > 1),
        traffic_unfused=_eager(group, itemsize, passes > 1),
        weights=weights * MASTER,
    )


def _fused(group: list[tuple[str, nn.Module, int, int]], itemsize: int, training: bool) -> int:
    """Bytes that the kernels behind a product move, where these are fused."""
    (_, product, _, n), m = group[0], group[-1][3]
    of = [module for _, module, _, _ in group[1:]]
    if not any(isinstance(module, (*NORMS, *POOLS, nn.ReLU)) for module in of):
        return n * itemsize if training and getattr(product, "bias", None) is not None else 0
    if not training:
        return (n + m) * itemsize
    if not any(isinstance(module, NORMS) for module in of):
        return ((n + m) + (n + m + n)) * itemsize
    if any(isinstance(module, nn.MaxPool2d) for module in of):
        sums = (2 * itemsize + 1) * m
        return n * itemsize + (n * itemsize + sums) + sums + (2 * n * itemsize + (itemsize + 1) * m)
    return (n + (n + m) + (n + m) + (n + m + n)) * itemsize


def _eager(group: list[tuple[str, nn.Module, int, int]], itemsize: int, training: bool) -> int:
    """Bytes that the kernels behind a product move, where each operation is one."""
    _, product, _, n = group[0]
    forward = backward = places = 0  # values; values; places that max pools note
    if getattr(product, "bias", None) is not None:
        forward += 2 * n if isinstance(product, nn.Conv2d) else 0
        backward += n
    for _, module, taken, given in group[1:]:
        if isinstance(module, NORMS):
            forward += training * taken + taken + given
            backward += 4 * taken + given
        elif isinstance(module, nn.ReLU):
            forward += 2 * given
            backward += 3 * given
        elif isinstance(module, POOLS):
            forward += taken + given
            backward += taken + given
            places += given if isinstance(module, nn.MaxPool2d) else 0
        elif isinstance(module, nn.Flatten):
            forward += 2 * given
            backward += 2 * given
    return (forward + training * backward) * itemsize + (1 + training) * PLACE * places
