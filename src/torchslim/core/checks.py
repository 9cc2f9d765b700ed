"""Check values against the declared types of functions and dataclasses, in Python calls and in recipes.

Numbers are checked beyond their type: a boolean is no number; NaN, infinity and numbers larger than any sensible
setting (by default `WHOLE` and `REAL`) are refused. `Annotated[float, Range(low, high)]` sets the limits of a field.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from torchslim.core.terminal import printable
from torchslim.errors import TorchslimError

WHOLE, REAL = 10**9, 1e9  # default limits of a field's absolute value
TEXT, VALUES, DEPTH = 10_000, 10_000, 32  # characters of a text, entries of a list or table, nesting levels

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Range:
    """Lowest and highest number that a field accepts, instead of the default limits.

    `least` is the smallest absolute value of a number other than 0.
    """

    low: float
    high: float
    least: float = 0.0


Divisor = Annotated[float, Range(-REAL, REAL, least=1e-30)]
"""A divisor: so far from 0 that quotients are finite in float32, even squared."""

Seed = Annotated[int, Range(0, 10**12)]
"""A seed of random generators; later steps and trainings add their numbers to it."""

Threads = Annotated[int, Range(1, 1024)]
"""The number of threads of a deployed model; the maximum is above the cores of any supported processor."""


class Misfit(Exception):
    """A value does not fit a type; the message says what is expected."""


def shown(value: Any) -> str:
    """`value` as text for a message: short, on one line, without control characters."""
    if not isinstance(value, type):  # by attributes: torch is not imported for a message
        if hasattr(value, "named_parameters"):
            return f"the module {type(value).__name__}"
        if hasattr(value, "is_meta") and hasattr(value, "shape"):
            return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a whole number of about {int(value.bit_length() * math.log10(2))} digits"
    if inspect.isgenerator(value):
        return "a generator"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    brief = _Brief()
    brief.maxlevel, brief.maxstring, brief.maxother = 3, 60, 80
    try:
        text = brief.repr(value)
    except Exception:  # noqa: BLE001 - the value's own repr is broken; the type is enough
        text = f"a {type(value).__name__}"
    return printable(text)[:300]


def got(value: Any) -> str:
    """End of a message: the value that was passed; for a module class, the remedy too."""
    if isinstance(value, type) and hasattr(value, "named_parameters"):
        return f"got {shown(value)}; make an instance: {value.__name__}(...)"
    return f"got {shown(value)}"


class _Brief(reprlib.Repr):
    """Repr that shows modules in a list by class name: their own repr has a line for every layer."""

    def repr_instance(self, x: Any, level: int) -> str:
        return f"{type(x).__name__}(...)" if hasattr(x, "named_parameters") else super().repr_instance(x, level)


def fitting(value: Any, kind: Any) -> Any:
    """`value` converted to the declared type: whole numbers to floats, and lists to tuples, if those are declared.

    Raises:
        Misfit: `value` is of another type, or beyond the limits.
    """
    return _fitting(value, kind, None, DEPTH)


def _fitting(value: Any, kind: Any, limits: Range | None, depth: int) -> Any:
    if depth < 0:
        raise Misfit(f"must be nested at most {DEPTH} levels deep")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        own = next((note for note in kind.__metadata__ if isinstance(note, Range)), limits)
        return _fitting(value, arguments[0], own, depth)
    if origin in (Union, types.UnionType):
        return _one_of(value, kind, arguments, limits, depth)
    if kind in _PLAIN:
        return _PLAIN[kind](value, limits)
    if origin is tuple or origin in (list, Sequence):
        items = _items(value, arguments if origin is tuple else (*(arguments or (Any,)), ...), limits, depth)
        return items if origin is tuple else list(items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _table(value, arguments, limits, depth)
    _check_member(value, kind, origin or kind, arguments)
    return value


def _check_member(value: Any, kind: Any, origin: Any, choices: Sequence[Any]) -> None:
    """Check a value that is not converted: a choice, function or class instance; every other type accepts any value."""
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
    elif kind is None or kind is type(None):
        fits = value is None
    elif origin is typing.get_origin(Callable[..., Any]):
        fits = callable(value)
    elif _is_call(origin):
        fits = callable(value) and not isinstance(value, type)
    elif isinstance(origin, type) and kind is not object:
        try:
            fits = isinstance(value, origin)
        except TypeError:  # a protocol that cannot be checked at runtime
            return
    else:
        return
    if not fits:
        raise Misfit(f"must be {described(kind)}")


def _is_call(kind: Any) -> bool:
    """Whether `kind` is a protocol that declares only `__call__`."""
    if not getattr(kind, "_is_protocol", False) or kind is typing.Protocol:
        return False
    return "__call__" in vars(kind) and all(var.startswith("_") for var in {*vars(kind), *_annotated(kind)})


def _annotated(kind: type) -> Mapping[str, Any]:
    return getattr(kind, "__annotations__", {})


def _one_of(value: Any, kind: Any, members: Sequence[Any], limits: Range | None, depth: int) -> Any:
    """`value` converted to the first member that it fits; a whole number stays whole if `int` is a member."""
    if type(value) is int and int in members:
        members = [member for member in members if member is not float]
    reasons = []
    for member in members:
        try:
            return _fitting(value, member, limits, depth)
        except Misfit as misfit:
            if _close(value, member):  # the member that was meant: its message says more than the union's
                reasons.append(str(misfit))
    raise Misfit(reasons[0] if reasons else f"must be {described(kind)}")


def _close(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Annotated:
        return _close(value, typing.get_args(kind)[0])
    if kind in (int, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return origin in (tuple, list, Sequence) and isinstance(value, (tuple, list))


def _boolean(value: Any, limits: Range | None) -> bool:
    if not isinstance(value, bool):
        raise Misfit("must be true or false")
    return value


def _whole(value: Any, limits: Range | None) -> int:
    low, high = (-WHOLE, WHOLE) if limits is None else (limits.low, limits.high)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise Misfit("must be a whole number")
    if not low <= int(value) <= high:
        raise Misfit(f"must be a whole number from {low:.12g} to {high:.12g}")
    return int(value)


def _real(value: Any, limits: Range | None) -> float:
    low, high = (-REAL, REAL) if limits is None else (limits.low, limits.high)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Misfit("must be a number")
    try:
        value = float(value)
    except OverflowError as error:  # a whole number beyond all floats
        raise Misfit(f"must be a number of at most {high:.12g}") from error
    if not low <= value <= high:  # NaN fails, too
        finite = "a finite number" if high < math.inf else "a number"
        if limits is not None and not limits.least:
            raise Misfit(f"must be {finite} from {low:.12g} to {high:.12g}")
        raise Misfit(f"must be {finite}{f' of at most {high:.12g}' if math.isfinite(value) else ''}")
    if limits is not None and 0 < abs(value) < limits.least:
        raise Misfit(f"must be 0, or at least {limits.least:g} in size")
    return value  # type: ignore[no-any-return]


def _text(value: Any, limits: Range | None) -> str:
    if not isinstance(value, str):
        raise Misfit("must be text")
    if len(value) > TEXT:
        raise Misfit(f"must be text of at most {TEXT:,} characters")
    if "\0" in value or not (value.isascii() or value.encode(errors="ignore").decode() == value):
        raise Misfit("must be text of valid Unicode, without NUL")
    return str(value)


def _path(value: Any, limits: Range | None) -> Any:
    if not isinstance(value, Path):
        raise Misfit("must be a path")
    _text(str(value), None)
    return value


_PLAIN: Mapping[Any, Callable[[Any, Range | None], Any]] = {
    bool: _boolean,
    int: _whole,
    float: _real,
    str: _text,
    Path: _path,
}


def _items(value: Any, arguments: Sequence[Any], limits: Range | None, depth: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise Misfit("must be a list")
    if len(value) > VALUES:
        raise Misfit(f"must be a list of at most {VALUES:,} entries")
    if arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise Misfit(f"must be a list of {len(arguments)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    items = []
    for number, (item, kind) in enumerate(zip(value, kinds, strict=True), 1):
        try:
            items.append(_fitting(item, kind, limits, depth - 1))
        except Misfit as misfit:
            raise Misfit(f"entry {number}, {shown(item)}, {misfit}") from misfit
    return tuple(items)


def _table(value: Any, arguments: Sequence[Any], limits: Range | None, depth: int) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise Misfit("must be a table of keys and values")
    if len(value) > VALUES:
        raise Misfit(f"must be a table of at most {VALUES:,} keys")
    table = {}
    for key, entry in value.items():
        try:
            key = _fitting(key, arguments[0], None, depth - 1)
        except Misfit as misfit:
            raise Misfit(f"the key {shown(key)} {misfit}") from misfit
        try:
            table[key] = _fitting(entry, arguments[1], limits, depth - 1)
        except Misfit as misfit:
            raise Misfit(f"entry {shown(key)}, {shown(entry)}, {misfit}") from misfit
    return table


def described(kind: Any) -> str:
    """A type in words: "a number, a list of text, or left out"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return described(arguments[0])
    if origin in (Union, types.UnionType):
        return _or(list(dict.fromkeys(described(argument) for argument in arguments if argument is not type(None))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if kind is None or kind is type(None):
        return "left out"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if kind in words:
        return words[kind]
    origin = origin or kind
    if not isinstance(origin, type):
        return "of another type"
    if origin is typing.get_origin(Callable[..., Any]):
        return "a function"
    if _is_call(origin):
        return f"a function ({', '.join([*inspect.signature(origin.__call__).parameters][1:])})"
    if issubclass(origin, Mapping):
        return "a table" if not arguments else f"a table of {_several(described(arguments[1]))}"
    if origin in (tuple, list, Sequence):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"a list of {_several(described(inner[0]))}" if inner else "a list"
    if written := getattr(origin, "written", ""):
        return str(written)
    name = origin.__name__
    if (origin.__module__, name) == ("torch.nn.modules.module", "Module"):
        return "an nn.Module"
    return (
        f"{name}(...)" if hasattr(origin, "__dataclass_fields__") else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    )


def _several(words: str) -> str:
    return {"a number": "numbers", "a whole number": "whole numbers", "text": "texts"}.get(words, words)


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@functools.lru_cache(maxsize=512)
def types_of(kind: type | Callable[..., Any]) -> Mapping[str, Any]:
    """Declared types of a class's fields, or of a function's parameters, by name."""
    return typing.get_type_hints(kind, include_extras=True)


def check_fields(config: Any, error: type[TorchslimError], what: str = "", *, only: Sequence[str] = ()) -> None:
    """Check and convert the fields of a dataclass (all, or those in `only`); messages begin with `what`.

    Raises:
        TorchslimError: of the type `error`, for a field of another type or beyond the limits.
    """
    hints = types_of(type(config))  # type: ignore[arg-type]  # a class is hashable
    for field_ in fields(config):
        value = getattr(config, field_.name)
        if value is field_.default or (only and field_.name not in only):
            continue
        try:
            fitted = fitting(value, hints[field_.name])
        except Misfit as misfit:
            raise error(f"{what}{field_.name} {misfit}, {got(value)}") from misfit
        if fitted is not value:
            object.__setattr__(config, field_.name, fitted)
