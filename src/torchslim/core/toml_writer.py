"""Write documents as TOML text that `tomllib` reads back."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torchslim.errors import RecipeError

BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(document: Mapping[str, Any]) -> str:
    """TOML that `tomllib.loads` reads as the same document.

    Tables and lists of tables at the top level get a header of their own. Nested ones, and tables that stand for one
    value (`{ search = ... }`, `{ do = ... }`), are written inline.

    Raises:
        RecipeError: a value that TOML has no type for, such as None, or a key that is no text.
    """
    lines = list(_pairs((key, value) for key, value in document.items() if not _headed(value)))
    for key, value in document.items():
        if not _headed(value):
            continue
        header = f"[[{_key(key)}]]" if isinstance(value, (list, tuple)) else f"[{_key(key)}]"
        for table in value if isinstance(value, (list, tuple)) else (value,):
            lines += ["", header, *_pairs(table.items())]
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""


def _headed(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not ("search" in value or "do" in value)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _pairs(items: Iterable[tuple[Any, Any]]) -> Iterable[str]:
    for key, value in items:
        written = _key(key)
        try:
            yield f"{written} = {_value(value)}"
        except RecipeError as error:
            raise RecipeError(f"{written}: {error}") from error


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise RecipeError(f"a key of a TOML table is text, got {key!r}")
    return key if BARE.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{text!r} is no valid Unicode, which TOML must be") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON allows DEL, TOML does not


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)  # the repr of a subclass such as numpy's contains its type
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_pairs(value.items()))} }}" if value else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    hint = "; leave the key out" if value is None else ""
    raise RecipeError(f"TOML has no type for {value!r}{hint}")
