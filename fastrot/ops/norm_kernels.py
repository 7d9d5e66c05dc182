# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
"""The kernels behind ops/norm.py, which has the maths, the idea and the bytes, and how they are launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrot.config import UsageError
from fastrot.ops.choice import check_kernel, kernel, processors, tl, triton

CHANNELS_LAST = torch.channels_last
CUT_OFF = 9  # a winner that ReLU cut
Three = tuple[Tensor, Tensor, Tensor]


# ---- kernel ----

WARPS = 4
TILE = 8192  # bytes of y that a program of statistics or sums reads at a time: four loads of 16 a thread
WINDOWS = 1024  # elements of out that a program of the forward makes
BLOCKS = 1024  # elements of dy that a program of the backward makes; pooled, times 2 x 2
PER_PROCESSOR = 8  # programs of statistics or sums
REGISTERS = dict(maxnreg=128)  # of the pooled backward: left alone, ptxas takes 96 and spills
FINISH, SHARES = 8, 128  # channels of a program that merges, and shares that it reads at a time

if triton is not None:
    CUT = tl.constexpr(CUT_OFF)

    @kernel
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

    @kernel
    def _finish_statistics_kernel(
        parts, mean, var, running_mean, running_var, shift, rows, per_share, shares, momentum,
        SHIFTED: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        column, known = _channels(0, C, BLOCK_C)
        middle = tl.load(parts + column, mask=known, other=0)  # of the first share
        total = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            share, source, there = _shares(parts, first, shares, column, known, C, SHARES)
            count = tl.minimum(rows - share * per_share, per_share).to(tl.float32)[:, None]
            part = tl.load(source, mask=there, other=0)
            total += tl.where(there, count * (part - middle[None, :]), 0)
        merged = middle + tl.sum(total, 0) / rows
        total = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            share, source, there = _shares(parts, first, shares, column, known, C, SHARES)
            count = tl.minimum(rows - share * per_share, per_share).to(tl.float32)[:, None]
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

    @kernel
    def _norm_relu_kernel(
        y, weight, bias, mean, var, out, peak, winner, places, height, width, down, across, eps,
        POOL: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Write out at ROWS places of one block of channels; `places` is N * down * across."""
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column, known = _channels(1, C, BLOCK_C)
        inside = (place < places)[:, None] & known[None, :]
        centre, _, scale, offset = _scales(weight, bias, mean, var, eps, column, known)
        if POOL:
            near = tl.minimum(place, places - 1)  # spare lanes repeat the last: nothing to mask
            line = near // across  # of all images' lines of windows
            image, i, j = line // down, line % down, near % across
            corner = (image.to(tl.int64) * height + 2 * i) * width + 2 * j
            sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
            # sign * y is largest where out is; line by line, since ptxas keeps a chain of nine in predicates
            for step in tl.static_range(3):
                row = corner + step * width
                for side in tl.static_range(3):
                    value = _values(y, row + side, column, known[None, :], C)
                    if step + side == 0:
                        first = value
                    value *= sign
                    if side == 0:
                        most, which = value, tl.full((1, 1), 3 * step, tl.int32)
                    else:
                        which = tl.where(value > most, 3 * step + side, which)
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
            value = _values(y, place, column, inside, C)
            normal = (value - centre) * scale + offset
        normal = tl.where(normal <= 0, 0.0, normal)  # a NaN stays one
        tl.store(_at(out, place, column, C), normal.to(out.dtype.element_ty), mask=inside)

    @kernel
    def _sums_kernel(
        grad, y, winner, weight, bias, mean, var, parts, rows, tiles, shares, eps,
        POOL: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Of one share of out's rows: the sums of g and g x. `y` is the winners', pooled."""
        share = tl.program_id(0)
        column, known = _channels(1, C, BLOCK_C)
        centre, rstd, scale, offset = _scales(weight, bias, mean, var, eps, column, known)
        plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
        times = tl.zeros((ROWS, BLOCK_C), tl.float32)
        begin = share * tiles * ROWS
        for tile in range(tiles):
            row = begin + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & known[None, :]
            g = _values(grad, row, column, inside, C)
            off = _values(y, row, column, inside, C) - centre
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

    @kernel
    def _finish_sums_kernel(
        parts, dweight, dbias, shares,
        C: tl.constexpr, BLOCK_C: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        column, known = _channels(0, C, BLOCK_C)
        plain = tl.zeros((SHARES, BLOCK_C), tl.float32)
        times = tl.zeros((SHARES, BLOCK_C), tl.float32)
        for first in range(0, shares, SHARES):
            _, source, there = _shares(parts, first, shares, column, known, C, SHARES)
            plain += tl.load(source, mask=there, other=0)
            times += tl.load(source + shares * C, mask=there, other=0)
        tl.store(dbias + column, tl.sum(plain, 0), mask=known)
        tl.store(dweight + column, tl.sum(times, 0), mask=known)

    @kernel
    def _back_kernel(
        grad, y, winner, weight, bias, mean, var, dweight, dbias, dy,
        blocks, height, width, down, across, over_rows, eps,
        POOL: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Write dy of ROWS blocks: rows of y, or pooled 2 x 2 elements, N * ceil(H / 2) * ceil(W / 2)."""
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column, known = _channels(1, C, BLOCK_C)
        there = block < blocks
        centre, rstd, scale, offset = _scales(weight, bias, mean, var, eps, column, known)
        # dbias / M, and dweight / M for each unit of y
        level = (tl.load(dbias + column, mask=known, other=0) * over_rows)[None, :]
        slope = (tl.load(dweight + column, mask=known, other=0) * over_rows)[None, :] * rstd
        if POOL:
            line = block // ((width + 1) // 2)
            image, i = line // ((height + 1) // 2), line % ((height + 1) // 2)
            j = block % ((width + 1) // 2)
            g00 = tl.zeros((ROWS, BLOCK_C), tl.float32)
            g01, g10, g11 = g00, g00, g00
            for back in tl.static_range(4):  # the window that begins here, left of it, above, both
                p, q = i - back // 2, j - back % 2
                near = there & (p >= 0) & (p < down) & (q >= 0) & (q < across)
                inside = near[:, None] & known[None, :]
                window = (image.to(tl.int64) * down + p) * across + q
                g = _values(grad, window, column, inside, C)
                won = tl.load(_at(winner, window, column, C), mask=inside, other=CUT)
                # this block's first element, in the window
                first = 6 * (back // 2) + 2 * (back % 2)
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
                off = _values(y, row, column, inside, C) - centre
                value = scale * ((g00, g01, g10, g11)[step] - level - off * slope)
                tl.store(_at(dy, row, column, C), value.to(dy.dtype.element_ty), mask=inside)
        else:
            inside = there[:, None] & known[None, :]
            g = _values(grad, block, column, inside, C)
            off = _values(y, block, column, inside, C) - centre
            g = tl.where(off * scale + offset > 0, g, 0)
            value = scale * (g - level - off * slope)
            tl.store(_at(dy, block, column, C), value.to(dy.dtype.element_ty), mask=inside)

    @kernel
    def _at(first, row, column, C: tl.constexpr):
        return first + row.to(tl.int64)[:, None] * C + column[None, :]  # M C can pass 2**31

    @kernel
    def _values(first, row, column, inside, C: tl.constexpr):
        return tl.load(_at(first, row, column, C), mask=inside, other=0).to(tl.float32)

    @kernel
    def _channels(AXIS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
        """A program's channels, and which of them there are: all, where blocks divide them."""
        column = tl.program_id(AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
        known = tl.full((BLOCK_C,), True, tl.int1) if C % BLOCK_C == 0 else column < C
        return column, known

    @kernel
    def _shares(parts, first, shares, column, known, C: tl.constexpr, SHARES: tl.constexpr):
        """SHARES shares from `first` on: their numbers, where their parts lie, and which there are."""
        share = first + tl.arange(0, SHARES)
        there = (share < shares)[:, None] & known[None, :]
        return share, parts + share[:, None] * C + column[None, :], there

    @kernel
    def _scales(weight, bias, mean, var, eps, column, known):
        """[1, BLOCK_C] each: mean, 1 / sqrt(var + eps), that times weight, and bias."""
        rstd = tl.rsqrt(tl.load(var + column, mask=known, other=1) + eps)  # one instruction, 1 ulp
        scale = rstd * tl.load(weight + column, mask=known, other=0).to(tl.float32)
        centre = tl.load(mean + column, mask=known, other=0)
        offset = tl.load(bias + column, mask=known, other=0).to(tl.float32)
        return centre[None, :], rstd[None, :], scale[None, :], offset[None, :]


# ---- launch ----


def launch_statistics(
    y: Tensor, running_mean: Tensor, running_var: Tensor, shift: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    y = _checked(y)
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


def launch_forward(
    y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, pool: bool
) -> Three:
    y = _checked(y)
    n, c, h, w = y.shape
    out, peak, winner = outputs(y, pool)
    places, block = n * out.shape[2] * out.shape[3], _block(c)
    with torch.cuda.device_of(y):
        _norm_relu_kernel[(triton.cdiv(places, WINDOWS // block), triton.cdiv(c, block))](
            y, weight, bias, mean, var, out, peak, winner, places, h, w, *out.shape[2:], eps,
            POOL=pool, C=c, BLOCK_C=block, ROWS=WINDOWS // block, num_warps=WARPS,
        )  # fmt: skip
    return out, peak, winner


def launch_back(grad: Tensor, kept: Sequence[Tensor], eps: float, pool: bool) -> Three:
    y, weight, bias, mean, var, peak, winner = kept
    y, grad = _checked(y), grad.contiguous(memory_format=CHANNELS_LAST)
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
        blocks = n * ((h + 1) // 2) * ((w + 1) // 2) if pool else rows
        _back_kernel[(triton.cdiv(blocks, BLOCKS // block), triton.cdiv(c, block))](
            grad, y, winner, weight, bias, mean, var, dweight, dbias, dy,
            blocks, h, w, *grad.shape[2:], 1 / rows, eps,
            POOL=pool, C=c, BLOCK_C=block, ROWS=BLOCKS // block, num_warps=WARPS,
            **(REGISTERS if pool else {}),
        )  # fmt: skip
    return dy, dweight.to(weight.dtype), dbias.to(bias.dtype)


def outputs(y: Tensor, pool: bool) -> Three:
    """Room for out, peak and winner, channels_last."""
    n, c, h, w = y.shape
    size = ((h - 3) // 2 + 1, (w - 3) // 2 + 1) if pool else (h, w)
    out = y.new_empty(n, *size, c).permute(0, 3, 1, 2)
    kept = out if pool else y.new_empty(0)
    return out, torch.empty_like(kept), torch.empty_like(kept, dtype=torch.uint8)


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
    wanted = -(-PER_PROCESSOR * processors(y) // -(-c // block))
    each = -(-tiles // min(tiles, wanted))
    return block, rows_of_tile, each, -(-tiles // each)


def _checked(y: Tensor) -> Tensor:
    """As the kernels want it, or refused."""
    check_kernel(y.dtype)
    if y.numel() // y.shape[1] > 2**30:
        shape = tuple(y.shape)
        raise UsageError(f"y is {shape}: kernels count to a billion rows: say a smaller --batch")
    return y.contiguous(memory_format=CHANNELS_LAST)
