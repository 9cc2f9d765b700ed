"""Surgery of a removal: the cuts of weights, and patches of the numbers in which modules keep sizes.

`mend` finds the patches. Sizes that certainly changed are patched first. Then the shrunk model runs, and the shape of
every value is compared with the predicted one. Where a shape differs, numbers of the modules at work are changed one or
two at a time until the run gets further; what helped one module is carried to its siblings of the same class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from torchslim.core.step import Inputs
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import Operation, Shape, named_weights
from torchslim.prune.dependency.verification import shapes_agree
from torchslim.prune.dependency.verify_runs import Divergence
from torchslim.prune.structured.literals import FORWARD, literals
from torchslim.prune.structured.surgery import Cut, Patch, Surgery, apply_patch, cuts_of, perform

TRIALS = 60
"""How many changes are tried at one divergence before it is given up."""

PAIRED = 8
"""How many of the first changes are also tried in pairs."""

DEPTH, LENGTH = 3, 16
"""How deeply nested tuples and lists are searched for numbers, and up to what length."""

Sizes = dict[int, set[int]]
"""The new sizes of each old size."""

Site = tuple[str, str, tuple[int, ...]]
"""Where a patch applies: path of the module, name of the attribute, place inside its value."""


def mend(model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> tuple[Surgery, Divergence | None]:
    """Find the surgery for a removal; also returns where the shrunk model still diverges from the predicted shapes.

    Args:
        model: read only.
        coupling: of a trace of this model.
        removed: mask of the atoms that go.
        inputs: those of the trace.
    """
    cuts = cuts_of(coupling, removed)
    repair = _Repair(model, _Suggestions(model, coupling, removed), cuts, inputs)
    divergence = repair.divergence()
    while divergence is not None:
        success = repair.improve(divergence)
        if success is None:
            break
        patches, divergence = success
        carried = repair.carry(patches)
        if carried or (patches and divergence is not None):
            divergence = repair.divergence()
    return Surgery(cuts, tuple(repair.patches.values())), divergence


def size_changes(model: nn.Module, coupling: Coupling, removed: Mask) -> Callable[[str], list[Patch]]:
    """A function from the path of a module to patches of its attributes: to every new size around it of their value."""
    suggestions = _Suggestions(model, coupling, removed)
    return lambda path: list(suggestions.of_attributes([path]))


# ----------------------------------------------------------------------------------------------------------------------
# numbers of modules, and the sizes that changed around them


def numbers_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Whole numbers in the module's public attributes: name, place inside the value, number."""
    for name, value in vars(module).items():
        if not name.startswith("_"):
            yield from ((name, place, number) for place, number in _numbers(value, ()))


