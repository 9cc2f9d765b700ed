"""The residual blocks of one model: what the removal of some of them saves, and whether it is verified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from torchslim.core.isolation import copy_model, is_plain, preserved_globals
from torchslim.core.layer_patterns import Patterns, as_list, check_patterns, class_names, matches, parameter_paths
from torchslim.core.reason import Reason
from torchslim.core.step import Inputs
from torchslim.core.trees import device_of, to_device
from torchslim.errors import PruneError
from torchslim.prune.dependency.examples import together
from torchslim.prune.dependency.sizes import other_inputs
from torchslim.prune.dependency.verify_runs import COUNTING
from torchslim.prune.depth.find import Residual, Way, find
from torchslim.prune.depth.flow import Flow, record
from torchslim.prune.depth.trial import Cut, Trial, merged
from torchslim.prune.structured.bypass import dropped
from torchslim.prune.structured.surgery import Surgery

BlockMeasure = Literal["params", "macs", "latency", "blocks"]
"""What the sparsity of depth pruning is a fraction of."""


@dataclass
class DepthPlan:
    """The blocks of a model, and the removals that could not be verified so far.

    A set of blocks is a sequence of names; blocks inside of others in the set add nothing to it.
    """

    model: nn.Module  # the caller's model if that is plain: read only
    inputs: Inputs
    flow: Flow
    blocks: dict[str, Residual]
    reasons: dict[str, str] = field(default_factory=dict)  # of blocks that stay
    _way: dict[str, int] = field(default_factory=dict)  # place of the way that a block is removed in

    @cached_property
    def trial(self) -> Trial:
        """The runs that verify removals."""
        return Trial(self.model, self.inputs)

    @property
    def offered(self) -> list[str]:
        """Names of the blocks that may go."""
        return [name for name in self.blocks if name not in self.reasons]

    def ways(self, names: Iterable[str]) -> list[Way]:
        """How blocks are removed."""
        return [self.blocks[name].ways[self._way.get(name, 0)] for name in names]

    def modules(self, names: Iterable[str]) -> set[str]:
        """Paths of the modules that go with blocks, without those inside of others."""
        return set(merged(self.ways(names)))

    def covers(self, names: Sequence[str], name: str) -> bool:
        """Whether a block goes with blocks that are removed already."""
        gone = self.modules(names)
        return name in names or all(_within(path, gone) for path in self.modules([name]))

    def size(self, names: Sequence[str], of: BlockMeasure) -> int:
        """Parameters, multiply-accumulates or branches that go with blocks; for "latency" the multiply-accumulates."""
        gone = self.modules(names)
        if of == "params":
            modules = {id(self.model.get_submodule(path)) for path in gone}
            every = {path for path, module in self.model.named_modules(remove_duplicate=False) if id(module) in modules}
            sizes = dict(self.model.named_parameters())
            return sum(
                sizes[first].numel()
                for first, paths in parameter_paths(self.model).items()
                if all(_within(path, every) for path in paths)
            )
        if of == "blocks":
            return sum(self.covers(names, name) for name in self._branches)
        inside = {index for call in self.flow.calls if call.path in gone for index in range(call.start, call.end)}
        return sum(self.flow.steps[index].macs for index in inside)

    def total(self, of: BlockMeasure) -> int:
        """Parameters or multiply-accumulates of the model, or branches that its blocks consist of."""
        if of == "params":
            return sum(parameter.numel() for parameter in self.model.parameters())
        return len(self._branches) if of == "blocks" else self.flow.macs

    @property
    def _branches(self) -> list[str]:
        return [name for name, block in self.blocks.items() if not block.passed and block.ways]

    def verify(self, names: Sequence[str], name: str) -> str:
        """Why a block cannot go besides others, which can; empty if it can.

        Ways are tried in order, and the block keeps the first one that is right.
        """
        if name in self.reasons:
            return self.reasons[name]
        objections = []
        first = self._way.get(name, 0)
        for place in range(first, len(self.blocks[name].ways)):
            self._way[name] = place
            together = [*names, name]
            objection = self._objection(together)
            if not objection:
                return ""
            objections.append(objection)
        self._way[name] = first
        return Reason.NOT_VERIFIED.with_detail(objections[0])

    def _objection(self, names: Sequence[str]) -> str:
        blocks, ways = [self.blocks[name] for name in names], self.ways(names)
        objection = self.trial.objection(blocks, ways)
        if objection or self._second is None:
            return objection
        objection = self.trial.objection(blocks, ways, self._second)
        return f"at another size of the inputs {objection}" if objection else ""

    @cached_property
    def _second(self) -> Inputs | None:
        """Inputs of a second size that the model takes."""
        if any(step.name in COUNTING for step in self.flow.steps):  # data decides the sizes
            return None
        for resized in other_inputs(self.trial.inputs):
            try:
                Cut({}, {}, self.trial.precision).outputs(self.trial.copy, resized)
            except Exception:  # noqa: BLE001 - whatever a model raises on a size that it does not take
                continue
            return resized
        return None

    def refuse(self, name: str, reason: str) -> None:
        """Leave a block in from now on."""
        self.reasons[name] = reason

    def surgery(self, names: Sequence[str]) -> Surgery:
        """The surgery that removes blocks."""
        return Surgery(
            (), (), tuple(dropped(self.model, path, what) for path, what in merged(self.ways(names)).items())
        )


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def analyze_depth(
    model: nn.Module,
    inputs: Inputs,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    examples: Sequence[Any] = (),
) -> DepthPlan:
    """Find the residual blocks of a model, and mark those that the user wants to keep.

    Args:
        model: only copies of it run.
        inputs: its example inputs.
        include: globs over names of blocks, or "type:NAME"; other blocks stay.
        exclude: likewise, for blocks that stay with all modules inside of them.
        examples: further calls, see `together`.

    Raises:
        PruneError: arguments that cannot be used.
        SelectError: a pattern that matches no layer.
    """
    if not isinstance(inputs, (tuple, list, dict)):
        raise PruneError(
            f"example_inputs must be a tuple of positional or a dict of keyword arguments, got {type(inputs).__name__}"
        )
    if not is_plain(model):
        model, _ = copy_model(model)  # masks of torch.nn.utils.prune become zeros
    check_patterns(model, include, exclude)
    inputs = to_device(together(model, inputs, examples), device_of(model))
    with preserved_globals(seed=0):
        flow = record(copy_model(model)[0], inputs)
    plan = DepthPlan(model, inputs, flow, {block.name: block for block in find(flow, model)})
    types = class_names(model)
    for name, block in plan.blocks.items():
        paths = [name, *(path for way in block.ways[:1] for path in way)]
        if block.reason:
            plan.refuse(name, block.reason)
        elif any(_touches(pattern, paths, types) for pattern in as_list(exclude)):
            plan.refuse(name, Reason.EXCLUDED)
        elif include is not None and not any(matches(pattern, name, types) for pattern in as_list(include)):
            plan.refuse(name, Reason.NOT_INCLUDED)
    return plan


def _touches(pattern: str, paths: Sequence[str], types: Any) -> bool:
    """Whether a pattern matches one of the modules, or a module inside of one."""
    inside = [name for name in types if _within(name, paths)]
    return any(matches(pattern, path, types) for path in (*paths, *inside))
