# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Boxes of packed pictures -> crops.

Shapes.  A pack's pictures one after the other (data/pack): tiles uint8 [T, 48], one row for 8x8 pixels, or pixels uint8
         [T, 3]; first int64 [N + 1]; sizes int32 [N, 2]. boxes int64 [B, 6], rows (index, y, x, height, width, flip);
         crops uint8 [B, S, S, 3].
Maths.   A tile holds six BC4 blocks of 8 bytes: four of Y, one of Cb, one of Cr. Sample k of a block is entry
         i = bits 16+3k to 18+3k of the palette between its first two bytes: e0, e1, then (7-j) e0 + j e1 over 7,
         j = 1 to 6, where e0 > e1; else over 5, j = 1 to 4, and 0 and 255; rounded down. R = Y + (91881 Cr' + 2**15 >> 16),
         B = Y + (116130 Cb' + 2**15 >> 16), G = Y + (-22554 Cb' - 46802 Cr' + 2**15 >> 16), each clipped; ' is less 128.
         The box is cut out, 0 outside the picture, and brought to n S x n S, n the least power of two with no side over
         2 n S, by OpenCV's INTER_LINEAR; a pixel is the mean of n x n of these (ops/resample.py).
Idea.    A tile decodes alone and lies at a known place, so that a crop reads those under its box and no other. A program
         owns 32 x 32 pixels of a crop: it decodes the four pixels that each mixes, where it needs them. What it has made
         goes through shared memory, so that a thread writes elements that lie together. A tap outside the picture is
         read at its edge and weighs nothing: no load is masked.
Bytes.   0.75 h w of tiles from memory (3 h w raw), and 3 S S of crop, written once.
         B ceil(S / 32)**2 programs of 256 threads. A thread has four pixels; for each tap of n x n x 4 it loads three words
         of 8 bytes (raw: three bytes), most of which it shares with its neighbours; its stores are of 4 elements, those
         of a warp fill whole lines of 32 elements, which are sectors. Of 8 pixels a thread would spill: decoding, held to 128
         registers, is what binds: some 1,800 instructions for a thread's four pixels where n is 1. Not timed on a GPU.
Digits.  The same bits everywhere, as all of it is whole numbers, but for the place of a tap: float64, once a row or column,
         each operation rounded by itself (so the kernel is compiled without fused multiply-adds), then float32.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from fastrot.config import UsageError
from fastrot.ops.choice import check_kernel, form_for, kernel, tl, triton
from fastrot.ops.resample import Box, resample
from fastrot.ops.rows import check_device, misfit
from fastrot.ops.tiles import decoded

YCC, RAW = 48, 3  # bytes of a row of tiles
EDGE = 8  # pixels of a tile's side


@dataclass(frozen=True)
class PackTensors:
    """Packed pictures on one device. A row of `tiles` is a tile (c = 48) or a pixel (c = 3)."""

    tiles: UInt8[Tensor, "t c"]
    first: Int64[Tensor, " m"]  # [n + 1]: where each picture begins in `tiles`; last, their number
    sizes: Int32[Tensor, "n 2"]  # heights and widths

    @property
    def encoding(self) -> Literal["ycc", "raw"]:
        return "ycc" if self.tiles.shape[1] == YCC else "raw"


# ---- reference ----


def unpack_crops_reference(
    pack: PackTensors, boxes: Int64[Tensor, "b 6"], size: int
) -> UInt8[Tensor, "b s s 3"]:
    """What tests trust, and what runs on a CPU: one box after the other."""
    out = np.empty((len(boxes), size, size, 3), np.uint8)
    for row, crop in zip(boxes.cpu().numpy(), out, strict=True):
        unpack_crop(pack, row, crop)
    return torch.from_numpy(out).to(boxes.device)


def unpack_crop(pack: PackTensors, row: Box, out: UInt8[np.ndarray, "s s 3"]) -> None:
    """Write the crop of one box into `out`: what is decoded under it is a picture of its own, resampled by OpenCV."""
    index, y, x, height, width, _ = row.tolist()
    start, stop = pack.first[index : index + 2].tolist()
    down, across = pack.sizes[index].tolist()
    edge = EDGE if pack.encoding == "ycc" else 1
    grid = pack.tiles[start:stop].view(-(-down // edge), -(-across // edge), -1)
    top, left = max(y, 0) // edge, max(x, 0) // edge
    under = grid[top : -(-(y + height) // edge), left : -(-(x + width) // edge)].cpu().numpy()
    top, left = top * edge, left * edge
    picture = decoded(under)[: down - top, : across - left] if edge > 1 else under
    resample(picture, row - [0, top, left, 0, 0, 0], out)


# ---- kernel ----

SIDE, WARPS = 32, 8  # pixels of a program's square; 4 of them a thread
EXACT = {"enable_fp_fusion": False}  # a place of a tap is a product and a sum, each rounded
REGISTERS = {"maxnreg": 128}  # of decoding: 16 warps an SM; Triton 3.6 takes 152 else, for 8

if triton is not None:

    @kernel
    def _unpack_kernel(
        tiles, first, sizes, boxes, out, size,
        PACKED: tl.constexpr,  # ycc: `tiles` are words of 8 bytes
        SIDE: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(size, SIDE)
        program = tl.program_id(0)
        image = (program // (across * across)).to(tl.int64)  # B * S * S * 3 can pass 2**31
        top = program // across % across * SIDE
        left = program % across * SIDE
        row = (top + tl.arange(0, SIDE))[:, None]
        column = (left + tl.arange(0, SIDE))[None, :]
        index = tl.load(boxes + image * 6)
        flip = tl.load(boxes + image * 6 + 5) != 0
        column = tl.where(flip, size - 1 - column, column)
        red, green, blue = _crop_pixels(
            tiles, first, sizes, boxes + image * 6, index, row, column, size, PACKED
        )
        square = tl.reshape(red | (green << 8) | (blue << 16), [SIDE * SIDE])  # a pixel a word
        place = tl.arange(0, SIDE * SIDE)
        line = place // SIDE
        for third in tl.static_range(3):  # of the square's 3 * SIDE elements a line
            element = third * SIDE + place % SIDE
            value = tl.gather(square, line * SIDE + element // 3, 0) >> (element % 3 * 8)
            inside = (top + line < size) & (3 * left + element < 3 * size)
            target = out + image * 3 * size * size + (top + line) * 3 * size + 3 * left + element
            tl.store(target, value.to(tl.uint8), mask=inside)

    @kernel
    def _crop_pixels(tiles, first, sizes, box, index, row, column, size, PACKED: tl.constexpr):
        """Red, green and blue of the crop's pixels at row [R, 1] and column [1, C]."""
        y, x = tl.load(box + 1).to(tl.int32), tl.load(box + 2).to(tl.int32)
        height, width = tl.load(box + 3).to(tl.int32), tl.load(box + 4).to(tl.int32)
        down, across = tl.load(sizes + 2 * index), tl.load(sizes + 2 * index + 1)
        picture = tiles + tl.load(first + index) * (6 if PACKED else 3)  # may pass 2**31
        n, bits = 1, 0
        while tl.maximum(height, width) > 2 * n * size:
            n *= 2
            bits += 2
        down_by, across_by = _kernel_scale(height, n * size), _kernel_scale(width, n * size)
        red = tl.zeros((row + column).shape, tl.int32)
        green, blue = red, red
        for i in range(0, n):
            y0, y1, ay, by = _kernel_rows(row * n + i, height, down_by)
            y0, ay = _kept_inside(y + y0, ay, down)
            y1, by = _kept_inside(y + y1, by, down)
            for j in range(0, n):
                x0, x1, ax, bx = _kernel_columns(column * n + j, width, across_by)
                x0, ax = _kept_inside(x + x0, ax, across)
                x1, bx = _kept_inside(x + x1, bx, across)
                r = tl.full(red.shape, 2, tl.int32)
                g, b = r, r
                for lower in range(0, 2):
                    at, weight = tl.where(lower == 0, y0, y1), tl.where(lower == 0, ay, by)
                    r0, g0, b0 = _pixel(picture, across, at, x0, PACKED)
                    r1, g1, b1 = _pixel(picture, across, at, x1, PACKED)
                    r += (weight * ((r0 * ax + r1 * bx) >> 4)) >> 16
                    g += (weight * ((g0 * ax + g1 * bx) >> 4)) >> 16
                    b += (weight * ((b0 * ax + b1 * bx) >> 4)) >> 16
                red += r >> 2
                green += g >> 2
                blue += b >> 2
        return _kernel_mean(red, n, bits), _kernel_mean(green, n, bits), _kernel_mean(blue, n, bits)

    @kernel
    def _kernel_mean(total, n, bits):
        half = n * n // 2
        mean = (total + half) >> bits
        return tl.where(((total & (n * n - 1)) == half) & (n > 2), mean & ~1, mean)

    @kernel
    def _kernel_scale(length, size):
        return 1.0 / (size.to(tl.float64) / length.to(tl.float64))

    @kernel
    def _kernel_places(at, scale):
        place = ((at.to(tl.float64) + 0.5) * scale - 0.5).to(tl.float32)
        floor = tl.floor(place)
        return floor.to(tl.int32), place - floor

    @kernel
    def _kernel_columns(at, length, scale):
        place, share = _kernel_places(at, scale)
        share = tl.where((place < 0) | (place >= length - 1), 0.0, share)
        place = tl.minimum(tl.maximum(place, 0), length - 1)
        return place, tl.minimum(place + 1, length - 1), _weight(1 - share), _weight(share)

    @kernel
    def _kernel_rows(at, length, scale):
        place, share = _kernel_places(at, scale)
        above = tl.minimum(tl.maximum(place, 0), length - 1)
        below = tl.minimum(tl.maximum(place + 1, 0), length - 1)
        return above, below, _weight(1 - share), _weight(share)

    @kernel
    def _weight(share):
        """2048ths, halves to even: where float32 has no room for a fraction."""
        return (share * 2048.0 + 8388608.0 - 8388608.0).to(tl.int32)

    @kernel
    def _kept_inside(at, weight, length):
        """A tap outside the picture weighs nothing, as if it were 0; it is read at the edge."""
        inside = (at >= 0) & (at < length)
        return tl.minimum(tl.maximum(at, 0), length - 1), tl.where(inside, weight, 0)

    @kernel
    def _pixel(picture, across, y, x, PACKED: tl.constexpr):
        """Red, green and blue at y [R, 1] and x [1, C] of a picture."""
        if PACKED:
            above = (y >> 3) * ((across + 7) >> 3) * 6
            beside = (x >> 3) * 6
            luma = tl.load(picture + (above + ((y >> 2) & 1) * 2 + (beside + ((x >> 2) & 1))))
            blue = tl.load(picture + (above + 4 + beside))
            red = tl.load(picture + (above + 5 + beside))
            which = 16 + ((y >> 1) & 3) * 12 + ((x >> 1) & 3) * 3
            light = _sample(luma, 16 + (y & 3) * 12 + (x & 3) * 3)
            cb, cr = _sample(blue, which) - 128, _sample(red, which) - 128
            r = _clipped(light + ((91881 * cr + 32768) >> 16))
            g = _clipped(light + ((-22554 * cb - 46802 * cr + 32768) >> 16))
            b = _clipped(light + ((116130 * cb + 32768) >> 16))
        else:
            at = picture + (y * across * 3 + x * 3)
            r = tl.load(at).to(tl.int32)
            g = tl.load(at + 1).to(tl.int32)
            b = tl.load(at + 2).to(tl.int32)
        return r, g, b

    @kernel
    def _clipped(value):
        return tl.minimum(tl.maximum(value, 0), 255)

    @kernel
    def _sample(block, shift):
        """The sample of a BC4 block whose 3 bits begin at `shift`. A digit of a number is its weight of e1."""
        low = block.to(tl.int32)
        e0, e1 = low & 255, (low >> 8) & 255
        choice = (block >> shift.to(tl.int64)).to(tl.int32) & 7
        eight = e0 > e1
        weight = (tl.where(eight, 0x65432170, 0x00432150) >> (4 * choice)) & 15
        value = tl.where(eight, 7, 5) * e0 + weight * (e1 - e0)
        value *= tl.where(eight, 9363, 13108)
        value >>= 16  # over 7 or 5, rounded down: up to 2**11
        return tl.where(eight | (choice < 6), value, (choice & 1) * 255)


# ---- launch ----


def _launch(pack: PackTensors, boxes: Tensor, size: int) -> Tensor:
    check_kernel()
    packed = pack.encoding == "ycc"
    tiles = pack.tiles.view(torch.int64) if packed else pack.tiles
    out = boxes.new_empty((len(boxes), size, size, 3), dtype=torch.uint8)
    if out.numel():
        with torch.cuda.device_of(boxes):
            _unpack_kernel[(len(boxes) * triton.cdiv(size, SIDE) ** 2,)](
                tiles, pack.first, pack.sizes, boxes.contiguous(), out, size,
                PACKED=packed, SIDE=SIDE, num_warps=WARPS, **EXACT, **(REGISTERS if packed else {}),
            )  # fmt: skip
    return out


# ---- public name ----


def unpack_crops(
    pack: PackTensors, boxes: Int64[Tensor, "b 6"], size: int
) -> UInt8[Tensor, "b s s 3"]:
    """The boxes of packed pictures, decoded, brought to size x size and mirrored where asked.

    boxes  rows (index, y, x, height, width, flip), index a picture's number in `pack`: one that it has not is refused
           on a CPU; on a GPU, where looking would wait, that is the caller's to avoid

    Equal to the bit to decoding the whole picture, then `resample`, on every device.
    """
    _check(pack, boxes, size)
    if form_for(boxes) == "triton":
        return _launch(pack, boxes, size)
    return unpack_crops_reference(pack, boxes, size)


def _check(pack: PackTensors, boxes: Tensor, size: int) -> None:
    tiles, first, sizes = pack.tiles, pack.first, pack.sizes
    if tiles.dtype != torch.uint8 or tiles.ndim != 2 or tiles.shape[1] not in (YCC, RAW):
        raise misfit("tiles are", tiles, f"torch.uint8 [T, {YCC}] or [T, {RAW}]")
    if not tiles.is_contiguous() or tiles.data_ptr() % 8:
        raise UsageError("tiles are not contiguous from 8 bytes on: give the pack's array itself")
    if sizes.dtype != torch.int32:
        raise misfit("sizes are", sizes, "torch.int32 [N, 2]")
    if first.dtype != torch.int64 or len(first) != len(sizes) + 1:
        raise misfit("first is", first, f"torch.int64 [N + 1], N = {len(sizes)}")
    if boxes.ndim != 2 or boxes.shape[1] != 6 or boxes.dtype != torch.int64:
        raise misfit("boxes are", boxes, "torch.int64 [B, 6]")
    check_device(tiles, first, sizes, boxes)
    if size < 1:
        raise UsageError(f"size got {size}: it wants at least 1 pixel")
    if not boxes.is_cuda and len(boxes):
        low, high = (int(end) for end in boxes[:, 0].aminmax())
        if low < 0 or high >= len(sizes):
            last = len(sizes) - 1
            raise UsageError(f"boxes ask for pictures {low} to {high}: the pack has 0 to {last}")
        starts, ends = boxes[:, 1:3], boxes[:, 1:3] + boxes[:, 3:5]
        if not ((starts < sizes[boxes[:, 0]]) & (ends > 0) & (ends > starts)).all():
            raise UsageError("boxes lie outside their pictures: they want a pixel of these")
