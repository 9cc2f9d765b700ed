"""An analyzed model, and the retreat from what of it cannot be verified."""

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
"""What attention may lose, in the order in which it is tried: see `couple`."""


UnseenCode = Literal["keep", "prune"]
"""What happens to channels that code may share which no example reached."""

SHOWN = 6
"""How many names a warning lists."""


@dataclass
class Plan:
    """An analyzed model, and what of it could not be verified so far."""

    model: nn.Module  # the caller's where that is plain: read only
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
    precision: torch.dtype = torch.float64  # of the check
    precise: bool = False  # is it known whether the model itself runs in that?
    imprecise: str = ""  # why it does not
    elsewhere: tuple[Inputs, Trace] | None = None  # inputs of a second size that the model takes, and their trace
    sized: bool = False  # has one been looked for?
    unseen: UnseenCode = "keep"

    @property
    def names(self) -> list[str]:
        """The parameters, each once."""
        return [name for name, _ in self.model.named_parameters()]

    def second(self) -> tuple[Inputs, Trace] | None:
        """Inputs of another size and the trace of a run on them; None where the model takes no other size."""
        if not self.sized:
            self.sized = True
            # where data decides how much there is, a run on other data shows nothing of sizes
            if not any(operation.name.split(".")[1] in COUNTING for operation in self.trace.operations):
                self.elsewhere = _second(self.model, self.inputs, self.trace)
        return self.elsewhere

    def coupling(self) -> Coupling:
        """The groups, with all that is known to be impossible left out."""
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
        """What a user must know of code that no example reached."""
        found = self.trace.unseen
        if not found.weights and not found.methods:
            return []
        names = [
            f"{kind} {_listed(each)}" for kind, each in (("weights", found.weights), ("methods", found.methods)) if each
        ]
        kept = [group.name for group in self.coupling().groups if Reason.NOT_REACHED.given_in(group.reason)]
        if found.weights and self.unseen == "prune":
            consequence = "with unseen='prune' they may not fit the pruned model any more"
        elif kept:
            consequence = f"channels that they may share stay ({_listed(kept)})"
        else:
            consequence = "whether they still run was not checked"
        return [
            f"no example reached {' and '.join(names)}: {consequence}; give the calls that reach them, as "
            "examples=[(x, 1), {'method': 'embed', 'args': (x,)}]"
        ]

    def retreat(self, divergence: Divergence, coupling: Coupling, removed: Mask) -> bool:
        """Give up what a divergence shows to be impossible: another way for the attention, or the groups at work."""
        self.narrowest = 1
        kinds = {path: type(module) for path, module in self.model.named_modules()}
        path: str | None = divergence.path
        while path is not None:
            if path in coupling.modes and coupling.modes[path] != "none":
                mode = coupling.modes[path]
                alike = {other for other in coupling.modes if kinds.get(other) is kinds.get(path)}
                done = self.tried.setdefault(path, set()) | {mode}
                following = next(each for each in MODES[self.heads] if each not in done)
                for other in alike:
                    self.tried.setdefault(other, set()).add(mode)
                    if coupling.modes[other] == mode:
                        self.modes[other] = following
                return True
            path = path.rpartition(".")[0] if path else None
        operation = coupling.trace.operations[divergence.index]
        suspects = self._losing((*operation.outputs, *operation.inputs), coupling, removed)
        if not suspects:  # nothing at hand: whatever goes in this module
            suspects = self._inside(divergence.path, coupling, removed)
        for earlier in reversed(coupling.trace.operations[: divergence.index]):  # the last that lost anything
            if suspects:
                break
            suspects = self._losing(earlier.outputs, coupling, removed)
        if not suspects:
            return False
        suspects = self._culprits(suspects, divergence, coupling, removed) or suspects
        if self._turn(suspects, coupling, kinds) or self._place(suspects, coupling):
            return True
        why = Reason.NOT_VERIFIED.with_detail(f"{divergence.what} ({divergence.path})")
        for unit in coupling.units:
            classes = np.concatenate([cell.classes for cell in unit.cells])
            if suspects & set(classes.tolist()):
                self.stays.append((classes, why))
        return True

    def _turn(self, suspects: set[int], coupling: Coupling, kinds: Mapping[str, type]) -> bool:
        """Let joint layers at work, and those of modules of the same class, lose slices along another axis."""
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
        """Take it that parts at work which are equally long were cut at positions that stand in the code."""
        new = {
            key
            for key, balance in self.trace.tagger.balances.items()
            if len(balance.fixed) and suspects & set(coupling.roots[np.concatenate(balance.parts)].tolist())
        } - self.placed
        self.placed |= new
        return bool(new)

    def _inside(self, path: str, coupling: Coupling, removed: Mask) -> set[int]:
        found: set[int] = set()
        for operation in coupling.trace.operations:
            if operation.path == path or operation.path.startswith(f"{path}." if path else ""):
                found |= self._losing(operation.outputs, coupling, removed)
        return found

    def _culprits(self, suspects: set[int], divergence: Divergence, coupling: Coupling, removed: Mask) -> set[int]:
        """Those of the suspects whose units bring the divergence about by themselves, by halving; none if none does."""

        def diverges(units: list[Unit]) -> bool:
            only = np.zeros_like(removed)
            for unit in units:
                for cell in unit.cells:
                    only[cell.classes] = removed[cell.classes]
            only.setflags(write=False)
            found = mend(self.model, coupling, only, self.inputs)[1]
            return found is not None and found.index <= divergence.index

        def guilty(units: list[Unit]) -> list[Unit]:
            if not units or not diverges(units):
                return []
            if len(units) == 1:
                return units
            half = len(units) // 2  # those that only diverge together are not looked for
            return guilty(units[:half]) + guilty(units[half:])

        removing = [
            unit
            for unit in coupling.units
            if suspects & set(np.concatenate([cell.classes for cell in unit.cells]).tolist())
        ]
        found = guilty(removing) if len(removing) > 1 else []
        classes = {root for unit in found for cell in unit.cells for root in cell.classes.tolist()}
        return suspects & classes

    def _losing(self, values: Iterable[Value], coupling: Coupling, removed: Mask) -> set[int]:
        found: set[int] = set()
        for value in values:
            for classes in coupling.classes(value.layers):
                found |= set(np.unique(classes[removed[classes]]).tolist())
        return found


