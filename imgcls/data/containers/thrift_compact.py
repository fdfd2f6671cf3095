"""Thrift's compact protocol, as far as the headers and footers of Parquet files use it.

A struct is a dictionary by field id. Source: github.com/apache/thrift,
doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Struct = dict[int, Any]
Field = tuple[int, bytes]
"""An encoded field: its type, and its value."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 16


class ThriftError(ValueError):
    """The bytes are not in the compact protocol."""


class ThriftTruncated(ThriftError):
    """The bytes end before the struct does."""


def read_struct(data: bytes, start: int = 0) -> tuple[Struct, int]:
    """Decode the struct that starts at a position; returns it, and the position after it.

    Raises ThriftTruncated where more bytes are needed, and ThriftError.
    """
    reader = _Reader(data, start)
    return reader.read_struct(0), reader.at


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def read_struct(self, depth: int) -> Struct:
        if depth > _MAX_DEPTH:
            raise ThriftError("structs are nested too deeply")
        fields: Struct = {}
        number = 0
        while head := self._read_byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._read_signed()
            fields[number] = self._read_value(kind, depth, in_field=True)
        return fields

    def _read_value(self, kind: int, depth: int, *, in_field: bool = False) -> Any:
        if kind in (_TRUE, _FALSE):
            # in a list, a byte holds the value
            return kind == _TRUE if in_field else self._read_byte() == _TRUE
        if kind in (_I16, _I32, _I64):
            return self._read_signed()
        if kind == _BINARY:
            return self._take(self._read_varint())
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        if kind in (_LIST, _SET):
            head = self._read_byte()
            count = head >> 4 if head >> 4 < 15 else self._read_varint()
            return [self._read_value(head & 15, depth + 1) for _ in range(count)]
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BYTE:
            return self._read_byte()
        raise ThriftError(f"a value of type {kind}")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ThriftTruncated("the struct is not complete")
        self.at += size
        return self.data[self.at - size : self.at]

    def _read_byte(self) -> int:
        if self.at >= len(self.data):
            raise ThriftTruncated("the struct is not complete")
        self.at += 1
        return self.data[self.at - 1]

    def _read_varint(self) -> int:
        value = shift = 0
        while (byte := self._read_byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ThriftError("an integer with more than 64 bits")
        return value | byte << shift

    def _read_signed(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)


def encode_struct(fields: dict[int, Field]) -> bytes:
    """Encode a struct of fields made by the functions below, in ascending order of their ids."""
    encoded = bytearray()
    last = 0
    for number, (kind, value) in fields.items():
        encoded.append((number - last) << 4 | kind)  # Parquet's structs have gaps below 16
        encoded += value
        last = number
    return bytes(encoded) + b"\0"


def i32(value: int) -> Field:
    return _I32, _encode_signed(value)


def i64(value: int) -> Field:
    return _I64, _encode_signed(value)


def binary(value: bytes) -> Field:
    return _BINARY, _encode_varint(len(value)) + value


def struct(fields: dict[int, Field]) -> Field:
    return _STRUCT, encode_struct(fields)


def sequence(values: Sequence[Field]) -> Field:
    """A list of at least one value, all of one type."""
    return _LIST, _encode_list(values[0][0], [value for _, value in values])


def _encode_list(kind: int, values: Iterable[bytes]) -> bytes:
    items = list(values)
    count = len(items)
    head = bytes([count << 4 | kind]) if count < 15 else bytes([15 << 4 | kind])
    return head + (b"" if count < 15 else _encode_varint(count)) + b"".join(items)


def _encode_signed(value: int) -> bytes:
    return _encode_varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
