"""Colours of whole batches changed, each picture's by numbers of its own.

Shapes.  images uint8 [n, S, S, 3]; draws float32 [n, 12], in [0, 1); out uint8 [n, S, S, 3].
Maths.   In float32 from 0 to 1, as torchvision's functional ops. Brightness, contrast and saturation are blends f x + (1 - f) y with black, with
         the mean grey and with the grey of each pixel; they and the hue come in one of 24 orders. Then, together or not at all, VISSL's
         four: 4 to 8 bits, sharpness, solarised from a threshold of 0 to 256 on, auto-contrast. Then grey, then blur.
Idea.    No picture is looked at by itself, and nothing waits: a change that one does not get is a factor of 1, or is not selected. The hue,
         which is dear, is turned once: blends that come before it are done before, the others behind.
Bytes.   n (6 S S + 48), were all one kernel: the pictures in and out, and the draws. Launched one by one, some 320 launches read and write
         180 times the n S S 3 floats, 110 times for the first four alone.
Digits.  Rounded to whole numbers at the end, and by posterising and sharpness, as where VISSL has them: the last bit of a float would else
         decide beside a threshold, and be stretched where all is flat.
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
    assert salt in range(2**16)  # a counter is a word, and half of it the salt's
    assert count <= 2**18
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
    x = images.permute(0, 3, 1, 2).contiguous().float().div_(255)  # in planes: faster on a CPU
    if how.brightness or how.contrast or how.saturation or how.hue:
        x = _jittered(x, how, each)
    if how.photometric:
        x = torch.where(each[_PHOTOMETRIC] < how.photometric, _photometric(x, each), x)
    if how.grey:
        x = torch.where(each[_GREY] < how.grey, _grey(x), x)
    if how.blur:
        x = torch.where(each[_BLUR] < how.blur, _blurred(x, each[_SIGMA]), x)
    return (x * 255).round_().to(torch.uint8, memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _jittered(x: Pixels, how: config.Augment, each: tuple[Each, ...]) -> Pixels:
    places = _order((each[_ORDER] * 24).long())  # which op is done 1st, 2nd, 3rd, 4th; 3: hue
    if not how.hue:
        for op in places:
            x = _blended(x, op, how, each)
        return x
    # up to the hue an op is itself, behind it is 3, which changes nothing; then the other way round
    before = list(itertools.accumulate(places, lambda last, op: torch.where(last == 3, 3, op)))
    for op in before[:3]:
        x = _blended(x, op, how, each)
    x = _turned(x, how.hue * (2 * each[_HUE] - 1))
    for op, passed in zip(places[1:], before[1:], strict=True):
        x = _blended(x, torch.where(passed == op, 3, op), how, each)
    return x


def _order(number: Int64[Tensor, "n 1 1 1"]) -> tuple[Tensor, ...]:
    """The `number`-th of the 24 orders of 0, 1, 2, 3."""
    a, b, c = number // 6, number % 6 // 2, number % 2
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    return a, b, c, 6 - a - b - c


def _blended(x: Pixels, op: Tensor, how: config.Augment, each: tuple[Each, ...]) -> Pixels:
    """Brightness (0), contrast (1) or saturation (2) of each picture, or nothing (3), to the bit."""
    ranges = how.brightness, how.contrast, how.saturation
    if not any(ranges):
        return x
    factor = torch.ones_like(each[0])
    for n, range_ in enumerate(ranges):
        low = max(0.0, 1 - range_)
        if range_:
            factor = torch.where(op == n, low + (1 + range_ - low) * each[_BRIGHTNESS + n], factor)
    changed = factor * x
    if how.contrast or how.saturation:
        grey, rest = _grey(x), 1 - factor
        mean = grey.mean(dim=(2, 3), keepdim=True) * rest * (op == 1)
        changed.add_(grey.mul_(rest * (op == 2)).add_(mean))
    return changed.clamp_(0, 1)


def _grey(x: Pixels) -> Float[Tensor, "n 1 s s"]:
    red, green, blue = x.split(1, dim=1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _turned(x: Pixels, by: Each) -> Pixels:
    """The hue shifted by a share of the circle, through HSV; with h in sixths of it red is v - v s clamp(2 - |h - 3|, 0, 1)."""
    red, green, blue = x.split(1, dim=1)
    most = torch.maximum(torch.maximum(red, green), blue)
    spread = most - torch.minimum(torch.minimum(red, green), blue)
    # products of masks, since where() waits for a CPU's wrong guesses
    is_red = (red == most).to(x.dtype)
    is_green = (green == most).to(x.dtype).mul_(1 - is_red)
    hue = is_red * (green - blue)
    hue.addcmul_(is_green, (blue - red).add_(spread, alpha=2))
    hue.addcmul_(1 - is_red - is_green, (red - green).add_(spread, alpha=4))
    hue.div_(spread.clamp_min(1e-12)).add_(6 * by)
    hue.sub_((hue / 6).floor_(), alpha=6)
    lack = torch.cat([2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1], dim=1)
    return most - lack.clamp_(0, 1).mul_(spread)


def _photometric(x: Pixels, each: tuple[Each, ...]) -> Pixels:
    """In whole numbers of 0 to 255, up to auto-contrast."""
    step = 16 >> (each[_BITS] * 5).long()  # of 4 to 8 bits
    x = (x * 255).round_().div_(step).floor_().mul_(step)
    _sharpen(x, 0.1 + 1.8 * each[_SHARPNESS])
    x.sub_((x >= (each[_THRESHOLD] * 257).floor()).to(x.dtype), alpha=255).abs_()  # 255 - x
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    flat = low == high  # stays
    return x.sub_(torch.where(flat, 0.0, low)).div_(torch.where(flat, 255.0, high - low))


def _sharpen(x: Pixels, factor: Each) -> None:
    """In place, whole numbers: a blend with the mean of 3 x 3 pixels, the middle five times; pixels at the border stay."""
    inside = x[:, :, 1:-1, 1:-1]
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    around.add_(inside, alpha=4).mul_((1 - factor) / 13)
    inside.copy_(around.add_(factor * inside).clamp_(0, 255).round_())


def _blurred(x: Pixels, draw: Each) -> Pixels:
    n, side = len(x), x.shape[-1]
    taps = max(3, side // 20 * 2 + 1)  # a tenth of the side
    sigma = (SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draw) * (side / 224)
    at = torch.arange(taps, device=x.device) - taps // 2
    weight = torch.exp(-0.5 * (at / sigma.view(n, 1)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # [3n, 1, k]
    planes = F.pad(x, [taps // 2] * 4, "reflect").flatten(0, 1)[None]
    for kernel in (weight[..., None], weight[:, :, None]):
        planes = F.conv2d(planes, kernel, groups=3 * n)
    return planes.view_as(x)
