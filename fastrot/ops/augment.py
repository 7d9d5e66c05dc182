"""Colours of whole batches changed, each picture's by numbers of its own.

Shapes.  images uint8 [n, S, S, 3]; draws float32 [n, 12], in [0, 1); out uint8 [n, S, S, 3].
Maths.   In float32 from 0 to 1, as torchvision's functional ops. Brightness, contrast and saturation are blends f x + (1 - f) y with black, with
         the mean grey and with the grey of each pixel; they and the hue come in one of 24 orders. Then, together or not at all, VISSL's
         four: 4 to 8 bits, sharpness, solarised from a threshold of 0 to 256 on, auto-contrast. Then grey, then blur.
Idea.    No picture is looked at by itself, and nothing waits: a change that one does not get is a factor of 1, or is not selected. The hue,
         which is dear, is turned once: blends that come before it are done before, the others behind.
Bytes.   Some 100 passes over n S S 3 floats, launched one by one; 12 n draws.
Digits.  Rounded to whole numbers at the end, and by posterising and sharpness: the last bit of a float would be stretched, where all is flat.
"""

import itertools

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from fastrot import config
from fastrot.ops.philox import philox

DRAWS = 12  # numbers that a picture's changes want
_ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(5)
_PHOTOMETRIC, _BITS, _SHARPNESS, _THRESHOLD, _GREY, _BLUR, _SIGMA = range(5, DRAWS)
GREY = (0.2989, 0.587, 0.114)  # of red, green, blue: torchvision's
SIGMA = (0.1, 2.0)  # pixels in 224

Pixels = Float[Tensor, "n 3 s s"]  # 0 to 1
Each = Float[Tensor, "n 1 1 1"]


