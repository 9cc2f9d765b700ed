"""Analysis of a model for channel pruning, and the retreat from removals that cannot be verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchslim.core.isolation import copy_model, is_plain, preserved_globals
from torchslim.core.layer_patterns import Patterns, as_list, check_patterns, class_names, matches, parameter_paths
from torchslim.core.reason import Reason
from torchslim.core.step import Inputs
from torchslim.core.trees import device_of, tensors, to_device
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask, couple
from torchslim.prune.dependency.examples import together
from torchslim.prune.dependency.groups import Unit
from torchslim.prune.dependency.propagation import JointKey
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.dependency.sizes import other_inputs
from torchslim.prune.dependency.trace import Trace, Value, trace
from torchslim.prune.dependency.verify_runs import COUNTING, Divergence
from torchslim.prune.structured.attributes import mend

MODES = {
    "auto": ("inner", "even", "outer", "tied", "outer tied", "none"),
    "whole": ("outer", "outer tied", "none"),
    "dim": ("inner", "even", "tied", "none"),
}
"""Ways to prune attention for each `heads` option, in the order in which they are tried; see `couple`."""


UnseenCode = Literal["keep", "prune"]
"""The treatment of channels that may be shared with code that no example reached."""

SHOWN = 6
"""The largest number of names that a warning lists."""


@dataclass
class Plan:
    """An analyzed model, and the removals that could not be verified so far."""

    model: nn.Module  # the caller's model if that is plain: read only
    inputs: Inputs
    trace: Trace
    frozen: list[str]
    heads: Heads = "auto"
    modes: dict[str, str] = field(default_factory=dict)
    tried: dict[str, set[str]] = field(default_factory=dict)
    stays: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)
    shut: dict[JointKey, set[int]] = field(default_factory=dict)
    placed: set[bytes] = field(default_factory=set)
    narrowest: int = 1
    precision: torch.dtype = torch.float64  # of the verification
    precise: bool = False  # whether the model itself was tried in that precision
    imprecise: str = ""  # why the verification uses less than float64
    elsewhere: tuple[Inputs, Trace] | None = None  # inputs of a second size that the model takes, and their trace
    sized: bool = False  # whether a second size was looked for
    unseen: UnseenCode = "keep"

    @property
    def names(self) -> list[str]:
        """Names of the parameters, shared ones listed once."""
        return [name for name, _ in self.model.named_parameters()]

    def second(self) -> tuple[Inputs, Trace] | None:
        """Inputs of another size and the trace of a run on them; None where the model takes no other size."""
        if not self.sized:
            self.sized = True
            # where data decides the sizes of results, a run on other data shows nothing about sizes
            if not any(operation.name.split(".")[1] in COUNTING for operation in self.trace.operations):
                self.elsewhere = _second(self.model, self.inputs, self.trace)
        return self.elsewhere

    def coupling(self) -> Coupling:
        """The coupled groups, without removals that are known to be impossible."""
        return couple(
            self.trace,
            heads=self.heads,
            frozen=self.frozen,
            modes=self.modes,
            stays=self.stays,
            shut=self.shut,
            placed=self.placed,
        )

    def notes(self) -> list[str]:
        """Warnings about code that no example reached."""
        unseen = self.trace.unseen
        if not unseen.weights and not unseen.methods:
            return []
        names = [
            f"{kind} {_listed(items)}"
            for kind, items in (("weights", unseen.weights), ("methods", unseen.methods))
            if items
        ]
        staying = [group.name for group in self.coupling().groups if Reason.NOT_REACHED.given_in(group.reason)]
        if unseen.weights and self.unseen == "prune":
            consequence = "with unseen='prune' they may not fit the pruned model any more"
        elif staying:
            consequence = f"channels that they may share stay ({_listed(staying)})"
        else:
            consequence = "whether they still run was not checked"
        return [
            f"no example reached {' and '.join(names)}: {consequence}; give the calls that reach them, as "
            "examples=[(x, 1), {'method': 'embed', 'args': (x,)}]"
        ]

    def retreat(self, divergence: Divergence, coupling: Coupling, removed: Mask) -> bool:
        """Rule out what a divergence shows to be impossible: a mode of the attention, or the groups at work."""
        self.narrowest = 1
        kinds = {path: type(module) for path, module in self.model.named_modules()}
        path: str | None = divergence.path
        while path is not None:
            if path in coupling.modes and coupling.modes[path] != "none":
                mode = coupling.modes[path]
                same_class = {
                    module_path for module_path in coupling.modes if kinds.get(module_path) is kinds.get(path)
                }
                tried = self.tried.setdefault(path, set()) | {mode}
                next_mode = next(option for option in MODES[self.heads] if option not in tried)
                for module_path in same_class:
                    self.tried.setdefault(module_path, set()).add(mode)
                    if coupling.modes[module_path] == mode:
                        self.modes[module_path] = next_mode
                return True
            path = path.rpartition(".")[0] if path else None
        operation = coupling.trace.operations[divergence.index]
        suspects = self._losing((*operation.outputs, *operation.inputs), coupling, removed)
        if not suspects:  # no channel goes at this operation: suspect all that go in this module
            suspects = self._inside(divergence.path, coupling, removed)
        for earlier in reversed(coupling.trace.operations[: divergence.index]):  # the last one that lost channels
            if suspects:
                break
            suspects = self._losing(earlier.outputs, coupling, removed)
        if not suspects:
            return False
        suspects = self._culprits(suspects, divergence, coupling, removed) or suspects
        if self._turn(suspects, coupling, kinds) or self._place(suspects, coupling):
            return True
        reason = Reason.NOT_VERIFIED.with_detail(f"{divergence.what} ({divergence.path})")
        for unit in coupling.units:
            classes = np.concatenate([cell.classes for cell in unit.cells])
            if suspects & set(classes.tolist()):
                self.stays.append((classes, reason))
        return True

    def _turn(self, suspects: set[int], coupling: Coupling, kinds: Mapping[str, type]) -> bool:
        """Make suspect joint layers, and those of modules of the same class, lose slices along another axis."""
        joints = self.trace.tagger.joints
        turned = {
            (kinds.get(joints[key].where), axis)
            for key, axis in coupling.axes.items()
            if suspects & set(coupling.roots[joints[key].atoms].reshape(-1).tolist())
        }
        for key, axis in coupling.axes.items():
            if (kinds.get(joints[key].where), axis) in turned:
                self.shut.setdefault(key, set()).add(axis)
        return bool(turned)

    def _place(self, suspects: set[int], coupling: Coupling) -> bool:
        """Assume that suspect parts of equal length are cut at positions that the code fixes."""
        new = {
            key
            for key, balance in self.trace.tagger.balances.items()
            if len(balance.fixed) and suspects & set(coupling.roots[np.concatenate(balance.parts)].tolist())
        } - self.placed
        self.placed |= new
        return bool(new)

    def _inside(self, path: str, coupling: Coupling, removed: Mask) -> set[int]:
        losing: set[int] = set()
        for operation in coupling.trace.operations:
            if operation.path == path or operation.path.startswith(f"{path}." if path else ""):
                losing |= self._losing(operation.outputs, coupling, removed)
        return losing

    def _culprits(self, suspects: set[int], divergence: Divergence, coupling: Coupling, removed: Mask) -> set[int]:
        """Suspects in units that cause the divergence on their own, found by halving; empty if no unit does."""

        def diverges(units: list[Unit]) -> bool:
            subset = np.zeros_like(removed)
            for unit in units:
                for cell in unit.cells:
                    subset[cell.classes] = removed[cell.classes]
            subset.setflags(write=False)
            observed = mend(self.model, coupling, subset, self.inputs)[1]
            return observed is not None and observed.index <= divergence.index

        def guilty(units: list[Unit]) -> list[Unit]:
            if not units or not diverges(units):
                return []
            if len(units) == 1:
                return units
            half = len(units) // 2  # units that diverge only together are not searched for
            return guilty(units[:half]) + guilty(units[half:])

        removing = [
            unit
            for unit in coupling.units
            if suspects & set(np.concatenate([cell.classes for cell in unit.cells]).tolist())
        ]
        culprits = guilty(removing) if len(removing) > 1 else []
        classes = {root for unit in culprits for cell in unit.cells for root in cell.classes.tolist()}
        return suspects & classes

    def _losing(self, values: Iterable[Value], coupling: Coupling, removed: Mask) -> set[int]:
        losing: set[int] = set()
        for value in values:
            for classes in coupling.classes(value.layers):
                losing |= set(np.unique(classes[removed[classes]]).tolist())
        return losing


def shapes_of(inputs: Inputs) -> str:
    """Shapes of the tensors in `inputs`, as text."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors(inputs))


