"""Thrift's compact protocol, as far as a parquet footer needs it.

pyarrow cannot hand out a footer to change: it parses it, and writes one only for columns that it encoded itself. Read
here, changed and written again, a footer keeps every field, those of later format versions included.
Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)
"""Types of fields. A boolean field has its value in its type; 2 is the type of booleans in lists and maps."""

_FIXED = {DOUBLE: 8, UUID: 16}

Struct = dict[int, tuple[int, Any]]
"""Field number -> (type, value). Numbers are ints, binaries bytes, what is fixed in size its raw bytes; a list is
(element type, elements), a map (key type, value type, pairs)."""


class _Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    def varint(self) -> int:
        data, position = self.data, self.position
        byte = data[position]
        position += 1
        if byte < 0x80:
            self.position = position
            return byte
        value, shift = byte & 0x7F, 7
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.position = position
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def raw(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("ends early")
        return self.data[start : self.position]

    def struct(self) -> Struct:
        found: Struct = {}
        number = 0
        while True:
            head = self.data[self.position]
            self.position += 1
            if head == 0:
                return found
            kind, step = head & 0x0F, head >> 4
            number = number + step if step else self.integer()
            if kind in (I32, I64, I16):
                found[number] = (kind, self.integer())
            elif kind == BINARY:
                found[number] = (kind, self.raw(self.varint()))
            elif kind in (TRUE, FALSE):
                found[number] = (kind, kind == TRUE)
            else:
                found[number] = (kind, self.value(kind))

    def value(self, kind: int) -> Any:
        """One value that is not a boolean field: an element, a key, or a field."""
        if kind == STRUCT:
            return self.struct()
        if kind in (I16, I32, I64):
            return self.integer()
        if kind == BINARY:
            return self.raw(self.varint())
        if kind in (LIST, SET):
            head = self.raw(1)[0]
            size, element = head >> 4, head & 0x0F
            if size == 15:
                size = self.varint()
            return element, [self.value(element) for _ in range(size)]
        if kind == MAP:
            size = self.varint()
            kinds = self.raw(1)[0] if size else 0
            key, item = kinds >> 4, kinds & 0x0F
            return key, item, [(self.value(key), self.value(item)) for _ in range(size)]
        if kind in (TRUE, FALSE, BYTE):
            return self.raw(1)
        if kind in _FIXED:
            return self.raw(_FIXED[kind])
        raise ValueError(f"type {kind} is not known")


def read_struct(data: bytes, position: int = 0) -> tuple[Struct, int]:
    """Read the struct at ``position``; returns it and where it ends.

    Raises:
        ValueError: no such struct is there.
    """
    reader = _Reader(data, position)
    try:
        return reader.struct(), reader.position
    except (IndexError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"not a Thrift struct ({error})") from None


def write_struct(struct: Struct) -> bytes:
    """The bytes of a struct."""
    out = bytearray()
    _struct(out, struct)
    return bytes(out)


def _varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _integer(out: bytearray, value: int) -> None:
    _varint(out, value << 1 if value >= 0 else (-value << 1) - 1)


def _struct(out: bytearray, struct: Struct) -> None:
    before = 0
    for number in sorted(struct):
        kind, value = struct[number]
        if kind in (TRUE, FALSE):
            kind = TRUE if value else FALSE
        step = number - before
        if 0 < step <= 15:
            out.append(step << 4 | kind)
        else:
            out.append(kind)
            _integer(out, number)
        before = number
        if kind not in (TRUE, FALSE):
            _value(out, kind, value)
    out.append(0)


def _value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (I16, I32, I64):
        _integer(out, value)
    elif kind == BINARY:
        _varint(out, len(value))
        out += value
    elif kind == STRUCT:
        _struct(out, value)
    elif kind in (LIST, SET):
        element, values = value
        if len(values) < 15:
            out.append(len(values) << 4 | element)
        else:
            out.append(0xF0 | element)
            _varint(out, len(values))
        for item in values:
            _value(out, element, item)
    elif kind == MAP:
        key, item, pairs = value
        _varint(out, len(pairs))
        if pairs:
            out.append(key << 4 | item)
        for one, other in pairs:
            _value(out, key, one)
            _value(out, item, other)
    else:
        out += value
