"""Read JSON from untrusted writers: bounded bytes in, checked values out, one kind of error.

    MANIFEST = Schema(Manifest, "artifact.json", ArtifactError)
    manifest = MANIFEST.read(folder / "artifact.json")

A schema is a pydantic model or any type that pydantic can check. Every failure becomes the schema's `TorchslimError`:
a missing file, no ordinary file, too many bytes, no UTF-8, no JSON, a duplicate key, NaN and infinity, numbers beyond
64 bits, deep nesting, wrong types, unknown keys.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torchslim.errors import TorchslimError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of JSON that is read. Values are limited besides bytes: a list of two bytes takes a hundred in memory."""

    size_bytes: int = 16 * MIB
    values: int = 1_000_000
    depth: int = 64


LIMITS = Limits()


def read_file(
    path: Path, error: type[TorchslimError], *, size_bytes: int, mend: str = "copy it again", links: bool = True
) -> bytes:
    """Bytes of an ordinary file of at most `size_bytes`; never waits for a pipe or a device.

    With `links=False` a symbolic link is not followed.

    Raises:
        TorchslimError: of the type `error`: no such file, no ordinary file, a larger one, or one that cannot be read.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is not an ordinary file; {mend}")
            data = file.read(min(size_bytes, status.st_size) + 1)  # Python allocates as much as is asked for
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist; {mend}") from missing
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read: {getattr(failure, 'strerror', None) or failure}; {mend}") from failure
    if len(data) > size_bytes:
        raise error(f"{path} is larger than {size_bytes:,} bytes, the most that is read; {mend}")
    return data


def parse_json(
    data: bytes | str, what: str, error: type[TorchslimError], *, limits: Limits = LIMITS, mend: str = "copy it again"
) -> Any:
    """Value of a JSON text, as plain dicts, lists, texts and numbers.

    Args:
        data: the text; bytes are UTF-8.
        what: name of the file in messages.
        error: the type of the error.
        limits: of the text and its value.
        mend: remedy that messages end with.

    Raises:
        TorchslimError: of the type `error`: not JSON, a duplicate key, NaN or infinity, a number beyond 64 bits, text
            that is no valid Unicode, or more than the limits allow.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        if len(data) > limits.size_bytes:
            raise ValueError(f"larger than {limits.size_bytes:,} bytes")
        if data.count(b",") + data.count(b"[") + data.count(b"{") > limits.values:
            raise ValueError(f"more than {limits.values:,} values")
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
        _check(value, limits.depth)
    except RecursionError as failure:
        raise error(f"{what} is damaged: nested deeper than {limits.depth} levels; {mend}") from failure
    except ValueError as failure:  # not UTF-8, not JSON, or a ValueError raised above
        raise error(f"{what} is damaged: {failure}; {mend}") from failure
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} is given twice")
    return table


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _check(value: Any, depth: int) -> None:
    """Raise ValueError for depth, sizes of numbers or Unicode beyond the limits; without recursion."""
    level: list[Any] = [value]
    for _ in range(depth + 1):
        following: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                following += node
                following += node.values()
            elif isinstance(node, list):
                following += node
            elif isinstance(node, str):
                node.isascii() or node.encode()  # a lone surrogate cannot be encoded, which is a ValueError
            elif isinstance(node, float) and not math.isfinite(node):
                raise ValueError("a number is too large")
            elif isinstance(node, int) and not -(2**63) <= node < 2**63:
                raise ValueError("a whole number is beyond 64 bits")
        if not following:
            return
        level = following
    raise ValueError(f"nested deeper than {depth} levels")


def shorten(value: Any, length: int = 60) -> str:
    """`value` as text for a message: quoted, without control characters, at most `length` long."""
    text = ascii(value[: 4 * length]) if isinstance(value, str) else ascii(type(value).__name__)
    if isinstance(value, (bool, int, float)) or value is None:
        text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class Schema(Generic[T]):
    """A kind of JSON file: the type of its value, its name in messages, and its error.

    Values are checked strictly: a text is never converted to a number, nor a number to a text.
    """

    type: Any
    what: str
    error: type[TorchslimError]
    limits: Limits = LIMITS
    mend: str = "copy it again"
    also: Callable[[T], str | None] = field(default=lambda value: None)
    """A check beyond the type: returns a message if the value is wrong, else None."""

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.type)

    def parse(self, data: bytes | str, what: str | None = None) -> T:
        """Checked value of a JSON text.

        Raises:
            TorchslimError: the schema's own type; the message names the place, the value there and what is expected.
        """
        what = what or self.what
        parse_json(data, what, self.error, limits=self.limits, mend=self.mend)
        return self._checked(lambda: self._adapter.validate_json(data, strict=True), what)

    def check(self, value: Any, what: str | None = None) -> T:
        """Checked value of parsed JSON: plain dicts, lists, texts and numbers."""
        what = what or self.what
        try:
            data = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as failure:
            raise self.error(f"{what} is damaged: {failure}; {self.mend}") from failure
        return self.parse(data, what)

    def read(self, path: Path) -> T:
        """Checked value of a file.

        Raises:
            TorchslimError: the schema's own type, if `parse` raises or the file cannot be read.
        """
        return self.parse(read_file(path, self.error, size_bytes=self.limits.size_bytes, mend=self.mend), str(path))

    def _checked(self, validate: Callable[[], T], what: str) -> T:
        from pydantic import ValidationError

        try:
            value = validate()
        except ValidationError as failure:
            raise self.error(f"{what} is damaged: {_first(failure)}; {self.mend}") from failure
        message = self.also(value)
        if message:
            raise self.error(f"{what} is damaged: {message}; {self.mend}")
        return value


def _first(failure: Any) -> str:
    """First of pydantic's errors: its place, the expected value and the actual one."""
    errors = failure.errors(include_url=False, include_context=False)
    # if no member of a union matches, the deepest error is about the member that was meant
    first = max(errors[:50], key=lambda error: len(error["loc"])) if errors else {"loc": (), "msg": str(failure)}
    where = ".".join(ascii(str(part))[1:-1][:60] for part in first["loc"][:12])
    got = "" if "input" not in first or first.get("type") == "missing" else f", got {shorten(first['input'])}"
    message = ascii(first["msg"])[1:-1][:200]
    return f"{where + ': ' if where else ''}{message}{got}"
