"""What a page shows of a net: photographs rotated four ways with what it said of each, and its first filters.

A rotation counts 90 degrees counter-clockwise (numpy.rot90). Blue is right and vermilion wrong,
the pair of Okabe and Ito that colour-blind people tell apart; a tick or a cross says it again.
"""

import base64
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fastrot.arrays import Picture
from fastrot.core import DamagedRecord
from fastrot.disk import replace_bytes, write_atomically

BLUE, RED, INK, FAINT = "#0072B2", "#D55E00", "#1f2328", "#7a828c"
SIDE, FRAME, GAP, MARGIN = 188, 6, 14, 22  # pixels; a side includes its two frames
STYLE = (
    "body { font: 15px/1.5 system-ui, sans-serif; margin: 40px; color: #1f2328 } img { max-width: 100% } "
    "td, th { text-align: right; padding: 3px 18px 3px 0; border-bottom: 1px solid #eceef1 } "
    "td:first-child, th:first-child { text-align: left }"
)
UP = ((0, -1), (-1, 0), (0, 1), (1, 0))  # right and down: where a picture's top is, by its rotation


def rotated_sheet(
    images: UInt8[Tensor, "n s s 3"],
    guesses: Float[Tensor, "n 4 4"] | None,
    path: Path,
    *,
    overall: float | None = None,
    footer: str = "",
) -> None:
    """Write a PNG: a row per picture, its four rotations, the net's answers. Without guesses: the pictures alone.

    `guesses[i, t]` are the probabilities of the four rotations for picture i, shown with rotation t; `overall` is the
    accuracy on the whole hold-out.
    """
    if guesses is None:
        title, body = "Held-out photographs", _contact(images)
        words = "Some of those that the net is judged on"
    else:
        sure, says = guesses.nan_to_num(0.0).max(dim=-1)
        title, body = "Which way is up? Photographs never trained on", _turned(images, says, sure)
        words = f"{int((says == torch.arange(4)).sum())} of these {says.numel()} right"
        words += "" if overall is None else f" · {overall:.1%} of the whole hold-out"
        words += " · 25% by chance\nThe arrow points to where the net thinks up is."
    top = 92 if guesses is None else 112
    sheet = Image.new("RGB", (body.width + 2 * MARGIN, top + body.height + 44), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 20), title, fill=INK, font=font(21, bold=True))
    draw.text((MARGIN, 54), words, fill=INK, font=font(15), spacing=7)
    sheet.paste(body, (MARGIN, top))
    draw.text((MARGIN, sheet.height - 26), legible(footer), fill=FAINT, font=font(11))
    write_atomically(path, lambda file: sheet.save(file, "PNG", compress_level=3))  # fast


