"""rotated_views: the reference is numpy's rot90 and the originals' float32 steps; the kernel is the reference, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from truth import golden

from fastrot.config import UsageError
from fastrot.ops import rotate as op
from fastrot.ops.choice import form_for, using
from fastrot.ops.rotate import SpaceToDepth, rotated_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {
    "imagenet": (MEAN, STD),
    "cifar": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "plain": ((0.0, 0.5, 1.0), (1.0, 0.5, 0.3)),
}
ALL = (0, 1, 2, 3)
ROTATIONS = {
    "all": ALL,
    "upright": (0,),
    "some-again": (3, 1, 1),
    "per-image": torch.tensor([[0, 1, 2], [3, 3, 0], [2, 1, 0]]),
}
SIZES = [
    pytest.param(1, id="one-pixel"),
    pytest.param(5, id="under-one-tile"),
    pytest.param(32, id="whole-tiles"),  # 32 rows of 3 * 32 elements
    pytest.param(43, id="ragged-in-both-directions"),
    pytest.param(64, id="small-crops"),
]

CELLS = [  # size, cells: of a convolution, its kernel / stride, or of any kind
    pytest.param(31, SpaceToDepth(4, 2, 8), id="11/4-odd"),
    pytest.param(32, SpaceToDepth(4, 2, 9), id="11/4-two-tiles-wide"),
    pytest.param(29, SpaceToDepth(2, 2, 16), id="5/2-odd"),
    pytest.param(30, SpaceToDepth(2, 2, 16), id="5/2-last-pixel-left-out"),
    pytest.param(17, SpaceToDepth(3, 1, 6), id="3/3"),
    pytest.param(20, SpaceToDepth(1, 1, 22), id="3/1"),
    pytest.param(7, SpaceToDepth(5, 0, 1), id="one-cell-within"),
    pytest.param(6, SpaceToDepth(4, 5, 9), id="far-beyond-on-both-sides"),
]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
interpreted = pytest.mark.skipif(
    op.triton is None or torch.cuda.is_available(), reason="for machines with Triton and no GPU"
)


def crops(images: int, size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=draw)


def by_numpy(images: torch.Tensor, rotations, mean, std) -> np.ndarray:
    """Views [B*V, S, S, 3] in float32, as the originals take their steps."""
    each = rotations.tolist() if isinstance(rotations, torch.Tensor) else [rotations] * len(images)
    rotated = [np.rot90(i, t) for i, row in zip(images.numpy(), each, strict=True) for t in row]
    values = np.stack(rotated).astype(np.float32) / np.float32(255)
    return (values - np.array(mean, np.float32)) / np.array(std, np.float32)


def cut_by_numpy(views: np.ndarray, cells: SpaceToDepth) -> np.ndarray:
    """[W, S, S, 3] in cells, [W, side * side * 3, count, count]: every pixel by its address."""
    size, d = views.shape[1], cells.side
    out = np.zeros((len(views), cells.channels, cells.count, cells.count), views.dtype)
    for y, x, c in np.ndindex(d, d, 3):
        for i, j in np.ndindex(cells.count, cells.count):
            row, column = d * i - cells.pad + y, d * j - cells.pad + x
            if 0 <= row < size and 0 <= column < size:
                out[:, (y * d + x) * 3 + c, i, j] = views[:, row, column, c]
    return out


# ---- reference ----


def test_turns_are_those_of_the_original_code():
    file = golden("rotation")
    views = rotated_views(
        torch.tensor(file["sq"])[None], ALL, (0.0,) * 3, (1.0,) * 3, torch.float32
    )
    for view, degrees in zip(views, (0, 90, 180, 270), strict=True):
        bytes_back = (view.permute(1, 2, 0) * 255).round().to(torch.uint8)
        assert (bytes_back.numpy() == file[f"sq_rot{degrees}"]).all()


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reference_equals_numpy_bit_for_bit(rotations, dtype, statistics):
    images = crops(3, 20)
    views = rotated_views(images, rotations, *STATISTICS[statistics], dtype)
    assert views.dtype == dtype
    assert views.is_contiguous(memory_format=torch.channels_last)
    want = torch.from_numpy(by_numpy(images, rotations, *STATISTICS[statistics])).to(dtype)
    assert torch.equal(views.permute(0, 2, 3, 1), want)


@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize(("size", "cells"), CELLS)
def test_reference_in_cells_is_numpys_turn_cut_up(size, cells, rotations):
    images = crops(3, size)
    views = rotated_views(images, rotations, MEAN, STD, torch.float32, cells)
    assert views.is_contiguous(memory_format=torch.channels_last)
    want = torch.from_numpy(cut_by_numpy(by_numpy(images, rotations, MEAN, STD), cells))
    assert torch.equal(views, want)
    plain = rotated_views(images, rotations, MEAN, STD, torch.float32)
    assert torch.equal(cells(plain), want)
    assert cells(plain).is_contiguous(memory_format=torch.channels_last)


# ---- kernel ----


def kernel_equals_reference(images, rotations, statistics, dtype, cells=None):
    with using("reference"):
        rotations_here = rotations if isinstance(rotations, tuple) else rotations.cpu()
        want = rotated_views(images.cpu(), rotations_here, *statistics, dtype, cells)
    with using("triton"):
        got = rotated_views(images, rotations, *statistics, dtype, cells)
    assert got.stride() == want.stride()
    assert torch.equal(got.cpu(), want)


# the interpreter cuts bfloat16 off instead of rounding it, hence the other two
@interpreted
@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_interpreted_kernel_equals_the_reference(size, rotations):
    dtype = torch.float16 if size == 5 else torch.float32
    kernel_equals_reference(crops(3, size), rotations, STATISTICS["imagenet"], dtype)


@pytest.mark.soak
@interpreted
def test_interpreted_kernel_at_the_papers_size():
    kernel_equals_reference(crops(1, 224), (1, 2), STATISTICS["cifar"], torch.float16)


@interpreted
@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize(("size", "cells"), CELLS)
def test_interpreted_kernel_in_cells_equals_the_reference(size, cells, rotations):
    dtype = torch.float16 if size == 17 else torch.float32
    kernel_equals_reference(crops(3, size), rotations, STATISTICS["imagenet"], dtype, cells)


@pytest.mark.soak
@interpreted
def test_interpreted_kernel_in_the_papers_cells():
    paper = SpaceToDepth(4, 2, 57)
    kernel_equals_reference(crops(1, 224), (3,), STATISTICS["cifar"], torch.float16, paper)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize(
    ("size", "cells"), [*CELLS, pytest.param(224, SpaceToDepth(4, 2, 57), id="paper")]
)
def test_kernel_in_cells_equals_the_reference_on_a_gpu(size, cells, rotations, dtype):
    rotations = rotations.cuda() if isinstance(rotations, torch.Tensor) else rotations
    kernel_equals_reference(crops(3, size).cuda(), rotations, STATISTICS["imagenet"], dtype, cells)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotations", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("size", [*SIZES, pytest.param(224, id="paper")])
def test_kernel_equals_the_reference_on_a_gpu(size, rotations, dtype):
    rotations = rotations.cuda() if isinstance(rotations, torch.Tensor) else rotations
    for statistics in STATISTICS.values():
        kernel_equals_reference(crops(3, size).cuda(), rotations, statistics, dtype)


@pytest.mark.gpu
@needs_cuda
def test_kernel_writes_past_two_to_the_31_elements():
    images = crops(3, 64).cuda().repeat(60_000, 1, 1, 1)  # 2.2e9 bytes of crops
    last = rotated_views(images, (1,), MEAN, STD, torch.bfloat16)[-3:]
    assert torch.equal(last, rotated_views(images[-3:], (1,), MEAN, STD, torch.bfloat16))


@pytest.mark.gpu
@needs_cuda
def test_nothing_waits_for_the_gpu():
    images, rotations = crops(3, 64).cuda(), ROTATIONS["per-image"].cuda()
    rotated_views(images, rotations, MEAN, STD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rotated_views(images, rotations, MEAN, STD)
        rotated_views(images, ALL, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the two divisions that the kernel writes otherwise ----


def nearest(exact: Fraction) -> np.float32:
    """Round to float32, ties to even."""
    near = np.float32(float(exact))
    around = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    return min(around, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.int32)) & 1))


def fused(a, b, c) -> np.float32:
    return nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def test_a_byte_over_255_is_exact_however_the_compiler_contracts_it():
    high, low = (
        np.float32(float.fromhex("0x1.0102p-8")),
        np.float32(float.fromhex("-0x1.fdfdfep-25")),
    )
    if op.triton is not None:
        assert (float(high), float(low)) == (op.HI.value, op.LO.value)
    for byte in np.arange(256, dtype=np.float32):
        want = byte / np.float32(255)
        assert byte * high + byte * low == want
        assert fused(byte, high, byte * low) == fused(byte, low, byte * high) == want


@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_corrected_reciprocal_divides_as_ieee_does(statistics):
    for mean, std in zip(*np.array(STATISTICS[statistics], np.float32), strict=True):
        inverse = np.float32(1) / std
        for centred in np.arange(256, dtype=np.float32) / np.float32(255) - mean:
            value = centred * inverse
            residue = fused(-value, std, centred)
            assert fused(residue, inverse, value) == centred / std


# ---- as an operator ----


def test_the_operator_keeps_torchs_rules():
    images, rotations = crops(3, 6), ROTATIONS["per-image"]
    for arguments in (
        (images, None, list(ALL), list(MEAN), list(STD), torch.float32),
        (images, rotations, [], list(MEAN), list(STD), torch.float16),
        (images, rotations, [], list(MEAN), list(STD), torch.float32, [4, 2, 3]),
    ):
        torch.library.opcheck(op._rotated_views, arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images=torch.zeros(1, 4, 5, 3, dtype=torch.uint8)), "square"),
        (dict(images=torch.zeros(1, 4, 4, 3)), "torch.uint8"),
        (dict(rotations=(0, 4)), r"rotations got \(0, 4\)"),
        (dict(rotations=()), "at least one"),
        (dict(rotations=torch.zeros(2, 1, dtype=torch.int64)), r"torch.int64 \[1, V\]"),
        (dict(rotations=torch.tensor([[4]])), "0, 1, 2 and 3"),
        (dict(std=(0.2, 0.0, 0.2)), "above 0"),
        (dict(dtype=torch.int32), "torch.int32"),
    ],
)
def test_wrong_use_is_refused(change, words):
    right = dict(images=crops(1, 4), rotations=ALL, mean=MEAN, std=STD, dtype=torch.float32)
    unchecked = getattr(
        rotated_views, "__wrapped__", rotated_views
    )  # before the tests' shape checks
    with pytest.raises(UsageError, match=words):
        unchecked(**{**right, **change})


@pytest.mark.parametrize("wrong", [(0, 0, 1), (4, -1, 1), (4, 2, 0)])
def test_cells_that_are_none_are_refused(wrong):
    with pytest.raises(UsageError, match=r"SpaceToDepth\(side=.* makes no cells"):
        SpaceToDepth(*wrong)


def test_a_wrong_form_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"using\(\) got 'cuda'"), using("cuda"):
        pass
    monkeypatch.setenv("FASTROT_OPS", "fast")
    with pytest.raises(UsageError, match="FASTROT_OPS got 'fast': it wants reference or triton"):
        form_for(torch.zeros(1))


def test_using_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("FASTROT_OPS", "triton")
    assert form_for(torch.zeros(1)) == "triton"
    with using("reference"):
        assert form_for(torch.zeros(1)) == "reference"
