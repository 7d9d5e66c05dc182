import numpy as np
import pytest
import torch
from truth import photo

from fastrot.config import RandomResized, Shifted, UsageError, Whole, Within
from fastrot.data import crops
from fastrot.ops.resample import resample

HEIGHTS = np.array([375, 500, 64, 256, 40], np.int32)
WIDTHS = np.array([500, 375, 64, 256, 1000], np.int32)
INDEX = np.array([0, 1, 2, 1_281_166, 77])
MIRRORED = [0, 1, 0, 0, 1]

GOLDEN = {  # crop, view -> boxes, flips: a resumed run and every loader see the same pixels
    "random-resized": (
        RandomResized(),
        0,
        [
            [160, 231, 165, 185],
            [121, 11, 336, 281],
            [6, 1, 55, 56],
            [1, 1, 237, 225],
            [0, 473, 40, 53],
        ],  # 40 x 1000: no try fits, so the largest centred box
        MIRRORED,
    ),
    "second-view": (
        RandomResized(),
        1,
        [
            [48, 146, 267, 231],
            [116, 67, 295, 301],
            [3, 0, 57, 64],
            [16, 78, 147, 158],
            [0, 473, 40, 53],
        ],
        [0, 0, 1, 0, 0],
    ),
    "within": (
        Within(),
        0,
        [
            [33, 52, 328, 328],
            [79, 9, 328, 328],
            [6, 4, 56, 56],
            [32, 18, 224, 224],
            [1, 775, 35, 35],
        ],
        MIRRORED,
    ),
    "centred": (
        Within(random=False, flip=False),
        0,
        [
            [24, 86, 328, 328],
            [86, 24, 328, 328],
            [4, 4, 56, 56],
            [16, 16, 224, 224],
            [2, 482, 35, 35],
        ],
        [0, 0, 0, 0, 0],
    ),
    "shifted": (
        Shifted(),
        0,
        [
            [240, 141, 32, 32],
            [215, 63, 32, 32],
            [26, 18, 32, 32],
            [223, 128, 32, 32],
            [1, 780, 32, 32],
        ],
        MIRRORED,
    ),
    "whole": (
        Whole(flip=True),
        0,
        [[0, 0, 375, 500], [0, 0, 500, 375], [0, 0, 64, 64], [0, 0, 256, 256], [0, 0, 40, 1000]],
        MIRRORED,
    ),
}


def boxes(crop, heights, widths, *, index, **address):
    """Boxes [b, 4] and flips [b]."""
    rows = crops.boxes(crop, np.stack([heights, widths], axis=1), index=index, **address)
    assert rows.dtype == np.int64
    assert np.array_equal(rows[:, 0], index)
    return rows[:, 1:5], rows[:, 5].astype(bool)


def drawn(crop, height, width, images=20_000, **address):
    sizes = np.full(images, height, np.int32), np.full(images, width, np.int32)
    address = {"seed": 0, "epoch": 0, **address}
    return boxes(crop, *sizes, index=np.arange(images), **address)


@pytest.mark.parametrize(("crop", "view", "golden", "flips"), GOLDEN.values(), ids=GOLDEN)
def test_boxes_are_as_ever(crop, view, golden, flips):
    box, flip = boxes(crop, HEIGHTS, WIDTHS, seed=5, epoch=2, index=INDEX, view=view)
    assert box.tolist() == golden
    assert flip.astype(int).tolist() == flips


def test_a_box_depends_on_its_own_picture_only():
    box, flip = boxes(RandomResized(), HEIGHTS, WIDTHS, seed=5, epoch=2, index=INDEX)
    for i in range(len(INDEX)):
        at = slice(i, i + 1)
        one = boxes(RandomResized(), HEIGHTS[at], WIDTHS[at], seed=5, epoch=2, index=INDEX[at])
        assert np.array_equal(one[0][0], box[i])
        assert one[1][0] == flip[i]