def _second(model: nn.Module, inputs: Inputs, first: Trace) -> tuple[Inputs, Trace] | None:
    for resized in other_inputs(inputs):
        with preserved_globals(seed=0):
            try:
                second_trace = trace(copy_model(model)[0], resized)
            except Exception:  # noqa: BLE001 - whatever a model raises on a size that it does not take
                continue
        same = [value.shape for value in second_trace.weights.values()] == [
            value.shape for value in first.weights.values()
        ]
        if same and not second_trace.training:
            return resized, second_trace
    return None


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def analyze(
    model: nn.Module,
    inputs: Inputs,
    *,
    heads: Heads = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    examples: Sequence[Any] = (),
    unseen: UnseenCode = "keep",
) -> Plan:
    """Trace a copy of the model, and mark the weights that the user wants to keep.

    Args:
        examples: further calls, see `together`.
        unseen: channels that weights which no call reaches may share: "keep" leaves them in, "prune" lets them go.

    Raises:
        PruneError: arguments that cannot be used.
        SelectError: a pattern that matches no layer.
    """
    if heads not in ("auto", "whole", "dim"):
        raise PruneError(f"heads must be 'auto', 'whole' or 'dim', got {heads!r}")
    if not isinstance(inputs, (tuple, list, dict)):
        raise PruneError(
            f"example_inputs must be a tuple of positional or a dict of keyword arguments, got {type(inputs).__name__}"
        )
    if unseen not in ("keep", "prune"):
        raise PruneError(f"unseen must be 'keep' or 'prune', got {unseen!r}")
    check_patterns(model, include, exclude)
    if not is_plain(model):
        model, _ = copy_model(model)  # masks of torch.nn.utils.prune become zeros
    inputs = to_device(together(model, inputs, examples), device_of(model))
    with preserved_globals(seed=0):
        model_trace = trace(copy_model(model)[0], inputs)
    types, aliases = class_names(model), parameter_paths(model)

    def covered(patterns: Patterns) -> set[str]:
        return {
            name
            for name in model_trace.weights
            if any(matches(pattern, path, types) for pattern in as_list(patterns) for path in aliases.get(name, [name]))
        }

    plan = Plan(model, inputs, model_trace, sorted(covered(exclude)), heads, unseen=unseen)
    if unseen == "keep":
        plan.stays += model_trace.unseen.shared
    if include is not None:
        included = covered(include)
        for group in plan.coupling().groups:
            if not included & {member.weight for member in group.members}:
                plan.stays.append((group.classes, Reason.NOT_INCLUDED))
    return plan
