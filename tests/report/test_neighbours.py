"""Neighbours are exact, and the sheet shows what it was given."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageColor

from curator_embed.report import Group, Tile, contact_sheet, nearest
from curator_embed.report import neighbours as module


def test_nearest_equals_a_plain_loop_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * 7
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    expected = [
        sorted((j for j in range(50) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:4] for i in range(50)
    ]
    for block in (1, 7, 1024):
        monkeypatch.setattr(module, "_BLOCK", block)
        rows, cosines = nearest(vectors, 4)
        assert rows.tolist() == expected
        np.testing.assert_allclose(cosines[3], unit[expected[3]] @ unit[3], atol=1e-6)


def test_an_exact_duplicate_is_found_and_the_query_itself_is_not() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 2, 1]]
    rows, cosines = nearest(vectors, 1, [1, 3])
    assert rows[:, 0].tolist() == [3, 1]
    assert cosines[:, 0].tolist() == [1.0, 1.0]


def test_fewer_vectors_than_neighbours_wanted() -> None:
    assert nearest(np.eye(3, dtype=np.float32), 10)[0].shape == (3, 2)
    assert nearest(np.ones((1, 3), np.float32), 5)[0].shape == (1, 0)


def _encoded(colour: str, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_sheet_holds_every_picture_and_frames_the_marked_ones() -> None:
    groups = [
        Group(Tile(_encoded("#ff0000")), [Tile(_encoded("#00ff00"), marked=True), Tile(_encoded("#0000ff"))]),
        Group(Tile(Image.new("L", (10, 300), 77)), [], [Tile(Image.new("RGB", (300, 10), "#ff00ff"))]),
    ]
    sheet = contact_sheet(groups, title="T", headings=("a", "b", "c"))
    found = {colour for _, colour in sheet.getcolors(maxcolors=1 << 20) or []}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (77, 77, 77), (255, 0, 255)} <= found
    green = np.all(np.asarray(sheet) == ImageColor.getrgb(module.GREEN), axis=2)
    assert green.sum() == 4 * module.FRAME * (module.TILE - module.FRAME)  # one frame, whole


def test_long_captions_stay_within_their_tile() -> None:
    lone = contact_sheet([Group(Tile(_encoded("#123456"), ("x" * 500,)), [])], title="")
    right = module.MARGIN + module.TILE
    assert np.asarray(lone)[:, right:].min() == 255, "nothing is drawn beside the tile"


def test_a_title_wider_than_the_pictures_is_not_cut() -> None:
    narrow = [Group(Tile(_encoded("#123456")), [])]
    assert contact_sheet(narrow, title="W" * 80).width > contact_sheet(narrow, title="W").width
