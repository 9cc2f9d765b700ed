"""Names of the programs of a model's parts.

A part has a program for each frequent structure of its calls. The first one has the name of the part, its path in the
model; the further ones are numbered: "decoder", "decoder#2".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBERED = re.compile(r"#[1-9][0-9]?$")


def numbered(path: str, number: int) -> str:
    """The name of a program of a part: the part's path for the first one."""
    return path if number == 1 else f"{path}#{number}"


def split_name(name: str) -> tuple[str, int]:
    """The path of a part and the number of a program in its name; the inverse of `numbered`."""
    path, _, number = name.rpartition("#")
    return (path, int(number)) if NUMBERED.search(name) else (name, 1)


def first_programs(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names of programs that are the paths of parts."""
    return tuple(name for name in names if split_name(name)[1] == 1)
