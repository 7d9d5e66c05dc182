"""What the first layer looks for: its filters as a picture."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

GAP = 4  # pixels between filters


def first_filters(net: nn.Module) -> UInt8[np.ndarray, "h w 3"] | None:
    """The filters of the first convolution that sees colours, on white; None where there is none.

    Each is scaled by its own largest weight: grey is 0, so colours compare within a filter only.
    """
    convolutions = (m for m in net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    first = next(convolutions, None)
    if first is None or first.weight.shape[1] != 3:  # grouped: a filter sees one colour only
        return None
    weight = first.weight.detach().float().cpu().nan_to_num().permute(0, 2, 3, 1)  # [n, k, k, 3]
    peak = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    grey = (127.5 + 127.5 * weight / peak).round().to(torch.uint8).numpy()

    times = max(1, round(48 / max(grey.shape[1:3])))  # about 48 pixels a filter
    grey = grey.repeat(times, axis=1).repeat(times, axis=2)
    n, height, width, _ = grey.shape
    columns = min(16, int(np.ceil(np.sqrt(2 * n))))  # wider than high
    rows = -(-n // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(grey):
        y, x = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[y : y + height, x : x + width] = picture
    return sheet