def turned_sheet(
    answers: Sequence[tuple[str, int, float]],
    picture: Callable[[str], Picture],
    path: Path,
    *,
    of: int,
) -> None:
    """Write a PNG: photographs as they open, by (path, degrees, confidence), each with an arrow to where up seems to be.

    `picture` gives the pixels of a path; `of`: how many there are in all.
    """
    cell, columns = SIDE + GAP, 5
    rows = max(1, -(-len(answers) // columns))
    sheet = Image.new("RGB", (2 * MARGIN + columns * cell - GAP, 104 + rows * (cell + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), "Photographs that seem turned", fill=INK, font=font(21, bold=True))
    few = f"{len(answers)} of {of:,}, the surest first" if answers else "None"
    draw.text(
        (MARGIN, 54), f"{few}. The arrow points to where up seems to be.", fill=INK, font=font(15)
    )
    for i, (name, degrees, confidence) in enumerate(answers):
        x, y, rotation = MARGIN + i % columns * cell, 92 + i // columns * (cell + 30), degrees // 90
        try:
            image = Image.fromarray(picture(name))
        except DamagedRecord:  # by now
            image = Image.new("RGB", (SIDE, SIDE), FAINT)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        badge = _badge(rotation, BLUE)
        reach = SIDE // 2 - 20
        middle = x + SIDE // 2 + UP[rotation][0] * reach, y + SIDE // 2 + UP[rotation][1] * reach
        sheet.paste(badge, (middle[0] - 20, middle[1] - 20), badge)
        draw.text(
            (x, y + SIDE + 3), f"{degrees}°  {confidence:.0%}", fill=BLUE, font=font(13, bold=True)
        )
        draw.text((x, y + SIDE + 20), legible(name)[-28:], fill=FAINT, font=font(11))
    write_atomically(path, lambda file: sheet.save(file, "PNG", compress_level=3))


def write_page(
    png: Path, save: Callable[[Any], object], title: str, *, before: str = "", behind: str = ""
) -> Path:
    """Write a picture, by `save` into a file, and index.html beside it, which shows it with HTML before and behind.

    Returns the page, which opens from disk.
    """
    png.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(png, save)
    return write_html(png.with_name("index.html"), title, before, embedded(png, title), behind)


def embedded(png: Path, alt: str) -> str:
    """HTML that holds a picture."""
    coded = base64.b64encode(png.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{coded}">'


def write_html(page: Path, title: str, *parts: str) -> Path:
    """Write a page of some HTML under its title."""
    head = html.escape(title)
    style = f'<meta charset="utf-8"><title>{head}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{head}</h1>", *parts])
    text = f"<!doctype html>\n<html lang=en>{style}\n{body}\n</html>\n"
    replace_bytes(page, text.encode("utf-8", "replace"))
    return page


def legible(text: str) -> str:
    """The text, with a question mark for what the font may lack."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)


def _turned(
    images: UInt8[Tensor, "n s s 3"], says: Int64[Tensor, "n 4"], sure: Float[Tensor, "n 4"]
) -> Image.Image:
    plain, bold, high = font(15), font(15, bold=True), SIDE + 36
    sheet = Image.new("RGB", (4 * (SIDE + GAP) - GAP, 30 + len(images) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for rotation, heading in enumerate(("upright", "rotated 90°", "rotated 180°", "rotated 270°")):
        draw.text((rotation * (SIDE + GAP), 4), heading, fill=FAINT, font=plain)
    for i, image in enumerate(images):
        upright = _sized(image, SIDE - 2 * FRAME)
        for rotation in range(4):
            x, y, guess = rotation * (SIDE + GAP), 30 + i * high, int(says[i, rotation])
            colour, mark = (BLUE, "✓ ") if guess == rotation else (RED, "✗ ")
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=colour)
            sheet.paste(upright.rotate(90 * rotation), (x + FRAME, y + FRAME))
            badge, reach = _badge(guess, colour), SIDE // 2 - 20
            middle = x + SIDE // 2 + UP[guess][0] * reach, y + SIDE // 2 + UP[guess][1] * reach
            sheet.paste(badge, (middle[0] - 20, middle[1] - 20), badge)
            words = f"{90 * guess}°" if guess else "upright"
            draw.text((x, y + SIDE + 4), mark + words, fill=colour, font=bold)
            share, corner = f"{sure[i, rotation]:.0%}", (x + SIDE, y + SIDE + 4)
            draw.text(corner, share, fill=INK, font=plain, anchor="ra")
    return sheet


def _contact(images: UInt8[Tensor, "n s s 3"]) -> Image.Image:
    cell, rows = SIDE + GAP, -(-len(images) // 4)
    sheet = Image.new("RGB", (4 * cell - GAP, rows * cell), "white")
    for i, image in enumerate(images):
        sheet.paste(_sized(image, SIDE), (i % 4 * cell, i // 4 * cell))
    return sheet


def _badge(guess: int, colour: str) -> Image.Image:
    """A disc of 40 pixels with an arrow: drawn upright, four times as large, rotated as a picture is."""
    large = Image.new("RGBA", (160, 160))
    draw = ImageDraw.Draw(large)
    draw.ellipse((4, 4, 156, 156), fill=colour, outline="white", width=8)
    draw.polygon([(80, 30), (122, 78), (92, 78), (92, 126), (68, 126), (68, 78), (38, 78)], "white")
    return large.rotate(90 * guess).resize((40, 40), Image.Resampling.LANCZOS)


def _sized(image: UInt8[Tensor, "s s 3"], side: int) -> Image.Image:
    return Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.LANCZOS)


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which every matplotlib brings along: the machine may have no fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def first_filters(net: nn.Module) -> UInt8[np.ndarray, "h w 3"] | None:
    """The filters of the first convolution that sees colours, on white; None where there is none.

    Each is scaled by its own largest weight: grey is 0, so colours compare within a filter only.
    """
    from torchvision.utils import make_grid

    convolutions = (m for m in net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    first = next(convolutions, None)
    if first is None or first.weight.shape[1] != 3:  # grouped: a filter sees one colour only
        return None
    weight = first.weight.detach().float().cpu().nan_to_num()  # [n, 3, k, k]
    peak = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    tiles = (127.5 + 127.5 * weight / peak).round().to(torch.uint8)
    times = max(1, round(48 / max(tiles.shape[2:])))  # about 48 pixels a filter
    tiles = tiles.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    columns = min(16, math.ceil(math.sqrt(2 * len(tiles))))  # wider than high
    return make_grid(tiles, columns, padding=4, pad_value=255).permute(1, 2, 0).numpy()