def _numbers(value: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield place, value
    elif type(value) in (tuple, list, torch.Size) and len(place) < DEPTH and len(value) <= LENGTH:
        for index, item in enumerate(value):
            yield from _numbers(item, (*place, index))


class _SizeChanges:
    """Old and new sizes by module path: of a module's own weights, and of all values around it."""

    def __init__(self, coupling: Coupling, removed: Mask) -> None:
        self.coupling, self.removed = coupling, removed
        self.own: dict[str, Sizes] = {}  # of the module's own weights
        self._around: dict[str, Sizes] = {}  # also of the values that enter and leave its operations
        self._note_weights()
        for path, sizes in self.own.items():
            self._around[path] = {old: set(new_sizes) for old, new_sizes in sizes.items()}
        for operation in coupling.trace.operations:
            self._note_operation(operation)
        self._note_joint_layers()

    def around(self, path: str) -> Sizes:
        """Sizes of the module's own weights and of the values in its operations."""
        return self._around.get(path, {})

    def beneath(self, path: str) -> dict[int, list[int]]:
        """Other new sizes of each old size in the weights of a module and of those inside it, most frequent first."""
        counts: Counter[tuple[int, int]] = Counter()
        for inner, sizes in self.own.items():
            if not path or f"{inner}.".startswith(f"{path}."):
                counts.update(_changed(sizes))
        new_sizes: dict[int, list[int]] = {}
        for (old, new), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            new_sizes.setdefault(old, []).append(new)
        return new_sizes

    def _note_weights(self) -> None:
        for name, value in self.coupling.trace.weights.items():
            sizes = self.own.setdefault(name.rpartition(".")[0], {})
            for old, new in zip(value.shape, self.coupling.shape(value, self.removed), strict=True):
                sizes.setdefault(old, set()).add(new)

    def _note(self, path: str, old: int, new: int) -> None:
        self._around.setdefault(path, {}).setdefault(old, set()).add(new)

    def _note_operation(self, operation: Operation) -> None:
        values = (*operation.inputs, *operation.outputs)
        new_shapes = [self.coupling.shape(value, self.removed) for value in values]
        for value, new_shape in zip(values, new_shapes, strict=True):
            for old, new in zip(value.shape, new_shape, strict=True):
                self._note(operation.path, old, new)
        if "convolution" in operation.name:
            # the number of groups is the size of no value
            groups = int(operation.scalars[-1])
            if groups > 1:
                self._note(operation.path, groups, _groups_left(operation, new_shapes))

    def _note_joint_layers(self) -> None:
        """Note the sizes that joint layers of dimensions keep along each axis, such as heads and their width."""
        for joint in self.coupling.trace.tagger.joints.values():
            stays = ~self.removed[self.coupling.roots[joint.atoms]]
            if stays.all():
                continue
            for axis, old in enumerate(joint.atoms.shape):
                others = tuple(index for index in range(stays.ndim) if index != axis)
                self._note(joint.where, old, int(stays.any(others).sum()))


def _groups_left(operation: Operation, new_shapes: Sequence[Shape]) -> int:
    """Number of groups of a grouped convolution after the removal; its first two inputs are `x` and the kernel."""
    new_input, new_kernel = new_shapes[:2]
    transposed = any(scalar is True for scalar in operation.scalars)
    if transposed:  # the kernel's shape is (inputs, outputs of a group, ...)
        inputs, inputs_of_a_group = new_kernel[0], operation.inputs[1].shape[0] // int(operation.scalars[-1])
    else:
        inputs, inputs_of_a_group = new_input[1 - len(new_kernel)], new_kernel[1]
    return inputs // max(inputs_of_a_group, 1)


def _changed(sizes: Mapping[int, set[int]]) -> Iterator[tuple[int, int]]:
    """Pairs of an old and a new size that differ."""
    return ((old, new) for old, new_sizes in sizes.items() for new in new_sizes if new != old)


# ----------------------------------------------------------------------------------------------------------------------
# suggested patches


class _Suggestions:
    """Patches that a removal needs for certain, and those that may help at a divergence."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask) -> None:
        self.coupling, self.removed = coupling, removed
        self.modules = dict(model.named_modules())
        self.changes = _SizeChanges(coupling, removed)

    def certain(self) -> list[Patch]:
        """Patches of the numbers whose size has one new value around their module, other than the old one."""
        patches = []
        for path, module in self.modules.items():
            around = self.changes.around(path)
            for name, place, number in numbers_of(module):
                sizes = around.get(number, set())
                if len(sizes) > 1 and not module._modules:
                    # a layer's numbers describe its weights rather than the values that pass through it
                    sizes = self.changes.own.get(path, {}).get(number, sizes)
                    sizes = self._side(path, name, number) or sizes
                if len(sizes) == 1 and number not in sizes:
                    patches.append(Patch(path, name, place, number, next(iter(sizes))))
        return patches

    def _side(self, path: str, name: str, number: int) -> set[int]:
        """The new size of the inputs or outputs of a layer, if the attribute's name says which it holds; else empty.

        A square layer may lose channels on one side only, so that its old size has two new ones.
        """
        module = self.modules[path]
        parameters = (parameter for parameter in module._parameters.values() if parameter is not None)
        weight = next((parameter for parameter in parameters if parameter.dim() > 1), None)
        if weight is None:
            return set()
        key = next((key for key, tensor in named_weights(module).items() if tensor is weight), "")
        value = self.coupling.trace.weights.get(f"{path}.{key}".lstrip("."))
        if value is None:
            return set()
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        outputs, inputs = (1, 0) if transposed else (0, 1)
        new_shape = self.coupling.shape(value, self.removed)
        for prefix, dim in (("out", outputs), ("in", inputs)):
            if name.startswith(prefix) and value.shape[dim] == number:
                return {new_shape[dim]}
        return set()

    def likely(self, divergence: Divergence) -> list[Patch]:
        """Patches that may mend a divergence, of the modules at work from the innermost outwards.

        Attributes come first, then those of modules inside the innermost that may not be called, then numbers in code.
        """
        paths = _path_and_parents(divergence.path)
        attributes = [patch for place, path in enumerate(paths) for patch in self.of_attributes(paths[: place + 1])]
        return [*attributes, *self._of_uncalled(divergence.path), *self._of_code(paths)]

    def of_attributes(self, paths: Sequence[str]) -> Iterator[Patch]:
        """Patches of the attributes of the last module of `paths`, to sizes around it and the modules before it."""
        path = paths[-1]
        module = self.modules[path]
        numbers = list(numbers_of(module))
        if not numbers:
            return
        around = {old: new_sizes for inner in paths for old, new_sizes in self.changes.around(inner).items()}
        # a module may check the sizes of the layers in it before any of them runs
        beneath = self.changes.beneath(path) if module._modules else {}
        for name, place, number in numbers:
            sizes = sorted(around.get(number, set()) - {number})
            sizes += [size for size in beneath.get(number, ()) if size not in sizes]
            yield from (Patch(path, name, place, number, size) for size in sizes)

    def _of_uncalled(self, path: str) -> Iterator[Patch]:
        """Patches of multiples of a changed size, in modules inside `path` that hold buffers alone.

        Other code may read the buffers without calling the module, so that no operation runs at its path.
        """
        for inner, sizes in self.changes.own.items():
            if inner == path or not f"{inner}.".startswith(f"{path}." if path else ""):
                continue
            changed = list(_changed(sizes))
            module = self.modules[inner]
            if changed and not module._modules and not module._parameters:
                for name, place, number in numbers_of(module):
                    for old, new in changed:
                        if number % old == 0:
                            yield Patch(inner, name, place, number, number // old * new)

    def _of_code(self, paths: Sequence[str]) -> Iterator[Patch]:
        """Patches of the numbers in the code of modules, to sizes around them and the modules before them."""
        around: Sizes = {}
        for path in paths:
            for old, new_sizes in self.changes.around(path).items():
                around.setdefault(old, set()).update(new_sizes)
            for literal, number in literals(self.modules[path]):
                for size in sorted(around.get(number, set()) - {number}):
                    yield Patch(path, FORWARD, (literal,), number, size)

    def siblings(self, patch: Patch) -> Iterator[Patch]:
        """Patches of the same number in other modules of the same class, where one new size is around them."""
        kind = type(self.modules[patch.module])
        for path, module in self.modules.items():
            if type(module) is not kind:
                continue
            for name, place, number in numbers_of(module):
                if (name, place) == (patch.name, patch.place):
                    sizes = self.changes.around(path).get(number, set()) - {number}
                    if len(sizes) == 1:
                        yield Patch(path, name, place, number, next(iter(sizes)))


def _path_and_parents(path: str) -> list[str]:
    """The path of a module and those of the modules around it, up to the model's own."""
    paths = [path]
    while path:
        path = path.rpartition(".")[0]
        paths.append(path)
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# trial and error at a divergence


@dataclass(frozen=True, slots=True)
class _Change:
    """A patch to apply, or with `withdrawn` to take back."""

    patch: Patch
    withdrawn: bool = False

    @property
    def site(self) -> Site:
        """Where it applies."""
        return _site(self.patch)


def _site(patch: Patch) -> Site:
    return patch.module, patch.name, patch.place


class _Repair:
    """The shrunk model while patches are tried on it; `patches` holds those that are kept, by site."""

    def __init__(self, model: nn.Module, suggestions: _Suggestions, cuts: tuple[Cut, ...], inputs: Inputs) -> None:
        self.suggestions, self.inputs = suggestions, inputs
        self.patches = {_site(patch): patch for patch in suggestions.certain()}
        self.shrunk = perform(model, Surgery(cuts, tuple(self.patches.values()))).eval()

    def divergence(self) -> Divergence | None:
        """Where a run of the shrunk model first leaves the predicted shapes."""
        return shapes_agree(self.shrunk, self.suggestions.coupling, self.suggestions.removed, self.inputs)

    def improve(self, divergence: Divergence) -> tuple[list[Patch], Divergence | None] | None:
        """Keep the first trial with which the run gets further: its patches and the next divergence; None if none."""
        for trial in self._trials(divergence):
            for change in trial:
                apply_patch(self.shrunk, change.patch, back=change.withdrawn)
            result = self.divergence()
            if result is None or result.index > divergence.index:
                self._keep(trial)
                return [change.patch for change in trial if not change.withdrawn], result
            self._undo(trial)
        return None

    def carry(self, patches: Sequence[Patch]) -> bool:
        """Apply kept patches to sibling modules too, where those have no patch yet; whether there were any."""
        carried = False
        for patch in patches:
            for sibling in self.suggestions.siblings(patch):
                if _site(sibling) not in self.patches:
                    self.patches[_site(sibling)] = sibling
                    apply_patch(self.shrunk, sibling)
                    carried = True
        return carried

    def _trials(self, divergence: Divergence) -> Iterator[tuple[_Change, ...]]:
        """Changes to try together: single ones first, then pairs of two sites."""
        likely = self.suggestions.likely(divergence)
        at_work = {patch.module for patch in likely} | {divergence.path}
        changes = [
            *(_Change(patch) for patch in likely if self.patches.get(_site(patch)) != patch),
            *(_Change(patch, withdrawn=True) for patch in self.patches.values() if patch.module in at_work),
        ]
        pairs = combinations(changes[:PAIRED], 2)
        for trial in [*((change,) for change in changes), *pairs][:TRIALS]:
            if len({change.site for change in trial}) == len(trial):
                yield trial

    def _keep(self, trial: Sequence[_Change]) -> None:
        for change in trial:
            if change.withdrawn:
                del self.patches[change.site]
            else:
                self.patches[change.site] = change.patch

    def _undo(self, trial: Sequence[_Change]) -> None:
        """Set the numbers of a trial back to the kept patches, or to the model's own values."""
        for change in trial:
            kept = self.patches.get(change.site)
            apply_patch(self.shrunk, kept if kept is not None else change.patch, back=kept is None)
