# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""The kernels behind ops/nce.py, which has the maths, the idea and the bytes, and how they are launched."""

import math

import torch
from torch import Tensor

from fastrot.ops.choice import check_kernel, kernel, processors, tl, triton
from fastrot.ops.rows import check_width

# ---- kernel ----

TILE = 4096  # bytes of a word's rows in a program: 32 of each of its 128 threads
WARPS = 4
PER_PROCESSOR = 12  # programs a multiprocessor, five or six of which run at once
STEP = 2048  # elements of partial gradients that the second stage adds at a time

if triton is not None:
    STAGES = tl.constexpr(3)  # one block is worked on while the rows of the next two come in
    LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
    LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: minus itself it is 0

    @kernel(do_not_specialize=["size", "seed"])
    def _nce_kernel(
        x, rows, positive, negatives, index, step, z, sums, grads,
        count, size, splits, turns, seed, in_log2, level,
        D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
        DRAWN: tl.constexpr, OTHERS: tl.constexpr, SOFTMAX: tl.constexpr,
    ):  # fmt: skip
        """One image and one share of its negatives: sums of loss and mass, maximum, gradient; in log2 units."""
        program = tl.program_id(0)
        image, split = (program // splits).to(tl.int64), program % splits
        column = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        query = tl.load(x + image * D + column, mask=column < D, other=0) * in_log2
        own = tl.load(positive + image)
        if DRAWN:
            address = tl.load(index + image)
            low, high = address.to(tl.uint32), (address >> 32).to(tl.uint32)
            now = tl.load(step).to(tl.uint32)
            key = seed.to(tl.uint64)
            choices = (size.to(tl.int64) - OTHERS).to(tl.uint32)
        if not SOFTMAX:
            shift = tl.log2(tl.load(z).to(tl.float32)) + level
        loss = tl.zeros((ROWS,), tl.float32)
        spread = tl.zeros((ROWS,), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), LOWEST, tl.float32)
        grad = tl.zeros((PARTS, ROWS, WIDTH), tl.float32)
        last = tl.minimum((split + 1) * turns, tl.cdiv(count, 4 * ROWS))
        for block in tl.range(split * turns, last, num_stages=STAGES):
            place = block * ROWS + tl.arange(0, ROWS)  # of four negatives each, one a word
            if DRAWN:
                words = tl.philox(key, place.to(tl.uint32), low, high, now)
            for word in tl.static_range(4):
                asked = 4 * place + word < count
                if DRAWN:
                    pick = tl.umulhi(words[word], choices).to(tl.int64)
                    if OTHERS:
                        pick += (pick >= own).to(tl.int64)
                    found = asked
                else:
                    source = negatives + image * count + 4 * place + word
                    pick = tl.load(source, mask=asked, other=0)
                    found = asked & (pick >= 0) & (pick < size)
                mask = found[None, :, None]
                if D != PARTS * WIDTH:
                    mask = mask & (column < D)[:, None, :]
                near = tl.load(
                    rows + pick[None, :, None] * D + column[:, None, :], mask=mask, other=0
                )
                near = near.to(tl.float32)  # [PARTS, ROWS, WIDTH]
                score = tl.sum(tl.sum(near * query[:, None, :], 0), 1)
                if not DRAWN:
                    score = tl.where(found, score, float("nan"))  # there is no such row
                score = tl.where(asked, score, float("-inf"))  # weighs nothing
                if SOFTMAX:
                    higher = tl.maximum(top, score)
                    shrink = tl.exp2(top - higher)
                    top = higher
                    weight = tl.exp2(score - top)
                    mass = mass * shrink + weight
                    grad = grad * shrink[None, :, None]
                else:
                    weight, over, tail = _soft(score - shift)
                    loss += over
                    spread += tail + spread * tail  # spread + 1 is the product of all 1 + tail
                    mass += tl.exp2(score)
                grad += near * weight[None, :, None]
            if not SOFTMAX and block % 16 == 0:  # float32 holds a product of 64 factors up to 2
                loss += _log1p(spread) * LOG2E
                spread = tl.zeros_like(spread)
        if SOFTMAX:
            best = tl.max(top, 0)
            shrink = tl.exp2(top - best)
            mass = mass * shrink
            grad = grad * shrink[None, :, None]
            tl.store(sums + program, best)
        else:
            tl.store(sums + program, tl.sum(loss + _log1p(spread) * LOG2E, 0))
        programs = tl.num_programs(0)
        tl.store(sums + programs + program, tl.sum(mass, 0))
        target = grads + program.to(tl.int64) * D + column
        tl.store(target, tl.sum(grad, 1), mask=column < D)

    @kernel(do_not_specialize=["size"])
    def _finish_kernel(
        x, rows, positive, z, sums, grads, loss, mass, grad,
        size, splits, in_log2, level, over_temperature, floor,
        D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, SOFTMAX: tl.constexpr,
    ):  # fmt: skip
        """One image: its shares in a fixed order, and its positive."""
        image = tl.program_id(0).to(tl.int64)
        programs = tl.num_programs(0) * splits
        column = tl.arange(0, BLOCK_D)
        query = tl.load(x + image * D + column, mask=column < D, other=0) * in_log2
        own = tl.load(positive + image)
        inside = (own >= 0) & (own < size)
        row = tl.load(rows + own * D + column, mask=inside & (column < D), other=0).to(tl.float32)
        score = tl.where(inside, tl.sum(row * query, 0), float("nan"))
        best = score
        if SOFTMAX:
            for first in range(0, splits, SPLITS):
                split = first + tl.arange(0, SPLITS)
                tops = tl.load(sums + image * splits + split, mask=split < splits, other=LOWEST)
                best = tl.maximum(best, tl.max(tops, 0))
        all_loss = tl.zeros((SPLITS,), tl.float32)
        all_mass = tl.zeros((SPLITS,), tl.float32)
        all_grad = tl.zeros((SPLITS, BLOCK_D), tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            there = split < splits
            program = image * splits + split
            part = tl.load(sums + program, mask=there, other=LOWEST if SOFTMAX else 0)
            part_mass = tl.load(sums + programs + program, mask=there, other=0)
            part_grad = tl.load(
                grads + program[:, None] * D + column[None, :],
                mask=there[:, None] & (column < D)[None, :],
                other=0,
            )
            if SOFTMAX:
                shrink = tl.exp2(part - best)
                all_mass += part_mass * shrink
                all_grad += part_grad * shrink[:, None]
            else:
                all_loss += part
                all_mass += part_mass
                all_grad += part_grad
        total, weighted = tl.sum(all_mass, 0), tl.sum(all_grad, 0)
        if SOFTMAX:
            share = tl.exp2(score - best)
            value = (best - score + tl.log2(total + share)) * LN2
            value = tl.where(score == best, _log1p(total), value)  # exact where the loss is small
            total += share
            weighted = (weighted + share * row) / total - row
            total *= tl.exp2(best)
        else:
            weight, over, tail = _soft(tl.log2(tl.load(z).to(tl.float32)) + level - score)
            value = (tl.sum(all_loss, 0) + over) * LN2 + _log1p(tail) + floor
            total += tl.exp2(score)
            weighted -= weight * row
        tl.store(loss + image, value)
        tl.store(mass + image, total)
        tl.store(grad + image * D + column, weighted * over_temperature, mask=column < D)

    @kernel
    def _soft(u):
        """Of 2**u: its share of 1 + 2**u, and the logarithm of that in two parts, max(u, 0) and t of log(1 + t)."""
        tail = tl.exp2(-tl.abs(u))
        return tl.where(u >= 0, 1.0, tail) / (1 + tail), tl.maximum(u, 0.0), tail

    @kernel
    def _log1p(t):
        """With what 1 + t lost to rounding given back."""
        grown = 1 + t
        return tl.log(grown) + (t - (grown - 1)) / grown


# ---- launch ----


def launch(x, rows, positive, negatives, z, temperature, population, eps) -> tuple[Tensor, ...]:
    """Loss [B], mass [B] and d loss / d x [B, D], of what `nce_reference` takes."""
    check_kernel(x.dtype, rows.dtype)
    check_width(x)
    b, d = x.shape
    x, positive = x.contiguous(), positive.contiguous()
    drawn = not isinstance(negatives, Tensor)
    if drawn:
        k, seed, others = negatives.count, negatives.seed, negatives.exclude_self
        index, step, negatives = negatives.index.contiguous(), negatives.step, positive
    else:
        k, seed, others = negatives.shape[1], 0, False
        index, step, negatives = positive, positive, negatives.contiguous()
    block_d = triton.next_power_of_2(d)
    row_bytes = block_d * rows.element_size()
    parts, at_once = _parts(row_bytes), _rows_at_once(x, row_bytes)
    splits, turns = _shared_out(b, k, d, at_once, processors(x))
    sums = torch.empty(2, b, splits, device=x.device)
    grads = torch.empty(b, splits, d, device=x.device)
    loss, mass = torch.empty(b, device=x.device), torch.empty(b, device=x.device)
    grad = torch.empty_like(x)
    in_log2, level = 1 / (temperature * math.log(2)), math.log2(k / population + eps)
    floor = k * math.log1p(eps * population / k)
    softmax, z = z is None, x if z is None else z
    if b:
        with torch.cuda.device_of(x):
            _nce_kernel[(b * splits,)](
                x, rows, positive, negatives, index, step, z, sums, grads,
                k, len(rows), splits, turns, seed, in_log2, level,
                D=d, PARTS=parts, WIDTH=block_d // parts, ROWS=at_once, DRAWN=drawn,
                OTHERS=others, SOFTMAX=softmax, num_warps=WARPS,
            )  # fmt: skip
            _finish_kernel[(b,)](
                x, rows, positive, z, sums, grads, loss, mass, grad,
                len(rows), splits, in_log2, level, 1 / temperature, floor,
                D=d, BLOCK_D=block_d, SPLITS=max(1, STEP // block_d), SOFTMAX=softmax,
                num_warps=WARPS,
            )  # fmt: skip
    return loss, mass, grad


def _rows_at_once(x: Tensor, row_bytes: int) -> int:
    """Rows of one load, a power of two; the interpreter pays by the turn, not by the row."""
    return max(1, min(TILE // row_bytes, 64)) if x.is_cuda else 128


def _parts(row_bytes: int) -> int:
    """A row is read in two halves, so that half the threads share it, each with twice the arithmetic."""
    return 2 if row_bytes >= 256 else 1


def _shared_out(b: int, k: int, d: int, at_once: int, processors: int) -> tuple[int, int]:
    """Programs an image, and blocks of negatives a program.

    As many as fill the GPU, but never so many that the partial gradients outgrow [B, K].
    """
    blocks = -(-k // (4 * at_once))
    wanted = -(-PER_PROCESSOR * processors // max(b, 1))
    splits = max(1, min(wanted, blocks, (k - 1) // d))
    turns = -(-blocks // splits)
    return -(-blocks // turns), turns