@pytest.mark.parametrize("part", ["seed", "epoch", "view"])
def test_each_part_of_the_address_counts(part):
    box, flip = drawn(RandomResized(), 300, 400, images=1000)
    other, turned = drawn(RandomResized(), 300, 400, images=1000, **{part: 1})
    assert (box != other).any(axis=1).mean() > 0.95
    assert 0.4 < (flip != turned).mean() < 0.6


@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 700)])
def test_random_resized_draws_torchvisions_distribution(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    crop = RandomResized()
    ours, flip = drawn(crop, height, width)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array(
        [draw(picture, list(crop.scale), list(crop.ratio)) for _ in range(4000)], np.float64
    )
    torch.random.set_rng_state(state)
    mine = ours.astype(np.float64)
    for of in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 3] / b[:, 2]),
    ):
        apart = np.quantile(of(mine), np.arange(0.1, 1, 0.1)) - np.quantile(
            of(theirs), np.arange(0.1, 1, 0.1)
        )
        assert np.abs(apart).max() < 0.06 * max(np.ptp(of(theirs)), 1e-9) + 1e-9
    assert abs(flip.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    "crop",
    [RandomResized(), RandomResized(scale=(1.0, 1.0)), Within(), Within(random=False), Whole()],
    ids=lambda crop: type(crop).__name__,
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (375, 500), (65_535, 2)])
def test_boxes_lie_inside(crop, height, width):
    box, _ = drawn(crop, height, width, images=2000)
    y, x, h, w = box.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (y + h <= height).all()
    assert (x + w <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "golden"),
    [(10, 1000, [0, 493, 10, 13]), (1000, 10, [493, 0, 13, 10])],
    ids=["wide", "tall"],
)
def test_an_extreme_aspect_falls_back_to_the_largest_centred_box(height, width, golden):
    box, _ = drawn(RandomResized(scale=(0.5, 1.0)), height, width, images=100)
    assert np.unique(box, axis=0).tolist() == [golden]


def test_within_is_resize_and_crop_in_one():
    for height, width in [(375, 500), (500, 375), (256, 256), (300, 301), (1000, 257)]:
        (box,), _ = drawn(Within(random=False), height, width, images=1)
        scale = min(height, width) / 256  # torchvision's Resize(256), then CenterCrop(224)
        resized = int(height / scale), int(width / scale)
        top, left = (round((side - 224) / 2) for side in resized)
        assert np.abs(box - scale * np.array([top, left, 224, 224])).max() < 1 + scale / 2
        boxes, _ = drawn(Within(), height, width)
        y, x, h, w = boxes.T
        assert (y.min(), x.min()) == (0, 0)
        assert ((y + h).max(), (x + w).max()) == (height, width)


def test_shifted_reaches_over_the_border_by_the_pad():
    box, _ = drawn(Shifted(size=32, pad=4), 32, 32)
    y, x, h, w = box.T
    assert (np.unique(y) == np.arange(-4, 5)).all()
    assert (np.unique(x) == np.arange(-4, 5)).all()
    assert (h == 32).all()
    assert (w == 32).all()


# ---- resample ----


def sampled(picture, y, x, h, w, flip, size):
    out = np.full((size, size, 3), 77, np.uint8)
    resample(picture, np.array([0, y, x, h, w, flip], np.int64), out)
    return out


@pytest.mark.parametrize("flip", [0, 1])
def test_a_box_of_the_crops_size_is_copied(flip):
    picture = photo(1)
    cut = picture[5:37, 9:41]
    assert np.array_equal(sampled(picture, 5, 9, 32, 32, flip, 32), cut[:, ::-1] if flip else cut)


def test_outside_is_black():
    picture = np.maximum(photo(1, 32, 32), 1)
    out = sampled(picture, -3, 2, 32, 32, 0, 32)
    assert not out[:3].any()
    assert not out[:, 30:].any()
    assert np.array_equal(out[3:, :30], picture[:29, 2:])
    assert np.array_equal(sampled(picture, -3, 2, 32, 32, 1, 32), out[:, ::-1])


