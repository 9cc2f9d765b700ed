"""Flattens the arguments and results of dispatched operations, which nest only in tuples, lists and dicts.

A general walk over trees looks up the registered type of every leaf, which takes longer than most operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(value: Any) -> list[Any]:
    """All values in `value` that are not containers, in order."""
    flat: list[Any] = []
    _collect(value, flat)
    return flat


def _collect(value: Any, flat: list[Any]) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, flat)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, flat)
    else:
        flat.append(value)


def filled(like: Any, values: Iterator[Any]) -> Any:
    """The containers of `like`, with leaves taken from `values` in order."""
    if isinstance(like, (tuple, list)):
        items = [filled(item, values) for item in like]
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    if isinstance(like, dict):
        return {key: filled(item, values) for key, item in like.items()}
    return next(values)
