"""Thrift's compact protocol: whatever is read is written back byte for byte."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.tables.thrift import (
    BINARY,
    BYTE,
    DOUBLE,
    FALSE,
    I16,
    I32,
    I64,
    LIST,
    MAP,
    SET,
    STRUCT,
    TRUE,
    UUID,
    read_struct,
    write_struct,
)


def numbers(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


VALUES: dict[int, st.SearchStrategy[Any]] = {
    BYTE: st.binary(min_size=1, max_size=1),
    I16: numbers(16),
    I32: numbers(32),
    I64: numbers(64),
    DOUBLE: st.binary(min_size=8, max_size=8),
    UUID: st.binary(min_size=16, max_size=16),
    BINARY: st.binary(max_size=200),
}


def typed(values: dict[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[int, Any]]:
    return st.one_of([st.tuples(st.just(kind), value) for kind, value in values.items()])


def containers(inner: st.SearchStrategy[tuple[int, Any]]) -> st.SearchStrategy[tuple[int, Any]]:
    structs = st.dictionaries(st.integers(1, 2**15 - 1), inner, max_size=6)
    element = st.sampled_from(list(VALUES))
    lists = element.flatmap(lambda kind: st.tuples(st.just(kind), st.lists(VALUES[kind], max_size=40)))
    bools = st.tuples(st.just(FALSE), st.lists(st.sampled_from([b"\x01", b"\x02"]), max_size=20))
    many = st.tuples(st.just(STRUCT), st.lists(structs, max_size=4))
    maps = st.tuples(element, element).flatmap(
        lambda kinds: st.lists(st.tuples(VALUES[kinds[0]], VALUES[kinds[1]]), min_size=1, max_size=5).map(
            lambda pairs: (*kinds, pairs)
        )
    )
    return st.one_of(
        st.tuples(st.just(STRUCT), structs),
        st.tuples(st.sampled_from([LIST, SET]), st.one_of(lists, bools, many)),
        st.tuples(st.just(MAP), maps),
    )


flags = st.sampled_from([(TRUE, True), (FALSE, False)])
anything = st.recursive(st.one_of(typed(VALUES), flags), containers, max_leaves=12)


@given(st.dictionaries(st.integers(1, 2**15 - 1), anything, max_size=8), st.binary(max_size=5))
def test_what_is_written_is_read_back(struct: dict[int, tuple[int, Any]], behind: bytes) -> None:
    data = write_struct(struct)
    assert read_struct(b"before" + data + behind, 6) == (struct, 6 + len(data))
    assert write_struct(read_struct(data)[0]) == data


@given(st.binary(max_size=60))
def test_bytes_that_are_no_struct_are_an_error_and_nothing_else(data: bytes) -> None:
    with suppress(ValueError):
        read_struct(data)


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x18\x05ab", b"\x19\xf5\xff\xff\xff\xff\x0f", b"\x15" + b"\xff" * 11, b"\x1f\x00"]
)
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_struct(data)


def test_a_known_encoding() -> None:
    """From the specification: field 1 an i32 of -1, field 20 true, field 21 a binary."""
    struct = {1: (I32, -1), 20: (TRUE, True), 21: (BINARY, b"ab")}
    assert write_struct(struct) == bytes([0x15, 0x01, 0x01, 40, 0x18, 2]) + b"ab" + bytes([0])
