"""Sizes that are written as numbers in a module's forward, as in `torch.zeros(2, x.size(0), 32)`.

To change such a number, one module gets its own forward: the code of its class with other constants. The class stays as
it is, and a record holds only numbers.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

FORWARD = "forward"
"""The attribute name of a patch that replaces a number in the code of `forward`; its place is that number."""

ATTRIBUTE = "_torchslim_literals"


def literals(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The whole numbers above 1 in the code of a user's forward, each with its value in this module."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or type(module).__module__.partition(".")[0] == "torch":
        return
    changed: Mapping[int, int] = vars(module).get(ATTRIBUTE, {})
    for number in sorted(set(_numbers(code.co_consts))):
        yield number, changed.get(number, number)


def write(module: nn.Module, number: int, value: int) -> None:
    """Replace a number in the forward of this module by a value."""
    changed = {**vars(module).get(ATTRIBUTE, {}), number: value}
    changed = {old: new for old, new in changed.items() if old != new}
    vars(module).pop("forward", None)
    vars(module).pop(ATTRIBUTE, None)
    if not changed:
        return
    forward: Any = type(module).forward
    code = forward.__code__.replace(co_consts=_replaced(forward.__code__.co_consts, changed))
    function = types.FunctionType(
        code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    function.__kwdefaults__, function.__doc__ = forward.__kwdefaults__, forward.__doc__
    function.__annotations__, function.__qualname__ = forward.__annotations__, forward.__qualname__
    vars(module)[ATTRIBUTE] = changed
    vars(module)["forward"] = types.MethodType(function, module)


def _numbers(value: Any) -> Iterator[int]:
    if type(value) is int and value > 1:
        yield value
    elif type(value) is tuple:
        for item in value:
            yield from _numbers(item)


def _replaced(value: Any, changed: Mapping[int, int]) -> Any:
    if type(value) is int:
        return changed.get(value, value)
    return tuple(_replaced(item, changed) for item in value) if type(value) is tuple else value
