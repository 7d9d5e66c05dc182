# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""uint8 crops -> rotated, normalised, channels-last views.

Shapes.  images uint8 [B, S, S, 3]; V rotations of each image. In cells of D x D pixels, n a side, the first begun P pixels
         before the view: out [B*V, D*D*3, n, n] channels_last, that is [B*V, n, n, D, D, 3] in memory. Plain views,
         [B*V, 3, S, S], are cells of one pixel. Row V*i + v is image i rotated rotations[v] * 90 degrees counter-clockwise,
         as numpy.rot90 does it.
Maths.   view[i, j, c] = ((u / 255) - mean[c]) / std[c] in float32, in this order, then cast to the dtype, where u is
         pixel [i, j], [j, S-1-i], [S-1-i, S-1-j] or [S-1-j, i] of channel c for 0, 1, 2, 3 rotations.
         Channel (y D + x) 3 + c of cell [i, j] is view[D i - P + y, D j - P + x, c], and 0 beside the view, as a
         convolution pads it; what the cells do not reach is left out.
Idea.    A rotation is an address. Each program owns a tile of the output (channels are elements too, so rows are
         contiguous) and writes it for every rotation; the caches serve the byte loads of the transposed ones.
Bytes.   B (3 S S + 3 V itemsize (D n)**2): the crop is read from memory once, each view is written once.
Digits.  Reference and kernel give the same bits on every device: u / 255 is written as u * HI + u * LO, where u * HI
         is exact, so that a compiler may or may not contract it into a fused multiply-add; the second
         division is the reciprocal, corrected by its own exact residue. Tests go through all 256 values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops.choice import check_kernel, form_for, kernel, tl, triton
from fastrot.ops.rows import misfit

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SpaceToDepth:
    """Views cut into cells whose pixels become channels: what a convolution of stride `side` reads at once."""

    side: int  # D: pixels a side of a cell
    pad: int  # P: pixels by which the first cell begins before the view
    count: int  # n: cells a side

    def __post_init__(self):
        if self.side < 1 or self.pad < 0 or self.count < 1:
            raise UsageError(f"{self} makes no cells: side and count want 1 or more, pad 0")

    def __hash__(self) -> int:
        return 0  # torch 2.11 asks for it as it traces, before there are fields

    @property
    def channels(self) -> int:
        """Of a cell: its pixels by three colours."""
        return 3 * self.side**2

    def beyond(self, size: int) -> int:
        """Pixels that the last cell reaches beyond a view of `size`; below 0 where it ends within."""
        return self.side * self.count - self.pad - size

    def cut(self, padded: Tensor, first: int) -> Float[Tensor, "w n n d d c"]:
        """Padded views [w, h, h, c] in cells, of which the first begins at pixel `first`; no copy."""
        end, each = first + self.side * self.count, (self.count, self.side)
        whole = padded[:, first:end, first:end]
        return whole.unflatten(2, each).unflatten(1, each).transpose(2, 3)

    def __call__(self, views: Float[Tensor, "w c s s"]) -> Float[Tensor, "w d n n"]:
        """Views of any kind in cells, channels_last: what `rotated_views` writes at once. With gradient."""
        before, behind = self.pad, self.beyond(views.shape[-1])
        padded = F.pad(views.permute(0, 2, 3, 1), (0, 0, before, behind, before, behind))
        return self.cut(padded, 0).flatten(3).permute(0, 3, 1, 2)


# ---- reference ----


