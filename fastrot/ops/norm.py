# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Batch norm with the batch's own statistics, ReLU, and where asked a 3x3 max pool of stride 2, forward and backward.

Shapes.  y [N, C, H, W] channels_last, a convolution's output without its bias, seen as [M, C], M = N H W rows. weight, bias,
         running_mean, running_var and shift (the bias that was left out) [C]. out [N, C, H, W], pooled [N, C, P, Q] with
         P = (H - 3) // 2 + 1, Q = (W - 3) // 2 + 1, channels_last.
Maths.   mean, var (biased) of each column of y; x = (y - mean) / sqrt(var + eps); out = max(weight x + bias, 0), the largest of each
         window (Ioffe 2015, arXiv 1502.03167). Of equal y the first in scan order wins, and of all where weight is 0, as in
         torch's max_pool2d; what only out's rounding makes equal is told apart. With g the gradient at weight x + bias
         (zero where ReLU cut, and where no window chose):
             dbias = sum g,   dweight = sum g x,   dy = weight / sqrt(var + eps) (g - dbias / M - x dweight / M)
         A bias in front moves mean by itself and nothing else: its gradient is zero, and running_mean <- (1 - m) running_mean +
         m (mean + shift), running_var <- (1 - m) running_var + m var M / (M - 1), as BatchNorm2d has them.
Idea.    Four passes instead of a dozen: statistics; normalise, clamp, pool; two sums; dy. The forward keeps, beside y, of each window
         the winner's place (uint8, 0 to 8; 9: ReLU cut it) and its y, so that the sums read the pooled map alone. Backward, a
         program owns 2 x 2 elements of y, and each of their nine meetings with a window is one comparison with a constant.
Bytes.   For each element of y of s bytes: 4 s + q (5 s + 3) pooled, to q elements (a quarter), and 8 s not: 11.25 and 16 bytes
         in bfloat16. README.md has them pass by pass.
Digits.  Statistics: a mean and the squares about it, row after row (Welford 1962), merged by Chan's formula about one of the
         means (Chan 1983), all in float32 and in a fixed order: the same bits again on the same device.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops import norm_kernels as kernels
from fastrot.ops.choice import form_for
from fastrot.ops.norm_kernels import CHANNELS_LAST, CUT_OFF, Three
from fastrot.ops.rows import check_device, misfit

Maps = Float[Tensor, "n c h w"]
Each = Float[Tensor, " c"]  # one number a channel

# ---- reference ----


def statistics_reference(
    y: Maps, running_mean: Each, running_var: Each, shift: Each | None, momentum: float
) -> tuple[Each, Each]:
    """Mean and biased variance of each channel, in float32 at least; the running ones are moved."""
    rows = y.numel() // y.shape[1]
    # batch_norm's own statistics, which on a CPU take a hundredth of var_mean's time
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    F.batch_norm(y, mean, var, training=True, momentum=1.0)
    var.mul_((rows - 1) / rows)
    seen = mean if shift is None else mean + shift
    running_mean.mul_(1 - momentum).add_(seen, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * rows / (rows - 1))
    return mean, var


def norm_relu_reference(
    y: Maps, weight: Each, bias: Each, mean: Each, var: Each, eps: float, pool: bool
) -> Three:
    """out, and of each window its winner's y and place (of no element, not pooled)."""
    normal = F.batch_norm(y, mean, var, weight, bias, training=False, eps=eps).relu_()
    if not pool:
        return normal, y.new_empty(0), y.new_empty(0, dtype=torch.uint8)
    out, chosen = F.max_pool2d(normal, 3, 2, return_indices=True)
    n, c, _, width = y.shape
    lines = chosen.permute(0, 2, 3, 1)  # rows of channels are quicker to gather
    picks = lines.reshape(n, -1, c)
    peak = y.permute(0, 2, 3, 1).reshape(n, -1, c).gather(1, picks).view(lines.shape)
    winner = chosen.int() - (_corner(out, 2) * width + _corner(out, 3)).int()
    winner -= ((winner >= width).int() + (winner >= 2 * width)) * (width - 3)
    winner = winner.to(torch.uint8).masked_fill_(out <= 0, CUT_OFF)
    one, two = (each.contiguous(memory_format=CHANNELS_LAST) for each in (out, winner))
    return one, peak.permute(0, 3, 1, 2), two


