"""Parts: submodules that are pruned, quantized and deployed, while the model around them stays in Python.

A part is named by its path; the empty path is the model itself. A part may have several programs, one for each frequent
structure of its calls: the first one has the name of the part, the others are numbered, "decoder#2".
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from torchslim.core.isolation import copy_model
from torchslim.core.layer_patterns import Patterns, as_list, class_names, matches
from torchslim.core.object_states import become, end_states
from torchslim.core.program_names import split_name
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import (
    changes_state,
    holds_objects,
    named_arguments,
    packed,
    put,
    unpacked,
    view_with_tensors,
)
from torchslim.core.trees import to_device
from torchslim.errors import SelectError

WHOLE = ""  # path of the model itself


class Fitted(NamedTuple):
    """The flat tensors of a call, in the structure that a program was captured with; its only argument then."""

    leaves: list[Tensor]


class Program(Protocol):
    """A captured program: a quantized graph or a deployed model."""

    def fitted(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, sizes: bool = False) -> Fitted | None:
        """The tensors of a call of the captured structure and ranks (and `sizes`); None for other calls."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Mounted(nn.Module):
    """Stands in the place of a part: calls its programs, and has the other attributes and methods of the part.

    A call runs the program of its structure. A call of another structure runs the part's own module, and so does one
    that has the structure of a numbered program, but sizes that it does not take. Tensors in objects, such as caches,
    are taken out for the call and put back. Outputs are returned on the device of the inputs.

    Args:
        part: the module that was there before.
        programs: quantized graphs or deployed models, by number, from 1.
    """

    def __init__(self, part: nn.Module, programs: Mapping[int, Program]) -> None:
        super().__init__()
        part = part.part if isinstance(part, Mounted) else part
        vars(self)["_part"] = (part,)  # in a tuple: its weights are not the whole model's any more
        vars(self)["_numbers"] = tuple(sorted(programs))
        vars(self)["_ends"] = {}
        for number, program in programs.items():
            setattr(self, mounted_as(number), program)
        self.training = part.training
        # code around a part may look at the arguments that its forward takes
        forward = types.FunctionType(_forward.__code__, _forward.__globals__, "forward", _forward.__defaults__)
        parameters = list(signature_of(part).parameters.values())
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        positional = [
            parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            else parameter
            for parameter in parameters
        ]
        forward.__signature__ = inspect.Signature([own, *positional])  # type: ignore[attr-defined]
        self.__class__ = type("Mounted", (Mounted,), {"forward": forward, "__module__": __name__})

    def __reduce__(self) -> tuple[Any, ...]:
        return Mounted, (self.part, self.programs), vars(self)  # the class of an instance has no name to be found by

    @property
    def part(self) -> nn.Module:
        """The module that was there before."""
        part: nn.Module = vars(self)["_part"][0]
        return part

    @property
    def programs(self) -> dict[int, Any]:
        """What is called in place of the part, by number."""
        return {number: getattr(self, mounted_as(number)) for number in vars(self)["_numbers"]}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_part" not in vars(self):
                raise
            return getattr(self.part, name)


def mounted_as(number: int) -> str:
    """The attribute of a `Mounted` that holds the program with a number."""
    return "inner" if number == 1 else f"inner_{number}"


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    objects: dict[str, Any] = {}
    given: tuple[Any, Any] = (args, kwargs)
    if holds_objects(given):
        given = ((), unpacked(named_arguments(signature_of(self.part), args, kwargs), objects))
    for number, program in self.programs.items():
        fitted = program.fitted(*given, sizes=number > 1)
        if fitted is None:
            continue
        outputs = program(fitted)
        device = fitted.leaves[0].device if fitted.leaves else None
        ends: dict[str, Any] = {}
        if objects and changes_state(outputs, objects):
            known = vars(self)["_ends"]
            if (number, device) not in known:
                known[number, device] = end_states(self.part, signature_of(self.part), args, kwargs)
            ends = known[number, device]

        def fill(name: str, own: Mapping[str, Any], ends: Mapping[str, Any] = ends) -> Any:
            return become(objects[name], ends[name], own) if name in ends else put(objects[name], own)

        if device is not None and not isinstance(program, nn.Module):
            outputs = to_device(outputs, device)
        return packed(outputs, fill)
    return self.part(*args, **kwargs)


def signature_of(module: nn.Module) -> inspect.Signature:
    """The arguments of a module's forward; a graph stores those of the model that it was made from."""
    stored = getattr(module, "forward_signature", None)
    return stored if isinstance(stored, inspect.Signature) else inspect.signature(module.forward)