def shares(
    seed: int, index: Int64[Tensor, " b"], epoch: Int64[Tensor, ""], salt: int, count: int
) -> Float[Tensor, "b d"]:
    """`count` numbers in [0, 1) a row, addressed by (seed, epoch, row, salt): 24 bits of a word of Philox each."""
    counter = torch.arange(-(-count // 4), device=index.device) + (salt << 16)
    low, high = index[:, None], index[:, None] >> 32
    words = torch.stack(torch.broadcast_tensors(*philox(seed, low, epoch, high, counter)), dim=-1)
    return (words.flatten(1)[:, :count] >> 8).float() * 2.0**-24


def augmented(
    images: UInt8[Tensor, "n s s 3"], how: config.Augment, draws: Float[Tensor, "n d"]
) -> UInt8[Tensor, "n s s 3"]:
    """The pictures with other colours. What `how` has at 0 is not computed."""
    if not len(images):
        return images
    each = draws[:, :, None, None, None].unbind(1)
    x = images.permute(0, 3, 1, 2).float() / 255
    if how.brightness or how.contrast or how.saturation or how.hue:
        x = _jittered(x, how, each)
    if how.photometric:
        x = torch.where(each[_PHOTOMETRIC] < how.photometric, _photometric(x, each), x)
    if how.grey:
        x = torch.where(each[_GREY] < how.grey, _grey(x), x)
    if how.blur:
        x = torch.where(each[_BLUR] < how.blur, _blurred(x, each[_SIGMA]), x)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _jittered(x: Pixels, how: config.Augment, each: tuple[Each, ...]) -> Pixels:
    ranges = (_BRIGHTNESS, how.brightness), (_CONTRAST, how.contrast), (_SATURATION, how.saturation)
    factors = []
    for draw, range_ in ranges:
        low = max(0.0, 1 - range_)
        factors.append(low + (1 + range_ - low) * each[draw])
    places = _order((each[_ORDER] * 24).long())  # which op is done 1st, 2nd, 3rd, 4th; 3: hue
    behind = torch.zeros_like(x[:, :1, :1, :1], dtype=torch.bool)
    if not how.hue:
        for op in places:
            x = _blend(x, op, factors, op < 3)
        return x
    for op in places[:3]:
        behind = behind | (op == 3)
        x = _blend(x, op, factors, ~behind)
    x = _turned(x, how.hue * (2 * each[_HUE] - 1))
    behind = torch.zeros_like(behind)
    for before, op in itertools.pairwise(places):
        behind = behind | (before == 3)
        x = _blend(x, op, factors, behind)
    return x


def _order(number: Int64[Tensor, "n 1 1 1"]) -> tuple[Tensor, ...]:
    """The `number`-th of the 24 orders of 0, 1, 2, 3."""
    a, b, c = number // 6, number % 6 // 2, number % 2
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    return a, b, c, 6 - a - b - c


def _blend(x: Pixels, op: Tensor, factors: list[Tensor], wanted: Tensor) -> Pixels:
    """Brightness (0), contrast (1) or saturation (2) of those pictures for which it is wanted."""
    factor = torch.where(op == 0, factors[0], torch.where(op == 1, factors[1], factors[2]))
    factor = torch.where(wanted, factor, 1.0)
    grey = _grey(x)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    other = torch.where(op == 0, 0.0, torch.where(op == 1, mean, grey))
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def _grey(x: Pixels) -> Float[Tensor, "n 1 s s"]:
    red, green, blue = x.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _turned(x: Pixels, by: Each) -> Pixels:
    """The hue shifted by a share of the circle, through HSV: v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, n = 5, 3, 1."""
    red, green, blue = x.split(1, dim=1)
    most = x.amax(dim=1, keepdim=True)
    spread = most - x.amin(dim=1, keepdim=True)
    over = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(
        most == red,
        (green - blue) / over,
        torch.where(most == green, 2 + (blue - red) / over, 4 + (red - green) / over),
    )
    k = (hue + 6 * by + torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1)) % 6
    return most - spread * torch.minimum(k, 4 - k).clamp_(0, 1)


def _photometric(x: Pixels, each: tuple[Each, ...]) -> Pixels:
    step = 2.0 ** (4 - (each[_BITS] * 5).floor())  # of 4 to 8 bits
    x = ((x * 255).round() / step).floor() * step / 255
    if x.shape[-1] > 2:  # smaller ones have no inside
        x = (_sharpened(x, 0.1 + 1.8 * each[_SHARPNESS]) * 255).round() / 255
    x = torch.where(x >= (each[_THRESHOLD] * 257).floor() / 255, 1 - x, x)
    low = x.amin(dim=(2, 3), keepdim=True)
    spread = x.amax(dim=(2, 3), keepdim=True) - low
    return torch.where(spread > 0, (x - low) / spread.clamp_min(1e-12), x)


def _sharpened(x: Pixels, factor: Each) -> Pixels:
    """A blend with the mean of 3 x 3 pixels, the middle five times; pixels at the border stay."""
    around = F.avg_pool2d(x, 3, 1) * (9 / 13) + x[:, :, 1:-1, 1:-1] * (4 / 13)
    inside = factor * x[:, :, 1:-1, 1:-1] + (1 - factor) * around
    return torch.cat(
        [
            x[:, :, :1],
            torch.cat([x[:, :, 1:-1, :1], inside.clamp_(0, 1), x[:, :, 1:-1, -1:]], dim=3),
            x[:, :, -1:],
        ],
        dim=2,
    )


def _blurred(x: Pixels, draw: Each) -> Pixels:
    n, side = len(x), x.shape[-1]
    taps = max(3, side // 20 * 2 + 1)  # a tenth of the side
    sigma = (SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draw) * (side / 224)
    at = torch.arange(taps, device=x.device) - taps // 2
    weight = torch.exp(-0.5 * (at / sigma.view(n, 1)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # [3n, 1, k]
    planes = F.pad(x, [taps // 2] * 4, "reflect").reshape(
        1, 3 * n, side + taps - 1, side + taps - 1
    )
    for kernel in (weight[..., None], weight[:, :, None]):
        planes = F.conv2d(planes, kernel, groups=3 * n)
    return planes.view_as(x)