def norm_relu_back_reference(grad: Tensor, kept: Sequence[Tensor], eps: float, pool: bool) -> Three:
    """dy, dweight and dbias; `kept` are y, weight, bias, mean, var, peak and winner."""
    y, weight, bias, mean, var, _, winner = kept
    if pool:
        place = winner.long()
        down, across = _corner(place, 2) + place // 3, _corner(place, 3) + place % 3
        place = torch.where(winner == CUT_OFF, 0, down * y.shape[3] + across)
        grad = torch.ops.aten.max_pool2d_with_indices_backward(
            grad * (winner != CUT_OFF), y, [3, 3], [2, 2], [0, 0], [1, 1], False, place
        )
    else:
        normal = F.batch_norm(y, mean, var, weight, bias, training=False, eps=eps)
        grad = grad * (normal > 0)
    rstd = (var + eps).rsqrt()
    dy, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        grad, y, weight, None, None, mean, rstd, True, eps, [True, True, True]
    )
    return dy.contiguous(memory_format=CHANNELS_LAST), dweight, dbias


def _corner(pooled: Tensor, axis: int) -> Tensor:
    """Where each window begins along this axis of y."""
    begin = 2 * torch.arange(pooled.shape[axis], device=pooled.device)
    return begin[:, None] if axis == 2 else begin


@torch.library.custom_op(
    "fastrot::batch_statistics",
    mutates_args=("running_mean", "running_var"),
    schema="(Tensor y, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor? shift, float momentum)"
    " -> (Tensor, Tensor)",
)
def _batch_statistics(y, *rest):
    run = kernels.launch_statistics if form_for(y) == "triton" else statistics_reference
    return run(y, *rest)


@_batch_statistics.register_fake
def _(y, *_):
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape[1], dtype=wide), y.new_empty(y.shape[1], dtype=wide)


@torch.library.custom_op(
    "fastrot::norm_relu",
    mutates_args=(),
    schema="(Tensor y, Tensor weight, Tensor bias, Tensor? shift, Tensor mean, Tensor var, float eps, bool pool)"
    " -> (Tensor, Tensor, Tensor)",
)
def _norm_relu(y, weight, bias, shift, *rest):
    run = kernels.launch_forward if form_for(y) == "triton" else norm_relu_reference
    return run(y, weight, bias, *rest)


@_norm_relu.register_fake
def _(y, *rest):
    return kernels.outputs(y, rest[-1])


@torch.library.custom_op(
    "fastrot::norm_relu_back",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor peak, Tensor winner,"
    " float eps, bool pool) -> (Tensor, Tensor, Tensor)",
)
def _norm_relu_back(grad, *rest):
    *kept, eps, pool = rest
    run = kernels.launch_back if form_for(grad) == "triton" else norm_relu_back_reference
    return run(grad, kept, eps, pool)


@_norm_relu_back.register_fake
def _(grad, y, weight, bias, *_):
    dy = torch.empty_like(y, memory_format=CHANNELS_LAST)
    return dy, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx, inputs, output):
    y, weight, bias, shift, mean, var, ctx.eps, ctx.pool = inputs
    ctx.save_for_backward(y, weight, bias, shift, mean, var, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _back(ctx, grad, of_peak, of_winner):
    y, weight, bias, shift, mean, var, peak, winner = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    found = _norm_relu_back(grad, y, weight, bias, mean, var, peak, winner, ctx.eps, ctx.pool)
    nothing = None if shift is None else torch.zeros_like(shift)  # exactly; DDP wants a gradient
    return (*found, nothing, None, None, None, None)


_norm_relu.register_autograd(_back, setup_context=_keep)


# ---- public name ----


def norm_relu(
    y: Maps,
    weight: Each,
    bias: Each,
    running_mean: Each,
    running_var: Each,
    *,
    shift: Each | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
) -> Float[Tensor, "n c p q"]:
    """max_pool2d(relu(batch_norm(y + shift)), 3, 2) in training, differentiable once; without the pool unless asked.

    Moves the running statistics in place. `shift`, a convolution's bias that was left out, gets a gradient of zero.
    """
    if y.ndim != 4 or not y.is_floating_point():
        raise misfit("y is", y, "a convolution's output, [N, C, H, W]")
    n, c, h, w = y.shape
    if n * h * w < 2:
        raise UsageError(f"y is {tuple(y.shape)}: give two values a channel at least, by --batch 2")
    running = dict(running_mean=running_mean, running_var=running_var)
    for name, each in dict(weight=weight, bias=bias, shift=shift, **running).items():
        if each is not None and each.shape != (c,):
            raise UsageError(f"{name} is {tuple(each.shape)}: y of {c} channels wants [{c}]")
    check_device(y, weight, bias, running_mean, running_var, shift)
    if pool and min(h, w) < 3:
        raise UsageError(f"y is {h} x {w} pixels: a pool of 3 x 3 wants at least that")
    bare = None if shift is None else shift.detach()
    mean, var = _batch_statistics(y.detach(), running_mean, running_var, bare, momentum)
    return _norm_relu(y, weight, bias, shift, mean, var, eps, pool)[0]
