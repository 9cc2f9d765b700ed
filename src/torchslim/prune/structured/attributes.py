"""Sizes that a model keeps as numbers follow its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from torchslim.core.step import Inputs
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import named_weights
from torchslim.prune.dependency.verification import shapes_agree
from torchslim.prune.dependency.verify_runs import Divergence
from torchslim.prune.structured.literals import FORWARD, literals
from torchslim.prune.structured.surgery import Patch, Surgery, apply_patch, cuts_of, perform

TRIALS = 60
"""How many attributes are tried at one divergence before it is given up."""


def sizes_in(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Every whole number among a module's own attributes: name, place inside it, value."""
    for name, value in vars(module).items():
        if not name.startswith("_"):
            yield from ((name, place, number) for place, number in _numbers(value, ()))


def _numbers(value: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield place, value
    elif type(value) in (tuple, list, torch.Size) and len(place) < 3 and len(value) <= 16:
        for index, each in enumerate(value):
            yield from _numbers(each, (*place, index))


class Mender:
    """Finds the attributes that must change with a removal."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask) -> None:
        self.model, self.coupling, self.removed = model, coupling, removed
        self.modules = dict(model.named_modules())
        self.own = self._own()
        self.changes = self._changes()

    def _own(self) -> dict[str, dict[int, set[int]]]:
        """Per module: old size -> new sizes, of its own weights alone."""
        found: dict[str, dict[int, set[int]]] = {}
        for name, value in self.coupling.trace.weights.items():
            sizes = found.setdefault(name.rpartition(".")[0], {})
            for old, new in zip(value.shape, self.coupling.shape(value, self.removed), strict=True):
                sizes.setdefault(old, set()).add(new)
        return found

    def _changes(self) -> dict[str, dict[int, set[int]]]:
        """Per module: old size -> new sizes, of its own weights and of the values in its operations."""
        found: dict[str, dict[int, set[int]]] = {}

        def note(path: str, old: int, new: int) -> None:
            found.setdefault(path, {}).setdefault(old, set()).add(new)

        for path, sizes in self.own.items():
            for old, news in sizes.items():
                for new in news:
                    note(path, old, new)
        for operation in self.coupling.trace.operations:
            new_shapes = []
            for value in (*operation.inputs, *operation.outputs):
                shape = self.coupling.shape(value, self.removed)
                new_shapes.append((value.shape, shape))
                for old, new in zip(value.shape, shape, strict=True):
                    note(operation.path, old, new)
            if "convolution" in operation.name:
                self._note_groups(operation.path, operation.scalars, new_shapes, note)
        for joint in self.coupling.trace.tagger.joints.values():
            gone = self.removed[self.coupling.roots[joint.atoms]]
            if gone.any():
                for axis, old in enumerate(joint.atoms.shape):
                    others = tuple(index for index in range(gone.ndim) if index != axis)
                    note(joint.where, old, int((~gone).any(others).sum()))
        return found

    def _note_groups(
        self,
        path: str,
        scalars: Sequence[Any],
        shapes: Sequence[tuple[Any, Any]],
        note: Callable[[str, int, int], None],
    ) -> None:
        # a grouped convolution's count of groups is no size of any value
        (old_in, new_in), (old_kernel, new_kernel) = shapes[:2]
        groups = int(scalars[-1])
        transposed = any(scalar is True for scalar in scalars)
        channels = -len(old_kernel) + 1
        if groups > 1:
            inner = (old_kernel[0], new_kernel[0]) if transposed else (old_in[channels], new_in[channels])
            width = (old_kernel[0] // groups) if transposed else old_kernel[1]
            left = new_kernel[1] if not transposed else width
            note(path, groups, inner[1] // max(left, 1))

    def certain(self) -> list[Patch]:
        """Attributes whose value changed everywhere around their module, and to one new value."""
        patches = []
        for path, module in self.modules.items():
            around = self.changes.get(path, {})
            for name, place, value in sizes_in(module):
                new = around.get(value, set())
                if len(new) > 1 and not module._modules:
                    # a layer's numbers speak of its weights before they speak of what passes through it
                    new = self._by_name(module, name, value, self.own.get(path, {}).get(value, new))
                if len(new) == 1 and value not in new:
                    patches.append(Patch(path, name, place, value, next(iter(new))))
        return patches

    def _by_name(self, module: nn.Module, name: str, value: int, new: set[int]) -> set[int]:
        # a square layer of which one side changed: its attributes say which side they mean
        weight = next(
            (parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() > 1),
            None,
        )
        if weight is None:
            return new
        path = next(path for path, each in self.modules.items() if each is module)
        full = next((key for key, each in named_weights(module).items() if each is weight), "")
        recorded = self.coupling.trace.weights.get(f"{path}.{full}".lstrip("."))
        if recorded is None:
            return new
        shape = self.coupling.shape(recorded, self.removed)
        sides = (1, 0) if isinstance(module, nn.modules.conv._ConvTransposeNd) else (0, 1)
        if name.startswith("out") and recorded.shape[sides[0]] == value:
            return {shape[sides[0]]}
        if name.startswith("in") and recorded.shape[sides[1]] == value:
            return {shape[sides[1]]}
        return new

    def candidates(self, divergence: Divergence) -> list[Patch]:
        """What may be wrong at a divergence: attributes of the modules at work, the innermost first."""
        patches = []
        path = divergence.path
        paths = [path]
        while path:
            path = path.rpartition(".")[0]
            paths.append(path)
        for each in paths:
            module = self.modules[each]
            inside = {key: new for inner in paths if inner.startswith(each) for key, new in self._around(inner).items()}
            below: dict[int, list[int]] | None = None
            for name, place, value in sizes_in(module):
                found = sorted(inside.get(value, set()) - {value})
                if module._modules:  # the sizes of the layers that it holds may be checked before any of them runs
                    below = self._below(each) if below is None else below
                    found += [new for new in below.get(value, ()) if new not in found]
                patches += [Patch(each, name, place, value, new) for new in found]
        return [*patches, *self._in_proportion(divergence.path), *self._in_code(paths)]

    def _in_code(self, paths: Sequence[str]) -> list[Patch]:
        """Sizes that changed around a divergence, among the numbers in the code of the modules at work."""
        patches, inside = [], dict[int, set[int]]()
        for path in paths:
            for old, news in self._around(path).items():
                inside.setdefault(old, set()).update(news)
            for number, value in literals(self.modules[path]):
                patches += [
                    Patch(path, FORWARD, (number,), value, new) for new in sorted(inside.get(value, set()) - {value})
                ]
        return patches

    def _below(self, path: str) -> dict[int, list[int]]:
        """Old size -> new sizes of the weights inside of a module, the most frequent first."""
        counts: Counter[tuple[int, int]] = Counter()
        for inner, sizes in self.own.items():
            if not path or f"{inner}.".startswith(f"{path}."):
                counts.update((old, new) for old, news in sizes.items() for new in news if new != old)
        found: dict[int, list[int]] = {}
        for (old, new), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            found.setdefault(old, []).append(new)
        return found

    def _in_proportion(self, path: str) -> list[Patch]:
        """Multiples of a size that changed, in modules inside whose own weights were cut: they may run uncalled."""
        patches = []
        for inner, sizes in self.own.items():
            if inner == path or not f"{inner}.".startswith(f"{path}." if path else ""):
                continue
            changed = [(old, new) for old, news in sizes.items() for new in news if new != old]
            module = self.modules[inner]
            if changed and not module._modules and not module._parameters:  # layers with parameters are called
                for name, place, value in sizes_in(module):
                    patches += [
                        Patch(inner, name, place, value, value // old * new) for old, new in changed if value % old == 0
                    ]
        return patches

    def _around(self, path: str) -> dict[int, set[int]]:
        return self.changes.get(path, {})


def mend(model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> tuple[Surgery, Divergence | None]:
    """The surgery for a removal, and where the model after it still diverges from what is predicted.

    Args:
        model: read only.
        coupling: of a trace of this model.
        removed: per atom what goes.
        inputs: those of the trace.
    """
    cuts = cuts_of(coupling, removed)
    mender = Mender(model, coupling, removed)
    patches = {_site(each): each for each in mender.certain()}
    shrunk = perform(model, Surgery(cuts, tuple(patches.values()))).eval()
    diverged = shapes_agree(shrunk, coupling, removed, inputs)
    while diverged is not None:
        better = _improve(shrunk, mender, patches, diverged, inputs)
        if better is None:
            break
        changed, diverged = better
        _carry(shrunk, mender, patches, changed)
        if len(changed) and diverged is not None:
            diverged = shapes_agree(shrunk, coupling, removed, inputs)
    return Surgery(cuts, tuple(patches.values())), diverged


def _site(patch: Patch) -> tuple[str, str, tuple[int, ...]]:
    return patch.module, patch.name, patch.place


def _improve(
    shrunk: nn.Module,
    mender: Mender,
    patches: dict[tuple[str, str, tuple[int, ...]], Patch],
    diverged: Divergence,
    inputs: Inputs,
) -> tuple[list[Patch], Divergence | None] | None:
    """Try changes at a divergence, one at a time and then in pairs; keep the first that gets further."""
    options = mender.candidates(diverged)
    at_work = {option.module for option in options} | {diverged.path}
    withdrawn = [each for site, each in patches.items() if site[0] in at_work]
    single: list[tuple[Patch, bool]] = [
        *((option, False) for option in options if patches.get(_site(option)) != option),
        *((each, True) for each in withdrawn),
    ]
    trials = [*((each,) for each in single), *combinations(single[:8], 2)][:TRIALS]
    for trial in trials:
        if len({_site(patch) for patch, _ in trial}) < len(trial):
            continue
        before = {_site(patch): patches.get(_site(patch)) for patch, _ in trial}
        for patch, back in trial:
            apply_patch(shrunk, patch, back=back)
        result = shapes_agree(shrunk, mender.coupling, mender.removed, inputs)
        if result is None or result.index > diverged.index:
            for patch, back in trial:
                if back:
                    del patches[_site(patch)]
                else:
                    patches[_site(patch)] = patch
            return [patch for patch, back in trial if not back], result
        for patch, _ in trial:
            old = before[_site(patch)]
            apply_patch(shrunk, old if old is not None else patch, back=old is None)
    return None


def _carry(
    shrunk: nn.Module,
    mender: Mender,
    patches: dict[tuple[str, str, tuple[int, ...]], Patch],
    changed: Sequence[Patch],
) -> None:
    """What held for one module holds for its siblings of the same class, where it is as plain."""
    for patch in changed:
        kind = type(mender.modules[patch.module])
        for path, module in mender.modules.items():
            if type(module) is not kind or (path, patch.name, patch.place) in patches:
                continue
            for name, place, value in sizes_in(module):
                if (name, place) != (patch.name, patch.place):
                    continue
                new = mender._around(path).get(value, set()) - {value}
                if len(new) == 1:
                    sibling = Patch(path, name, place, value, next(iter(new)))
                    patches[_site(sibling)] = sibling
                    apply_patch(shrunk, sibling)
