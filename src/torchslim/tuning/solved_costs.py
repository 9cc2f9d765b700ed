"""The decisions of a solved search and their costs: widths, schemes and blocks, in the units of a budget."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchslim.allocation.problem import LATENCY, MACS, MEMORY_BYTES, PARAMS, SIZE_BYTES, Decision, Term
from torchslim.analysis.costs.measuring import Subject, costs_subject, measure_subject
from torchslim.analysis.damage import WIDTH, kind_of
from torchslim.core.step import Target
from torchslim.errors import RecipeError
from torchslim.prune import Prune
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.depth.plan import DepthPlan, analyze_depth
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount
from torchslim.quantize import Quantize
from torchslim.tuning.choices import Places
from torchslim.tuning.space import Space
from torchslim.tuning.trial import Lab

FIGURES: Mapping[str, str] = {
    "latency": LATENCY,
    "size": SIZE_BYTES,
    "peak_memory": MEMORY_BYTES,
    "macs": MACS,
    "params": PARAMS,
}
"""The cost of each figure of a budget."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Decisions and their costs.

    Attributes:
        decisions: of the problem.
        costs: terms by the names of `core.budget.UNITS`, in its units.
        members: for each width decision the members of its group, "conv1.weight[0]".
        blocks: paths of the modules that go with each block.
        depth: the analysis of the blocks; None: no block may go.
        spread: 90th percentile of measured over predicted latencies of the programs that the tables are made from.
        seconds: that the measurements took in this process.
    """

    decisions: tuple[Decision, ...]
    costs: Mapping[str, tuple[Term, ...]]
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: Mapping[str, Collection[str]] = field(default_factory=dict)
    depth: DepthPlan | None = None
    spread: float = 1.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the costs of a search are asked for, before anything is measured.

    Attributes:
        subject: the model with its decisions.
        target: of the recipe.
        empty: decisions without costs.
        widths: whether the recipe prunes channels.
    """

    subject: Subject
    target: Target
    empty: Costs
    widths: bool

    @classmethod
    def of(cls, lab: Lab, space: Space) -> Question:
        """The decisions of a search.

        Raises:
            RecipeError: the recipe has no step whose content a solver could decide, or parts.
            TorchslimError: the model cannot be analyzed.
        """
        steps = space.document["step"]
        places = Places.of(steps)
        if places.prune is None and places.quantize is None:
            raise RecipeError(
                "budget: method = 'solve' decides widths and schemes, and the recipe neither prunes channels nor "
                "quantizes; add such a step, or take method = 'sample'"
            )
        if lab.parts:
            raise RecipeError("budget: method = 'solve' takes whole models; leave out part, or take method = 'sample'")
        recipe = space.recipe(space.whole(0.5))
        prune = next((s for s in recipe.steps if isinstance(s, Prune) and s.pattern == "channel"), None)
        options = None if prune is None else prune.channels().options
        given: dict[str, Any] = {} if options is None else {"include": options.include, "exclude": options.exclude}
        plan = analyze(lab.model, lab.example_inputs, **given)
        depth = None if prune is None else _depth(lab, given)
        blocks = {} if depth is None else _apart(depth)
        subject = costs_subject(
            lab.model,
            lab.example_inputs,
            target=recipe.target,
            schemes=() if places.quantize is None else _schemes(steps[places.quantize]),
            blocks=blocks,
            amount=Amount(of="latency") if options is None else replace(options.amount, of="latency", scope="global"),
            plan=plan,
            dynamic_shapes=lab.dynamic_shapes,
            seed=lab.seed,
        )
        everything = Costs(
            decisions=subject.space.decisions(),
            costs={},
            members=_members(subject.space.coupling),
            blocks=blocks,
            depth=depth,
        )
        empty = everything if prune is not None else without(everything, WIDTH)
        return cls(subject=subject, target=recipe.target, empty=empty, widths=prune is not None)

    def measured(self, lab: Lab) -> Costs:
        """Measure the costs, or read them from this machine's cache."""
        start = time.perf_counter()
        tables = measure_subject(self.subject, seed=lab.seed, progress=lab.progress)
        base = lab.baseline(self.target)
        costs = {
            figure: scaled(tables.costs[cost], base[figure])
            for figure, cost in FIGURES.items()
            if figure in lab.budget.figures
        }
        found = replace(self.empty, decisions=tables.decisions, costs=costs, spread=max(tables.spread[1], 1.0))
        found = found if self.widths else without(found, WIDTH)
        return replace(found, seconds=time.perf_counter() - start)


def scaled(terms: Sequence[Term], original: float) -> tuple[Term, ...]:
    """The terms times a factor, so that the unchanged model costs `original`: in the budget's unit, for one sample."""
    full = sum(term.at((0,) * (max(term.decisions, default=0) + 1)) for term in terms)
    factor = original / full if full else 1.0
    return tuple(Term(decisions=term.decisions, values=term.values * factor) for term in terms)


def without(costs: Costs, kind: str) -> Costs:
    """The costs with every decision of a kind at its first option, which changes nothing."""
    kept = [number for number, decision in enumerate(costs.decisions) if kind_of(decision) != kind]
    places = {number: place for place, number in enumerate(kept)}

    def fixed(term: Term) -> Term:
        index = tuple(slice(None) if number in places else 0 for number in term.decisions)
        decisions = tuple(places[number] for number in term.decisions if number in places)
        return Term(decisions=decisions, values=term.values[index])

    return replace(
        costs,
        decisions=tuple(costs.decisions[number] for number in kept),
        costs={name: tuple(map(fixed, terms)) for name, terms in costs.costs.items()},
    )


def _schemes(step: Mapping[str, Any]) -> Sequence[str]:
    """The schemes that the recipe names for its quantization."""
    scheme = step.get("scheme", Quantize().scheme)
    return tuple(scheme["search"]) if isinstance(scheme, Mapping) else (scheme,)


def _depth(lab: Lab, given: Mapping[str, Any]) -> DepthPlan:
    return analyze_depth(lab.model, lab.example_inputs, exclude=given["exclude"])


def _apart(depth: DepthPlan) -> dict[str, set[str]]:
    """Modules of the verified blocks, without blocks inside of others and modules around several."""
    branches = {name: depth.modules([name]) for name in depth.offered if not depth.blocks[name].passed}
    verified = {name: modules for name, modules in branches.items() if not depth.verify([], name)}
    return {
        name: modules
        for name, modules in verified.items()
        if not any(other != name and depth.covers([other], name) for other in verified)
    }


def _members(coupling: Coupling) -> dict[str, tuple[str, ...]]:
    """Members of the first group of each unit, by the name of the unit's decision."""
    groups = [coupling.groups[unit.groups[0]] for unit in coupling.units]
    return {
        f"{WIDTH} {group.name}": tuple(f"{member.weight}[{member.dim}]" for member in group.members) for group in groups
    }
