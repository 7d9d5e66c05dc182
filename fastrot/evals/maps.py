"""Where a network looks: gradients of its outputs by its input (saliency), and where its stages answer (attention)."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from fastrot.backbones.staged import Staged

# views of so many pixels in all go through a net at once; on a CPU more than its caches hold take up to twice the time
PIXELS = {"cpu": 2**17, "cuda": 2**22}
Reduce = Literal["max", "mean"]


def saliency(
    ask: Callable[[Float[Tensor, "b 3 s s"]], Float[Tensor, "b n"]],
    views: Float[Tensor, "b 3 s s"],
    reduce: Reduce = "max",
) -> Float[Tensor, "b s s"]:
    """Of each pixel the largest |d neuron / d colour| over its colours, and of these the largest or mean over the n neurons.

    ask    from normalised views to n neurons of each; its parameters want no gradient
    views  as the network takes them, by which the gradients are: normalised, not from 0 to 1

    Gradients of several neurons are taken at once (batched vector-Jacobian products), of views of PIXELS pixels in all, however many
    views and neurons there are.
    """
    at_once = max(1, PIXELS.get(views.device.type, PIXELS["cpu"]) // views[0, 0].numel())
    if len(views) > at_once:
        return torch.cat([saliency(ask, part, reduce) for part in views.split(at_once)])
    views = views.detach().requires_grad_()
    neurons = ask(views)
    count, width = neurons.shape
    found = views.new_zeros(count, *views.shape[2:])
    for some in torch.eye(width, device=views.device).split(at_once // count):
        (slope,) = torch.autograd.grad(
            neurons,
            views,
            some[:, None].expand(-1, count, -1),
            retain_graph=True,
            is_grads_batched=True,
        )
        each = slope.abs().amax(dim=2)
        found = (
            torch.maximum(found, each.amax(dim=0))
            if reduce == "max"
            else found + each.sum(0) / width
        )
    return found


def saliency_quality(
    maps: Float[np.ndarray, "m h w"],
    threshold: float,
    boxes: Int64[np.ndarray, "n 4"],
    reduce: Reduce = "max",
) -> float:
    """Q(S, B): how well the pixels S that reach `threshold` agree with the boxes B, as area of both / area of either.

    maps   of m neurons, reduced to one map S
    boxes  r0 c0 r1 c1, half open, united; without one Q is 0

    Q = sum(S B) / (sum(B) + sum(max(S - B, 0))) as the object- and scene-centric study has it.
    """
    whole = torch.from_numpy(np.asarray(maps, np.float64))
    whole = whole.amax(dim=0) if reduce == "max" else whole.mean(dim=0)
    inside = inside_of(boxes, *whole.shape)
    return float(qualities(whole[None], inside[None], torch.tensor([threshold])[None])[0, 0])


def inside_of(boxes: Int64[np.ndarray, "n 4"], height: int, width: int) -> Float[Tensor, "h w"]:
    """1 within any of the boxes, r0 c0 r1 c1 half open; else 0."""
    mask = torch.zeros(height, width)
    for top, left, bottom, right in np.asarray(boxes).reshape(-1, 4).clip(0).tolist():
        mask[top:bottom, left:right] = 1
    return mask


def qualities(
    maps: Float[Tensor, "b h w"], inside: Float[Tensor, "b h w"], thresholds: Float[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """Q of each map at each of its thresholds; see `saliency_quality`."""
    box, found = inside.flatten(1) > 0, []
    for threshold in thresholds.to(maps.dtype).T:  # one after the other: all at once fill gigabytes
        seen = maps.flatten(1) >= threshold[:, None]
        both, either = (each.sum(dim=1).double() for each in (seen & box, seen | box))
        found.append(both / either.clamp_min(1))
    return torch.stack(found, dim=1)


@torch.no_grad()
def attention(
    net: Staged, views: Float[Tensor, "b 3 s s"], stages: Sequence[str], powers: Sequence[float]
) -> list[Float[Tensor, "b h w"]]:
    """Of each stage, which gives maps, the sum over its channels of |activation|^p, from 0 to 1 in each picture (Zagoruyko 2017)."""
    found = []
    for each, power in zip(net.outputs(views, stages), powers, strict=True):
        # of the picture's largest, so that no power of small ones is lost
        share = each.abs() / each.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-38)
        amount = share.pow(power).sum(dim=1)
        low, high = amount.amin(dim=(1, 2), keepdim=True), amount.amax(dim=(1, 2), keepdim=True)
        found.append((amount - low) / (high - low).clamp_min(1e-12))
    return found


def upscaled(maps: Float[Tensor, "b h w"], side: int) -> Float[Tensor, "b side side"]:
    """The same maps over pictures of `side` pixels, bilinear."""
    return F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
