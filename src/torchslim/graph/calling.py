"""How a model is called: its arguments by name, and as flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.step import Inputs
from torchslim.errors import ExportError
from torchslim.graph.io_structure import Structure, build, describe


class Flat(nn.Module):
    """A model as a function of flat tensors, giving flat tensors: what is exported."""

    def __init__(
        self, model: nn.Module, inputs: Structure, classes: Mapping[str, type], outside: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.inputs, self.classes, self.outside = inputs, classes, outside

    def natural(self, leaves: Sequence[Tensor]) -> Any:
        """What the model itself returns."""
        if self.outside is not None:
            leaves = [leaf.float() if leaf.dtype == self.outside else leaf for leaf in leaves]
        args, kwargs = positional(self.model, build(self.inputs, leaves, self.classes))
        return self.model(*args, **kwargs)

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        answers = tensors_of(self.natural(leaves))
        if self.outside is not None:
            answers = [answer.to(self.outside) if answer.dtype == torch.float32 else answer for answer in answers]
        return tuple(answers)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output, in its structure's order."""
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return leaves


def bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names of the model's forward, defaults included (varargs as one tuple, extra keywords as a dict).

    Raises:
        ExportError: when they do not fit the forward's signature, or hold no tensor.
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
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}; give them as it takes them"
        ) from error
    leaves: list[Tensor] = []
    for name, value in named.items():
        describe(value, leaves, {}, f"input {name!r}")
    if not leaves:
        raise ExportError("example inputs hold no tensor; give at least one")
    return named


def bind_call(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those left out (but defaults that JSON cannot hold)."""
    bound = signature.bind(*args, **kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name in given or _plain(value)}


def _plain(value: Any) -> bool:
    leaves: list[Tensor] = []
    try:
        describe(value, leaves, {})
    except ExportError:
        return False
    return not leaves


def signature_of(model: nn.Module) -> inspect.Signature:
    """How the model's forward is called; a converted graph remembers that of the model it was made from."""
    remembered = getattr(model, "forward_signature", None)
    return remembered if isinstance(remembered, inspect.Signature) else inspect.signature(model.forward)


def positional(model: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bound arguments as what the model is called with."""
    bound = inspect.BoundArguments(signature_of(model), dict(named))
    return bound.args, bound.kwargs
