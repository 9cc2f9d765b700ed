"""Why a channel or a layer stays as it is, for the reasons that decisions depend on."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A reason that decisions depend on; its value is the text that users read, which details may follow.

    Whoever gives such a reason writes it as `Reason.X` or `Reason.X.with_detail(...)`, and whoever decides asks
    `Reason.X.given_in(text)`: no sentence stands in two places.
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

    def with_detail(self, detail: str, separator: str = ": ") -> str:
        """The text and what a user must know besides."""
        return f"{self.value}{separator}{detail}"

    def given_in(self, text: str) -> bool:
        """Is this the reason that a text gives?"""
        return text.startswith(self.value)
