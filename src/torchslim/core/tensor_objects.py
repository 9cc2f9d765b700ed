"""Objects that hold tensors, such as the caches of generating models, as plain dicts of their tensors.

A captured program takes and returns tensors only. Around it, the tensors of such an argument are taken out by the path
of their attributes, and those that come back are put into the same object, as the code of the model would do.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchslim.core.trees import tensors
from torchslim.errors import TaskError

MARK = "tensors of "  # begins the key under which an object's tensors stand
STATE = " in state "  # before the digest of an object's plain values in that key
RESULT = "result of the call"  # key of what a part returned, beside objects that it changed and did not return
DEPTH = 12
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers that depend on sizes, while a module is captured
PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type, *SYMBOLS)


def holds_tensors(value: Any) -> bool:
    """Whether a value is an object with tensors among its attributes: no container, dataclass or module."""
    if isinstance(value, (Tensor, PackedSequence, nn.Module, Mapping, tuple, list, *PLAIN)) or is_dataclass(value):
        return False
    return hasattr(value, "__dict__") and not callable(value)


def walk(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of an object by path, in the order of its attributes."""
    if depth > DEPTH:
        return
    if isinstance(value, (Tensor, *PLAIN)):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!r}]", depth + 1)
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from walk(item, f"{path}[{place}]", depth + 1)
    elif hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            yield from walk(item, f"{path}.{name}", depth + 1)


def tensors_in(value: Any) -> dict[str, Tensor]:
    """The tensors of an object, by path."""
    return {path: leaf for path, leaf in walk(value) if isinstance(leaf, Tensor)}


def state_of(value: Any) -> str:
    """Everything in an object but devices, and the contents and sizes of its tensors, as text."""
    return repr(
        [
            (path, f"{leaf.dim()} {leaf.dtype}" if isinstance(leaf, Tensor) else leaf)
            for path, leaf in walk(value)
            if not isinstance(leaf, torch.device)
        ]
    )


def plain_values(value: Any) -> dict[str, Any]:
    """The values of an object that are no tensors, by path; without devices, which differ from run to run."""
    return {path: leaf for path, leaf in walk(value) if not isinstance(leaf, (Tensor, torch.device))}


def _key(name: str, value: Any) -> str:
    """The key under which an object's tensors stand: objects in another state have another key."""
    plain = plain_values(value)
    state = f"{STATE}{hashlib.sha256(repr(plain).encode()).hexdigest()[:8]}" if plain else ""
    return f"{MARK}{name}{state}"


def _name(key: str) -> str:
    """The name of an object in its key."""
    return key.removeprefix(MARK).partition(STATE)[0]


