"""Parts: submodules that are pruned, quantized and deployed, while the model around them stays in Python.

A part is named by its path; the empty path is the model itself.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from torchslim.core.isolation import copy_model
from torchslim.core.layer_patterns import Patterns, as_list, class_names, matches
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import holds_objects, named_arguments, packed, unpacked, view_with_tensors
from torchslim.core.trees import tensors, to_device
from torchslim.errors import SelectError

WHOLE = ""  # path of the model itself


class Mounted(nn.Module):
    """Stands in the place of a part: calls `inner`, and has the other attributes and methods of the part.

    `inner` is a quantized graph or a deployed model. A call of another structure than `inner` was captured with, such
    as the first step of a generation, whose cache is empty, runs the part's own module. Tensors in objects, such as
    caches, are taken out for the call and put back. Outputs are returned on the device of the inputs.
    """

    def __init__(self, part: nn.Module, inner: Callable[..., Any]) -> None:
        super().__init__()
        part = part.part if isinstance(part, Mounted) else part
        vars(self)["_part"] = (part,)  # in a tuple: its weights are not the whole model's any more
        self.inner = inner
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
        return Mounted, (self.part, self.inner), vars(self)  # the class of an instance has no name to be found by

    @property
    def part(self) -> nn.Module:
        """The module that was there before."""
        part: nn.Module = vars(self)["_part"][0]
        return part

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_part" not in vars(self):
                raise
            return getattr(self.part, name)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    inner, objects = self.inner, dict[str, Any]()
    given: tuple[Any, Any] = (args, kwargs)
    if holds_objects(given):
        named = unpacked(named_arguments(signature_of(self.part), args, kwargs), objects)
        given = ((), named)
    if not inner.takes(*given[0], **given[1]):  # calls of another structure than the captured one
        return self.part(*args, **kwargs)
    outputs = packed(inner(*given[0], **given[1]), objects)
    if isinstance(inner, nn.Module):
        return outputs
    tensors_given = tensors(given)
    return to_device(outputs, tensors_given[0].device) if tensors_given else outputs


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
        if inside := next((other for other in ordered if other.startswith(f"{path}.")), None):
            raise SelectError(f"the parts {path!r} and {inside!r} overlap; name one of them")
    return tuple(ordered)


def part_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; for one that is mounted, the module that it calls."""
    module = model.get_submodule(path) if path else model
    return module.inner if isinstance(module, Mounted) and isinstance(module.inner, nn.Module) else module


def part_view(model: nn.Module, path: str, example: Inputs) -> nn.Module:
    """The module at a path as it is captured: with dicts of tensors in place of objects in the example."""
    module = model.get_submodule(path) if path else model
    if isinstance(module, Mounted):
        return part_at(model, path)
    if not path or not isinstance(example, Mapping) or not holds_objects(example):
        return module
    return view_with_tensors(module, signature_of(module), example)


def part_views(model: nn.Module, parts: Mapping[str, Sequence[Inputs]]) -> dict[str, nn.Module]:
    """`part_view` of each part by its first example; the model itself where there are no parts."""
    return {path: part_view(model, path, examples[0]) for path, examples in parts.items()} or {WHOLE: model}


def mounted(model: nn.Module, parts: Mapping[str, Callable[..., Any]]) -> nn.Module:
    """The model with other parts in place; `model` is changed, unless the part is the model itself.

    A plain module replaces a part of the same class, as after pruning; everything else is put into a `Mounted`.
    """
    for path, part in parts.items():
        if path == WHOLE:
            assert isinstance(part, nn.Module)
            return part
        before = model.get_submodule(path)
        plain = isinstance(part, nn.Module) and type(part) is type(before)
        after = part if plain else Mounted(before, part)
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
    """The name in the whole model of something inside of a part."""
    return f"{path}.{name}".strip(".")


def inside(path: str, name: str) -> str | None:
    """The name inside of a part of something in the whole model; None where it is elsewhere."""
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


def unmounted(model: nn.Module) -> nn.Module:
    """A copy of the model in float, with its parts as they were before others were mounted in their places."""
    copied, _ = copy_model(model)
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Mounted):
                module._modules[name] = child.part
    return copied
