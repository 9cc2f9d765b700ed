"""Calls of a model: its arguments by name, and as flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.parts import signature_of
from torchslim.core.step import Inputs
from torchslim.errors import ExportError
from torchslim.graph.io_structure import Structure, build, describe

KEYWORDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


class Flat(nn.Module):
    """Wraps a model as a function from flat tensors to flat tensors, which is exported."""

    def __init__(
        self, model: nn.Module, inputs: Structure, classes: Mapping[str, type], outside: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.inputs, self.classes, self.outside = inputs, classes, outside

    def natural(self, leaves: Sequence[Tensor]) -> Any:
        """Call the model with its own arguments, built from `leaves`, and return its own output."""
        if self.outside is not None:
            leaves = [leaf.float() if leaf.dtype == self.outside else leaf for leaf in leaves]
        args, kwargs = by_keyword(self.model, build(self.inputs, leaves, self.classes))
        return self.model(*args, **kwargs)

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_of(self.natural(leaves))
        if self.outside is not None:
            outputs = [output.to(self.outside) if output.dtype == torch.float32 else output for output in outputs]
        return tuple(outputs)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of an output, in its structure's order."""
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return leaves


def examples_of(example_inputs: Inputs | list[Inputs]) -> list[Inputs]:
    """The examples: a list of tuples and dicts holds several, anything else is one."""
    several = isinstance(example_inputs, list) and bool(example_inputs)
    if several and all(isinstance(example, (tuple, Mapping)) for example in example_inputs):
        return list(example_inputs)
    return [example_inputs]  # type: ignore[list-item]


def bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return inputs by the names of the forward, defaults included (varargs as one tuple, extra keywords as a dict).

    Raises:
        ExportError: when the inputs do not fit the forward's signature, or hold no tensor.
    """
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise ExportError(
            "example inputs must be a tuple of positional or a dict of keyword arguments, got "
            f"{type(inputs).__name__}; put a single input in a tuple: (x,)"
        )
    signature = signature_of(model)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        named = bind_call(signature, args, kwargs)
    except TypeError as error:
        raise ExportError(
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}; give its arguments"
        ) from error
    leaves: list[Tensor] = []
    for name, value in named.items():
        describe(value, leaves, {}, f"input {name!r}")
    if not leaves:
        raise ExportError("example inputs hold no tensor; give at least one")
    return named


def bind_call(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; missing ones get their defaults, except those that JSON cannot hold."""
    bound = signature.bind(*args, **kwargs)
    passed = set(bound.arguments)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name in passed or _plain(value)}


def _plain(value: Any) -> bool:
    leaves: list[Tensor] = []
    try:
        describe(value, leaves, {})
    except ExportError:
        return False
    return not leaves


def positional(model: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert arguments by name to the positional and keyword arguments of a call of the model."""
    bound = inspect.BoundArguments(signature_of(model), dict(named))
    return bound.args, bound.kwargs


def by_keyword(model: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert arguments by name to a call with optional arguments by keyword, as code usually gives them.

    A decorated forward may set some of its optional arguments itself, which fails for those that came by position.
    """
    parameters = signature_of(model).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return positional(model, named)
    args, kwargs = positional(model, named)
    required = [parameter for parameter in parameters if parameter.kind not in KEYWORDS]
    count = next(
        (place for place, parameter in enumerate(required) if parameter.default is not inspect.Parameter.empty),
        len(required),
    )
    count += sum(parameter.kind is inspect.Parameter.POSITIONAL_ONLY for parameter in required[count:])
    optional = {parameter.name: value for parameter, value in zip(required[count:], args[count:], strict=False)}
    return args[:count], optional | kwargs