def select_parts(model: nn.Module, part: Patterns) -> tuple[str, ...]:
    """Paths of the parts that names or globs select, in the model's order; `(WHOLE,)` for None.

    Raises:
        SelectError: a pattern matches no module, names a list of modules, which cannot be called, or two parts
            overlap.
    """
    if part is None:
        return (WHOLE,)
    if (isinstance(part, str) and not part) or not as_list(part):
        raise SelectError("part is empty; name a submodule, such as part='encoder', or leave it out")
    modules = {path: module for path, module in model.named_modules() if path}
    types_ = class_names(model)
    chosen: dict[str, str] = {}
    for pattern in as_list(part):
        covered = [path for path in modules if matches(pattern, path, types_)]
        # a pattern covers all modules inside of a module: the outermost ones are the parts
        outer = [path for path in covered if not any(path.startswith(f"{other}.") for other in covered)]
        if not outer:
            near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.4) or list(modules)[:5]
            raise SelectError(
                f"part {pattern!r} names no submodule of {type(model).__name__}; near names: "
                f"{', '.join(near) or 'none'}"
            )
        chosen |= dict.fromkeys(outer, pattern)
    ordered = [path for path in modules if path in chosen]
    for path in ordered:
        if isinstance(modules[path], (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise SelectError(
                f"part {chosen[path]!r} names {path}, a {type(modules[path]).__name__}, which is never called; name "
                f"its modules: part='{path}.*'"
            )
        if split_name(path)[1] != 1:
            raise SelectError(f"part {path!r} has the name of a further program of a part; rename the module")
        if inside := next((other for other in ordered if other.startswith(f"{path}.")), None):
            raise SelectError(f"the parts {path!r} and {inside!r} overlap; name one of them")
    return tuple(ordered)


def part_at(model: nn.Module, name: str) -> nn.Module:
    """The module at a path; for one that is mounted, the graph with the name that it calls, if it has one."""
    path, number = split_name(name)
    module = model.get_submodule(path) if path else model
    graph = module.programs.get(number) if isinstance(module, Mounted) else None
    return graph if isinstance(graph, nn.Module) else module


def part_view(model: nn.Module, name: str, example: Inputs) -> nn.Module:
    """The module at a path as it is captured: with dicts of tensors in place of objects in the example."""
    path, number = split_name(name)
    module = model.get_submodule(path) if path else model
    if isinstance(module, Mounted):
        return part_at(model, name)
    if not path or not isinstance(example, Mapping) or not holds_objects(example):
        return module
    return view_with_tensors(module, signature_of(module), example, stays=number == 1)


def part_views(model: nn.Module, parts: Mapping[str, Sequence[Inputs]]) -> dict[str, nn.Module]:
    """`part_view` of each program by its first example; the model itself where there are no parts.

    Programs that a mounted part does not have are left out.
    """
    views = {name: part_view(model, name, examples[0]) for name, examples in parts.items()}
    return {name: view for name, view in views.items() if not isinstance(view, Mounted)} or {WHOLE: model}


def mounted(model: nn.Module, programs: Mapping[str, Any]) -> nn.Module:
    """The model with other parts in place; `model` is changed, unless the part is the model itself.

    A plain module replaces a part of the same class, as after pruning; everything else is put into a `Mounted`, the
    numbered programs of a part beside its first one.
    """
    if WHOLE in programs:
        whole = programs[WHOLE]
        assert isinstance(whole, nn.Module)
        return whole
    by_path: dict[str, dict[int, Any]] = {}
    for name, program in programs.items():
        path, number = split_name(name)
        by_path.setdefault(path, {})[number] = program
    for path, of_path in by_path.items():
        before, first = model.get_submodule(path), of_path.get(1)
        plain = isinstance(first, nn.Module) and type(first) is type(before)
        after = first if plain else Mounted(before, of_path)
        assert isinstance(after, nn.Module)
        for module in list(model.modules()):  # a module may have several places
            if isinstance(module, Mounted):
                continue
            for name, child in module._modules.items():
                if child is before:
                    module._modules[name] = after
    return model


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the mounted parts of a model; `(WHOLE,)` where it has none."""
    return tuple(path for path, module in model.named_modules() if isinstance(module, Mounted)) or (WHOLE,)


def under(path: str, name: str) -> str:
    """The name in the whole model of something inside of a part, or of a program of it."""
    path, _ = split_name(path)
    return f"{path}.{name}".strip(".")


def inside(path: str, name: str) -> str | None:
    """The name inside of a part of something in the whole model; None where it is elsewhere."""
    path, _ = split_name(path)
    if path == WHOLE:
        return name
    return name[len(path) + 1 :] if name.startswith(f"{path}.") else None


def patterns_inside(model: nn.Module, path: str, patterns: Iterable[str]) -> dict[str, list[str]]:
    """For each pattern over the names of the whole model, names inside of a part that match the same layers.

    A pattern that matches nothing inside of the part has no names.
    """
    patterns = list(patterns)
    if path == WHOLE:
        return {pattern: [pattern] for pattern in patterns}
    types_ = class_names(model)
    part = part_at(model, path)
    path, _ = split_name(path)
    names = [name for name, _ in (*part.named_modules(), *part.named_parameters(remove_duplicate=False)) if name]
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        covered = [name for name in names if matches(pattern, f"{path}.{name}", types_)]
        found[pattern] = [name for name in covered if name.rpartition(".")[0] not in covered]
    return found


def outside(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Names of the parameters that are in none of the parts."""
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return [name for name in names if all(inside(path, name) is None for path in paths)]


def shared_with_the_rest(model: nn.Module, path: str) -> list[str]:
    """Names inside of a part of the parameters that the model also uses elsewhere."""
    elsewhere = {id(model.get_parameter(name)) for name in outside(model, [path])}
    return [name for name, parameter in part_at(model, path).named_parameters() if id(parameter) in elsewhere]


def unmounted(model: nn.Module) -> nn.Module:
    """A copy of the model in float, with its parts as they were before others were mounted in their places."""
    copied, _ = copy_model(model)
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Mounted):
                module._modules[name] = child.part
    return copied
