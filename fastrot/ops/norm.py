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
         the winner's place (uint8, 0 to 8; 9: ReLU cut it) and its y, so that the sums read the pooled map alone, and nothing
         of y's size but y itself is kept. Backward, a program owns 2 x 2 elements of y: the four windows that reach
         them are read once, and each of their nine meetings is one comparison with a constant.
Bytes.   `traffic` counts them. For each element of y of s bytes and q elements of out (a quarter, pooled; 1, not):
             statistics                   read s
             normalise, clamp, pool       read s      write q (2 s + 1)      not pooled: read s   write s
             sums                         read q (2 s + 1)                   not pooled: read 2 s
             dy                           read s + q (s + 1)   write s       not pooled: read 2 s   write s
         so 4 s + q (5 s + 3) pooled and 8 s not: 11.25 and 16 bytes in bfloat16. Windows overlap: the caches serve what is read again.
         Machine code for sm_90 (Triton 3.8, `make kernels`): no spills, 16 bytes a thread and load; in bfloat16 pooled
         the forward is 664 instructions for 8 values of out (21 for each of y that it reads), 70 registers; dy 792 for
         32 (25), 125 registers; statistics and sums 96 and 156 registers. Not yet timed on a GPU.
Digits.  Statistics: each lane keeps a mean and the squares about it, row after row (Welford 1962), lanes and then programs are
         merged by Chan's formula about one of their means (Chan 1983), all in float32 and in a fixed order, no atomics: the same
         bits again on the same device. sums: float32 lanes of a few dozen rows, added in a fixed order.
"""

from typing import Literal, Optional, no_type_check

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops.choice import form_for
from fastrot.ops.rows import check_device

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's builds for the CPU come without it
    triton = None

CHANNELS_LAST = torch.channels_last
CUT_OFF = 9  # a winner that ReLU cut


# ---- reference ----


def statistics_reference(
    y: Float[Tensor, "n c h w"],
    running_mean: Float[Tensor, " c"],
    running_var: Float[Tensor, " c"],
    shift: Float[Tensor, " c"] | None,
    momentum: float,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
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
    y: Float[Tensor, "n c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
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


def norm_relu_back_reference(
    grad: Tensor,
    y: Float[Tensor, "n c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    peak: Tensor,
    winner: UInt8[Tensor, "..."],
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dweight and dbias."""
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


# ---- kernel ----

WARPS = 4
TILE = 8192  # bytes of y that a program of statistics or sums reads at a time: four loads of 16 a thread
WINDOWS = 1024  # elements of out that a program of the forward makes
BLOCKS = 1024  # times 2 x 2 elements of dy that a program of the backward makes
PER_PROCESSOR = 8  # programs of statistics or sums
REGISTERS = dict(maxnreg=128)  # of the pooled backward: left alone, ptxas takes 96 and spills
FINISH, SHARES = 8, 128  # channels of a program that merges, and shares that it reads at a time

