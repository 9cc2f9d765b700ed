"""Recipe files as documents: TOML within limits of size, depth and values.

The content of a recipe may come from anywhere, so its size, depth and numbers are checked here, before any other use.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchslim.core.checks import DEPTH, TEXT, VALUES, shown
from torchslim.core.schema import read_file
from torchslim.errors import RecipeError

SIZE = 256 * 1024  # bytes of a recipe file
LARGEST = 1e18  # the largest number in a recipe
DOTS = 255  # dots in a line: the parser's time for a key of n parts grows with n * n


def load_document(path: str | Path) -> dict[str, Any]:
    """Read a recipe file, without validating the recipe.

    Raises:
        RecipeError: the file cannot be read, or is not TOML.
    """
    name = shown(str(path))[1:-1]
    data = read_file(Path(path), RecipeError, size_bytes=SIZE, mend="name a recipe file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not valid TOML: it is no UTF-8: {error}") from error
    return parse_toml(text, name)


def parse_toml(text: str, name: str = "recipe") -> dict[str, Any]:
    """Parse TOML text to a document; messages call the file `name`.

    Raises:
        RecipeError: the text is not TOML, or larger than the limits of a recipe.
    """
    data = text.encode(errors="surrogatepass")
    if len(data) > SIZE:
        raise RecipeError(f"{name} is larger than {SIZE:,} bytes, the most that a recipe may take")
    if any(line.count(b".") > DOTS for line in data.split(b"\n")):
        raise RecipeError(f"{name} has a line with more than {DOTS} dots, which no recipe needs; shorten it")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{name} is not valid TOML: it is nested too deep") from error
    except ValueError as error:  # TOMLDecodeError, and errors of Python's number and date parsers
        raise RecipeError(f"{name} is not valid TOML: {error}") from error


def sound(document: Any, name: str = "recipe") -> dict[str, Any]:
    """Copy a document of dictionaries with text keys, lists, booleans, numbers and texts, all within limits.

    Raises:
        RecipeError: naming the key of a value that is of another type or beyond a limit.
    """
    if not isinstance(document, Mapping):
        raise RecipeError(f"{name} must be a table of keys and values, as tomllib gives it, got {shown(document)}")
    count = [0]
    checked: dict[str, Any] = _sound(document, (), name, count)
    return checked


def _sound(value: Any, path: tuple[Any, ...], name: str, count: list[int]) -> Any:
    count[0] += 1
    if count[0] > VALUES or len(path) > DEPTH:
        limit = f"more than {VALUES:,} values" if count[0] > VALUES else f"nested deeper than {DEPTH} levels"
        raise RecipeError(f"{name}: {place(path[:4])} is {limit}, which no recipe needs")
    if isinstance(value, Mapping):
        table: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecipeError(f"{name}: {place(path)} has the key {shown(key)}; keys are text")
            _check_text(key, (*path, key), name)
            table[key] = _sound(item, (*path, key), name, count)
        return table
    if isinstance(value, (list, tuple)):
        return [_sound(item, (*path, number), name, count) for number, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path, name)
        return value
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value  # fields check their own limits: the order of a norm may be infinite
    if isinstance(value, int):
        if not -LARGEST <= value <= LARGEST:
            raise RecipeError(
                f"{name}: {place(path)}: got {shown(value)}: must be a whole number of at most {LARGEST:g}"
            )
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        raise RecipeError(f"{name}: {place(path)}: got {shown(value)}: no key of a recipe takes a date or a time")
    raise RecipeError(
        f"{name}: {place(path)}: got {shown(value)}: a recipe holds tables, lists, texts, numbers and booleans"
    )


def _check_text(text: str, path: tuple[Any, ...], name: str) -> None:
    if len(text) > TEXT:
        raise RecipeError(f"{name}: {place(path)}: text of {len(text):,} characters; at most {TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{name}: {place(path)}: got {shown(text)}, which is no valid Unicode") from error
    if "\0" in text:
        raise RecipeError(f"{name}: {place(path)}: got {shown(text)}: text must not hold a NUL")


def place(path: tuple[Any, ...]) -> str:
    """Return the place of a value in words: "step 2, key 'train', key 'epochs'"."""
    words = []
    for index, part in enumerate(path):
        if isinstance(part, int):
            words.append(f"step {part + 1}" if index == 1 and path[0] == "step" else f"entry {part + 1}")
        elif not (part == "step" and len(path) > 1 and index == 0):
            words.append(f"key {shown(part)}")
    return ", ".join(words) or "the document"
