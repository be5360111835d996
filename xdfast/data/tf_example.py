"""The two formats of a TFRecord file: the framing of records, and ``tf.train.Example`` in protobuf's wire format.

A record is ``length`` (uint64), a masked CRC-32C of those 8 bytes (uint32), the data, and a masked CRC-32C of the data
(uint32), all little-endian. An Example is these messages (field numbers in brackets)::

    Example   { Features features [1] }
    Features  { repeated { string key [1]; Feature value [2] } feature [1] }
    Feature   { one of BytesList [1], FloatList [2], Int64List [3] }
    BytesList { repeated bytes value [1] }     Int64List { repeated int64 value [1], packed or not }
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["BYTES", "INT64", "Feature", "bytes_range", "first_int", "parse_example", "record_ranges"]

BYTES, INT64 = 1, 3
_HEAD = struct.Struct("<QI")
_TAIL = 4
_VARINT, _FIXED64, _CHUNK, _FIXED32 = 0, 1, 2, 5


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord masks it: rotated by 15 bits, plus a constant. For a few bytes; byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_ranges(buffer: Any, size: int) -> tuple[list[tuple[int, int]], str]:
    """(start, end) of the data of each whole record, and what stopped the walk before the end of the file, or "".

    The CRC of each length is checked; that of the data is not: it would read every image.
    """
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        if at + _HEAD.size > size:
            return found, f"it ends inside the length of record {len(found)}"
        length, crc = _HEAD.unpack_from(buffer, at)
        if crc != masked_crc(buffer[at : at + 8]):
            return found, f"the length of record {len(found)} (byte {at}) is damaged: its CRC differs"
        start = at + _HEAD.size
        at = start + length + _TAIL
        if at > size:
            return found, f"it ends inside record {len(found)} ({size - start} of {length + _TAIL} bytes are there)"
        found.append((start, start + length))
    return found, ""


class Feature(NamedTuple):
    """A feature's list message: its kind (``BYTES``, 2 for floats, ``INT64``) and where its fields lie in the buffer."""

    kind: int
    start: int
    end: int


def parse_example(buffer: Any, start: int, end: int) -> dict[str, Feature]:
    """The features of an Example by name; of a name that comes twice the last. Values are not copied.

    Raises:
        ValueError: not an Example.
    """
    found: dict[str, Feature] = {}
    for _, a, b in _chunks(buffer, start, end, 1):  # Features
        for _, c, d in _chunks(buffer, a, b, 1):  # entries of the map
            name, feature = "", None
            for number, e, f in _chunks(buffer, c, d, 1, 2):
                if number == 1:
                    name = bytes(buffer[e:f]).decode("utf-8", "surrogateescape")
                else:
                    for kind, g, h in _chunks(buffer, e, f, 1, 2, 3):
                        feature = Feature(kind, g, h)
            if feature is not None:
                found[name] = feature
    return found


def bytes_range(buffer: Any, feature: Feature | None) -> tuple[int, int] | None:
    """(start, end) of the first value of a bytes feature, or None if there is none."""
    if feature is None or feature.kind != BYTES:
        return None
    return next(((a, b) for _, a, b in _chunks(buffer, feature.start, feature.end, 1)), None)


def first_int(buffer: Any, feature: Feature | None) -> int | None:
    """The first value of an int64 feature, or None if there is none."""
    if feature is None or feature.kind != INT64:
        return None
    for number, wire, a, b in _fields(buffer, feature.start, feature.end):
        if number == 1 and wire == _VARINT:
            value = a
        elif number == 1 and wire == _CHUNK and b > a:
            value = _varint(buffer, a, b)[0]
        else:
            continue
        return value - 2**64 if value >= 2**63 else value
    return None


def _chunks(buffer: Any, start: int, end: int, *numbers: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the length-delimited fields with one of these numbers."""
    for number, wire, a, b in _fields(buffer, start, end):
        if wire == _CHUNK and number in numbers:
            yield number, a, b


def _fields(buffer: Any, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, a, b): a chunk's start and end, or a varint's value and 0."""
    while at < end:
        tag, at = _varint(buffer, at, end)
        wire, a, b = tag & 7, 0, 0
        if wire == _VARINT:
            a, at = _varint(buffer, at, end)
        elif wire == _CHUNK:
            length, a = _varint(buffer, at, end)
            at = b = a + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field ends {at - end} bytes behind its message")
        yield tag >> 3, wire, a, b


def _varint(buffer: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise ValueError(f"an integer without end at byte {at}")
