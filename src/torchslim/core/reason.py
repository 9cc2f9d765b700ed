"""Reasons why a channel or a layer stays unchanged, for the reasons that decisions depend on."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A reason that decisions depend on; its value is the text that users read, which details may follow.

    Code that gives a reason writes `Reason.X` or `Reason.X.with_detail(...)`; code that decides calls
    `Reason.X.given_in(text)`. No text is repeated.
    """

    # channels
    EXCLUDED = "excluded"
    NOT_INCLUDED = "not included"
    OUTPUT = "reaches an output"
    KERNEL_EXTENT = "the kernel's extent stays"
    FIXED_SIZE = "meets a value of a fixed size"
    LOOKED_UP = "rows are looked up by data"
    NOT_REACHED = "may be shared with weights that no example reached"
    NOT_VERIFIED = "could not be verified"
    # layers
    AS_ASKED = "left in float, as asked"
    BACK_IN_FLOAT = "back in float"
    FASTER_IN_FLOAT = "faster in float"

    def with_detail(self, detail: str, separator: str = ": ") -> str:
        """Text of the reason, followed by a detail."""
        return f"{self.value}{separator}{detail}"

    def given_in(self, text: str) -> bool:
        """Whether `text` gives this reason."""
        return text.startswith(self.value)
