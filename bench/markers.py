"""Documents with a generated part between two comments."""

from __future__ import annotations

import re

__all__ = ["between_markers"]


def between_markers(document: str, name: str, block: str) -> str:
    """The document with ``block`` between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.

    Raises:
        ValueError: the markers are missing, or there are several.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    updated, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", document, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the document must contain {begin} … {end} once, found {count}")
    return updated
