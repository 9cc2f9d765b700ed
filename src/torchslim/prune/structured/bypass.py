"""Modules that stand in the place of removed ones, and the record that makes them again on a fresh model.

A bypass has no weights. It returns the arguments that the removed module got, or zeros of their shape, in the structure
that the removed module returned. The record holds names, numbers and shapes alone, so nothing of a class is saved.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.parts import signature_of, under
from torchslim.errors import PruneError

Place = tuple[str | int, ...]
"""Where a call has a value: the name of an argument, then indices and keys inside of it."""

Shape = tuple[int, ...]

PLAIN = (bool, int, float, str, type(None), torch.dtype)
"""Types of attributes that a bypass takes over, as code around a module may read them."""

STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Given:
    """An argument of the call, returned as it is."""

    place: Place


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros in the type and on the device of an argument.

    `shape` has a size for each dimension, or a negative number: -1 - i is the argument's dimension i. Without a shape,
    that of the argument is taken.
    """

    place: Place
    shape: Shape | None = None


Returned = Any
"""A `Given`, `Zeros`, None, number or text, or a tuple, list or dict of them."""


@dataclass(frozen=True, slots=True)
class Drop:
    """One removed module: its path, what the bypass returns, and the tensors that the model's state loses.

    `ties` maps each name of a tensor that has one of its names in the module to the tensor's first name.
    """

    module: str
    returned: Returned
    tensors: Mapping[str, Shape]
    ties: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, dicts, numbers and text."""
        return {
            "module": self.module,
            "returned": _written(self.returned),
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "ties": dict(self.ties),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Drop:
        """The inverse of `to_dict`."""
        tensors = {name: tuple(shape) for name, shape in data["tensors"].items()}
        return cls(data["module"], _read(data["returned"]), tensors, dict(data["ties"]))

    def under(self, path: str) -> Drop:
        """The same removal in a part, with the paths of the whole model."""
        return replace(
            self,
            module=under(path, self.module),
            tensors={under(path, name): shape for name, shape in self.tensors.items()},
            ties={under(path, name): under(path, first) for name, first in self.ties.items()},
        )


def _written(returned: Returned) -> dict[str, Any]:
    if isinstance(returned, Given):
        return {"given": list(returned.place)}
    if isinstance(returned, Zeros):
        return {"zeros": list(returned.place), "shape": None if returned.shape is None else list(returned.shape)}
    if isinstance(returned, (tuple, list)):
        kind = "tuple" if isinstance(returned, tuple) else "list"
        return {kind: [_written(item) for item in returned]}
    if isinstance(returned, dict):
        return {"dict": {key: _written(item) for key, item in returned.items()}}
    return {"value": returned}


def _read(data: Mapping[str, Any]) -> Returned:
    if "given" in data:
        return Given(tuple(data["given"]))
    if "zeros" in data:
        return Zeros(tuple(data["zeros"]), None if data["shape"] is None else tuple(data["shape"]))
    if "tuple" in data:
        return tuple(_read(item) for item in data["tuple"])
    if "list" in data:
        return [_read(item) for item in data["list"]]
    if "dict" in data:
        return {key: _read(item) for key, item in data["dict"].items()}
    return data["value"]


class Bypass(nn.Module):
    """Stands in the place of a removed module, and has its plain attributes, which code around it may read."""

    def __init__(self, removed: nn.Module, returned: Returned) -> None:
        super().__init__()
        self.forward_signature = signature_of(removed)  # code around a module may look at its arguments
        self._named = named_arguments(removed)
        self._returned = returned
        self.training = removed.training
        own = set(dir(self))
        for name, value in vars(removed).items():
            if isinstance(value, PLAIN) and not name.startswith("_") and name not in own:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the arguments, or zeros, that stand for the removed module's outputs."""
        return _result(self._returned, arguments(self._named, args, kwargs))

    def extra_repr(self) -> str:
        """What the bypass returns."""
        return str(_written(self._returned))


def named_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without those that take any number."""
    return tuple(
        parameter.name for parameter in signature_of(module).parameters.values() if parameter.kind not in STARRED
    )


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; further positional ones are in the tuple "*"."""
    return {**dict(zip(names, args, strict=False)), "*": tuple(args[len(names) :]), **kwargs}


def value_at(place: Place, given: Any) -> Any:
    """The value at a place among the arguments of a call."""
    for key in place:
        given = given[key]
    return given


def _result(returned: Returned, given: Mapping[str, Any]) -> Any:
    if isinstance(returned, Given):
        return value_at(returned.place, given)
    if isinstance(returned, Zeros):
        like: Tensor = value_at(returned.place, given)
        shape = (
            like.shape
            if returned.shape is None
            else [size if size >= 0 else like.shape[-1 - size] for size in returned.shape]
        )
        # not `zeros_like`: a captured program would keep the computation of the argument for it
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if isinstance(returned, (tuple, list)):
        return type(returned)(_result(item, given) for item in returned)
    if isinstance(returned, dict):
        return {key: _result(item, given) for key, item in returned.items()}
    return returned


def tensors_inside(model: nn.Module, path: str) -> dict[str, Shape]:
    """Shapes of all tensors of a model's state that have names in the module at `path`, or at its other paths."""
    removed = model.get_submodule(path)
    places = [f"{other}." for other, module in model.named_modules(remove_duplicate=False) if module is removed]
    return {
        name: tuple(getattr(value, "shape", ()))
        for name, value in model.state_dict().items()
        if name.startswith(tuple(places))
    }


def dropped(model: nn.Module, path: str, returned: Returned) -> Drop:
    """The record of the removal of the module at `path` from the model as it is now."""
    lost = tensors_inside(model, path)
    first: dict[int, str] = {}
    ties = {}
    for name, value in model.state_dict(keep_vars=True).items():
        known = first.setdefault(id(value), name)
        if known != name and (name in lost or known in lost):
            ties[name] = known
    return Drop(path, returned, lost, ties)


def drop_in_place(model: nn.Module, drop: Drop) -> None:
    """Put the bypass of a drop into the model.

    Raises:
        PruneError: the model is not the one that the module was removed from.
    """
    if not drop.module:
        raise PruneError("the surgery removes the model itself; give the factory of the model that was pruned")
    removed = model.get_submodule(drop.module)
    here = tensors_inside(model, drop.module)
    if here != dict(drop.tensors):
        names = sorted(name for name in {*here, *drop.tensors} if here.get(name) != drop.tensors.get(name))
        raise PruneError(
            f"the surgery removes {drop.module!r}, whose tensors differ here ({', '.join(names[:5])}); give the "
            "factory of the model that was pruned"
        )
    put(model, removed, Bypass(removed, drop.returned))


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in all places of another one."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


@contextmanager
def bypassed(model: nn.Module, returned: Mapping[str, Returned]) -> Iterator[None]:
    """Bypass modules of a model, by path, for the duration of the block."""
    modules = [(model.get_submodule(path), what) for path, what in returned.items()]
    pairs = [(module, Bypass(module, copy.copy(what))) for module, what in modules]
    for module, stand_in in pairs:
        put(model, module, stand_in)
    try:
        yield
    finally:
        for module, stand_in in reversed(pairs):
            put(model, stand_in, module)
