"""unpack_crops: every form gives the bits of decoding the whole picture, then `resample`."""

import numpy as np
import pytest
import torch
from packs import untiled
from truth import DATA

from fastrot.config import UsageError
from fastrot.data.pack import layout
from fastrot.ops import blocks as op
from fastrot.ops.blocks import PackTensors, unpack_crops, unpack_crops_reference
from fastrot.ops.choice import using
from fastrot.ops.resample import resample

ENCODINGS: tuple[layout.Encoding, ...] = ("ycc", "raw")
PICTURES = ((50, 61), (8, 8), (1, 3), (90, 41), (16, 104))  # height, width
CASES = {  # a box (index, y, x, height, width, flip), and pixels a side of its crop
    "copy": ((0, 3, 5, 20, 20, 0), 20),
    "copy-mirrored": ((0, 3, 5, 20, 20, 1), 20),
    "enlarged": ((0, 21, 30, 9, 13, 0), 32),
    "enlarged-mirrored": ((3, 11, 7, 13, 9, 1), 31),
    "shrunk": ((3, 2, 1, 47, 38, 0), 25),
    "shrunk-to-half": ((3, 4, 0, 40, 40, 1), 20),
    "taller-than-wide": ((3, 0, 39, 30, 1, 0), 16),
    "wider-than-tall": ((4, 15, 0, 1, 30, 1), 16),
    "whole-tiles": ((1, 0, 0, 8, 8, 0), 8),
    "smaller-than-a-tile": ((2, 0, 0, 1, 3, 1), 4),
    "two-taps": ((0, 7, 2, 41, 33, 1), 17),
    "over-the-top-left": ((0, -5, -3, 20, 24, 0), 20),
    "over-the-bottom-right": ((0, 40, 50, 20, 20, 1), 20),
    "over-all-four": ((1, -4, -9, 19, 24, 0), 13),
    "two-taps-over-the-border": ((2, -6, -5, 17, 30, 1), 9),
    "one-pixel-of-one": ((4, 9, 88, 1, 1, 0), 1),
    "one-pixel-of-two": ((4, 9, 88, 2, 1, 0), 1),
    "four-taps": ((3, 8, 3, 37, 30, 1), 5),
}
SQUARES = {  # several programs a crop; ragged, and whole
    "ragged": ([(0, 1, 2, 44, 52, 1), (3, -2, 4, 60, 30, 0)], 43),
    "four-squares": ([(3, 20, 1, 50, 40, 0)], 64),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
interpreted = pytest.mark.skipif(
    op.triton is None or torch.cuda.is_available(), reason="for machines with Triton and no GPU"
)


def random_pack(encoding: layout.Encoding, sizes=PICTURES) -> PackTensors:
    """Any bytes are tiles."""
    draw, sides = np.random.default_rng(7), np.array(sizes, np.int32)
    first = layout.firsts(sides, encoding)
    tiles = draw.integers(0, 256, (first[-1], layout.WIDTH[encoding]), dtype=np.uint8)
    return PackTensors(*map(torch.from_numpy, (tiles, first, sides)))


def decoded_then_cropped(pack: PackTensors, boxes: torch.Tensor, size: int) -> torch.Tensor:
    out = np.empty((len(boxes), size, size, 3), np.uint8)
    for crop, box in zip(out, boxes.cpu().numpy(), strict=True):
        start, stop = pack.first[box[0] : box[0] + 2].tolist()
        data, size = pack.tiles[start:stop].cpu().numpy(), pack.sizes[box[0]].tolist()
        picture = untiled(data, *size) if pack.encoding == "ycc" else data.reshape(*size, 3)
        resample(picture, box, crop)
    return torch.from_numpy(out)


def random_boxes(draw: np.random.Generator, pack: PackTensors, count: int) -> torch.Tensor:
    """Boxes that hold a pixel of their picture at least, and may reach over its border."""
    index = draw.integers(0, len(pack.sizes), count)
    sides = pack.sizes.numpy()[index].astype(np.int64)
    start = draw.integers(-9, sides)
    length = draw.integers(np.maximum(1, 1 - start), sides + 12)
    flip = draw.integers(0, 2, count)
    return torch.from_numpy(np.concatenate([index[:, None], start, length, flip[:, None]], axis=1))


# ---- reference ----


def test_the_random_tiles_hold_every_entry_of_both_palettes():
    blocks = random_pack("ycc").tiles.numpy().reshape(-1, 8)
    words = blocks.view("<u8")
    seen = {
        (bool(b[0] > b[1]), int(w) >> 16 + 3 * k & 7)
        for b, w in zip(blocks, words[:, 0], strict=True)
        for k in range(16)
    }
    assert len(seen) == 16


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_reference_equals_decode_then_crop(encoding):
    draw, pack = np.random.default_rng(1), random_pack(encoding)
    for size in (1, 2, 5, 9, 16, 24, 31, 57):
        boxes = random_boxes(draw, pack, 15)
        found = unpack_crops_reference(pack, boxes, size)
        assert torch.equal(found, decoded_then_cropped(pack, boxes, size)), size


def test_only_the_tiles_of_the_box_are_read():
    pack = random_pack("ycc")
    boxes = torch.tensor([(0, 17, 25, 20, 10, 0)])  # tile rows 2 to 4, columns 3 and 4, of 7 x 8
    want = unpack_crops_reference(pack, boxes, 12)
    tiles = pack.tiles[: 7 * 8].view(7, 8, 48)
    kept = tiles[2:5, 3:5].clone()
    tiles[:] = 0
    tiles[2:5, 3:5] = kept
    assert torch.equal(unpack_crops_reference(pack, boxes, 12), want)
    tiles[4, 4] += 1
    assert not torch.equal(unpack_crops_reference(pack, boxes, 12), want)


@pytest.mark.skipif(not (DATA / "imagenet-sample").is_dir(), reason="no real pictures here")
def test_real_pictures_come_out_as_decoded():
    from fastrot.data.pictures import decode

    files = sorted((DATA / "imagenet-sample").rglob("*.JPEG"))[:4]
    pictures = [decode(file.read_bytes()) for file in files]
    sides = np.array([picture.shape[:2] for picture in pictures], np.int32)
    tiles = np.concatenate([layout.encode(picture, "ycc") for picture in pictures])
    pack = PackTensors(*map(torch.from_numpy, (tiles, layout.firsts(sides, "ycc"), sides)))
    boxes = random_boxes(np.random.default_rng(3), pack, 6)
    want = decoded_then_cropped(pack, boxes, 96)
    assert torch.equal(unpack_crops_reference(pack, boxes, 96), want)
    assert torch.equal(unpack_crops(pack, boxes, 96), want)


# ---- kernel ----


def kernel_gives(device: str, pack: PackTensors, boxes: torch.Tensor, size: int) -> torch.Tensor:
    there = PackTensors(*(each.to(device) for each in (pack.tiles, pack.first, pack.sizes)))
    with using("triton"):
        return unpack_crops(there, boxes.to(device), size).cpu()


@interpreted
@pytest.mark.parametrize(
    ("case", "encoding"),
    [
        *((case, "ycc") for case in CASES if case != "four-taps"),
        *((case, "raw") for case in ("copy-mirrored", "shrunk", "over-all-four", "four-taps")),
    ],
)
def test_interpreted_kernel_equals_decode_then_crop(case, encoding):
    box, size = CASES[case]
    pack, boxes = random_pack(encoding), torch.tensor([box])
    want = decoded_then_cropped(pack, boxes, size)
    assert torch.equal(unpack_crops_reference(pack, boxes, size), want)
    assert torch.equal(kernel_gives("cpu", pack, boxes, size), want)


@interpreted
@pytest.mark.parametrize("case", SQUARES)
def test_interpreted_kernel_over_several_squares(case):
    boxes, size = torch.tensor(SQUARES[case][0]), SQUARES[case][1]
    pack = random_pack("ycc")
    want = decoded_then_cropped(pack, boxes, size)
    assert torch.equal(kernel_gives("cpu", pack, boxes, size), want)


def behind_two_to_the_31_bytes() -> tuple[PackTensors, PackTensors]:
    """A raw picture behind 2**31 bytes, most of which are never touched; and the same picture alone."""
    alone = random_pack("raw", [(20, 30)])
    before = 2**31 // 3 + 1000
    tiles = torch.from_numpy(np.zeros((before + 600, 3), np.uint8))
    tiles[before:] = alone.tiles
    sizes = torch.tensor([(1, before), (20, 30)], dtype=torch.int32)
    return PackTensors(tiles, torch.tensor([0, before, before + 600]), sizes), alone


@interpreted
def test_a_pack_of_more_than_two_to_the_31_bytes():
    pack, alone = behind_two_to_the_31_bytes()
    box = torch.tensor([(0, 2, 3, 15, 20, 0)])
    want = decoded_then_cropped(alone, box, 16)
    box[:, 0] = 1
    assert torch.equal(unpack_crops_reference(pack, box, 16), want)
    assert torch.equal(unpack_crops(pack, box, 16), want)
    assert torch.equal(kernel_gives("cpu", pack, box, 16), want)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_kernel_equals_decode_then_crop_on_a_gpu(encoding):
    pack, draw = random_pack(encoding), np.random.default_rng(5)
    for size in (1, 2, 5, 9, 16, 24, 31, 32, 57, 64, 100, 224):
        boxes = random_boxes(draw, pack, 200)
        want = decoded_then_cropped(pack, boxes, size)
        assert torch.equal(kernel_gives("cuda", pack, boxes, size), want), size
    for box, size in CASES.values():
        boxes = torch.tensor([box])
        want = decoded_then_cropped(pack, boxes, size)
        assert torch.equal(kernel_gives("cuda", pack, boxes, size), want)


@pytest.mark.gpu
@needs_cuda
def test_every_place_of_a_tap_is_opencvs_on_a_gpu():
    """A division by approximation, or halves rounded up, would move some of these."""
    sides = [(i, 1000 - i) for i in range(1, 1000, 3)]
    pack = random_pack("raw", sides)
    boxes = torch.tensor([(i, 0, 0, h, w, 0) for i, (h, w) in enumerate(sides)])
    for size in (96, 224):
        want = unpack_crops_reference(pack, boxes, size)
        assert torch.equal(kernel_gives("cuda", pack, boxes, size), want)


@pytest.mark.gpu
@needs_cuda
def test_a_pack_of_more_than_two_to_the_31_bytes_on_a_gpu():
    pack, alone = behind_two_to_the_31_bytes()
    box = torch.tensor([(0, 2, 3, 15, 20, 0)])
    want = decoded_then_cropped(alone, box, 16)
    box[:, 0] = 1
    assert torch.equal(kernel_gives("cuda", pack, box, 16), want)


@pytest.mark.gpu
@needs_cuda
def test_nothing_waits_for_the_gpu():
    pack, boxes = random_pack("ycc"), torch.tensor([CASES["shrunk"][0]]).cuda()
    there = PackTensors(*(each.cuda() for each in (pack.tiles, pack.first, pack.sizes)))
    unpack_crops(there, boxes, 24)
    torch.cuda.set_sync_debug_mode("error")
    try:
        unpack_crops(there, boxes, 24)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- wrong use ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(boxes=torch.zeros(1, 5, dtype=torch.int64)), r"torch.int64 \[B, 6\]"),
        (dict(boxes=torch.zeros(1, 6)), r"torch.int64 \[B, 6\]"),
        (dict(boxes=torch.tensor([[5, 0, 0, 4, 4, 0]])), "pictures 5 to 5: the pack has 0 to 4"),
        (dict(boxes=torch.tensor([[-1, 0, 0, 4, 4, 0]])), "pictures -1"),
        (dict(size=0), "size got 0"),
    ],
)
def test_wrong_use_is_refused(change, words):
    unchecked = getattr(unpack_crops, "__wrapped__", unpack_crops)  # before the tests' shape checks
    right = dict(pack=random_pack("ycc"), boxes=torch.tensor([[0, 0, 0, 4, 4, 0]]), size=4)
    with pytest.raises(UsageError, match=words):
        unchecked(**{**right, **change})


def test_what_is_no_pack_is_refused():
    pack, boxes = random_pack("ycc"), torch.tensor([[0, 0, 0, 4, 4, 0]])
    for tiles, first, words in (
        (pack.tiles[:, :47], pack.first, r"uint8 \[T, 48\] or \[T, 3\]"),
        (pack.tiles, pack.first[1:], r"int64 \[N \+ 1\]"),
        (pack.tiles.repeat(1, 2)[:, :48], pack.first, "not contiguous"),
    ):
        with pytest.raises(UsageError, match=words):
            unpack_crops(PackTensors(tiles, first, pack.sizes), boxes, 4)


def test_an_empty_batch_is_empty():
    none = torch.zeros(0, 6, dtype=torch.int64)
    assert unpack_crops(random_pack("raw"), none, 8).shape == (0, 8, 8, 3)
    with using("triton"):
        assert unpack_crops(random_pack("ycc"), none, 8).shape == (0, 8, 8, 3)
