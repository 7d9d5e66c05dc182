"""A gallery of queries and what was found for each: gallery.png, and an index.html that opens from disk."""

import html
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageOps

from fastrot.core import DamagedRecord
from fastrot.evals.asked import Pictures, Search
from fastrot.evals.picture import (
    BLUE,
    FAINT,
    FRAME,
    GAP,
    INK,
    MARGIN,
    RED,
    font,
    legible,
    write_page,
)

SIDE = 112  # pixels of a picture with its frames


def write(
    folder: Path,
    search: Search,
    stage: str,
    asked: Int64[np.ndarray, " q"],
    found: torch.return_types.topk,
    said: str,
) -> None:
    """The queries at the places `asked`, a row each, with the most alike pictures; `said`: the scores of the stage."""
    title = f"Found by {stage} of {search.run}"
    sheet = _sheet(search, asked, found, title, said)
    told = html.escape(f"{search.queries.name} among {search.gallery.name}: {said}")
    png, save = folder / "gallery.png", lambda file: sheet.save(file, "PNG")
    print(f"gallery: {write_page(png, save, title, before=f'<p>{told}</p>')}")


def _sheet(
    search: Search,
    asked: Int64[np.ndarray, " q"],
    found: torch.return_types.topk,
    title: str,
    said: str,
) -> Image.Image:
    queries, gallery, top, high = search.queries, search.gallery, 104, SIDE + 26
    wide = 2 * MARGIN + SIDE + 2 * GAP + found.indices.shape[1] * (SIDE + GAP)
    sheet = Image.new("RGB", (wide, top + len(asked) * high + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), legible(title), fill=INK, font=font(19, bold=True))
    words = "Left what is asked for; then the most alike, with the cosine: blue of its class, vermilion of another."
    draw.text((MARGIN, 50), f"{words}\n{legible(said)}", fill=INK, font=font(12), spacing=6)
    for i, place in enumerate(asked.tolist()):
        y, name = top + i * high, _class(queries, place)
        _paste(sheet, MARGIN, y, queries, place, INK)
        draw.text((MARGIN, y + SIDE + 3), name, fill=INK, font=font(11, bold=True))
        for j, (cosine, other) in enumerate(
            zip(found.values[i].tolist(), found.indices[i].tolist(), strict=True)
        ):
            right = bool(queries.labels[place] == gallery.labels[other])
            x, colour = MARGIN + SIDE + 2 * GAP + j * (SIDE + GAP), BLUE if right else RED
            _paste(sheet, x, y, gallery, other, colour)
            told = f"{'✓' if right else '✗'} {cosine:.2f}"
            draw.text((x, y + SIDE + 3), told, fill=colour, font=font(11, bold=True))
            if not right:
                draw.text((x + 46, y + SIDE + 3), _class(gallery, other), fill=FAINT, font=font(11))
    return sheet


def _class(pictures: Pictures, place: int) -> str:
    names, label = pictures.data.classes, int(pictures.labels[place])
    return legible(names[label] if label < len(names) else str(label))[:14]


def _paste(sheet: Image.Image, x: int, y: int, pictures: Pictures, place: int, colour: str) -> None:
    """The middle of a picture, framed; a grey square for one that cannot be read."""
    ImageDraw.Draw(sheet).rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=colour)
    inner = SIDE - FRAME
    try:
        picture = Image.fromarray(pictures.data.picture(int(pictures.rows[place])))
    except DamagedRecord:
        picture = Image.new("RGB", (inner, inner), FAINT)
    middle = ImageOps.fit(picture, (inner, inner), Image.Resampling.LANCZOS)
    sheet.paste(middle, (x + FRAME // 2, y + FRAME // 2))
