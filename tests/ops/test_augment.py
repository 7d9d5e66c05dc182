"""Colours of whole batches: torchvision's functional ops picture by picture, addresses of draws, and nothing that waits."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from tape import Tape
from torch.utils._python_dispatch import TorchDispatchMode
from truth import photo

from fastrot.config import Augment
from fastrot.ops import augment
from fastrot.ops.augment import DRAWS, augmented, shares

NOTHING = Augment(**{f.name: 0.0 for f in dataclasses.fields(Augment)})
ALL = Augment(photometric=1.0, grey=0.3, blur=1.0)
LARGEST = 1 - 2**-24  # that a draw can be
BLENDS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


def pictures(n: int = 6, size: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(i, size, size) for i in range(n)]))


def draws(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed))


def floats(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def near(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def jittered(x: torch.Tensor, how: Augment, d: torch.Tensor) -> torch.Tensor:
    """One picture by torchvision, in the order that is drawn."""
    ranges = how.brightness, how.contrast, how.saturation
    lows = [max(0.0, 1 - r) for r in ranges]
    factors = [
        low + (1 + r - low) * d[1 + n].item()
        for n, (low, r) in enumerate(zip(lows, ranges, strict=True))
    ]
    for op in list(itertools.permutations(range(4)))[int(d[0] * 24)]:
        if op < 3:
            x = BLENDS[op](x, factors[op])
        elif how.hue:
            x = tv.adjust_hue(x, (how.hue * (2 * d[4] - 1)).item())
    return x


def all_changes(x: torch.Tensor, how: Augment, d: torch.Tensor) -> torch.Tensor:
    x = jittered(x, how, d)
    if d[5] < how.photometric:
        bits, threshold = 4 + int(d[6] * 5), int(d[8] * 257) / 255
        x = tv.posterize((x * 255).round().to(torch.uint8), bits).to(x) / 255
        x = (tv.adjust_sharpness(x, 0.1 + 1.8 * d[7].item()) * 255).round() / 255
        x = tv.autocontrast(torch.where(x >= threshold, 1 - x, x))
    if d[9] < how.grey:
        x = tv.rgb_to_grayscale(x, 3)
    if d[10] < how.blur:
        side = x.shape[-1]
        sigma = (0.1 + 1.9 * d[11].item()) * side / 224
        x = tv.gaussian_blur(x, max(3, side // 20 * 2 + 1), sigma)
    return x


@pytest.mark.parametrize("hue", [0.0, 0.2, 0.5])
def test_jitter_is_torchvisions_in_all_orders(hue):
    how = Augment(brightness=0.4, contrast=0.6, saturation=0.8, hue=hue)
    given = draws(24)
    given[:, 0] = (torch.arange(24) + 0.5) / 24
    x = floats(pictures(24))
    ours = augment._jittered(x, how, given[:, :, None, None, None].unbind(1))
    for i in range(24):
        near(ours[i], jittered(x[i], how, given[i]))


def test_factors_reach_their_ends():
    """Brightness of 0 is black; one of twice the range too large begins at 0."""
    how = dataclasses.replace(NOTHING, brightness=3.0)
    ends = torch.zeros(3, DRAWS)
    ends[:, 1] = torch.tensor([0.0, 0.1, 1.0])
    found = floats(augmented(pictures(3), how, ends))
    for ours, given, factor in zip(found, floats(pictures(3)), (0, 0.4, 4), strict=True):
        near(ours, (given * factor).clamp(0, 1), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_photometric_changes_are_torchvisions(bits):
    given = draws(9, seed=bits)
    given[:, 6] = (bits - 4 + 0.5) / 5
    given[:3, 8] = torch.tensor([0.0, 0.5, LARGEST])  # thresholds of 0, 128 and 256
    x, given = floats(pictures(9, 33)).double(), given.double()  # few last bits decide
    ours = augment._photometric(x, given[:, :, None, None, None].unbind(1))
    only = dataclasses.replace(NOTHING, photometric=1.0)
    for i in range(9):
        near(ours[i], all_changes(x[i], only, given[i]), atol=1e-5)


def test_sharpness_reaches_its_ends():
    """There a half may be exact, which either may round up."""
    x = floats(pictures(2, 33)) * 255
    given = torch.tensor([0.0, LARGEST])[:, None, None, None]
    ours, factors = x.clone(), 0.1 + 1.8 * given
    augment._sharpen(ours, factors)
    for i, factor in enumerate((0.1, 1.9)):
        theirs = tv.adjust_sharpness(x[i] / 255, factor) * 255
        near(ours[i], theirs, atol=0.501)
        assert (theirs - x[i]).abs().max() > 5


def test_a_flat_picture_stays_where_it_is_stretched():
    flat = torch.full((1, 9, 9, 3), 77, dtype=torch.uint8)
    given = torch.full((1, DRAWS), 0.9999)
    given[0, 5] = 0
    assert torch.equal(augmented(flat, dataclasses.replace(NOTHING, photometric=1.0), given), flat)


def test_the_largest_draw_is_within_all_ranges():
    """Float32 products that rounded up would ask for a 25th order, 9 bits or a threshold of 257."""
    images, last = pictures(1), torch.full((1, DRAWS), LARGEST)
    order = augment._order((last[:, 0, None, None, None] * 24).long())
    assert [int(place) for place in order] == [3, 2, 1, 0]
    last[0, 7] = 0.5  # the sharpness that there is
    last[0, 5] = 0
    whole = torch.tensor([0, 255], dtype=torch.uint8)  # auto-contrast leaves these
    images[0, 0, :2] = whole[:, None]
    assert torch.equal(
        augmented(images, dataclasses.replace(NOTHING, photometric=1.0), last), images
    )


@pytest.mark.parametrize("size", [2, 7, 32, 64, 224])
def test_blur_is_torchvisions(size):
    given = draws(3)
    x = floats(pictures(3, size))
    ours = augment._blurred(x, given[:, 11, None, None, None])
    only = dataclasses.replace(NOTHING, blur=1.0)
    if size == 2:  # a kernel of three pixels reaches just over
        assert ours.shape == x.shape
    for i in range(3):
        near(ours[i], all_changes(x[i], only, given[i]), atol=1e-5)


@pytest.mark.parametrize(("size", "taps"), [(33, 3), (64, 7), (224, 23)])
def test_a_blurs_kernel_is_odd_and_a_tenth_of_the_side(size, taps, monkeypatch):
    met, conv = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, kernel, **how: met.append(kernel.shape[2:]) or conv(x, kernel, **how),
    )
    augmented(pictures(1, size), dataclasses.replace(NOTHING, blur=1.0), draws(1))
    assert met == [(taps, 1), (1, taps)]


@pytest.mark.parametrize("size", [33, 64])
def test_without_thresholds_every_pixel_is_torchvisions_rounded(size):
    how = dataclasses.replace(ALL, photometric=0.0, blur=0.5)
    images, given = pictures(24, size), draws(24, seed=size)
    ours = augmented(images, how, given)
    for i in range(24):
        theirs = (all_changes(floats(images)[i], how, given[i]) * 255).permute(1, 2, 0)
        near(ours[i].float(), theirs, atol=0.501)


@pytest.mark.parametrize("size", [33, 64])
def test_all_together_are_torchvisions_to_the_rounding(size):
    """A pixel beside a threshold, or at the edge of a level, may fall on its other side by the last bit of a float."""
    images, given = pictures(24, size), draws(24)
    ours = augmented(images, ALL, given)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    for i in range(24):
        theirs = (all_changes(floats(images)[i], ALL, given[i]) * 255).permute(1, 2, 0)
        apart = (ours[i].float() - theirs).abs()
        assert (apart > 1).float().mean() < 0.01
        assert apart.median() <= 0.5001


def test_what_is_off_changes_no_bit():
    images = pictures()
    assert torch.equal(augmented(images, NOTHING, draws()), images)
    still = draws()
    still[:, 1:5] = 0.5  # factors of 1, no shift of hue
    quiet = Augment(
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0, photometric=0.0, grey=0.0
    )
    assert torch.equal(augmented(images, quiet, still), images)
    never = dataclasses.replace(NOTHING, photometric=1e-9, grey=1e-9, blur=1e-9)
    assert torch.equal(augmented(images, never, draws()), images)


@pytest.mark.parametrize(
    ("on", "parts"),
    [
        ({}, ""),
        ({"brightness": 0.4}, ""),
        ({"contrast": 0.4}, "_grey"),
        ({"hue": 0.2}, "_turned"),
        ({"photometric": 0.5}, "_photometric _sharpen"),
        ({"grey": 0.5}, "_grey"),
        ({"blur": 0.5}, "_blurred"),
    ],
    ids=str,
)
def test_what_is_off_is_not_computed(on, parts, monkeypatch):
    for name in {"_grey", "_turned", "_photometric", "_sharpen", "_blurred"} - {*parts.split()}:
        monkeypatch.setattr(augment, name, None)
    images = pictures(2)
    assert augmented(images, dataclasses.replace(NOTHING, **on), draws(2)).shape == images.shape


def test_probabilities_choose_by_each_pictures_draw():
    images, given = pictures(4), draws(4)
    given[:, 9] = torch.tensor([0.1, 0.19, 0.21, 0.9])
    found = augmented(images, dataclasses.replace(NOTHING, grey=0.2), given)
    grey = [bool((each[..., 0] == each[..., 1]).all()) for each in found]
    assert grey == [True, True, False, False]
    assert torch.equal(found[2:], images[2:])


def test_a_picture_does_not_depend_on_its_batch():
    images, given = pictures(8), draws(8)
    whole = augmented(images, ALL, given)
    assert torch.equal(augmented(images[[5, 2]], ALL, given[[5, 2]]), whole[[5, 2]])
    assert torch.equal(augmented(images[3:4], ALL, given[3:4]), whole[3:4])
    assert augmented(images[:0], ALL, given[:0]).shape == (0, 48, 48, 3)


# ---- draws ----


def test_shares_are_addressed_and_never_one():
    index, epoch = torch.tensor([5, 2**33 + 1, 1]), torch.tensor(3)
    found = shares(7, index, epoch, 12, 50)
    assert found.shape == (3, 50)
    assert torch.equal(shares(7, index[[2, 0]], epoch, 12, 50), found[[2, 0]])
    assert torch.equal(shares(7, index, epoch, 12, 5), found[:, :5])
    others = (
        shares(8, index, epoch, 12, 50),
        shares(7, index + 1, epoch, 12, 50),
        shares(7, index + 2**32, epoch, 12, 50),
        shares(7, index, epoch + 1, 12, 50),
        shares(7, index, epoch, 13, 50),
        shares(2**63 - 1, index, epoch, 12, 50),
    )
    for other in others:
        assert not (other == found).any(dim=1).all()
    many = shares(0, torch.arange(4000), epoch, 0, 100)
    assert 0 <= many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert np.corrcoef(many[:, :12].T.numpy())[~np.eye(12, dtype=bool)].__abs__().max() < 0.08


def test_no_two_salts_share_a_counter(monkeypatch):
    """And counters of a salt are apart, up to the most that it has; no more are given."""
    met = []

    def noted(seed, low, epoch, high, counter):
        met.append(counter % 2**32)
        return (low + counter,) * 4

    monkeypatch.setattr(augment, "philox", noted)
    row, now = torch.tensor([3]), torch.tensor(0)
    for salt in (0, 1, 2, 0x210, 2**16 - 1):
        shares(5, row, now, salt, 2**18)
    counters = torch.cat(met)
    assert len(counters.unique()) == len(counters) == 5 * 2**16
    for salt, count in ((2**16, 1), (-1, 1), (0, 2**18 + 1)):
        with pytest.raises(AssertionError):
            shares(5, row, now, salt, count)


def test_seeds_have_64_bits_and_there_may_be_no_rows():
    index, epoch = torch.arange(4), torch.tensor(2**40)
    seeds = (0, 1, 2**32, 2**63 - 1, -(2**63), -1)
    found = torch.stack([shares(seed, index, epoch, 1, 8) for seed in seeds])
    assert len(found.flatten(1).unique(dim=0)) == len(seeds)
    assert shares(0, index[:0], epoch, 1, 8).shape == (0, 8)


def test_the_largest_word_is_below_one(monkeypatch):
    full = torch.tensor([[2**32 - 1]])
    monkeypatch.setattr(augment, "philox", lambda *counters: (full,) * 4)
    assert shares(0, torch.tensor([0]), torch.tensor(0), 0, 1).item() < 1


# ---- nothing waits ----

WAITING = ("_local_scalar_dense", "nonzero", "item", "_to_copy", "is_nonzero", "equal")


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" not in str(func) or (kwargs or {}).get("device") is not None:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_asks_for_a_number_or_copies_to_a_device():
    with Calls() as calls:
        augmented(pictures(), ALL, shares(0, torch.arange(6), torch.tensor(0), 0, DRAWS))
    assert calls.names
    assert not [name for name in calls.names if any(word in name for word in WAITING)]


def test_a_recorded_change_is_played_with_other_draws():
    images, index, epoch = pictures(4, 33), torch.arange(4), torch.tensor(0)
    with Tape() as tape:
        found = augmented(images, ALL, shares(7, index, epoch, 1, DRAWS))
    first = found.clone()
    epoch += 1
    tape.play()
    assert torch.equal(found, augmented(images, ALL, shares(7, index, epoch, 1, DRAWS)))
    assert not torch.equal(found, first)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_to_the_rounding():
    images, given = pictures(24, 64), draws(24)
    for photometric in (0.0, 1.0):  # a pixel beside a threshold may fall on its other side
        how = dataclasses.replace(ALL, photometric=photometric)
        ours = augmented(images.cuda(), how, given.cuda()).cpu()
        apart = (ours.float() - augmented(images, how, given).float()).abs()
        assert (apart > 1).float().mean() <= 0.01 * photometric
    index, epoch = torch.arange(9), torch.tensor(4)
    assert torch.equal(
        shares(3, index.cuda(), epoch.cuda(), 2, 30).cpu(), shares(3, index, epoch, 2, 30)
    )
