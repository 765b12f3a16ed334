"""A folder that grows, shrinks, and is renamed and replaced in: which images belong to which file."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.sources.fitting import (
    MARK_BYTES,
    Cut,
    Fit,
    KnownFile,
    Piece,
    fit,
    marks_as_text,
    recorded_marks,
    split_marks,
)


def mark(name: str, version: int = 0) -> bytes:
    """Six bytes that tell names and versions of a test apart."""
    return f"{name}{version}".encode().rjust(MARK_BYTES, b".")


def known(start: int, end: int, *ids: str | None, marks: bytes = b"") -> KnownFile:
    return KnownFile(f"p_{start}-{end}", start, end, ids, marks)


def cuts(found: Fit, listing: list[str]) -> dict[tuple[int, int], str]:
    """Positions -> the images there, of names of one letter."""
    return {(p.start, p.end): "".join(listing[at] for at in p.images) for p in found.pieces}


def fitted(
    listing: str, *files: KnownFile, per_file: int = 3, keep: tuple[Cut, ...] = ()
) -> dict[tuple[int, int], str]:
    names = list(listing)
    return cuts(fit(names, [mark(name) for name in names], files, per_file, keep), names)


def test_a_folder_that_is_new_is_cut_by_position() -> None:
    assert fitted("abcdefg") == {(0, 3): "abc", (3, 6): "def", (6, 7): "g"}
    assert fitted("") == {}


def test_an_image_that_sorts_first_moves_no_other() -> None:
    there = known(0, 3, "b", "c", "d"), known(3, 5, "e", "f")
    assert fitted("abcdef", *there) == {(0, 3): "bcd", (3, 5): "ef", (5, 6): "a"}


def test_a_last_short_file_is_not_filled_up() -> None:
    assert fitted("abcde", known(0, 2, "a", "b")) == {(0, 2): "ab", (2, 5): "cde"}


def test_images_that_are_gone_leave_their_files_where_they_are() -> None:
    there = known(0, 3, "a", "b", "c"), known(3, 5, "d", "e")
    found = fit(["a", "c"], [mark("a"), mark("c")], there, 3)
    assert cuts(found, ["a", "c"]) == {(0, 3): "ac", (3, 5): ""}
    assert found.gone == {"p_0-3": ["b"], "p_3-5": ["d", "e"]}


def test_a_run_that_was_stopped_goes_on_with_the_names_it_had() -> None:
    assert fitted("abcdefgh", known(3, 6, "d", "e", "f")) == {(0, 3): "abc", (3, 6): "def", (6, 8): "gh"}


def test_another_number_of_images_in_a_file_holds_for_new_files_alone() -> None:
    there = known(0, 3, "a", "b", "c"), known(6, 8, "g", "h")
    assert fitted("abcdefghijk", *there, per_file=2) == {
        (0, 3): "abc", (3, 5): "de", (5, 6): "f", (6, 8): "gh", (8, 10): "ij", (10, 11): "k"
    }  # fmt: skip


def test_an_image_whose_row_was_dropped_belongs_to_the_file_that_was_made_from_it() -> None:
    marks = mark("a") + mark("b") + mark("c")
    assert fitted("abcd", known(0, 3, "a", "c", marks=marks)) == {(0, 3): "abc", (3, 4): "d"}
    # Of the same name, and another image: nobody has looked at it yet.
    listing, now = ["a", "b", "c"], [mark("a"), mark("b", 1), mark("c")]
    assert cuts(fit(listing, now, [known(0, 3, "a", "c", marks=marks)], 3), listing) == {(0, 3): "ac", (3, 4): "b"}


def test_rows_without_an_id_and_ids_that_repeat_in_one_file_take_nothing() -> None:
    assert fitted("ab", known(0, 3, None, "a", "a")) == {(0, 3): "a", (3, 4): "b"}


def test_names_that_read_the_same_are_as_many_images() -> None:
    listing, marks = ["x", "x", "y"], [mark("x"), mark("x", 1), mark("y")]
    assert cuts(fit(listing, marks, [known(0, 2, "x", "x")], 3), listing) == {(0, 2): "xx", (2, 3): "y"}
    assert fit(listing, marks, [known(0, 1, "x"), known(1, 2, "x")], 3).twice is None
    assert fit(listing, marks, [known(0, 2, "x", "x"), known(2, 3, "x")], 3).twice is not None


@pytest.mark.parametrize("listing", ["abc", "a", ""])
def test_an_id_in_two_files_is_found_whether_its_image_is_there_or_gone(listing: str) -> None:
    found = fit(list(listing), [mark(n) for n in listing], [known(0, 2, "a", "b"), known(2, 4, "b", "a")], 3).twice
    assert found is not None
    assert (found.id, found.one, found.other, found.count) == ("b", "p_0-2", "p_2-4", 2)


def test_cuts_are_kept_where_no_file_is_in_the_way() -> None:
    keep = Cut(0, 2, (0, 1)), Cut(2, 4, (2, 3)), Cut(4, 5, (4,))
    names = list("abcdef")
    found = fit(names, [mark(n) for n in names], [known(0, 2, "a", "b"), known(5, 6, "e")], 3, keep)
    assert [(p.start, p.end, p.images, p.file, p.cut) for p in found.pieces] == [
        (0, 2, (0, 1), "p_0-2", 0),  # the same images: it has its table
        (2, 4, (2, 3), "", 1),
        (4, 5, (5,), "", None),  # the image of that cut is elsewhere, and its place is free
        (5, 6, (4,), "p_5-6", None),
    ]
    assert found.given_up == [2]
    # Other images under the name, and positions that a file has in part.
    found = fit(names, [mark(n) for n in names], [known(0, 2, "a"), known(3, 4, "f")], 3, keep)
    assert found.given_up == [0, 1]
    assert cuts(found, names) == {(0, 2): "a", (2, 3): "b", (3, 4): "f", (4, 5): "e", (5, 7): "cd"}


@pytest.mark.parametrize(("place", "kept"), [((0, 2), True), ((2, 3), False)])
def test_a_table_with_a_row_that_another_file_has_is_not_carried_along(place: tuple[int, int], kept: bool) -> None:
    files = [known(0, 2, "a", "x")] if kept else [known(0, 2, "a"), known(*place, "x")]
    found = fit(["a"], [mark("a")], files, 3, [Cut(0, 2, (0,), ("x",))])
    assert (found.given_up == []) is kept
    # The same of a table that no file has the name of.
    found = fit(["a"], [mark("a")], [known(5, 6, "x")], 3, [Cut(0, 2, (0,), ("x",))])
    assert found.given_up == [0] and cuts(found, ["a"]) == {(0, 1): "a", (5, 6): ""}


def test_marks_as_they_are_recorded() -> None:
    marks = mark("a") + mark("b")
    assert split_marks(recorded_marks({"marks": marks_as_text(marks)})) == [mark("a"), mark("b")]
    for damaged in ({}, {"marks": None}, {"marks": 7}, {"marks": ["a"]}, {"marks": "%%"}, {"marks": "YWJj"}):
        assert recorded_marks(damaged) == b""


# -- what a small fault would change --------------------------------------------------------


def test_marks_have_six_bytes_in_files_that_were_written() -> None:
    assert split_marks(b"abcdefghijkl") == [b"abcdef", b"ghijkl"]
    assert recorded_marks({"marks": "YWJj%ZGVm"}) == b"", "damaged, and of the right length where that is overlooked"
    assert KnownFile("p_0-1", 0, 1, ()).marks == b""


def test_twins_that_several_files_have() -> None:
    marks = [mark("x"), mark("x", 1)]
    assert fit(["x", "x"], marks, [known(0, 1, "x"), known(1, 3, "x", "x")], 3).twice is None
    found = fit(["x", "x"], marks, [known(0, 1, "x"), known(1, 2, "x"), known(2, 3, "x")], 3).twice
    assert found is not None and (found.one, found.other) == ("p_0-1", "p_2-3")


def test_an_image_with_a_row_stays_where_it_is_though_another_file_was_made_from_it() -> None:
    assert fitted("ab", known(0, 1, "a"), known(1, 3, "b", marks=mark("a") + mark("b"))) == {(0, 1): "a", (1, 3): "b"}


def test_files_whose_names_overlap_are_in_order() -> None:
    there = known(0, 5, "a"), known(0, 3, "b"), known(2, 4, "c")
    found = fit(["a", "b", "c"], [mark(name) for name in "abc"], there, 3)
    assert [(piece.start, piece.end) for piece in found.pieces] == [(0, 3), (0, 5), (2, 4)]


@pytest.mark.parametrize(("file", "given_up"), [
    (known(5, 7, "a"), [0]),  # it has a row of the cut's first image,
    (known(5, 7, "b"), [0]),  # or of its second,
    (known(5, 7, marks=mark("b")), [0]),  # or was made from one
    (known(5, 7, "c"), []),
    (known(2, 4, "c"), []),  # behind the cut, without a gap
    (known(0, 1, "c"), [0]),  # its name takes the cut's first position,
    (known(1, 3, "c"), [0]),  # or the second
])  # fmt: skip
def test_cuts_that_a_file_is_in_the_way_of(file: KnownFile, given_up: list[int]) -> None:
    names = list("abc")
    found = fit(names, [mark(name) for name in names], [file], 3, [Cut(0, 2, (0, 1))])
    assert found.given_up == given_up


def test_a_cut_that_begins_within_the_first_file_is_given_up() -> None:
    names = list("abc")
    marks = [mark(name) for name in names]
    assert fit(names, marks, [known(0, 3, "a")], 3, [Cut(1, 4, (1, 2))]).given_up == [0]


# -- any history ---------------------------------------------------------------------------


@dataclass
class Folder:
    """A folder and its output: what a run would do, in a few lines.

    Attributes:
        images: name -> version.
        files: positions -> (names of its rows, marks of what it was made from).
    """

    images: dict[str, int] = field(default_factory=dict)
    files: dict[tuple[int, int], tuple[list[str], bytes]] = field(default_factory=dict)

    def fit(self, per_file: int) -> tuple[Fit, list[str]]:
        names = sorted(self.images)
        files = [KnownFile(f"p_{a}-{b}", a, b, rows, made) for (a, b), (rows, made) in sorted(self.files.items())]
        return fit(names, [mark(name, self.images[name]) for name in names], files, per_file), names

    def write(self, piece: Piece, names: list[str], drop: bool) -> None:
        made = [names[at] for at in piece.images]
        rows = made[::2] if drop else made
        self.files[piece.start, piece.end] = rows, b"".join(mark(name, self.images[name]) for name in made)


NAMES = st.sampled_from("abcdefghijklmnop")
CHANGES = st.one_of(
    st.tuples(st.just("add"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES, NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("replace"), NAMES, NAMES),
    st.tuples(st.just("lose file"), NAMES, NAMES),
)
RUN = st.fixed_dictionaries(
    {
        "changes": st.lists(CHANGES, max_size=8),
        "per_file": st.integers(1, 5),
        "written": st.lists(st.booleans(), max_size=8),  # of the new files, before it was killed
        "drop": st.booleans(),
    }
)


@given(st.sets(NAMES), st.lists(RUN, min_size=1, max_size=5))
def test_any_history_keeps_files_and_loses_no_image(first: set[str], runs: list[dict]) -> None:
    folder = Folder(dict.fromkeys(first, 0))
    for run in runs:
        for what, one, other in run["changes"]:
            if what == "add":
                folder.images.setdefault(one, 0)
            elif what == "remove":
                folder.images.pop(one, None)
            elif what == "replace" and one in folder.images:
                folder.images[one] += 1
            elif what == "rename" and one in folder.images:
                folder.images[other] = folder.images.pop(one)
            elif what == "lose file" and folder.files:
                folder.files.pop(sorted(folder.files)[ord(one) % len(folder.files)])
        found, names = folder.fit(run["per_file"])

        assert found.twice is None
        placed = [at for piece in found.pieces for at in piece.images]
        assert sorted(placed) == list(range(len(names))), "every image is in exactly one piece"
        assert all(list(piece.images) == sorted(piece.images) for piece in found.pieces)
        assert all(one.end <= other.start for one, other in pairwise(found.pieces)), "no names overlap"
        there = {(piece.start, piece.end): piece for piece in found.pieces if piece.file}
        assert there.keys() == folder.files.keys(), "files keep their names"
        for place, (rows, made) in folder.files.items():
            mine = {names[at] for at in there[place].images}
            assert set(rows) & set(names) <= mine, "an image with a row stays in the file that has it"
            assert sorted(found.gone.get(f"p_{place[0]}-{place[1]}", [])) == sorted(set(rows) - set(names))
            extra = mine - set(rows)
            assert {mark(name, folder.images[name]) for name in extra} <= set(split_marks(made))
        new = [piece for piece in found.pieces if not piece.file]
        assert all(0 < len(piece.images) == piece.end - piece.start <= run["per_file"] for piece in new)

        # The run is killed when some of its files are written; the next one goes on.
        todo = dict(zip(new, run["written"], strict=False))
        for piece in (piece for piece, written in todo.items() if written):
            folder.write(piece, names, run["drop"])
        again, _ = folder.fit(run["per_file"])
        assert [(p.start, p.end, p.images) for p in again.pieces] == [(p.start, p.end, p.images) for p in found.pieces]
        everything = [row for rows, _ in folder.files.values() for row in rows]
        assert len(everything) == len(set(everything)), "no row is there twice"
