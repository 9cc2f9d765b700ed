"""The arguments and results of dispatched operations, flat: they nest in tuples, lists and dicts alone.

A general walk over trees asks each leaf for its registered kind, which takes longer than most operations do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(value: Any) -> list[Any]:
    """All that is not a container, in order."""
    found: list[Any] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, (tuple, list)):
        for each in value:
            _collect(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found)
    else:
        found.append(value)


def filled(like: Any, values: Iterator[Any]) -> Any:
    """The same containers with the next values as their leaves."""
    if isinstance(like, (tuple, list)):
        items = [filled(each, values) for each in like]
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    if isinstance(like, dict):
        return {key: filled(each, values) for key, each in like.items()}
    return next(values)
