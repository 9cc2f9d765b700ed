"""Code that no example reached: which weights and methods, and which channels these may share with what was seen."""

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
    """What no example reached.

    `weights` are parameters and buffers by path; `methods` by path with their module's; `shared` are atoms of channels
    that unseen weights may read or give, with a reason.
    """

    weights: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    shared: tuple[tuple[Ids, str], ...] = ()


@dataclass
class Boundaries:
    """The values that enter and leave each module, and those that its own code computes: what unseen code may see."""

    values: dict[str, dict[tuple[Any, ...], tuple[Shape, Layers]]] = field(default_factory=dict)

    def note(self, path: str, shape: Shape, layers: Layers) -> None:
        """A value that the code of a module can name."""
        if layers:
            self.values.setdefault(path, {})[shape, *map(id, layers)] = (shape, layers)


class Watch:
    """Records which public methods of a model's modules run; the model is a copy that nobody else uses."""

    def __init__(self, model: nn.Module) -> None:
        self._methods = {path: _public_methods(module) for path, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._ran: set[tuple[type, str]] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, methods note that they run."""
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
        """The method as it was for whoever inspects it: a bound method with the same signature."""
        function: Callable[..., Any] = getattr(type(module), name)

        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._ran.add((type(module), name))
            return function(*args, **kwargs)

        return MethodType(noting, module)

    def unreached(self) -> tuple[str, ...]:
        """Public methods that compute with layers or weights of their module, and have not run in any of its class."""
        found: dict[tuple[type, str], str] = {}
        for path, names in self._methods.items():
            module = self._modules[path]
            for name in names:
                key = (type(module), name)
                if key not in self._ran and key not in found and _computes(module, name):
                    found[key] = f"{path}.{name}".lstrip(".")
        return tuple(found.values())


def _public_methods(module: nn.Module) -> list[str]:
    """Methods of a user's own class that torch's modules do not have."""
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
    """Does a method, or one that it calls, make something of what it is given and of a layer of its module?"""
    function = getattr(type(module), name)
    wanted = list(inspect.signature(function).parameters.values())[1:]
    if not any(each.default is each.empty for each in wanted) or not _returns(function.__code__):
        return False
    own = {*module._modules, *module._parameters}
    seen: set[str] = set()
    queue = [name]
    while queue:
        function = getattr(type(module), queue.pop(), None)
        if not isinstance(function, FunctionType):
            continue
        for used in _names(function.__code__):
            if used in own:
                return True
            if used not in seen:
                seen.add(used)
                queue.append(used)
    return False


def _returns(code: CodeType) -> bool:
    """Does a function return anything? What only prepares a model returns None."""
    before = None
    for instruction in dis.get_instructions(code):
        nothing = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        if instruction.opname == "RETURN_VALUE" and not nothing:
            return True
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return True
        before = instruction
    return False


def _names(code: CodeType) -> set[str]:
    """The attributes that a function reads, its inner functions included."""
    found = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def shared_channels(
    model: nn.Module, weights: Mapping[str, Tensor], boundaries: Boundaries, called: Set[str], atoms: Atoms
) -> tuple[tuple[Ids, str], ...]:
    """Channels that unseen weights may read or give: those of a size of theirs that the code around them can see.

    The code that would use a weight stands in a module above it. That module's own code names what enters and leaves
    its parts. Those are looked at up to the first module that was called, and further up while no size fits.

    Args:
        weights: unseen ones by path.
        boundaries: what each module's code can see.
        called: the modules that ran.
        atoms: to tell what stays already.
    """
    unseen = {path.rpartition(".")[0] for path in weights}
    idle = {path for path, module in model.named_modules() if path not in called and _is_idle(path, module, weights)}
    found = []
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
            place: str | None = scope
            while place is not None:
                cores = [
                    core for shape, layers in _visible(place, boundaries) for core in _fitting(shape, layers, size)
                ]
                cores = [core for core in cores if not atoms.stuck(core.numpy())]
                found += [(np.unique(core.numpy()), reason) for core in cores]
                if (cores and place in called) or not place:
                    break
                place = _parent(place)
    return tuple(found)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_idle(path: str, module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Are all of a module's weights unseen?"""
    own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
    return bool(own) and all(name in weights for name in own)


def _visible(path: str, boundaries: Boundaries) -> Iterator[tuple[Shape, Layers]]:
    """What the code of a module can name: what it computes itself, and what enters and leaves its parts."""
    depth = path.count(".") + 1 if path else 0
    for other, values in boundaries.values.items():
        if other == path or (other.count(".") == depth and f"{other}.".startswith(f"{path}." if path else "")):
            yield from values.values()


def _sizes(value: Tensor, owner: nn.Module) -> set[int]:
    """The sizes of a weight that may be numbers of channels."""
    if not isinstance(owner, nn.modules.conv._ConvNd) or value.dim() < 2:
        return {size for size in value.shape if size > 1}
    return {value.shape[0], value.shape[1] * int(owner.groups)}  # both ways around for transposed ones


def _fitting(shape: Shape, layers: Layers, size: int) -> Iterator[Tensor]:
    """The layers along a dimension of this size, or along one that makes it together with its neighbors."""
    for core in layers:
        for dim in varying(core):
            runs = {shape[dim]} | {
                int(np.prod(shape[first : last + 1])) for first in range(1, dim + 1) for last in range(dim, len(shape))
            }
            if size in runs:
                yield core
                break
