"""Files made wrong: one way each, drawn from a seed."""

from __future__ import annotations

import random

__all__ = ["WAYS", "damaged"]

WAYS = (
    "bits flipped",
    "bytes replaced",
    "cut short",
    "block of zeros",
    "bytes put in",
    "random bytes",
    "empty",
    "text",
)
#: The first four meet a reader in its middle; the rest are mostly found at once.
_WEIGHTS = (5, 5, 4, 2, 2, 1, 1, 1)


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """(other bytes, which of :data:`WAYS`)."""
    (way,) = rng.choices(WAYS, _WEIGHTS)
    new = bytearray(data)
    # headers are where most decisions are made: half of the damage goes there
    place = rng.randrange(min(len(data), 256)) if rng.random() < 0.5 and data else rng.randrange(max(len(data), 1))
    if way == "bits flipped":
        for _ in range(rng.choice((1, 1, 3, 20))):
            new[rng.randrange(len(new)) if rng.random() < 0.5 else place] ^= 1 << rng.randrange(8)
    elif way == "bytes replaced":
        count = min(rng.choice((1, 4, 16, 200)), len(new) - place)
        new[place : place + count] = rng.randbytes(count)
    elif way == "cut short":
        del new[place:]
    elif way == "block of zeros":
        count = min(rng.choice((8, 512, 4096)), len(new) - place)
        new[place : place + count] = bytes(count)
    elif way == "bytes put in":
        new[place:place] = rng.randbytes(rng.choice((1, 3, 64)))
    elif way == "random bytes":
        new = bytearray(rng.randbytes(rng.choice((1, 20, len(data)))))
    elif way == "empty":
        new = bytearray()
    else:
        new = bytearray(b"<html><body>404 Not Found</body></html>\n")
    return bytes(new), way
