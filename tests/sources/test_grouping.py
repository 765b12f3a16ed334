"""Which members make a sample: webdataset's convention on lists of names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.sources.grouping import Grouper, group_members, kind_of, split_name
from curator_embed.sources.tar import Member


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("000.jpg", ("000", "jpg"), ("000", "jpg")),
        ("a/b.c/001.seg.PNG", ("a/b.c/001", "seg.PNG"), ("a/b.c/001.seg", "PNG")),
        ("./000.jpg", ("000", "jpg"), ("000", "jpg")),
        ("././/x/0.jpg", ("x/0", "jpg"), ("x/0", "jpg")),
        ("with blank é漢.jpg", ("with blank é漢", "jpg"), ("with blank é漢", "jpg")),
        ("noextension", ("noextension", ""), ("noextension", "")),
        ("trailing.", ("trailing", ""), ("trailing", "")),
        ("a/.DS_Store", None, None),
        ("._000.jpg", None, None),
        ("__index__/x.jpg", None, None),
        ("__main.jpg", ("__main", "jpg"), ("__main", "jpg")),
        ("../up.jpg", ("../up", "jpg"), ("../up", "jpg")),
    ],
)
def test_split_name(name: str, first: tuple[str, str] | None, last: tuple[str, str] | None) -> None:
    assert split_name(name, "first") == first
    assert split_name(name, "last") == last


def test_kinds() -> None:
    claims = ["JPG", "seg.png", "json", "meta.json", "TXT", "npy", "", "jpgx"]
    assert [kind_of(c) for c in claims] == ["image", "image", "json", "json", "txt", "other", "other", "other"]


def groups(*names: str) -> list[tuple[str, int, str]]:
    found = group_members(Member(name, 0, 0) for name in names)
    return [(key, k, " ".join(m.name for m in members)) for (key, k), members in found.items()]


def test_an_extension_that_is_there_begins_the_next_sample() -> None:
    assert groups("a.jpg", "a.txt", "a.jpg", "a.json", "a.txt") == [
        ("a", 0, "a.jpg a.txt"),
        ("a", 1, "a.jpg a.json a.txt"),
    ]
    assert groups("a.jpg", "a.JPG") == [("a", 0, "a.jpg"), ("a", 1, "a.JPG")]


def test_members_need_not_stand_together() -> None:
    assert groups("a.jpg", "b.jpg", "a.txt", "b.txt") == [("a", 0, "a.jpg a.txt"), ("b", 0, "b.jpg b.txt")]


@given(st.lists(st.sampled_from(["a.jpg", "a.txt", "b.jpg", "b.json", "c/a.jpg", "./a.json", ".x"]), max_size=20))
def test_every_member_has_one_place(names: list[str]) -> None:
    grouper = Grouper()
    places = [place for name in names if (place := grouper.place(name)) is not None]
    assert len(places) == len([name for name in names if name != ".x"])
    assert len({(p.key, p.k, p.extension) for p in places}) == len(places)
    for key in {p.key for p in places}:
        firsts = [p.k for p in places if p.key == key and p.first]
        assert firsts == list(range(len(firsts)))