def rotated_views_reference(
    images: UInt8[Tensor, "b s s 3"],
    rotations: Sequence[int] | Int64[Tensor, "b v"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    cells: SpaceToDepth | None = None,
) -> Float[Tensor, "w n n c"]:
    """The views as they lie in memory. What the CPU runs and what tests trust."""
    b, s = images.shape[:2]
    values = torch.empty(b, s, 3 * s, dtype=torch.float32, device=images.device)
    values.copy_(images.reshape(b, s, 3 * s))  # whole rows: inner loops of 3 channels are slow
    # divided by tensors: CUDA multiplies by the reciprocal of a Python number, which rounds otherwise
    values.div_(values.new_tensor(255.0))
    values.sub_(values.new_tensor(mean).repeat(s)).div_(values.new_tensor(std).repeat(s))
    values = values.to(dtype).view(b, s, s, 3)
    cells = cells or SpaceToDepth(1, 0, s)
    edge = max(cells.pad, cells.beyond(s), 0)
    if edge:
        values = F.pad(values, (0, 0, *[edge] * 4))  # before the rotations: once an image

    def rotated(values: Tensor, rotation: int) -> Tensor:
        return cells.cut(torch.rot90(values, rotation, (1, 2)), edge - cells.pad)

    shape = (cells.count, cells.count, cells.side, cells.side, 3)
    if isinstance(rotations, Tensor):
        out = values.new_empty(b, rotations.shape[1], *shape)
        for rotation in range(4):
            image, view = (rotations == rotation).nonzero(as_tuple=True)
            out[image, view] = rotated(values[image], rotation)
    else:
        out = values.new_empty(b, len(rotations), *shape)
        for view, rotation in enumerate(rotations):
            out[:, view] = rotated(values, rotation)
    return out.flatten(0, 1).flatten(3)


# ---- kernel ----

WARPS = 4
TILE = (32, 32)  # rows and elements; 8 elements a thread
CELLS_TILE = (4, 256)  # where cells are larger than a pixel

if triton is not None:
    HI = tl.constexpr(float.fromhex("0x1.0102p-8"))  # 1 / 255 to 16 bits: times a byte it is exact
    LO = tl.constexpr(float.fromhex("-0x1.fdfdfep-25"))  # the rest

    @kernel
    def _rotated_views_kernel(
        images, rotations, out, size, count, mean0, mean1, mean2, std0, std1, std2,
        VIEWS: tl.constexpr, PATTERN: tl.constexpr,  # rotations as digits to base 4, the first lowest; -1: read `rotations`
        SIDE: tl.constexpr, PAD: tl.constexpr, BESIDE: tl.constexpr,  # whether cells reach beyond the view
        FUSED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        CELL: tl.constexpr = 3 * SIDE * SIDE
        width = count * CELL
        across, down = tl.cdiv(width, WIDTH), tl.cdiv(count, ROWS)
        program = tl.program_id(0)
        image = (program // (across * down)).to(tl.int64)  # B * V * S * S * 3 can pass 2**31
        tile = program % (across * down)
        cell_row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
        element = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
        written = (cell_row < count) & (element < width)
        channel = element % 3
        if SIDE == 1:
            row, column = cell_row - PAD, element // 3 - PAD  # in the rotated view
        else:
            row = cell_row * SIDE - PAD + element % CELL // (3 * SIDE)
            column = element // CELL * SIDE - PAD + element % (3 * SIDE) // 3
        if BESIDE:
            inside = written & (row >= 0) & (row < size) & (column >= 0) & (column < size)
        else:
            inside = written
        mean, std = _of(channel, mean0, mean1, mean2), _of(channel, std0, std1, std2)
        inverse = _of(channel, tl.div_rn(1.0, std0), tl.div_rn(1.0, std1), tl.div_rn(1.0, std2))
        source = images + image * size * size * 3
        if SIDE == 1:
            upright = 3 * row * size + element - 3 * PAD  # in a form that is seen to be contiguous
        else:
            upright = 3 * (row * size + column) + channel
        rotated = 3 * (column * size + size - 1 - row) + channel  # once
        mirror = 3 * (size * size - 1) + 2 * channel  # less an element: that of two rotations more
        for view in tl.static_range(VIEWS):
            if PATTERN == -1:
                rotation = tl.load(rotations + image * VIEWS + view).to(tl.int32) & 3
                odd = rotation % 2 == 1
                down, right = tl.where(odd, -1, size), tl.where(odd, size, 1)
                pixel = tl.where(odd, size - 1, 0) + row * down + column * right
                pixel = tl.where(rotation < 2, pixel, size * size - 1 - pixel)
                offset = 3 * pixel + channel
            else:
                offset = upright if (PATTERN >> 2 * view) % 2 == 0 else rotated
                offset = offset if (PATTERN >> 2 * view) % 4 < 2 else mirror - offset
            byte = tl.load(source + offset, mask=inside, other=0).to(tl.float32)
            centred = byte * HI + byte * LO - mean
            if FUSED:  # IEEE's quotient without its 14 instructions and a branch (Markstein 1990)
                value = centred * inverse
                value = tl.fma(tl.fma(-value, std, centred), inverse, value)
            else:  # the interpreter's fma rounds twice
                value = tl.div_rn(centred, std)
            if BESIDE:
                value = tl.where(inside, value, 0.0)
            target = out + (image * VIEWS + view) * count * width + cell_row * width + element
            tl.store(target, value.to(out.dtype.element_ty), mask=written)

    @kernel
    def _of(channel, first, second, third):
        return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


# ---- launch ----


def _launch(images, rotations, mean, std, dtype, cells: SpaceToDepth) -> Tensor:
    """The same by the kernel."""
    check_kernel(dtype)
    images = images.contiguous()
    b, s = images.shape[:2]
    if isinstance(rotations, Tensor):
        views, pattern, rotations = rotations.shape[1], -1, rotations.contiguous()
    else:
        views, pattern = len(rotations), sum(t << 2 * v for v, t in enumerate(rotations))
        rotations = images
    n, channels = cells.count, cells.channels
    out = torch.empty(b * views, n, n, channels, dtype=dtype, device=images.device)
    height, width = TILE if cells.side == 1 else CELLS_TILE
    if out.numel():
        programs = b * triton.cdiv(n, height) * triton.cdiv(n * channels, width)
        with torch.cuda.device_of(images):
            _rotated_views_kernel[(programs,)](
                images, rotations, out, s, n, *mean, *std, VIEWS=views, PATTERN=pattern,
                SIDE=cells.side, PAD=cells.pad, BESIDE=cells.pad > 0 or cells.beyond(s) > 0,
                FUSED=images.is_cuda, ROWS=height, WIDTH=width, num_warps=WARPS,
            )  # fmt: skip
    return out


@torch.library.custom_op(
    "fastrot::rotated_views",
    mutates_args=(),
    schema="(Tensor images, Tensor? per_image, int[] for_all, float[] mean, float[] std, ScalarType dtype,"
    " int[]? cells=None) -> Tensor",
)
def _rotated_views(images, per_image, for_all, mean, std, dtype, cells=None):
    """`cells` are the fields of a SpaceToDepth; None: views as they are, in cells of one pixel."""
    rotations = for_all if per_image is None else per_image
    if per_image is not None and not per_image.is_cuda and bool((per_image & 3 != per_image).any()):
        raise UsageError("rotations of each image got a number outside 0, 1, 2 and 3")
    run = _launch if form_for(images) == "triton" else rotated_views_reference
    found = SpaceToDepth(*(cells or (1, 0, images.shape[1])))
    return run(images, rotations, mean, std, dtype, found).permute(0, 3, 1, 2)


@_rotated_views.register_fake
def _(images, per_image, for_all, mean, std, dtype, cells=None):
    views = len(for_all) if per_image is None else per_image.shape[1]
    side, _, n = cells or (1, 0, images.shape[1])
    shape = (images.shape[0] * views, n, n, 3 * side**2)  # len() would fix a symbol's number
    return images.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


# ---- public name ----


def rotated_views(
    images: UInt8[Tensor, "b s s 3"],
    rotations: Sequence[int] | Int64[Tensor, "b v"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
    space_to_depth: SpaceToDepth | None = None,
) -> Float[Tensor, "w c n n"]:
    """Every asked rotation of every crop, normalised: image-major, channels_last. No gradient.

    `rotations` is one tuple for all images, or one row per image (kept modulo 4 on a GPU, where looking would wait).
    [B*V, 3, S, S]; with `space_to_depth` [B*V, side * side * 3, count, count], for a convolution that reads these.
    """
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != torch.uint8 or not square:
        raise misfit("images are", images, "square ones, torch.uint8 [B, S, S, 3]")
    if dtype not in DTYPES:
        raise UsageError(f"dtype got {dtype}: rotated_views wants one of {DTYPES}")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise UsageError(f"mean, std got {mean}, {std}: give three numbers each, std's above 0")
    per_image, for_all = None, []
    if not isinstance(rotations, Tensor):
        for_all = list(rotations)
        if not for_all or not {*for_all} <= {0, 1, 2, 3}:
            raise UsageError(f"rotations got {rotations}: they want at least one of 0, 1, 2 and 3")
    elif rotations.ndim != 2 or len(rotations) != len(images) or rotations.dtype != torch.int64:
        raise misfit("rotations are", rotations, f"torch.int64 [{len(images)}, V]")
    else:
        per_image = rotations
    cells = space_to_depth and [space_to_depth.side, space_to_depth.pad, space_to_depth.count]
    mean, std = [float(m) for m in mean], [float(s) for s in std]
    return _rotated_views(images, per_image, for_all, mean, std, dtype, cells)