def put(value: Any, tensors: Mapping[str, Any], path: str = "", depth: int = 0) -> Any:
    """The same object with other tensors, set in place; a tuple in it is made anew."""
    if path in tensors:
        return tensors[path]
    if depth > DEPTH or isinstance(value, (Tensor, *PLAIN)):
        return value
    if isinstance(value, tuple):
        items = [put(item, tensors, f"{path}[{place}]", depth + 1) for place, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        value[:] = [put(item, tensors, f"{path}[{place}]", depth + 1) for place, item in enumerate(value)]
    elif isinstance(value, dict):
        value.update({key: put(item, tensors, f"{path}[{key!r}]", depth + 1) for key, item in value.items()})
    elif hasattr(value, "__dict__"):
        for name, item in list(vars(value).items()):
            vars(value)[name] = put(item, tensors, f"{path}.{name}", depth + 1)
    return value


def emptied(value: Any) -> Any:
    """A deep copy of an object with None in place of its tensors."""
    leaves = tensors_in(value)
    memo: dict[int, Any] = dict.fromkeys(map(id, leaves.values()), object())  # deepcopy ignores None in its memo
    return put(copy.deepcopy(value, memo), dict.fromkeys(leaves))


def holds_objects(tree: Any) -> bool:
    """Whether arguments of a call include an object that holds tensors."""
    if holds_tensors(tree):
        return True
    if type(tree) is dict or (is_dataclass(tree) and isinstance(tree, Mapping)):
        return any(map(holds_objects, tree.values()))
    return type(tree) in (tuple, list) and any(map(holds_objects, tree))


def unpacked(tree: Any, objects: dict[str, Any] | None = None, path: str = "") -> Any:
    """The tree with a dict of tensors in place of every object that holds some.

    Args:
        tree: arguments or outputs of a call.
        objects: receives the objects by the names that stand in their dicts.
        path: of the tree in the arguments.
    """
    if holds_tensors(tree):
        name = path
        if objects is not None:
            name = next((known for known, value in objects.items() if value is tree), path)
            objects[name] = tree
        return {_key(name, tree): tensors_in(tree)}
    if type(tree) is dict:
        return {key: unpacked(item, objects, f"{path}.{key}".lstrip(".")) for key, item in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(unpacked(item, objects, f"{path}.{place}".lstrip(".")) for place, item in enumerate(tree))
    if is_dataclass(tree) and isinstance(tree, Mapping):  # outputs of transformers
        return type(tree)(**{key: unpacked(item, objects, f"{path}.{key}".lstrip(".")) for key, item in tree.items()})
    return tree


def packed(tree: Any, fill: Callable[[str, Mapping[str, Any]], Any]) -> Any:
    """The inverse of `unpacked`: what `fill` returns for the name and the tensors of an object replaces their dict."""
    if type(tree) is dict:
        if len(tree) == 1 and (key := str(next(iter(tree)))).startswith(MARK):
            return fill(_name(key), tree[key])
        if RESULT in tree:
            for key in tree:
                if key != RESULT:
                    fill(_name(key), tree[key])
            return packed(tree[RESULT], fill)
        return {key: packed(item, fill) for key, item in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(packed(item, fill) for item in tree)
    if is_dataclass(tree) and isinstance(tree, Mapping):
        return type(tree)(**{key: packed(item, fill) for key, item in tree.items()})
    return tree


def changes_state(tree: Any, objects: Mapping[str, Any]) -> bool:
    """Whether an unpacked tree tells of objects with other tensors by path, or other plain values, than they have."""
    return any(
        key != _key(_name(key), objects[_name(key)]) or set(own) != set(tensors_in(objects[_name(key)]))
        for key, own in _dicts(tree)
    )


def _dicts(tree: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dicts of tensors in an unpacked tree, with their keys."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            if isinstance(key, str) and key.startswith(MARK):
                yield key, item
            else:
                yield from _dicts(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _dicts(item)


def structure_of(tree: Any) -> str:
    """Containers, types, numbers and ranks of a tree as text, but not the sizes and contents of its tensors."""

    def key(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return f"<{leaf.dim()} {leaf.dtype}>"
        if holds_tensors(leaf):
            return f"<{type(leaf).__name__} {state_of(leaf)}>"
        return leaf if isinstance(leaf, PLAIN) else type(leaf).__name__

    return repr(torch.utils._pytree.tree_map(key, tree))


def view_with_tensors(
    module: nn.Module, signature: inspect.Signature, inputs: Mapping[str, Any], *, stays: bool = True
) -> nn.Module:
    """A view of a module that takes and returns dicts of tensors in place of the objects in `inputs`.

    The view shares all weights and submodules, under the same names.

    Args:
        module: the module.
        signature: of its forward.
        inputs: arguments of a call by name, with objects.
        stays: refuse a call that changes an object beyond the values of its tensors: as the most frequent call
            of a part it would mean that most calls have objects in a state that no program was captured for.
    """
    objects: dict[str, Any] = {}
    unpacked(dict(inputs), objects)
    empty = {name: emptied(value) for name, value in objects.items()}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: copy.deepcopy(value) for name, value in empty.items()}
        named = packed(named_arguments(signature, args, kwargs), lambda name, own: put(given[name], own))
        before = {name: (tensors_in(value), plain_values(value)) for name, value in given.items()}
        versions = {name: {path: leaf._version for path, leaf in own.items()} for name, (own, _) in before.items()}
        outputs = unpacked(type(module).forward(self, **named), given)
        _check_objects(type(module).__name__, given, before, stays)
        returned = {_name(key) for key, _ in _dicts(outputs)}

        def untouched(name: str) -> bool:
            leaves, plain = before[name]
            own = tensors_in(given[name])
            same = all(
                own[path] is leaf and leaf._version == versions[name][path]
                for path, leaf in leaves.items()
                if path in own
            )
            return same and set(own) == set(leaves) and plain_values(given[name]) == plain

        changed = {
            _key(name, given[name]): tensors_in(given[name])
            for name in before
            if name not in returned and not untouched(name)
        }
        return {RESULT: outputs, **changed} if changed else outputs

    view = copy.copy(module)
    view.__class__ = type(type(module).__name__, (type(module),), {"forward": forward, "__module__": __name__})
    vars(view)["forward_signature"] = signature
    return view


def _check_objects(part: str, objects: Mapping[str, Any], before: Mapping[str, tuple[Any, Any]], stays: bool) -> None:
    """Raise TaskError for what a program cannot do to the objects of a call."""
    for name, value in objects.items():
        kind = type(value).__name__
        if name not in before:
            raise TaskError(
                f"{part} returns an object that it makes itself, a {kind}; a captured part returns tensors and the "
                "objects that it was given: choose a submodule inside of it"
            )
        leaves, plain = before[name]
        values = [path for path, leaf in plain_values(value).items() if path not in plain or plain[path] != leaf]
        if sized := next((path for path in values if isinstance(plain_values(value)[path], SYMBOLS)), None):
            raise TaskError(
                f"{part} sets {sized!r} of a {kind} to a number that depends on sizes, which a program cannot return: "
                "choose a submodule inside of it"
            )
        if not stays:
            continue
        if values:
            raise TaskError(
                f"{part} changes {values[0]!r} of a {kind}, which is no tensor, at most calls; a captured part can "
                "change tensors alone: choose a submodule inside of it, or give examples with more steps if this is a "
                "first step"
            )
        if moved := sorted(set(leaves) ^ set(tensors_in(value))):
            raise TaskError(
                f"{part} adds or removes the tensor {moved[0]!r} of a {kind} at most calls; a captured part can "
                "replace the tensors of an object, not their number: choose a submodule inside of it, or give examples "
                "with more steps if this is a first step"
            )


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments of a call by name, keywords beyond the signature's own included.

    Raises:
        TaskError: the call has further positional arguments, which have no name.
    """
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and named.pop(parameter.name, ()):
            raise TaskError(
                "a part is called with *args and keyword arguments at once, which example inputs cannot hold; choose "
                "a submodule that is called by name"
            )
    return named


def by_structure(calls: Sequence[Any]) -> list[list[Any]]:
    """The calls of each structure, the most frequent one first; of two as frequent, the one with more tensors.

    That is the structure of later steps where as many first steps were recorded.
    """
    groups: dict[str, list[Any]] = {}
    for inputs in calls:
        groups.setdefault(structure_of(inputs), []).append(inputs)
    return sorted(groups.values(), key=lambda group: (len(group), len(tensors(unpacked(group[0])))), reverse=True)


def of_structure(calls: Sequence[Any], example: Any) -> list[Any]:
    """The calls of the structure of `example`, as a captured program takes them: with dicts in place of objects."""
    structure = structure_of(example)
    return [unpacked(inputs) for inputs in calls if structure_of(inputs) == structure]
