"""Rows meet samples by id: types, repeats, and what is never guessed."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.sources.tar import decode_name
from curator_embed.tables.pairing import ids_as_text, ids_digest, key_normaliser, normalise_key, pair


def test_rows_out_of_order_find_their_samples() -> None:
    pairing = pair(["c", "a", "x", "b"], ["a", "b", "c"])
    assert pairing.sample_of_row.tolist() == [2, 0, -1, 1]
    assert not pairing.ambiguous.any()
    assert pairing.orphans.tolist() == []


def test_repeated_ids_pair_in_order() -> None:
    pairing = pair(["a", "b", "a"], ["b", "a", "a"])
    assert pairing.sample_of_row.tolist() == [1, 0, 2]


def test_unequal_repeats_are_reported_and_not_guessed() -> None:
    pairing = pair(["a", "a", "b"], ["a", "b"])
    assert pairing.sample_of_row.tolist() == [-1, -1, 1]
    assert pairing.ambiguous.tolist() == [True, True, False]
    assert pairing.unequal == {"a": (2, 1)}
    assert pairing.orphans.tolist() == [], "a sample whose id some row has is no orphan"


def test_null_ids_pair_with_nothing() -> None:
    pairing = pair([None, "a", None], ["a", "None"])
    assert pairing.sample_of_row.tolist() == [-1, 0, -1]
    assert pairing.orphans.tolist() == [1]


@given(st.lists(st.sampled_from("abcde"), max_size=12), st.lists(st.sampled_from("abcdef"), max_size=12))
def test_every_row_and_every_sample_is_accounted_for(rows: list[str], samples: list[str]) -> None:
    pairing = pair(rows, samples)
    taken = pairing.sample_of_row[pairing.sample_of_row >= 0]
    assert len(set(taken.tolist())) == len(taken), "no sample serves two rows"
    for row, ordinal in enumerate(pairing.sample_of_row):
        assert ordinal < 0 or samples[ordinal] == rows[row]
        assert (ordinal >= 0) == (Counter(rows)[rows[row]] == Counter(samples)[rows[row]])
    unpaired = set(range(len(samples))) - set(taken.tolist())
    assert unpaired == set(pairing.orphans.tolist()) | {n for n, key in enumerate(samples) if key in pairing.unequal}


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([1, 20, None]), ["1", "20", None]),
        (pa.array([1.0, 20.0, None]), ["1", "20", None]),
        (pa.array(["01", "ü b.c", None]), ["01", "ü b.c", None]),
        (pa.array([b"01", None]), ["01", None]),
        (pa.array([b"01", None], pa.large_binary()), ["01", None]),
        (pa.array([b"01", None], pa.binary(2)), ["01", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"01", None, b"02"]).dictionary_encode(), ["01", None, "02"]),
        (pa.array([1.0, None, 20.5]).dictionary_encode(), ["1", None, "20.5"]),
        (pa.array([2**63], pa.uint64()), [str(2**63)]),
    ],
)
def test_ids_of_any_type_become_text(column: pa.Array, text: list[str | None]) -> None:
    assert ids_as_text(column) == text


def test_infinite_ids_are_text_too() -> None:
    assert ids_as_text(pa.array([1.0, float("inf"), float("-inf"), float("nan")])) == ["1", "inf", "-inf", None]


def test_ids_that_are_no_utf8_meet_keys_from_tars_and_from_tables() -> None:
    raw = "ü".encode() + b"\xff/\x80"
    (text,) = ids_as_text(pa.array([raw]))
    assert text == normalise_key(decode_name(raw), numeric=False)
    assert text == normalise_key(str(raw, "utf-8", "surrogateescape"), numeric=False)


def test_an_integer_column_meets_zero_padded_keys() -> None:
    assert key_normaliser(pa.int64()) and key_normaliser(pa.float64()) and not key_normaliser(pa.string())
    assert normalise_key("000000042", numeric=True) == "42"
    assert normalise_key("000000042", numeric=False) == "000000042"
    assert normalise_key("a42", numeric=True) == "a42"
    assert normalise_key("-042", numeric=True) == "-42"
    assert normalise_key("-0-42", numeric=True) == "-0-42"


def test_a_dictionary_column_counts_as_what_it_holds_and_no_column_as_text() -> None:
    assert key_normaliser(pa.dictionary(pa.int32(), pa.int64()))
    assert not key_normaliser(pa.dictionary(pa.int32(), pa.string()))
    assert key_normaliser(None) is False


@pytest.mark.parametrize("key", ["²", "٤٢", "４２"])
def test_only_ascii_digits_make_a_number(key: str) -> None:
    assert normalise_key(key, numeric=True) == key


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=6))
def test_the_digest_tells_id_lists_apart(ids: list[str | None]) -> None:
    assert ids_digest(ids) == ids_digest(list(ids))
    assert ids_digest([*ids, "x"]) != ids_digest(ids)
    assert ids_digest(["", None]) != ids_digest([None, ""])


def test_the_digest_is_the_one_that_footers_hold() -> None:
    """It is compared with what earlier runs wrote: sha256 over each id's length (4 bytes, little-endian) and bytes."""
    by_hand = hashlib.sha256(b"\x02\0\0\0\x01a" + b"\x01\0\0\0\0" + b"\x02\0\0\0\x01\xff").hexdigest()
    assert ids_digest(["a", None, "\udcff"]) == by_hand[:32] == "55bdedb21824b8c99b7130e39782276d"


def test_positions_and_flags_have_their_types_even_when_nothing_pairs() -> None:
    pairing = pair([], [])
    assert (pairing.sample_of_row.dtype, pairing.ambiguous.dtype, pairing.orphans.dtype) == (np.int64, bool, np.int64)
