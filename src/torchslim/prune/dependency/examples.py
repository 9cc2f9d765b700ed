"""Calls of a model in one run: the call on the example inputs, and further calls of other branches and methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from torchslim.core.step import Inputs
from torchslim.errors import PruneError

KEYS = ("method", "args", "kwargs")


class Example(NamedTuple):
    """One call; `method` is a path from the model, such as "backbone.features", and empty for the model itself."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        return find_method(model, self.method)(*self.args, **self.kwargs)


class Examples(NamedTuple):
    """Several calls, made one after the other in one run."""

    calls: tuple[Example, ...]


def find_method(model: nn.Module, path: str) -> Callable[..., Any]:
    """The callable at `path` from the model; the model itself for an empty path.

    Raises:
        PruneError: `path` names nothing that can be called.
    """
    target: Any = model
    for name in path.split(".") if path else ():
        target = getattr(target, name, None)
    if not callable(target):
        raise PruneError(f"examples call {path!r}, which is no method of {type(model).__name__}; give a method's name")
    method: Callable[..., Any] = target
    return method


def calls_of(inputs: Inputs) -> tuple[Example, ...]:
    """The calls that a run on `inputs` consists of."""
    if isinstance(inputs, Examples):
        return inputs.calls
    if isinstance(inputs, Mapping):
        return (Example("", (), dict(inputs)),)
    return (Example("", tuple(inputs), {}),)


def together(model: nn.Module, example_inputs: Inputs, examples: Sequence[Any]) -> Inputs:
    """The example inputs, followed by the calls in `examples`.

    Args:
        examples: tuples of positional arguments, dicts of keyword arguments, or dicts with the key "method" and,
            optionally, the keys "args" and "kwargs".

    Raises:
        PruneError: an example has none of these forms, or names a method that the model does not have.
    """
    if isinstance(examples, (str, Mapping)) or not isinstance(examples, Sequence):
        raise PruneError(f"examples must be a list of calls, got {type(examples).__name__}; give examples=[(x,), ...]")
    if not examples:
        return example_inputs
    calls = tuple(_read(model, example, place) for place, example in enumerate(examples))
    return Examples((*calls_of(example_inputs), *calls))


def _read(model: nn.Module, example: Any, place: int) -> Example:
    if isinstance(example, (tuple, list)):
        return Example("", tuple(example), {})
    if not isinstance(example, Mapping):
        raise PruneError(
            f"examples[{place}] must be a tuple of positional arguments, a dict of keyword arguments, or "
            f'{{"method": name, "args": (...), "kwargs": {{...}}}}, got {type(example).__name__}'
        )
    if "method" not in example:
        return Example("", (), dict(example))
    if unknown := [key for key in example if key not in KEYS]:
        raise PruneError(f"examples[{place}] names a method, so its keys are {', '.join(KEYS)}; got {unknown[0]!r}")
    args, kwargs = example.get("args", ()), example.get("kwargs", {})
    if not isinstance(example["method"], str) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise PruneError(
            f"examples[{place}] must give a method's name, args as a tuple and kwargs as a dict, got "
            f"{type(example['method']).__name__}, {type(args).__name__} and {type(kwargs).__name__}"
        )
    find_method(model, example["method"])
    return Example(example["method"], tuple(args), dict(kwargs))
