# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""uint8 crops -> rotated, normalised, channels-last views.

Shapes.  images uint8 [B, S, S, 3]; V rotations of each image; out [B*V, 3, S, S] channels_last, that is [B*V, S, S, 3]
         in memory. Row V*i + v is image i rotated rotations[v] * 90 degrees counter-clockwise, as numpy.rot90 does it.
         In cells of D x D pixels, n a side, the first begun P pixels before the view: out [B*V, D*D*3, n, n] channels_last,
         that is [B*V, n, n, D, D, 3] in memory.
Maths.   out[i, j, c] = ((u / 255) - mean[c]) / std[c] in float32, in this order, then cast to the dtype, where u is
         pixel [i, j], [j, S-1-i], [S-1-i, S-1-j] or [S-1-j, i] of channel c for 0, 1, 2, 3 rotations.
         In cells: cell [i, j], channel (y D + x) 3 + c is out[D i - P + y, D j - P + x, c] of the rotated view, and 0 beside
         it, as a convolution pads it; what the cells do not reach is left out.
Idea.    A rotation is an address: source = first + i * down + j * right, three numbers per rotation. Each program owns a tile
         of the output, 32 rows of 32 elements (channels are elements too, so rows are contiguous), and writes it for
         every rotation; the transposition happens in the addresses of the byte loads, which the L1 and L2 caches serve.
Bytes.   3 B S S (1 + V * itemsize): the crop is read from memory once, each view is written once.
         B * ceil(S / 32) * ceil(3 S / 32) programs of 128 threads. In bfloat16 a thread's share of a view is 8 elements:
         one 8-byte load where it is not rotated and 8 single bytes where it is, and one 16-byte store; a warp writes
         8 rows of 64 bytes. No spills, no shared memory (`make kernels`). Not yet timed on a GPU.
         In cells: 3 B (S S + V itemsize (D n)**2), for 224 pixels in 57 cells of 4 and four rotations in bfloat16 1.03 times
         those above, by B * ceil(n / 4) * ceil(3 D D n / 256) programs of 128 threads. All 8 bytes of a thread's share of a
         view are loaded one by one, since cells do not begin where words do; it stores 16 bytes where D is 4, a warp 512 in a
         row. Two addresses serve four rotations: two rotations more mirror one.
Digits.  Reference and kernel give the same bits on every device: u / 255 is written as u * HI + u * LO, where u * HI
         is exact, so that a compiler may or may not contract it into a fused multiply-add; the second
         division is the reciprocal, corrected by its own exact residue. Tests go through all 256 values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops.choice import check_kernel, form_for, tl, triton
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
    space_to_depth: SpaceToDepth | None = None,
) -> Float[Tensor, "w n n c"]:
    """The views as they lie in memory. What the CPU runs and what tests trust."""
    b, s = images.shape[:2]
    values = torch.empty(b, s, 3 * s, dtype=torch.float32, device=images.device)
    values.copy_(images.reshape(b, s, 3 * s))  # whole rows: inner loops of 3 channels are slow
    # divided by tensors: CUDA multiplies by the reciprocal of a Python number, which rounds otherwise
    values.div_(values.new_tensor(255.0))
    values.sub_(values.new_tensor(mean).repeat(s)).div_(values.new_tensor(std).repeat(s))
    values = values.to(dtype).view(b, s, s, 3)
    shape, edge = (s, s, 3), 0
    if space_to_depth is not None:
        side, n = space_to_depth.side, space_to_depth.count
        shape = (n, n, side, side, 3)
        edge = max(space_to_depth.pad, space_to_depth.beyond(s), 0)
        values = F.pad(values, (0, 0, *[edge] * 4))  # before the rotations: once an image

    def rotated(values: Tensor, rotation: int) -> Tensor:
        view = torch.rot90(values, rotation, (1, 2))
        if space_to_depth is None:
            return view
        return space_to_depth.cut(view, edge - space_to_depth.pad)

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

ROWS, WIDTH, WARPS = 32, 32, 4  # of a tile, in elements; 8 elements a thread
CELL_ROWS, CELL_WIDTH = 4, 256  # of a tile in cells: rows of cells, elements; the same number

