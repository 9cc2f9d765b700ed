"""The one boundary for JSON that others may have written: bounded bytes in, checked values out, one kind of error.

    MANIFEST = Schema(Manifest, "artifact.json", ArtifactError)
    manifest = MANIFEST.read(folder / "artifact.json")

A schema is a pydantic model or any type that pydantic can check; `Strict` is the base class for models of ours. Every
failure becomes the schema's `TorchslimError`: a missing file, one that is no file, too many bytes, no UTF-8, no JSON,
a key given twice, NaN and infinity, numbers beyond 64 bits, deep nesting, wrong types, unknown keys.
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
    """How much JSON is read. A list of two bytes takes a hundred in memory, so values are bounded besides bytes."""

    size_bytes: int = 16 * MIB
    values: int = 1_000_000
    depth: int = 64


LIMITS = Limits()


def read_file(
    path: Path, error: type[TorchslimError], *, size_bytes: int, mend: str = "copy it again", links: bool = True
) -> bytes:
    """The bytes of an ordinary file of at most `size_bytes`; a pipe or a device is never waited for.

    With `links=False` a symbolic link is not followed.

    Raises:
        TorchslimError: of the type `error`: no such file, no ordinary file, a larger one, or one that cannot be read.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise error(f"{path} is not an ordinary file; {mend}")
            data = file.read(min(size_bytes, about.st_size) + 1)  # python takes memory for all that is asked for
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
    """The value of a JSON text, as plain dicts, lists, texts and numbers.

    Args:
        data: the text; bytes are UTF-8.
        what: names the file in messages.
        error: the type of what is raised.
        limits: how large the text and its value may be.
        mend: what the reader of the message should do.

    Raises:
        TorchslimError: of the type `error`: not JSON, a key given twice, NaN or infinity, a number beyond 64 bits, text
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
    except ValueError as failure:  # not UTF-8, not JSON, and what is raised here
        raise error(f"{what} is damaged: {failure}; {mend}") from failure
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} is given twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _check(value: Any, depth: int) -> None:
    """Depth, sizes of numbers and Unicode of a parsed value; without recursion."""
    level: list[Any] = [value]
    for _ in range(depth + 1):
        following: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                following += each
                following += each.values()
            elif isinstance(each, list):
                following += each
            elif isinstance(each, str):
                each.isascii() or each.encode()  # a lone surrogate cannot be encoded, which is a ValueError
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number is too large")
            elif isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError("a whole number is beyond 64 bits")
        if not following:
            return
        level = following
    raise ValueError(f"nested deeper than {depth} levels")


def shorten(value: Any, length: int = 60) -> str:
    """A value as text for a message, quoted, without control characters, and short."""
    text = ascii(value[: 4 * length]) if isinstance(value, str) else ascii(type(value).__name__)
    if isinstance(value, (bool, int, float)) or value is None:
        text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class Schema(Generic[T]):
    """A kind of JSON file: the type of its value, its name in messages, and the error that a damaged one is.

    Values must have the type's own JSON types: no text is taken for a number, and no number for a text.
    """

    type: Any
    what: str
    error: type[TorchslimError]
    limits: Limits = LIMITS
    mend: str = "copy it again"
    also: Callable[[T], str | None] = field(default=lambda value: None)
    """What a type cannot say: the message of what is wrong with a value, or None."""

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.type)

    def parse(self, data: bytes | str, what: str | None = None) -> T:
        """The checked value of a JSON text.

        Raises:
            TorchslimError: the schema's own type; says where, what was found, and what belongs there.
        """
        what = what or self.what
        parse_json(data, what, self.error, limits=self.limits, mend=self.mend)
        return self._checked(lambda: self._adapter.validate_json(data, strict=True), what)

    def check(self, value: Any, what: str | None = None) -> T:
        """The same for a value that was parsed already, of plain dicts, lists, texts and numbers."""
        what = what or self.what
        try:
            data = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as failure:
            raise self.error(f"{what} is damaged: {failure}; {self.mend}") from failure
        return self.parse(data, what)

    def read(self, path: Path) -> T:
        """The checked value of a file.

        Raises:
            TorchslimError: the schema's own type, for what `parse` raises and for a file that cannot be read.
        """
        return self.parse(read_file(path, self.error, size_bytes=self.limits.size_bytes, mend=self.mend), str(path))

    def _checked(self, validate: Callable[[], T], what: str) -> T:
        from pydantic import ValidationError

        try:
            value = validate()
        except ValidationError as failure:
            raise self.error(f"{what} is damaged: {_first(failure)}; {self.mend}") from failure
        wrong = self.also(value)
        if wrong:
            raise self.error(f"{what} is damaged: {wrong}; {self.mend}")
        return value


def _first(failure: Any) -> str:
    """The first of pydantic's findings: where, what belongs there, and what stands there."""
    errors = failure.errors(include_url=False, include_context=False)
    # where a union matches nowhere, the finding that lies deepest is about what was meant
    first = max(errors[:50], key=lambda error: len(error["loc"])) if errors else {"loc": (), "msg": str(failure)}
    where = ".".join(ascii(str(part))[1:-1][:60] for part in first["loc"][:12])
    got = "" if "input" not in first or first.get("type") == "missing" else f", got {shorten(first['input'])}"
    message = ascii(first["msg"])[1:-1][:200]
    return f"{where + ': ' if where else ''}{message}{got}"
