"""Types of the values in JSON files, for strict schemas of several rooms."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

Text = Annotated[str, Field(max_length=10_000)]
Name = Annotated[str, Field(max_length=2_000)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=2**40)]
Axis = Annotated[int, Field(ge=0, le=63)]
STRICT = ConfigDict(extra="forbid", strict=True, regex_engine="python-re")
