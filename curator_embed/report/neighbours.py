"""Images beside their nearest neighbours: finding them exactly, and drawing them on one sheet.

For looking at a few thousand embeddings; it compares every query with every vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

_BLOCK = 1024
"""Queries compared at a time: bounds the memory to this many rows of similarities."""

PAPER, INK, FAINT, GREEN, EMPTY = "#ffffff", "#1f2328", "#6e7781", "#2da44e", "#f0f2f4"
TILE, FRAME, GAP, MARGIN = 148, 4, 14, 36
CAPTION_LINE, ROW_GAP, QUERY_GAP = 15, 18, 34


def nearest(
    vectors: npt.NDArray[np.floating], k: int, queries: Sequence[int] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find each query's nearest neighbours by cosine, itself left out.

    Args:
        vectors: (n, dim), of any length but zero.
        k: neighbours wanted; fewer come back when there are fewer than k other vectors.
        queries: rows of ``vectors`` to look from; all by default.

    Returns:
        rows (q, k) int64 and cosines (q, k) float32, nearest first; of equals the lower row comes first.
    """
    asked = np.arange(len(vectors)) if queries is None else np.asarray(queries, dtype=np.int64)
    k = max(0, min(k, len(vectors) - 1))
    unit = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    rows, cosines = np.empty((len(asked), k), np.int64), np.empty((len(asked), k), np.float32)
    for start in range(0, len(asked), _BLOCK):
        block = slice(start, start + _BLOCK)
        similarity = unit[asked[block]] @ unit.T
        similarity[np.arange(len(similarity)), asked[block]] = -np.inf
        rows[block] = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        cosines[block] = np.take_along_axis(similarity, rows[block], axis=1)
    return rows, cosines


@dataclass(frozen=True)
class Tile:
    """One picture on the sheet.

    Attributes:
        image: a PIL image or encoded bytes.
        caption: lines below it; what does not fit is cut.
        marked: drawn with a green frame.
    """

    image: Image.Image | bytes
    caption: Sequence[str] = ()
    marked: bool = False


@dataclass(frozen=True)
class Group:
    """One row of the sheet: a query, its neighbours, and pictures set apart at the end."""

    query: Tile
    neighbours: Sequence[Tile]
    apart: Sequence[Tile] = ()


def contact_sheet(
    groups: Sequence[Group],
    *,
    title: str,
    subtitle: str = "",
    headings: tuple[str, str, str] = ("image", "nearest neighbours", ""),
    legend: str = "",
) -> Image.Image:
    """Draw one row a group: the query at the left, then its neighbours, then what is set apart.

    Args:
        groups: rows, top to bottom; they may have different numbers of neighbours.
        title: at the top.
        subtitle: below it, smaller.
        headings: above the query, the neighbours, and what is set apart.
        legend: what a green frame means; drawn with a sample of it.

    Returns:
        An RGB image, as large as it needs to be.
    """
    neighbours = max((len(group.neighbours) for group in groups), default=0)
    apart = max((len(group.apart) for group in groups), default=0)
    lines = max((len(tile.caption) for group in groups for tile in _tiles(group)), default=0)
    step = TILE + GAP
    first = MARGIN + TILE + QUERY_GAP
    last = first + neighbours * step - GAP + QUERY_GAP
    width = (last + apart * step - GAP if apart else last - QUERY_GAP) + MARGIN
    fonts = {size: ImageFont.load_default(size) for size in (12, 14, 26)}
    width = max(width, *(round(fonts[s].getlength(t)) + 2 * MARGIN for s, t in ((26, title), (14, subtitle))))
    top = MARGIN + 40 + (26 if subtitle else 0) + (30 if legend else 0) + 34
    row_height = TILE + 6 + lines * CAPTION_LINE + ROW_GAP
    sheet = Image.new("RGB", (width, top + len(groups) * row_height - ROW_GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)

    y = MARGIN
    draw.text((MARGIN, y), title, INK, fonts[26])
    y += 40
    if subtitle:
        draw.text((MARGIN, y), subtitle, FAINT, fonts[14])
        y += 26
    if legend:
        draw.rectangle((MARGIN, y + 1, MARGIN + 22, y + 17), outline=GREEN, width=FRAME - 1)
        draw.text((MARGIN + 32, y + 1), legend, INK, fonts[14])
    for x, heading, tiles in zip((MARGIN, first, last), headings, (1, neighbours, apart), strict=True):
        if tiles:
            draw.text((x, top - 26), heading, FAINT, fonts[14])

    for number, group in enumerate(groups):
        y = top + number * row_height
        columns = [MARGIN]
        columns += [first + i * step for i in range(len(group.neighbours))]
        columns += [last + i * step for i in range(len(group.apart))]
        for x, tile in zip(columns, _tiles(group), strict=True):
            _draw_tile(sheet, draw, (x, y), tile, fonts[12])
        if number:
            draw.line((MARGIN, y - ROW_GAP // 2, width - MARGIN, y - ROW_GAP // 2), EMPTY)
    return sheet


def _tiles(group: Group) -> list[Tile]:
    return [group.query, *group.neighbours, *group.apart]


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    tile: Tile,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = corner
    image = Image.open(BytesIO(tile.image)) if isinstance(tile.image, bytes) else tile.image
    room = TILE - 2 * FRAME - 2
    fitted = ImageOps.contain(image.convert("RGB"), (room, room), Image.Resampling.LANCZOS)
    draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=EMPTY)
    sheet.paste(fitted, (x + (TILE - fitted.width) // 2, y + (TILE - fitted.height) // 2))
    if tile.marked:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=GREEN, width=FRAME)
    for number, line in enumerate(tile.caption):
        place = (x, y + TILE + 6 + number * CAPTION_LINE)
        draw.text(place, _shortened(line, font), FAINT if number else INK, font)


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= TILE:
        return line
    while line and font.getlength(line + "...") > TILE:
        line = line[:-1]
    return line.rstrip() + "..."
