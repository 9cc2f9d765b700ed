"""Names that others chose, as text for a terminal: control sequences are shown as codes, never sent."""

from __future__ import annotations

import re

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with control characters as escape codes, so that it cannot move the cursor, color or reorder letters.

    Args:
        text: text of any origin.
        lines: keep line ends and tabs, for text of several lines whose parts are escaped already.

    >>> printable("layer\x1b[2J")
    'layer\\x1b[2J'
    """
    return UNSAFE.sub(lambda match: match[0] if lines and match[0] in "\n\t" else ascii(match[0])[1:-1], text)