if triton is not None:
    HI = tl.constexpr(float.fromhex("0x1.0102p-8"))  # 1 / 255 to 16 bits: times a byte it is exact
    LO = tl.constexpr(float.fromhex("-0x1.fdfdfep-25"))  # the rest

    @triton.jit
    @no_type_check  # the tests' shape checks would wrap it, and Triton wants the bare function
    def _rotated_views_kernel(
        images, rotations, out, size, mean0, mean1, mean2, std0, std1, std2,
        VIEWS: tl.constexpr, PATTERN: tl.constexpr,  # rotations as digits to base 4, the first lowest; -1: read `rotations`
        FUSED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        width = 3 * size
        across, down = tl.cdiv(width, WIDTH), tl.cdiv(size, ROWS)
        program = tl.program_id(0)
        image = (program // (across * down)).to(tl.int64)  # B * V * S * S * 3 can pass 2**31
        tile = program % (across * down)
        row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
        element = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
        column, channel = element // 3, element % 3
        inside = (row < size) & (element < width)
        mean, std = _of(channel, mean0, mean1, mean2), _of(channel, std0, std1, std2)
        inverse = _of(channel, tl.div_rn(1.0, std0), tl.div_rn(1.0, std1), tl.div_rn(1.0, std2))
        source = images + image * width * size
        for view in tl.static_range(VIEWS):
            if PATTERN == -1:
                rotation = tl.load(rotations + image * VIEWS + view).to(tl.int32) & 3
                pixel = _source_pixel(row, column, size, rotation)
                offset = 3 * pixel + channel
            elif (PATTERN >> 2 * view) & 3 == 0:
                offset = row * width + element  # the same, in a form that is seen to be contiguous
            else:
                offset = 3 * _source_pixel(row, column, size, (PATTERN >> 2 * view) & 3) + channel
            byte = tl.load(source + offset, mask=inside, other=0).to(tl.float32)
            value = _normalised(byte, mean, std, inverse, FUSED)
            target = out + (image * VIEWS + view) * width * size + row * width + element
            tl.store(target, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _space_to_depth_kernel(
        images, rotations, out, size, count, mean0, mean1, mean2, std0, std1, std2,
        VIEWS: tl.constexpr, PATTERN: tl.constexpr,  # as above
        SIDE: tl.constexpr, PAD: tl.constexpr, FUSED: tl.constexpr,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        CELL: tl.constexpr = 3 * SIDE * SIDE
        width = count * CELL
        across, down = tl.cdiv(width, WIDTH), tl.cdiv(count, ROWS)
        program = tl.program_id(0)
        image = (program // (across * down)).to(tl.int64)
        tile = program % (across * down)
        cell_row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
        element = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
        written = (cell_row < count) & (element < width)
        channel = element % 3
        row = cell_row * SIDE - PAD + element % CELL // (3 * SIDE)  # in the rotated view
        column = element // CELL * SIDE - PAD + element % (3 * SIDE) // 3
        inside = written & (row >= 0) & (row < size) & (column >= 0) & (column < size)
        mean, std = _of(channel, mean0, mean1, mean2), _of(channel, std0, std1, std2)
        inverse = _of(channel, tl.div_rn(1.0, std0), tl.div_rn(1.0, std1), tl.div_rn(1.0, std2))
        source = images + image * size * size * 3
        upright = 3 * (row * size + column) + channel
        rotated = 3 * (column * size + size - 1 - row) + channel  # once
        mirror = 3 * (size * size - 1) + 2 * channel  # less an element: that of two rotations more
        for view in tl.static_range(VIEWS):
            if PATTERN == -1:
                rotation = tl.load(rotations + image * VIEWS + view).to(tl.int32) & 3
                offset = tl.where(rotation % 2 == 0, upright, rotated)
                offset = tl.where(rotation < 2, offset, mirror - offset)
            else:
                offset = upright if (PATTERN >> 2 * view) % 2 == 0 else rotated
                offset = offset if (PATTERN >> 2 * view) % 4 < 2 else mirror - offset
            byte = tl.load(source + offset, mask=inside, other=0).to(tl.float32)
            value = tl.where(inside, _normalised(byte, mean, std, inverse, FUSED), 0.0)
            target = out + (image * VIEWS + view) * count * width + cell_row * width + element
            tl.store(target, value.to(out.dtype.element_ty), mask=written)

    @triton.jit
    @no_type_check
    def _of(channel, first, second, third):
        return tl.where(channel == 0, first, tl.where(channel == 1, second, third))

    @triton.jit
    @no_type_check
    def _normalised(byte, mean, std, inverse, FUSED: tl.constexpr):
        """(byte / 255 - mean) / std, of float32; inverse = 1 / std."""
        centred = byte * HI + byte * LO - mean
        if FUSED:  # IEEE's quotient without its 14 instructions and a branch (Markstein 1990)
            value = centred * inverse
            value = tl.fma(tl.fma(-value, std, centred), inverse, value)
        else:  # the interpreter's fma rounds twice
            value = tl.div_rn(centred, std)
        return value

    @triton.jit
    @no_type_check
    def _source_pixel(row, column, size, rotation):
        """Which pixel of the crop is pixel [row, column] of the crop rotated `rotation` times."""
        last = size - 1
        if rotation == 0:
            pixel = row * size + column
        elif rotation == 1:
            pixel = column * size + last - row
        elif rotation == 2:
            pixel = (last - row) * size + last - column
        else:
            pixel = (last - column) * size + row
        return pixel


# ---- launch ----


def _launch(images, rotations, mean, std, dtype, space_to_depth) -> Tensor:
    """The same by the kernels."""
    check_kernel(dtype)
    images = images.contiguous()
    b, s = images.shape[:2]
    if isinstance(rotations, Tensor):
        views, pattern, rotations = rotations.shape[1], -1, rotations.contiguous()
    else:
        views, pattern = len(rotations), sum(t << 2 * v for v, t in enumerate(rotations))
        rotations = images
    out = torch.empty(b * views, *_shape(s, space_to_depth), dtype=dtype, device=images.device)
    if not out.numel():
        return out
    known = dict(VIEWS=views, PATTERN=pattern, FUSED=images.is_cuda, num_warps=WARPS)
    with torch.cuda.device_of(images):
        if space_to_depth is None:
            programs = b * triton.cdiv(s, ROWS) * triton.cdiv(3 * s, WIDTH)
            _rotated_views_kernel[(programs,)](
                images, rotations, out, s, *mean, *std, ROWS=ROWS, WIDTH=WIDTH, **known
            )
        else:
            n, width = space_to_depth.count, space_to_depth.count * space_to_depth.channels
            programs = b * triton.cdiv(n, CELL_ROWS) * triton.cdiv(width, CELL_WIDTH)
            _space_to_depth_kernel[(programs,)](
                images, rotations, out, s, n, *mean, *std,
                SIDE=space_to_depth.side, PAD=space_to_depth.pad, ROWS=CELL_ROWS, WIDTH=CELL_WIDTH, **known,
            )  # fmt: skip
    return out


def _shape(size, space_to_depth: SpaceToDepth | None):
    """Of a view in memory; `size` may be a symbol of torch.compile's."""
    if space_to_depth is None:
        return size, size, 3
    return space_to_depth.count, space_to_depth.count, space_to_depth.channels


@torch.library.custom_op(
    "fastrot::rotated_views",
    mutates_args=(),
    schema="(Tensor images, Tensor? per_image, int[] for_all, float[] mean, float[] std, ScalarType dtype,"
    " int[]? cells=None) -> Tensor",
)
def _rotated_views(images, per_image, for_all, mean, std, dtype, cells=None):
    """`cells` are the fields of a SpaceToDepth."""
    rotations = for_all if per_image is None else per_image
    if per_image is not None and not per_image.is_cuda and bool((per_image & 3 != per_image).any()):
        raise UsageError("rotations of each image got a number outside 0, 1, 2 and 3")
    run = _launch if form_for(images) == "triton" else rotated_views_reference
    space_to_depth = None if cells is None else SpaceToDepth(*cells)
    return run(images, rotations, mean, std, dtype, space_to_depth).permute(0, 3, 1, 2)


@_rotated_views.register_fake
def _(images, per_image, for_all, mean, std, dtype, cells=None):
    b, s = images.shape[:2]
    views = len(for_all) if per_image is None else per_image.shape[1]
    shape = _shape(s, None if cells is None else SpaceToDepth(*cells))
    return images.new_empty(b * views, *shape, dtype=dtype).permute(0, 3, 1, 2)


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
    cells = None
    if space_to_depth is not None:
        cells = [space_to_depth.side, space_to_depth.pad, space_to_depth.count]
    mean, std = [float(m) for m in mean], [float(s) for s in std]
    return _rotated_views(images, per_image, for_all, mean, std, dtype, cells)