if triton is not None:
    CUT = tl.constexpr(CUT_OFF)

    @triton.jit
    @no_type_check  # the tests' shape checks would wrap it, and Triton wants the bare function
    def _statistics_kernel(
        y, parts, rows, tiles, shares,
        C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Of one share of the rows, `tiles` tiles: the means, and the squares about them."""
        share = tl.program_id(0)
        column, known = _channels(1, C, BLOCK_C)
        lane = tl.arange(0, ROWS)
        begin = share * tiles * ROWS
        whole = tl.minimum((rows - begin) // ROWS, tiles)
        mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
        squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for tile in range(whole):
            row = begin + tile * ROWS + lane
            value = tl.load(_at(y, row, column, C), mask=known[None, :], other=0)
            off = value.to(tl.float32) - mean
            mean += off * (1.0 / (tile + 1))
            squares += off * (value.to(tl.float32) - mean)
        row = begin + whole * ROWS + lane  # the last share may end within a tile
        there = (row < rows) & (whole < tiles)
        value = tl.load(_at(y, row, column, C), mask=there[:, None] & known[None, :], other=0)
        off = tl.where(there[:, None], value.to(tl.float32) - mean, 0)
        mean += off * (1.0 / (whole + 1))
        squares += off * (value.to(tl.float32) - mean)
        count = (whole + there.to(tl.int32)).to(tl.float32)[:, None]
        middle = tl.max(mean, 0)
        total = tl.sum(count, 0)
        merged = middle + tl.sum(count * (mean - middle[None, :]), 0) / total
        off = mean - merged[None, :]
        squares += count * off * off
        target = parts + share * C + column
        tl.store(target, merged, mask=known)
        tl.store(target + shares * C, tl.sum(squares, 0), mask=known)

    @triton.jit
    @no_type_check
    def _finish_statistics_kernel(
        parts, mean, var, running_mean, running_var, shift, rows, per_share, shares, momentum,
        SHIFTED: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        column, known = _channels(0, C, BLOCK_C)
        middle = tl.load(parts + column, mask=known, other=0)  # of the first share
        total = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            share = first + tl.arange(0, SHARES)
            there = (share < shares)[:, None] & known[None, :]
            count = tl.minimum(rows - share * per_share, per_share).to(tl.float32)[:, None]
            part = tl.load(parts + share[:, None] * C + column[None, :], mask=there, other=0)
            total += tl.where(there, count * (part - middle[None, :]), 0)
        merged = middle + tl.sum(total, 0) / rows
        total = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            share = first + tl.arange(0, SHARES)
            there = (share < shares)[:, None] & known[None, :]
            count = tl.minimum(rows - share * per_share, per_share).to(tl.float32)[:, None]
            source = parts + share[:, None] * C + column[None, :]
            off = tl.load(source, mask=there, other=0) - merged[None, :]
            squares = tl.load(source + shares * C, mask=there, other=0)
            total += tl.where(there, squares + count * off * off, 0)
        spread = tl.sum(total, 0) / rows
        tl.store(mean + column, merged, mask=known)
        tl.store(var + column, spread, mask=known)
        if SHIFTED:
            merged += tl.load(shift + column, mask=known, other=0).to(tl.float32)
        old = tl.load(running_mean + column, mask=known, other=0)
        tl.store(running_mean + column, (1 - momentum) * old + momentum * merged, mask=known)
        old = tl.load(running_var + column, mask=known, other=0)
        spread = spread * (rows.to(tl.float32) / (rows - 1))
        tl.store(running_var + column, (1 - momentum) * old + momentum * spread, mask=known)

    @triton.jit
    @no_type_check
    def _norm_relu_kernel(
        y, weight, bias, mean, var, out, peak, winner, places, height, width, down, across, eps,
        POOL: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Write out at ROWS places of one block of channels; `places` is N * down * across."""
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column, known = _channels(1, C, BLOCK_C)
        inside = (place < places)[:, None] & known[None, :]
        centre, _, scale = _scales(weight, mean, var, eps, column, known)
        offset = tl.load(bias + column, mask=known, other=0).to(tl.float32)[None, :]
        if POOL:
            near = tl.minimum(place, places - 1)  # spare lanes repeat the last: nothing to mask
            line = near // across  # of all images' lines of windows
            image, i, j = line // down, line % down, near % across
            corner = (image.to(tl.int64) * height + 2 * i) * width + 2 * j
            sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
            # sign * y is largest where out is; line by line, since ptxas keeps a chain of nine in predicates
            for step in tl.static_range(3):
                row = corner + step * width
                left = tl.load(_at(y, row, column, C), mask=known[None, :], other=0)
                middle = tl.load(_at(y, row + 1, column, C), mask=known[None, :], other=0)
                right = tl.load(_at(y, row + 2, column, C), mask=known[None, :], other=0)
                most = left.to(tl.float32) * sign
                if step == 0:
                    first = left.to(tl.float32)
                value = middle.to(tl.float32) * sign
                which = tl.where(value > most, 3 * step + 1, 3 * step)
                most = tl.maximum(value, most)
                value = right.to(tl.float32) * sign
                which = tl.where(value > most, 3 * step + 2, which)
                most = tl.maximum(value, most)
                if step == 0:
                    best, chosen = most, which
                else:
                    chosen = tl.where(most > best, which, chosen)
                    best = tl.maximum(most, best)
            value = tl.where(sign == 0, first, best * sign)
            normal = (value - centre) * scale + offset
            chosen = tl.where(normal <= 0, CUT, chosen)
            tl.store(_at(peak, place, column, C), value.to(peak.dtype.element_ty), mask=inside)
            tl.store(_at(winner, place, column, C), chosen.to(tl.uint8), mask=inside)
        else:
            value = tl.load(_at(y, place, column, C), mask=inside, other=0).to(tl.float32)
            normal = (value - centre) * scale + offset
        normal = tl.where(normal <= 0, 0.0, normal)  # a NaN stays one
        tl.store(_at(out, place, column, C), normal.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _sums_kernel(
        grad, y, winner, weight, bias, mean, var, parts, rows, tiles, shares, eps,
        POOL: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Of one share of out's rows: the sums of g and g x. `y` is the winners', pooled."""
        share = tl.program_id(0)
        column, known = _channels(1, C, BLOCK_C)
        centre, rstd, scale = _scales(weight, mean, var, eps, column, known)
        offset = tl.load(bias + column, mask=known, other=0).to(tl.float32)[None, :]
        plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
        times = tl.zeros((ROWS, BLOCK_C), tl.float32)
        begin = share * tiles * ROWS
        for tile in range(tiles):
            row = begin + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & known[None, :]
            g = tl.load(_at(grad, row, column, C), mask=inside, other=0).to(tl.float32)
            off = tl.load(_at(y, row, column, C), mask=inside, other=0).to(tl.float32) - centre
            if POOL:
                kept = tl.load(_at(winner, row, column, C), mask=inside, other=CUT) != CUT
            else:
                kept = off * scale + offset > 0
            g = tl.where(kept, g, 0)
            plain += g
            times += g * off
        target = parts + share * C + column
        tl.store(target, tl.sum(plain, 0), mask=known)
        tl.store(target + shares * C, tl.sum(times * rstd, 0), mask=known)

    @triton.jit
    @no_type_check
    def _finish_sums_kernel(
        parts, dweight, dbias, shares,
        C: tl.constexpr, BLOCK_C: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        column, known = _channels(0, C, BLOCK_C)
        plain = tl.zeros((SHARES, BLOCK_C), tl.float32)
        times = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            share = first + tl.arange(0, SHARES)
            there = (share < shares)[:, None] & known[None, :]
            source = parts + share[:, None] * C + column[None, :]
            plain += tl.load(source, mask=there, other=0)
            times += tl.load(source + shares * C, mask=there, other=0)
        tl.store(dbias + column, tl.sum(plain, 0), mask=known)
        tl.store(dweight + column, tl.sum(times, 0), mask=known)

    @triton.jit
    @no_type_check
    def _back_kernel(
        grad, y, weight, bias, mean, var, dweight, dbias, dy, rows, over_rows, eps,
        C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Write dy of ROWS rows, not pooled."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column, known = _channels(1, C, BLOCK_C)
        inside = (row < rows)[:, None] & known[None, :]
        centre, rstd, scale = _scales(weight, mean, var, eps, column, known)
        level, slope = _means(dweight, dbias, rstd, over_rows, column, known)
        offset = tl.load(bias + column, mask=known, other=0).to(tl.float32)[None, :]
        g = tl.load(_at(grad, row, column, C), mask=inside, other=0).to(tl.float32)
        off = tl.load(_at(y, row, column, C), mask=inside, other=0).to(tl.float32) - centre
        g = tl.where(off * scale + offset > 0, g, 0)
        value = scale * (g - level - off * slope)
        tl.store(_at(dy, row, column, C), value.to(dy.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _pooled_back_kernel(
        grad, y, winner, weight, mean, var, dweight, dbias, dy,
        blocks, height, width, down, across, over_rows, eps,
        C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Write dy of ROWS blocks of 2 x 2 elements; `blocks` is N * ceil(H / 2) * ceil(W / 2)."""
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column, known = _channels(1, C, BLOCK_C)
        there = block < blocks
        line = block // ((width + 1) // 2)
        image, i = line // ((height + 1) // 2), line % ((height + 1) // 2)
        j = block % ((width + 1) // 2)
        centre, rstd, scale = _scales(weight, mean, var, eps, column, known)
        level, slope = _means(dweight, dbias, rstd, over_rows, column, known)
        g00 = tl.zeros((ROWS, BLOCK_C), tl.float32)
        g01 = tl.zeros((ROWS, BLOCK_C), tl.float32)
        g10 = tl.zeros((ROWS, BLOCK_C), tl.float32)
        g11 = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for back in tl.static_range(4):  # the window that begins here, left of it, above, both
            p, q = i - back // 2, j - back % 2
            near = there & (p >= 0) & (p < down) & (q >= 0) & (q < across)
            inside = near[:, None] & known[None, :]
            window = (image.to(tl.int64) * down + p) * across + q
            g = tl.load(_at(grad, window, column, C), mask=inside, other=0).to(tl.float32)
            won = tl.load(_at(winner, window, column, C), mask=inside, other=CUT)
            first = 6 * (back // 2) + 2 * (back % 2)  # this block's first element, in the window
            g00 += tl.where(won == first, g, 0)
            if back % 2 == 0:
                g01 += tl.where(won == first + 1, g, 0)
            if back // 2 == 0:
                g10 += tl.where(won == first + 3, g, 0)
            if back == 0:
                g11 += tl.where(won == first + 4, g, 0)
        for step in tl.static_range(4):
            h, w = 2 * i + step // 2, 2 * j + step % 2
            inside = (there & (h < height) & (w < width))[:, None] & known[None, :]
            row = (image.to(tl.int64) * height + h) * width + w
            off = tl.load(_at(y, row, column, C), mask=inside, other=0).to(tl.float32) - centre
            if step == 0:
                g = g00
            elif step == 1:
                g = g01
            elif step == 2:
                g = g10
            else:
                g = g11
            value = scale * (g - level - off * slope)
            tl.store(_at(dy, row, column, C), value.to(dy.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _at(first, row, column, C: tl.constexpr):
        return first + row.to(tl.int64)[:, None] * C + column[None, :]  # M C can pass 2**31

    @triton.jit
    @no_type_check
    def _channels(AXIS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
        """A program's channels, and which of them there are: all, where blocks divide them."""
        column = tl.program_id(AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
        known = tl.full((BLOCK_C,), True, tl.int1) if C % BLOCK_C == 0 else column < C
        return column, known

    @triton.jit
    @no_type_check
    def _scales(weight, mean, var, eps, column, known):
        """[1, BLOCK_C] each: mean, 1 / sqrt(var + eps), and that times weight."""
        rstd = tl.rsqrt(tl.load(var + column, mask=known, other=1) + eps)  # one instruction, 1 ulp
        scale = rstd * tl.load(weight + column, mask=known, other=0).to(tl.float32)
        centre = tl.load(mean + column, mask=known, other=0)
        return centre[None, :], rstd[None, :], scale[None, :]

    @triton.jit
    @no_type_check
    def _means(dweight, dbias, rstd, over_rows, column, known):
        """[1, BLOCK_C] each: dbias / M, and dweight / M for each unit of y."""
        level = tl.load(dbias + column, mask=known, other=0) * over_rows
        slope = tl.load(dweight + column, mask=known, other=0) * over_rows
        return level[None, :], slope[None, :] * rstd


# ---- launch ----


def _launch_statistics(
    y: Tensor, running_mean: Tensor, running_var: Tensor, shift: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    _check_kernel(y)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    c, rows = y.shape[1], y.numel() // y.shape[1]
    block, each, tiles, shares = _shared_out(y, rows)
    parts = torch.empty(2, shares, c, device=y.device)
    mean, var = torch.empty(c, device=y.device), torch.empty(c, device=y.device)
    with torch.cuda.device_of(y):
        _statistics_kernel[(shares, triton.cdiv(c, block))](
            y, parts, rows, tiles, shares, C=c, BLOCK_C=block, ROWS=each, num_warps=WARPS
        )
        _finish_statistics_kernel[(triton.cdiv(c, FINISH),)](
            parts, mean, var, running_mean, running_var, mean if shift is None else shift,
            rows, tiles * each, shares, momentum,
            SHIFTED=shift is not None, C=c, BLOCK_C=FINISH, SHARES=SHARES, num_warps=WARPS,
        )  # fmt: skip
    return mean, var


def _launch(
    y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_kernel(y)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    n, c, h, w = y.shape
    out, peak, winner = _outputs(y, pool)
    places, block = n * out.shape[2] * out.shape[3], _block(c)
    with torch.cuda.device_of(y):
        _norm_relu_kernel[(triton.cdiv(places, WINDOWS // block), triton.cdiv(c, block))](
            y, weight, bias, mean, var, out, peak, winner, places, h, w, *out.shape[2:], eps,
            POOL=pool, C=c, BLOCK_C=block, ROWS=WINDOWS // block, num_warps=WARPS,
        )  # fmt: skip
    return out, peak, winner


def _launch_back(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    peak: Tensor,
    winner: Tensor,
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_kernel(y)
    y, grad = (each.contiguous(memory_format=CHANNELS_LAST) for each in (y, grad))
    n, c, h, w = y.shape
    rows, summed = n * h * w, peak if pool else y
    block, each, tiles, shares = _shared_out(summed, grad.numel() // c)
    parts = torch.empty(2, shares, c, device=y.device)
    dweight, dbias = torch.empty(c, device=y.device), torch.empty(c, device=y.device)
    dy = torch.empty_like(y)
    with torch.cuda.device_of(y):
        _sums_kernel[(shares, triton.cdiv(c, block))](
            grad, summed, winner, weight, bias, mean, var, parts,
            grad.numel() // c, tiles, shares, eps,
            POOL=pool, C=c, BLOCK_C=block, ROWS=each, num_warps=WARPS,
        )  # fmt: skip
        _finish_sums_kernel[(triton.cdiv(c, FINISH),)](
            parts, dweight, dbias, shares, C=c, BLOCK_C=FINISH, SHARES=SHARES, num_warps=WARPS
        )
        if pool:
            blocks = n * ((h + 1) // 2) * ((w + 1) // 2)
            _pooled_back_kernel[(triton.cdiv(blocks, BLOCKS // block), triton.cdiv(c, block))](
                grad, y, winner, weight, mean, var, dweight, dbias, dy,
                blocks, h, w, *grad.shape[2:], 1 / rows, eps,
                C=c, BLOCK_C=block, ROWS=BLOCKS // block, num_warps=WARPS, **REGISTERS,
            )  # fmt: skip
        else:
            _back_kernel[(triton.cdiv(rows, WINDOWS // block), triton.cdiv(c, block))](
                grad, y, weight, bias, mean, var, dweight, dbias, dy, rows, 1 / rows, eps,
                C=c, BLOCK_C=block, ROWS=WINDOWS // block, num_warps=WARPS,
            )  # fmt: skip
    return dy, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _outputs(y: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for out, peak and winner, channels_last."""
    n, c, h, w = y.shape
    if not pool:
        out = y.new_empty(n, h, w, c).permute(0, 3, 1, 2)
        return out, y.new_empty(0), y.new_empty(0, dtype=torch.uint8)
    shape = (n, (h - 3) // 2 + 1, (w - 3) // 2 + 1, c)
    out, peak = y.new_empty(shape), y.new_empty(shape)
    winner = y.new_empty(shape, dtype=torch.uint8)
    return out.permute(0, 3, 1, 2), peak.permute(0, 3, 1, 2), winner.permute(0, 3, 1, 2)


def _block(channels: int) -> int:
    """Channels of a program, a power of two up to 64: one that divides them, where that is 16 at least."""
    divides = channels & -channels
    return min(64, divides if divides >= 16 else triton.next_power_of_2(channels))


def _shared_out(y: Tensor, rows: int) -> tuple[int, int, int, int]:
    """Channels of a program, rows of a tile, tiles of a share, shares."""
    c = y.shape[1]
    block = _block(c)
    rows_of_tile = TILE // (block * y.itemsize)
    tiles = -(-rows // rows_of_tile)
    wanted = -(-PER_PROCESSOR * _processors(y) // -(-c // block))
    each = -(-tiles // min(tiles, wanted))
    return block, rows_of_tile, each, -(-tiles // each)


def _processors(y: Tensor) -> int:
    return torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1


@torch.library.custom_op("fastrot::batch_statistics", mutates_args=("running_mean", "running_var"))
def _batch_statistics(
    y: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shift: Optional[Tensor],  # noqa: UP045 (what torch.library reads)
    momentum: float,
) -> tuple[Tensor, Tensor]:
    run = _launch_statistics if form_for(y) == "triton" else statistics_reference
    return run(y, running_mean, running_var, shift, momentum)


@_batch_statistics.register_fake
def _(y, running_mean, running_var, shift, momentum):
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape[1], dtype=wide), y.new_empty(y.shape[1], dtype=wide)


@torch.library.custom_op("fastrot::norm_relu", mutates_args=())
def _norm_relu(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Optional[Tensor],  # noqa: UP045
    mean: Tensor,
    var: Tensor,
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _launch if form_for(y) == "triton" else norm_relu_reference
    return run(y, weight, bias, mean, var, eps, pool)


@_norm_relu.register_fake
def _(y, weight, bias, shift, mean, var, eps, pool):
    return _outputs(y, pool)


@torch.library.custom_op("fastrot::norm_relu_back", mutates_args=())
def _norm_relu_back(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    peak: Tensor,
    winner: Tensor,
    eps: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _launch_back if form_for(y) == "triton" else norm_relu_back_reference
    return run(grad, y, weight, bias, mean, var, peak, winner, eps, pool)


@_norm_relu_back.register_fake
def _(grad, y, weight, bias, mean, var, peak, winner, eps, pool):
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


# ---- public names ----


def norm_relu(
    y: Float[Tensor, "n c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    running_mean: Float[Tensor, " c"],
    running_var: Float[Tensor, " c"],
    *,
    shift: Float[Tensor, " c"] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
) -> Float[Tensor, "n c p q"]:
    """max_pool2d(relu(batch_norm(y + shift)), 3, 2) in training, differentiable once; without the pool unless asked.

    Moves the running statistics in place. `shift`, a convolution's bias that was left out, gets a gradient of zero.
    """
    _check(y, weight, bias, running_mean, running_var, shift, pool)
    mean, var = _batch_statistics(
        y.detach(),
        running_mean,
        running_var,
        None if shift is None else shift.detach(),
        momentum,
    )
    return _norm_relu(y, weight, bias, shift, mean, var, eps, pool)[0]


Form = Literal["eager", "compiled", "fused"]


def traffic(elements: int, pooled: int | None, itemsize: int, form: Form) -> int:
    """Bytes read and written for y of so many elements, `pooled` behind the pool (None: there is none), of a training step.

    What a convolution with bias, batch norm, ReLU and pool move, forward and backward, beside the convolution's own work, with each
    kernel reading what it is given once. `eager` is torch on a GPU: bias added in place; batch norm in two reads and a
    write; ReLU in place; pool with int64 places; backward the pool, ReLU (out, gradient, write), batch norm (both twice, write),
    the bias's sum. `compiled` is what inductor's fusions can reach: bias inside the statistics, ReLU inside the
    norm, pool alone with int8 places, the pool's and ReLU's backward inside both passes of the norm's.
    """
    s, q = itemsize, 0 if pooled is None else pooled
    if form == "eager":
        return 16 * s * elements + (0 if pooled is None else 2 * s * elements + 2 * (s + 8) * q)
    if form == "compiled":
        return (11 if pooled is None else 10) * s * elements + 3 * (s + 1) * q
    return (8 if pooled is None else 4) * s * elements + (5 * s + 3) * q


def forward_traffic(elements: int, pooled: int | None, itemsize: int) -> int:
    """The share of the forward in `traffic`, fused."""
    if pooled is None:
        return 3 * itemsize * elements
    return 2 * itemsize * elements + (2 * itemsize + 1) * pooled


# ---- what is refused ----


def _check(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shift: Tensor | None,
    pool: bool,
) -> None:
    if y.ndim != 4 or not y.is_floating_point():
        raise UsageError(
            f"y is {y.dtype} {tuple(y.shape)}: norm_relu wants a convolution's output, [N, C, H, W]"
        )
    n, c, h, w = y.shape
    rows = n * h * w
    if rows < 2:
        raise UsageError(
            f"y is {tuple(y.shape)}: statistics of a batch want two values a channel at least: say --batch 2"
        )
    for name, each in dict(
        weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, shift=shift
    ).items():
        if each is not None and each.shape != (c,):
            raise UsageError(f"{name} is {tuple(each.shape)}: y of {c} channels wants [{c}]")
    check_device(y, weight, bias, running_mean, running_var, shift)
    if pool and min(h, w) < 3:
        raise UsageError(f"y is {h} x {w} pixels: a pool of 3 x 3 wants at least that")


def _check_kernel(y: Tensor) -> None:
    """What the Triton kernels take."""
    if triton is None:
        raise UsageError(
            "the Triton kernels want Triton, which this torch came without: set FASTROT_OPS=reference"
        )
    if y.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UsageError(f"the Triton kernels read no {y.dtype}: set FASTROT_OPS=reference")
    if y.numel() // y.shape[1] > 2**30:
        raise UsageError(
            f"y is {tuple(y.shape)}: the Triton kernels count to a billion rows: say a smaller --batch"
        )
