"""Finds weights and methods that no example reached, and the channels that they may share with code that ran."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchslim.core.reason import Reason
from torchslim.prune.dependency.propagation import Layers, varying
from torchslim.prune.dependency.union_find import Atoms, Ids

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unseen:
    """Code that no example reached.

    `weights` are paths of parameters and buffers, `methods` paths of methods from the model; `shared` are atoms of
    channels that unseen weights may read or produce, with a reason.
    """

    weights: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    shared: tuple[tuple[Ids, str], ...] = ()


@dataclass
class Boundaries:
    """The values that enter, leave or are computed in each module: unseen code may use them."""

    values: dict[str, dict[tuple[Any, ...], tuple[Shape, Layers]]] = field(default_factory=dict)

    def note(self, path: str, shape: Shape, layers: Layers) -> None:
        """Record a value that the code of a module can use."""
        if layers:
            self.values.setdefault(path, {})[shape, *map(id, layers)] = (shape, layers)


class Watch:
    """Records which public methods of a model's modules run; the model must be a copy that nothing else uses."""

    def __init__(self, model: nn.Module) -> None:
        self._methods = {path: _public_methods(module) for path, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._ran: set[tuple[type, str]] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the methods that run inside this context."""
        wrapped = []
        for path, names in self._methods.items():
            module = self._modules[path]
            for name in names:
                if name not in vars(module):
                    module.__dict__[name] = self._noting(module, name)
                    wrapped.append((module, name))
        try:
            yield
        finally:
            for module, name in wrapped:
                module.__dict__.pop(name, None)

    def _noting(self, module: nn.Module, name: str) -> MethodType:
        """A bound method that records its calls; its signature is the original's, for code that inspects it."""
        function: Callable[..., Any] = getattr(type(module), name)

        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._ran.add((type(module), name))
            return function(*args, **kwargs)

        return MethodType(noting, module)

    def unreached(self) -> tuple[str, ...]:
        """Public methods that compute with layers or weights of their module, and ran in no module of its class."""
        method_paths: dict[tuple[type, str], str] = {}
        for path, names in self._methods.items():
            module = self._modules[path]
            for name in names:
                key = (type(module), name)
                if key not in self._ran and key not in method_paths and _computes(module, name):
                    method_paths[key] = f"{path}.{name}".lstrip(".")
        return tuple(method_paths.values())


def _public_methods(module: nn.Module) -> list[str]:
    """Names of public methods of a user's own classes that `nn.Module` does not have, except `forward`."""
    names: dict[str, None] = {}
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        if kind.__module__.split(".")[0] != "torch":
            for name, value in vars(kind).items():
                if isinstance(value, FunctionType) and not name.startswith("_") and not hasattr(nn.Module, name):
                    names[name] = None
    return [name for name in names if name != "forward"]


def _computes(module: nn.Module, name: str) -> bool:
    """Does a method with a required argument return a value, and use a layer of its module, directly or in calls?"""
    function = getattr(type(module), name)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if not any(parameter.default is parameter.empty for parameter in parameters) or not _returns(function.__code__):
        return False
    layer_names = {*module._modules, *module._parameters}
    seen: set[str] = set()
    queue = [name]
    while queue:
        function = getattr(type(module), queue.pop(), None)
        if not isinstance(function, FunctionType):
            continue
        for attribute in _names(function.__code__):
            if attribute in layer_names:
                return True
            if attribute not in seen:
                seen.add(attribute)
                queue.append(attribute)
    return False


def _returns(code: CodeType) -> bool:
    """Does a function return anything? Functions that only prepare a model return None."""
    previous = None
    for instruction in dis.get_instructions(code):
        returns_none = previous is not None and previous.opname == "LOAD_CONST" and previous.argval is None
        if instruction.opname == "RETURN_VALUE" and not returns_none:
            return True
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return True
        previous = instruction
    return False


def _names(code: CodeType) -> set[str]:
    """Names of the attributes that a function and its inner functions read."""
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def shared_channels(
    model: nn.Module, weights: Mapping[str, Tensor], boundaries: Boundaries, called: Set[str], atoms: Atoms
) -> tuple[tuple[Ids, str], ...]:
    """Channels that unseen weights may read or produce: those of a matching size that the code around them can use.

    The code that would use a weight is in a module above it, and can use the values that enter and leave this module's
    parts. The search goes up to the first module that was called, and further up while no size fits.

    Args:
        weights: unseen weights by path.
        boundaries: the values that each module's code can use.
        called: paths of the modules that ran.
        atoms: tell which channels already stay.
    """
    unseen = {path.rpartition(".")[0] for path in weights}
    idle = {path for path, module in model.named_modules() if path not in called and _is_idle(path, module, weights)}
    shared = []
    for path in sorted(unseen):
        top = path
        while top and top in idle and _parent(top) in idle:
            top = _parent(top)
        sizes = {
            size
            for name, value in weights.items()
            if name.rpartition(".")[0] == path
            for size in _sizes(value, model.get_submodule(path))
        }
        scope = _parent(top) if top in idle and top else top
        reason = Reason.NOT_REACHED.with_detail(path or "of the model itself")
        for size in sizes:
            module_path: str | None = scope
            while module_path is not None:
                cores = [
                    core
                    for shape, layers in _visible(module_path, boundaries)
                    for core in _fitting(shape, layers, size)
                ]
                cores = [core for core in cores if not atoms.stuck(core.numpy())]
                shared += [(np.unique(core.numpy()), reason) for core in cores]
                if (cores and module_path in called) or not module_path:
                    break
                module_path = _parent(module_path)
    return tuple(shared)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_idle(path: str, module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Does a module have parameters, all of them unseen?"""
    parameter_names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
    return bool(parameter_names) and all(name in weights for name in parameter_names)


def _visible(path: str, boundaries: Boundaries) -> Iterator[tuple[Shape, Layers]]:
    """Yield the values that a module's code can use: those it computes, and those that enter and leave its parts."""
    depth = path.count(".") + 1 if path else 0
    for module_path, values in boundaries.values.items():
        if module_path == path or (
            module_path.count(".") == depth and f"{module_path}.".startswith(f"{path}." if path else "")
        ):
            yield from values.values()


def _sizes(value: Tensor, owner: nn.Module) -> set[int]:
    """Sizes of a weight that may be numbers of channels."""
    if not isinstance(owner, nn.modules.conv._ConvNd) or value.dim() < 2:
        return {size for size in value.shape if size > 1}
    return {value.shape[0], value.shape[1] * int(owner.groups)}  # swapped in transposed convolutions


def _fitting(shape: Shape, layers: Layers, size: int) -> Iterator[Tensor]:
    """Yield layers along a dimension of `size`, or along one that gives `size` together with its neighbors."""
    for core in layers:
        for dim in varying(core):
            sizes = {shape[dim]} | {
                int(np.prod(shape[first : last + 1])) for first in range(1, dim + 1) for last in range(dim, len(shape))
            }
            if size in sizes:
                yield core
                break
