"""Sizes that are written as numbers in a module's forward, as in `torch.zeros(2, x.size(0), 32)`.

Such a number is changed for one module: it gets a forward of its own, with the code of its class and other constants.
The class stays as it is, and a record holds nothing but numbers.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

FORWARD = "forward"
"""The name of a patch of a number in the code of forward; its place is the number that the code has."""

ATTRIBUTE = "_torchslim_literals"


def literals(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The whole numbers above 1 in the code of a user's forward, and what stands for them in this module."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or type(module).__module__.partition(".")[0] == "torch":
        return
    changed: Mapping[int, int] = vars(module).get(ATTRIBUTE, {})
    for number in sorted(set(_numbers(code.co_consts))):
        yield number, changed.get(number, number)


def write(module: nn.Module, number: int, value: int) -> None:
    """Put a value in the place of a number in this module's forward."""
    changed = {**vars(module).get(ATTRIBUTE, {}), number: value}
    changed = {old: new for old, new in changed.items() if old != new}
    vars(module).pop("forward", None)
    vars(module).pop(ATTRIBUTE, None)
    if not changed:
        return
    own: Any = type(module).forward
    code = own.__code__.replace(co_consts=_replaced(own.__code__.co_consts, changed))
    function = types.FunctionType(code, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    function.__kwdefaults__, function.__doc__ = own.__kwdefaults__, own.__doc__
    function.__annotations__, function.__qualname__ = own.__annotations__, own.__qualname__
    vars(module)[ATTRIBUTE] = changed
    vars(module)["forward"] = types.MethodType(function, module)


def _numbers(value: Any) -> Iterator[int]:
    if type(value) is int and value > 1:
        yield value
    elif type(value) is tuple:
        for each in value:
            yield from _numbers(each)


def _replaced(value: Any, changed: Mapping[int, int]) -> Any:
    if type(value) is int:
        return changed.get(value, value)
    return tuple(_replaced(each, changed) for each in value) if type(value) is tuple else value
