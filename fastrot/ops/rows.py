# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Blend, renormalise and write rows of a memory bank, in place.

Shapes.  rows [N, D], float32 or bfloat16; index int64 [B], rows that may repeat; features [B, D] float32.
Maths.   row <- unit(m * row + (1 - m) * feature), unit(v) = v / max(|v|, eps); eps 0, as the originals have it, gives
         NaN where a blend is zero (lemniscate NCEAverage; Wu 2018, arXiv 1805.01978, section 3.3).
Idea.    Of each row's duplicates the last in `index` order is the only one that reads and writes it: so every one
         starts from the old row, the last wins, and no program meets another.
Bytes.   B D (4 + 2 * itemsize) + 4 B**2, the indices from the cache.
Digits.  Blend and norm are float32, added in another order than the reference's: the last bit may differ.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot.config import WIDEST_EMBEDDING, NotFinite, UsageError
from fastrot.ops.choice import check_kernel, form_for, kernel, tl, triton

WIDEST = WIDEST_EMBEDDING  # features that a kernel's program holds
Bank = Float[Tensor, "n d"]
Features = Float[Tensor, "b d"]


# ---- reference ----


def update_rows_reference(
    rows: Bank, index: Int64[Tensor, " b"], features: Features, momentum: float, eps: float
) -> None:
    """What the CPU runs and what tests trust."""
    order = index.argsort(stable=True)
    ends = torch.ones_like(index, dtype=torch.bool)
    ends[:-1] = index[order[1:]] != index[order[:-1]]
    last = order[ends]  # of each row's duplicates
    blend = momentum * rows[index[last]].to(features.dtype) + (1 - momentum) * features[last]
    norm = torch.linalg.vector_norm(blend, dim=1, keepdim=True)
    rows[index[last]] = (blend / norm.clamp_min(eps)).to(rows.dtype)


# ---- kernel ----

AHEAD = 512  # indices looked through at a time
WARPS = 1

if triton is not None:

    @kernel(do_not_specialize=["size", "images"])
    def _update_rows_kernel(
        rows, index, features, size, images, momentum, rest, eps,
        D: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    ):  # fmt: skip
        image = tl.program_id(0)
        row = tl.load(index + image)
        again = tl.zeros((AHEAD,), tl.int32)
        for first in range(image + 1, images, AHEAD):
            later = first + tl.arange(0, AHEAD)
            other = tl.load(index + later, mask=later < images, other=-1)
            again += (other == row).to(tl.int32)
        if (tl.max(again, 0) == 0) & (row >= 0) & (row < size):
            column = tl.arange(0, BLOCK_D)
            inside = column < D
            target = rows + row * D + column
            old = tl.load(target, mask=inside, other=0).to(tl.float32)
            new = tl.load(features + image.to(tl.int64) * D + column, mask=inside, other=0)
            blend = momentum * old + rest * new
            norm = tl.sqrt_rn(tl.sum(blend * blend, 0))
            norm = tl.where(norm < eps, eps, norm)  # a NaN stays one
            tl.store(target, tl.div_rn(blend, norm).to(rows.dtype.element_ty), mask=inside)


# ---- launch ----


def _launch(rows: Tensor, index: Tensor, features: Tensor, momentum: float, eps: float) -> None:
    check_kernel(features.dtype, rows.dtype)
    check_width(features)
    b, d = features.shape
    if b:
        with torch.cuda.device_of(rows):
            _update_rows_kernel[(b,)](
                rows, index.contiguous(), features.contiguous(),
                len(rows), b, momentum, 1 - momentum, eps,
                D=d, BLOCK_D=triton.next_power_of_2(d), AHEAD=AHEAD, num_warps=WARPS,
            )  # fmt: skip


@torch.library.custom_op("fastrot::update_rows", mutates_args=("rows",))
def _update_rows(
    rows: Tensor, index: Tensor, features: Tensor, momentum: float, eps: float
) -> None:
    if form_for(rows) == "triton":
        return _launch(rows, index, features, momentum, eps)
    if not rows.is_cuda:  # looking would wait there
        check_values(features, len(rows), index)
    return update_rows_reference(rows, index, features, momentum, eps)


@_update_rows.register_fake
def _(*_):
    return None


# ---- public name ----


def update_rows(
    rows: Bank, index: Int64[Tensor, " b"], features: Features, momentum: float, eps: float = 0.0
) -> None:
    """Row <- unit(momentum * row + (1 - momentum) * feature), in place; of duplicates in `index` the last wins.

    What lies outside the bank is refused on a CPU and left out on a GPU, where looking would wait.
    """
    if features.ndim != 2 or features.dtype not in (torch.float32, torch.float64):
        raise misfit("features are", features, "torch.float32 [B, D]")
    check_rows(rows, features)
    if index.shape != features.shape[:1] or index.dtype != torch.int64:
        raise misfit("index is", index, f"torch.int64 [{len(features)}]")
    check_device(rows, index, features)
    if not 0 <= momentum <= 1:
        raise UsageError(f"--method.bank-momentum got {momentum}: it wants 0 to 1, as 0.5")
    if not eps >= 0:
        raise UsageError(f"eps got {eps}: it wants 0 or more")
    _update_rows(rows, index, features.detach(), momentum, eps)


# ---- what is refused, here and in other ops ----


def misfit(what: str, tensor: Tensor, wanted: str) -> UsageError:
    """Of a tensor of another dtype or shape than is wanted; `what` with its verb, as "x is"."""
    return UsageError(f"{what} {tensor.dtype} {tuple(tensor.shape)}: give {wanted}")


def check_rows(rows: Tensor, features: Tensor) -> None:
    """A bank that these features [B, D] can meet."""
    d = features.shape[1]
    dtypes = (torch.float32, torch.bfloat16, features.dtype)
    if rows.ndim != 2 or rows.shape[1] != d or rows.dtype not in dtypes:
        raise misfit("rows are", rows, f"torch.float32 or torch.bfloat16 [N, {d}]")
    if not rows.is_contiguous():
        raise UsageError("rows are not contiguous: give the bank itself, or rows.contiguous()")
    if not 1 <= len(rows) < 2**32:
        raise UsageError(f"the bank has {len(rows)} rows: it wants from 1 to 2**32 - 1")


def check_device(first: Tensor, *others: Tensor | None) -> None:
    """All on the device of the first."""
    for other in others:
        if other is not None and other.device != first.device:
            raise UsageError(f"tensors are on {first.device} and {other.device}: move them to one")


def check_width(features: Tensor) -> None:
    """Features [B, D] that a kernel's program can hold."""
    if features.shape[1] > WIDEST:
        held = f"the Triton kernels hold features up to {WIDEST}, and these are {features.shape[1]}"
        raise UsageError(f"{held}: say --method.dim 128, or set FASTROT_OPS=reference")


def check_values(features: Tensor, rows: int, *indices: Tensor | None) -> None:
    """What a GPU would have to be waited for."""
    for index in indices:
        if index is None or not index.numel():
            continue
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= rows:
            asked = f"rows {low} to {high} are asked for"
            raise UsageError(f"index out of range: {asked}, the bank has 0 to {rows - 1}")
    if not bool(torch.isfinite(features).all()):
        way_out = "start again with a smaller --lr, or --precision fp32"
        raise NotFinite(f"features are not finite (NaN or infinity): {way_out}")
