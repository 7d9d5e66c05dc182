# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""NCE and InfoNCE of features against rows of a memory bank, without ever building the [B, K, D] gather.

Shapes.  x [B, D], one feature an image; rows [N, D], the bank; positive [B], each image's own row; K negatives an
         image, numbers [B, K] or a Draw. Loss and mass [B].
Maths.   s_j = x . row_j over the positive (j = 0) and the negatives, T the temperature. NCE (Gutmann 2010; Wu 2018, arXiv
         1805.01978; lemniscate's NCEAverage and NCECriterion) with P_j = exp(s_j / T) / Z and a = K / population:
         loss = -ln(P_0 / (P_0 + a + eps)) - sum_j ln(a / (P_j + a + eps)). In log space, u_j = s_j / T - ln Z - ln(a + eps):
             loss = softplus(-u_0) + sum_j softplus(u_j) + K ln(1 + eps / a)
             dloss/dx = (sum_j sigmoid(u_j) row_j - sigmoid(-u_0) row_0) / T
         exactly, with no exp that overflows and no difference of near numbers. InfoNCE (van den Oord 2018, arXiv 1807.03748):
             loss = logsumexp(s / T) - s_0 / T,   dloss/dx = (sum_j softmax(s / T)_j row_j - row_0) / T
         mass = exp(s_0 / T) + sum_j exp(s_j / T), for a running mean of Z; it has no gradient, nor have rows and Z.
Idea.    NCE is a sum over negatives; InfoNCE's gradient is attention with one query whose keys and values are the same
         rows, so a running maximum suffices. Both read each row once and give loss, mass and gradient together; backward
         is one multiply. A Draw's negatives are Philox words, computed where they are needed, four a counter.
Bytes.   B (K + 1) D itemsize gathered, 8 B K more for negatives that are given; partial sums 8 B splits (D + 2), where
         splits * D < K.
Digits.  Integers of a Draw are equal on every device. Sums differ in their order, about 1e-7 of the loss.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops.choice import form_for
from fastrot.ops.nce_kernels import launch
from fastrot.ops.philox import philox, scaled
from fastrot.ops.rows import Bank, Features, check_device, check_rows, check_values, misfit

# ---- negatives that are drawn where they are used ----


@dataclass(frozen=True, slots=True)
class Draw:
    """Uniform negatives, with replacement, that are never stored: the same integers on every device.

    Negative k of image i at step t is word k % 4 of Philox4x32-10(seed; k // 4, index low, index high, t),
    times the number of rows, high 32 bits.
    """

    count: int  # K; more than N is legal
    seed: int
    index: Int64[Tensor, " b"]  # the images' data rows, not the bank's: where their randomness lies
    step: Int64[Tensor, ""]  # on the device, so that a replayed CUDA graph draws anew
    exclude_self: bool = False  # draw from N - 1 rows and step over the image's own, `positive`

    def __getitem__(self, images: slice) -> "Draw":
        return replace(self, index=self.index[images])


Numbers = Int64[Tensor, " b"]
Negatives = Int64[Tensor, "b k"] | Draw
Each = Float[Tensor, " b"]
One = Float[Tensor, ""]
Found = tuple[Each, Each, Features]  # loss, mass and gradient of each image


def drawn(draw: Draw, positive: Numbers, rows: int) -> Int64[Tensor, "b k"]:
    """What `draw` draws from a bank of so many rows, as a tensor: for tests and small uses."""
    counter = torch.arange(-(-draw.count // 4), device=draw.index.device)
    low, high = draw.index[:, None], draw.index[:, None] >> 32
    words = torch.stack(philox(draw.seed, counter, low, high, draw.step), dim=-1)
    picks = scaled(words, rows - draw.exclude_self).flatten(1)[:, : draw.count]
    return picks + (picks >= positive[:, None]) if draw.exclude_self else picks


# ---- reference ----

PIECE = 2**19  # elements gathered at a time: 2 MB of float32 stay in a core's cache
PICKS = 2**16  # negatives drawn at a time: fewer, larger calls


def nce_reference(
    x: Features,
    rows: Bank,
    positive: Numbers,
    negatives: Negatives,
    z: One | None,
    temperature: float,
    population: int,
    eps: float,
) -> Found:
    """Loss, mass and d loss / d x of each image; InfoNCE where there is no z. What the CPU runs and what tests trust."""
    loss, mass, grad = x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(x.shape)
    room, several = _Room(rows, x.dtype), _several(_count(negatives), x.shape[1])
    for some in _slices(len(x), several * max(1, PICKS // (_count(negatives) * several))):
        picks = negatives[some]
        if isinstance(picks, Draw):
            picks = drawn(picks, positive[some], len(rows))
        query, own = x[some] / temperature, rows[positive[some]].to(x.dtype)  # [c, D]
        if z is None:
            loss[some], mass[some], weighted = _infonce(query, own, picks, room)
        else:
            k = picks.shape[1]
            shift = z.to(x.dtype).log() + math.log(k / population + eps)
            loss[some], mass[some], weighted = _nce(query, own, picks, room, shift)
            loss[some] += k * math.log1p(eps * population / k)
        grad[some] = weighted / temperature
    return loss, mass, grad


def on_cores(x: Tensor, rows: Tensor, positive: Tensor, negatives: Tensor | Draw, *rest) -> Found:
    """The reference with images shared out over torch's threads: the same bits whatever their number.

    Each thread's operators are kept to itself: split inside, they would meet hundreds of times, and each meeting
    waits for the thread that a busy machine has put aside.
    """
    several, threads = _several(_count(negatives), x.shape[1]), torch.get_num_threads()
    groups = -(-len(x) // several)
    cores = min(threads, 8, groups)  # Python leads them one call at a time: more would queue
    if cores < 2:
        return nce_reference(x, rows, positive, negatives, *rest)
    each = several * -(-groups // cores)

    def of_one(share: slice) -> Found:
        torch.set_num_threads(1)
        return nce_reference(x[share], rows, positive[share], negatives[share], *rest)

    try:
        with ThreadPoolExecutor(cores) as pool:
            parts = list(pool.map(of_one, _slices(len(x), each)))
    finally:
        torch.set_num_threads(threads)
    loss, mass, grad = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss, mass, grad


def _nce(query: Tensor, own: Tensor, picks: Tensor, room: "_Room", shift: Tensor) -> Found:
    """Of few calls in the inner loop: threads that share a bank take turns in Python between two of them."""
    score = (query * own).sum(1)
    weighted = -torch.sigmoid(shift - score)[:, None] * own
    scores, several = query.new_empty(picks.shape), _several(picks.shape[1], own.shape[1])
    for some in _slices(len(picks), several):
        column, added = query[some, :, None], weighted[some]
        for place, near in room.pieces(picks[some]):
            part = torch.bmm(near, column)  # [c, k, 1]
            scores[some, place] = part[:, :, 0]
            added += torch.bmm(part.sub_(shift).sigmoid_().transpose(1, 2), near)[:, 0]
    loss = -F.logsigmoid(score - shift) - F.logsigmoid(shift - scores).sum(1)
    return loss, score.exp() + scores.exp_().sum(1), weighted


def _infonce(query: Tensor, own: Tensor, picks: Tensor, room: "_Room") -> Found:
    few = _slices(len(picks), _several(picks.shape[1], own.shape[1]))
    parts = [_infonce_of_few(query[each], own[each], room.pieces(picks[each])) for each in few]
    loss, mass, weighted = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss, mass, weighted


def _infonce_of_few(query: Tensor, own: Tensor, gathered: Iterator[tuple[slice, Tensor]]) -> Found:
    score = (query * own).sum(1)
    top, total, weighted = score, torch.zeros_like(score), torch.zeros_like(own)  # over exp(top)
    for _, near in gathered:
        scores = torch.bmm(near, query[:, :, None])[:, :, 0]  # [c, k]
        higher = torch.maximum(top, scores.amax(1))
        shrink = (top - higher).exp()
        scores = scores.sub_(higher[:, None]).exp_()
        weighted = weighted * shrink[:, None] + torch.bmm(scores[:, None], near)[:, 0]
        top, total = higher, total * shrink + scores.sum(1)
    share = (score - top).exp()
    loss = torch.where(score == top, total.log1p(), top - score + (total + share).log())
    total += share
    weighted = (weighted + share[:, None] * own) / total[:, None] - own
    return loss, top.exp() * total, weighted


def _slices(total: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, total, step)]


def _several(k: int, d: int) -> int:
    """Images whose gathered rows are one piece."""
    return max(1, PIECE // (k * d))


class _Room:
    """Memory for pieces of gathered rows, used again and again: fresh memory costs a page fault per 4 KB."""

    def __init__(self, rows: Tensor, dtype: torch.dtype):
        size = max(PIECE, rows.shape[1])
        self.rows, self.near = rows, rows.new_empty(size)
        self.wide = self.near if rows.dtype == dtype else rows.new_empty(size, dtype=dtype)

    def pieces(self, picks: Int64[Tensor, "c k"]) -> Iterator[tuple[slice, Tensor]]:
        """Places among the K, and their rows [c, k, D], one piece after the other in the same memory."""
        c, d = len(picks), self.rows.shape[1]
        most = max(1, PIECE // (c * d))
        for place in _slices(picks.shape[1], most):
            piece = picks[:, place]
            near = self.near[: piece.numel() * d].view(-1, d)
            torch.index_select(self.rows, 0, piece.reshape(-1), out=near)
            if self.wide is not self.near:
                near = self.wide[: near.numel()].view(-1, d).copy_(near)
            yield place, near.view(c, -1, d)


@torch.library.custom_op(
    "fastrot::nce",
    mutates_args=(),
    schema="(Tensor x, Tensor rows, Tensor positive, Tensor? explicit, Tensor? index, Tensor? step, int count, int seed,"
    " bool exclude_self, Tensor? z, float temperature, int population, float eps) -> (Tensor, Tensor, Tensor)",
)
def _nce_op(x, rows, positive, explicit, index, step, count, seed, exclude_self, *rest):
    negatives = Draw(count, seed, index, step, exclude_self) if explicit is None else explicit
    if form_for(x) == "triton":
        return launch(x, rows, positive, negatives, *rest)
    if not x.is_cuda:  # looking would wait there
        check_values(x, len(rows), positive, explicit)
    return (nce_reference if x.is_cuda else on_cores)(x, rows, positive, negatives, *rest)


@_nce_op.register_fake
def _(x, *_):
    return x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(x.shape)


def _keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _one_multiply(ctx, loss, mass, grad):
    (of_x,) = ctx.saved_tensors
    return (None if loss is None else loss[:, None] * of_x, *[None] * 12)


_nce_op.register_autograd(_one_multiply, setup_context=_keep_gradient)


# ---- public names ----


def nce_loss(x: Features, rows: Bank, positive: Numbers, negatives: Negatives, **how: Any) -> Each:
    """Loss of each image: `nce_loss_and_mass`, with its settings, without the mass."""
    return nce_loss_and_mass(x, rows, positive, negatives, **how)[0]


def nce_loss_and_mass(
    x: Features,
    rows: Bank,
    positive: Numbers,
    negatives: Negatives,
    *,
    temperature: float,
    z: float | One | None = None,
    population: int | None = None,
    kind: Literal["nce", "infonce"] = "nce",
    eps: float = 1e-7,
) -> tuple[Each, Each]:
    """Loss of each image, and its mass: the sum of exp(s / T) over the positive and its negatives.

    The loss is differentiable in x (once); rows get no gradient, and the mass has none. `z` is the constant of "nce"
    (`estimate_z`), `population` the number of pictures that negatives stand for (None: the rows). A row's number
    outside the bank, like a NaN, makes that image's loss NaN on a GPU.
    mass.mean() / (K + 1) * population is Z as this batch sees it: a running mean of Z costs no second gather.
    """
    population = len(rows) if population is None else population
    if kind not in ("nce", "infonce"):
        raise UsageError(f"kind got {kind!r}: it wants nce or infonce")
    if kind == "infonce":
        z = None
    elif not isinstance(z, Tensor):
        if z is None or not 0 < z < math.inf:
            raise UsageError(f"z got {z}: nce wants a number above 0, from estimate_z")
        z = x.new_full((), z)
    _check(x, rows, positive, negatives, z)
    if not 0 < temperature < math.inf:
        raise UsageError(f"--method.temperature got {temperature}: it wants a number above 0")
    if population < 1:
        raise UsageError(f"population got {population}: it wants 1 or more, as the bank's rows")
    draw = (negatives, None, None, _count(negatives), 0, False)
    if isinstance(negatives, Draw):
        seed = (negatives.seed + 2**63) % 2**64 - 2**63  # the same 64 bits, as torch takes them
        where = (None, negatives.index, negatives.step)
        draw = (*where, negatives.count, seed, negatives.exclude_self)
    return _nce_op(x, rows, positive, *draw, z, temperature, population, eps)[:2]


def estimate_z(
    x: Features,
    rows: Bank,
    positive: Numbers,
    negatives: Negatives,
    *,
    temperature: float,
    population: int | None = None,
) -> One:
    """Mean of exp(s / T) over all B (K + 1) entries, the positives too, times the population. No gradient."""
    settings = dict(temperature=temperature, population=population, kind="infonce")
    _, mass = nce_loss_and_mass(x.detach(), rows, positive, negatives, **settings)
    population = len(rows) if population is None else population
    return (mass.double().mean() / (1 + _count(negatives)) * population).to(x.dtype)


# ---- what is refused ----


def _count(negatives: Tensor | Draw) -> int:
    return negatives.count if isinstance(negatives, Draw) else negatives.shape[1]


def _check(x: Tensor, rows: Tensor, positive: Tensor, negatives: Tensor | Draw, z: Any) -> None:
    if x.ndim != 2 or x.shape[1] < 1 or x.dtype not in (torch.float32, torch.float64):
        raise misfit("x is", x, "torch.float32 [B, D]")
    check_rows(rows, x)
    b, int64 = len(x), torch.int64
    if positive.shape != (b,) or positive.dtype != int64:
        raise misfit("positive is", positive, f"torch.int64 [{b}]")
    if isinstance(negatives, Tensor):
        if negatives.ndim != 2 or len(negatives) != b or negatives.dtype != int64:
            raise misfit("negatives are", negatives, f"torch.int64 [{b}, K], or a Draw")
        check_device(x, rows, positive, z, negatives)
    else:
        index, step = negatives.index, negatives.step
        if index.shape != (b,) or index.dtype != int64:
            raise misfit("Draw.index is", index, f"torch.int64 [{b}]")
        if step.ndim or step.dtype != int64:
            raise misfit("Draw.step is", step, "torch.int64 of no dimension")
        if negatives.exclude_self and len(rows) < 2:
            raise UsageError("the bank has one row, the image's own: --method.no-exclude-self")
        check_device(x, rows, positive, z, index, step)
    k = _count(negatives)
    if not 1 <= k < 2**31 - 2**12:  # the kernel counts to a block beyond them
        raise UsageError(f"--method.negatives got {k}: it wants 1 or more, below two billion")
    if z is not None and (z.ndim or not z.is_floating_point()):
        raise misfit("z is", z, "one number of no dimension")