def shapes_of(inputs: Inputs) -> str:
    """The shapes of the tensors among inputs, as text."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors(inputs))


def _second(model: nn.Module, inputs: Inputs, first: Trace) -> tuple[Inputs, Trace] | None:
    for other in other_inputs(inputs):
        with preserved_globals(seed=0):
            try:
                found = trace(copy_model(model)[0], other)
            except Exception:  # noqa: BLE001 - whatever a model raises on a size that it does not take
                continue
        same = [value.shape for value in found.weights.values()] == [value.shape for value in first.weights.values()]
        if same and not found.training:
            return other, found
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
    """Trace a copy of the model, and find which weights the user wants left alone.

    Args:
        examples: further calls, see `together`.
        unseen: "keep" lets what may share channels with weights that no call reaches stay; "prune" lets it go.

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
        found = trace(copy_model(model)[0], inputs)
    types, aliases = class_names(model), parameter_paths(model)

    def covered(patterns: Patterns) -> set[str]:
        return {
            name
            for name in found.weights
            if any(matches(each, path, types) for each in as_list(patterns) for path in aliases.get(name, [name]))
        }

    plan = Plan(model, inputs, found, sorted(covered(exclude)), heads, unseen=unseen)
    if unseen == "keep":
        plan.stays += found.unseen.shared
    if include is not None:
        wanted = covered(include)
        for group in plan.coupling().groups:
            if not wanted & {member.weight for member in group.members}:
                plan.stays.append((group.classes, Reason.NOT_INCLUDED))
    return plan
