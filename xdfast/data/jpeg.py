"""Whether a JPEG is sound enough to be put into a decoder that does not survive one that is not."""

from __future__ import annotations

import re

__all__ = ["is_plain_jpeg"]

_SEQUENTIAL = (0xC0, 0xC1)  # SOF0, SOF1: Huffman-coded, one pass
_QUANTISATION, _HUFFMAN, _RESTART, _COMMENT, _SCAN = 0xDB, 0xC4, 0xDD, 0xFE, 0xDA
_STRAY = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in a scan: neither a stuffed byte nor a restart marker


def is_plain_jpeg(data: bytes) -> bool:
    """True for an 8-bit grey or three-channel sequential JPEG of a single scan whose structure is whole.

    Checked is all that libjpeg would stop at: the length of every segment, frame, quantisation and Huffman tables, that
    the scan refers to tables that are there, that it holds no marker but restarts, and that the end marker ends the file.
    A wrong value inside the scan is not seen: it decodes to wrong pixels. Progressive and arithmetic JPEGs, several scans
    and trailing bytes give False.

    Args:
        data: the whole file.

    Reference:
        ITU-T T.81, annex B.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    position = 2
    components: dict[int, int] = {}  # id → quantisation table
    tables: set[tuple[str, int]] = set()
    while position + 4 <= len(data):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if data[position] != 0xFF or length < 2 or len(body) != length - 2:
            return False
        position += 2 + length
        if marker == _SCAN:
            stray = _STRAY.search(data, position)
            return _scan(body, components, tables) and stray is not None and stray.start() == len(data) - 2
        if marker in _SEQUENTIAL:
            found = _frame(body)
            if components or not found:
                return False
            components = found
        elif marker in (_QUANTISATION, _HUFFMAN):
            defined = _quantisation(body) if marker == _QUANTISATION else _huffman(body)
            if not defined:
                return False
            tables |= defined
        elif marker == _RESTART:
            if len(body) != 2:
                return False
        elif marker != _COMMENT and not 0xE0 <= marker <= 0xEF:
            return False  # other frames, arithmetic coding, hierarchies, markers that do not belong here
    return False


def _frame(body: bytes) -> dict[int, int]:
    """Component → its quantisation table; empty if the frame is not one of 8 bits with one or three components."""
    if len(body) < 6 or body[0] != 8 or not any(body[1:3]) or not any(body[3:5]):
        return {}
    count = body[5]
    if count not in (1, 3) or len(body) != 6 + 3 * count:
        return {}
    factors = [divmod(body[7 + 3 * k], 16) for k in range(count)]
    if not all(1 <= f <= 4 for pair in factors for f in pair) or sum(h * v for h, v in factors) > 10:
        return {}
    widest, tallest = max(h for h, _ in factors), max(v for _, v in factors)
    if any(widest % h or tallest % v for h, v in factors):
        return {}
    found = {body[6 + 3 * k]: body[8 + 3 * k] for k in range(count)}
    return found if len(found) == count else {}


def _scan(body: bytes, components: dict[int, int], tables: set[tuple[str, int]]) -> bool:
    count = len(components)
    if not count or len(body) != 4 + 2 * count or body[0] != count or body[-3:] != b"\x00\x3f\x00":
        return False
    if [body[1 + 2 * k] for k in range(count)] != list(components):
        return False
    needed = {("q", table) for table in components.values()}
    for k in range(count):
        dc, ac = divmod(body[2 + 2 * k], 16)
        needed |= {("dc", dc), ("ac", ac)}
    return needed <= tables


def _quantisation(body: bytes) -> set[tuple[str, int]]:
    """Tables defined; empty if the segment is not whole."""
    position, found = 0, set()
    while position < len(body):
        precision, table = divmod(body[position], 16)
        values = body[position + 1 : position + 1 + 64 * (1 + precision)]
        if precision > 1 or table > 3 or len(values) != 64 * (1 + precision):
            return set()
        found.add(("q", table))
        position += 1 + len(values)
    return found


def _huffman(body: bytes) -> set[tuple[str, int]]:
    """Tables defined; empty if the segment is not whole or one of them is no prefix code."""
    position, found = 0, set()
    while position < len(body):
        kind, table = divmod(body[position], 16)
        counts = body[position + 1 : position + 17]
        symbols = body[position + 17 : position + 17 + sum(counts)]
        if kind > 1 or table > 3 or len(counts) != 16 or not 0 < sum(counts) <= 256 or len(symbols) != sum(counts):
            return set()
        if kind == 0 and max(symbols) > 11:  # a difference of 8-bit samples has at most 11 bits
            return set()
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            if count and code >= 1 << bits:  # the code of ones alone is reserved
                return set()
        found.add(("ac" if kind else "dc", table))
        position += 17 + len(symbols)
    return found