def test_outside_is_black_also_when_resampled():
    out = sampled(np.full((32, 32, 3), 200, np.uint8), -16, 0, 32, 32, 0, 64)
    assert not out[:31].any()
    assert (out[33:] == 200).all()


def test_a_box_outside_altogether_is_an_error():
    with pytest.raises(ValueError, match="outside the picture of 60 x 80"):
        sampled(photo(1), 60, 0, 8, 8, 0, 8)


@pytest.mark.parametrize(("h", "w"), [(20, 50), (33, 60), (60, 80), (16, 16), (3, 3)])
def test_flip_mirrors_the_upright_crop(h, w):
    picture = photo(2)
    assert np.array_equal(
        sampled(picture, 0, 0, h, w, 1, 24), sampled(picture, 0, 0, h, w, 0, 24)[:, ::-1]
    )


@pytest.mark.parametrize("side", [40, 64, 200], ids=["shrinks", "enlarges", "enlarges-much"])
def test_a_slope_stays_a_slope(side):
    """Pixels are areas: a linear slope must come out as the same slope, unshifted."""
    slope = np.broadcast_to(np.linspace(0, 255, 60)[None, :, None], (60, 60, 3)).astype(np.uint8)
    out = sampled(np.ascontiguousarray(slope), 0, 0, 60, 60, 0, side)
    wanted = ((np.arange(side) + 0.5) * 60 / side - 0.5).clip(0, 59) * 255 / 59
    assert np.abs(out[0, :, 0] - wanted).max() < 2.5


def test_strong_shrinking_skips_no_pixel():
    stripes = np.zeros((240, 240, 3), np.uint8)
    stripes[:, ::5] = 200  # two in ten: plain bilinear would meet none, or all
    lying = np.ascontiguousarray(stripes.transpose(1, 0, 2))
    for picture, h, w in ((stripes, 240, 240), (stripes, 24, 240), (lying, 240, 24)):
        assert np.abs(sampled(picture, 0, 0, h, w, 0, 24).astype(int) - 40).max() <= 5


def test_a_read_only_picture_will_do():
    picture = photo(3)
    picture.flags.writeable = False
    sampled(picture, 0, 0, 50, 50, 1, 32)


# ---- what goes with a crop ----


@pytest.mark.parametrize(
    ("crop", "golden"),
    [
        (RandomResized(), Within(size=224, short=256, random=False, flip=False)),
        (RandomResized(size=64), Within(size=64, short=73, random=False, flip=False)),
        (Within(size=96, short=100), Within(size=96, short=110, random=False, flip=False)),
        (Shifted(), Whole(size=32)),
        (Whole(size=48, flip=True), Whole(size=48)),
    ],
)
def test_the_evaluation_view_is_centred_and_never_mirrored(crop, golden):
    assert crops.plain(crop) == golden


SIZES = np.array([[40, 90], [300, 200], [400, 400]], np.int32)


@pytest.mark.parametrize(
    ("crop", "enlarge"),
    [
        (Shifted(size=40), False),
        (RandomResized(size=200), False),
        (Within(size=224), True),
        (Whole(size=999), False),
    ],
)
def test_pictures_large_enough_pass(crop, enlarge):
    crops.check_sizes(crop, SIZES, enlarge=enlarge)


@pytest.mark.parametrize(
    ("crop", "enlarge", "words"),
    [
        (Shifted(size=41), True, "row 0 has a short side of 40: set --image-size 40"),
        (RandomResized(size=201), False, "at most 200: set --image-size 200"),
        (Within(), False, "--enlarge"),
    ],
)
def test_pictures_too_small_are_refused(crop, enlarge, words):
    with pytest.raises(UsageError, match=words):
        crops.check_sizes(crop, SIZES, enlarge=enlarge)
