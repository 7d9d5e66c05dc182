"""Copies at any angle show where they are rotated to, and not by how they were made which angle it is."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops.angles import REACH, rotated_by

EIGHT = (0, 45, 90, 135, 180, 225, 270, 315)


def noise(images: int, size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=draw)


def by_the_formula(image: np.ndarray, degrees: float) -> np.ndarray:
    """One copy, pixel by pixel."""
    size, angle = len(image), math.radians(degrees)
    side, middle = (size - 1 - 2 * REACH) / math.sqrt(2), (size - 1) / 2
    out = np.zeros(image.shape)
    for i in range(size):
        for j in range(size):
            down, right = (((k + 0.5) / size - 0.5) * side for k in (i, j))
            y = middle + math.cos(angle) * down + math.sin(angle) * right
            x = middle - math.sin(angle) * down + math.cos(angle) * right
            total = 0.0
            for row in range(math.floor(y) - REACH + 1, math.floor(y) + REACH + 1):
                for column in range(math.floor(x) - REACH + 1, math.floor(x) + REACH + 1):
                    weight = math.exp(-((row - y) ** 2 + (column - x) ** 2) / 2)
                    out[i, j] += weight * image[row, column]  # IndexError beyond the border
                    total += weight
            out[i, j] /= total
    return out


def test_crops_without_room_are_refused():
    with pytest.raises(UsageError, match="S >= 24"):
        rotated_by(noise(1, 23), (0, 45))


@pytest.mark.parametrize("size", [24, 31])
def test_each_pixel_is_a_gaussian_mean_round_the_place_where_it_falls(size):
    images = noise(2, size)
    found = rotated_by(images, (0, 45, 200)).unflatten(0, (2, 3))
    for place, degrees in enumerate((0, 45, 200)):
        wanted = by_the_formula(images[1].numpy().astype(float), degrees)
        assert np.abs(found[1, place].numpy() - wanted).max() < 0.51  # rounded


def test_it_turns_counter_clockwise_as_rot90_does():
    found = rotated_by(noise(3, 40), EIGHT).unflatten(0, (3, 8)).int()
    for more in range(8):  # rounding may fall either way
        quarters, first = divmod(more, 2)
        turned = torch.rot90(found[:, first], quarters, (1, 2))
        assert (found[:, more] - turned).abs().max() <= 1


def told(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share that a linear classifier, learnt on one half by ridge regression, tells of the other."""
    half = len(features) // 2
    features = (features - features[:half].mean(0)) / (features[:half].std(0) + 1e-6)
    known, wanted = features[:half], F.one_hot(labels[:half]).float()
    gram = known.T @ known + 100 * torch.eye(known.shape[1])
    weights = torch.linalg.solve(gram, known.T @ (wanted - wanted.mean(0)))
    return ((features[half:] @ weights).argmax(1) == labels[half:]).float().mean().item()


def of_noise(views: torch.Tensor) -> dict[str, torch.Tensor]:
    """What could betray how a copy was made: spectra of it, and variance in each place."""
    grey = views.float().mean(-1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    window = torch.hann_window(grey.shape[1], periodic=False)
    spectra = {
        name: (torch.fft.rfft2(grey * each).abs() ** 2 + 1e-3).log().flatten(1)
        for name, each in {"windowed": window[:, None] * window, "whole": torch.ones(1)}.items()
    }
    steps = [(grey.diff(dim=dim) ** 2).flatten(1) for dim in (1, 2)]
    return {**spectra, "square": (grey**2).flatten(1), "steps": torch.cat(steps, 1)}


@pytest.mark.parametrize("angles", [(0, 45), EIGHT])
def test_noise_does_not_tell_its_angle(angles):
    count, draw = 6000, torch.Generator().manual_seed(0)
    labels = torch.randint(0, len(angles), (count,), generator=draw)
    every = torch.cat([rotated_by(each, angles) for each in noise(count, 32).split(500)])
    views = every.unflatten(0, (count, len(angles)))[torch.arange(count), labels]
    chance = 1 / len(angles)
    bound = chance + 3.5 * math.sqrt(chance * (1 - chance) / (count / 2))
    shares = {name: told(features, labels) for name, features in of_noise(views).items()}
    assert max(shares.values()) < bound, shares


def test_the_judge_can_tell():
    """A copy that is resampled from one that is not; and 0 from 45 degrees, where the kernel is bilinear."""
    images, labels = noise(2000, 32), torch.arange(2000) % 2
    views = torch.where(labels[:, None, None, None] == 0, images, rotated_by(images, (0,)))
    assert min(told(features, labels) for features in of_noise(views).values()) > 0.95
    angle = torch.pi / 4 * labels
    half = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1) * 0.5**0.5
    where = F.affine_grid(
        F.pad(half.view(-1, 2, 2), (0, 1)), [2000, 3, 32, 32], align_corners=False
    )
    pixels = images.permute(0, 3, 1, 2).float()
    bilinear = F.grid_sample(pixels, where, align_corners=False).round().permute(0, 2, 3, 1)
    assert told(of_noise(bilinear)["windowed"], labels) > 0.95


@pytest.mark.gpu
def test_a_gpu_gives_the_same_to_rounding():
    images = noise(8, 40)
    there = rotated_by(images.cuda(), EIGHT).cpu()
    assert (there.int() - rotated_by(images, EIGHT).int()).abs().max() <= 1
