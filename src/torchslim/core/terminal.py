"""Names that others chose, as text for a terminal: what a terminal would obey is shown, not sent."""

from __future__ import annotations

import re

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text without control characters: a sequence that moves the cursor, colors or reorders letters becomes its code.

    Args:
        text: of any origin.
        lines: keep line ends and tabs, for text of several lines that was put together from escaped parts.

    >>> printable("layer\x1b[2J")
    'layer\\x1b[2J'
    """
    return UNSAFE.sub(lambda found: found[0] if lines and found[0] in "\n\t" else ascii(found[0])[1:-1], text)
