"""The space that a solver chooses from: a width for each group, a scheme for each layer, and the blocks that stay.

It is a search space like any other: every decision is a choice in the document of a recipe, so that stored values are
checked, shown and written as those of any search. One value more names the trial whose trained weights a recipe starts
from, and another says whether it trains again. The recipe then begins with the steps of that trial, up to its last
training; these have run already, and their results are shared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchslim.allocation.problem import Decision
from torchslim.core.step import Trains
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import Recipe
from torchslim.prune.masking.patterns import CHANNEL
from torchslim.tuning.space import Parameter, Space

Document = dict[str, Any]
Values = Mapping[str, Any]

AFTER = "after"
"""Name of the value that holds the number of the trial to start from; -1: the original model."""

TRAIN = "train"
"""Name of the value that says whether a recipe trains after its own cuts; the trial that it starts from may have."""

ALONE: Values = {AFTER: -1, TRAIN: True}
"""The values of a recipe that starts from the original model and trains."""

MOST_TRIALS = 10**6
KEEP, DROP = "keep", "drop"
DECIDED = ("sparsity", "of", "scope", "schedule", "rounds", "until", "train", "latency_table", "skip")
"""Fields of a pruning step that the solver's widths replace."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Indices of the steps of a document that decisions are written into; None if there is no such step."""

    prune: int | None
    quantize: int | None

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]]) -> Places:
        """The first step that removes channels, and the last one that quantizes."""
        prunes = [n for n, step in enumerate(steps) if step.get("do") == "prune" and step.get("pattern") == CHANNEL]
        quantizes = [n for n, step in enumerate(steps) if step.get("do") == "quantize"]
        return cls(prune=prunes[0] if prunes else None, quantize=quantizes[-1] if quantizes else None)


def template(space: Space) -> Document:
    """The document without ranges: no step skipped, first choices, the middle of ranges, and no amounts of pruning.

    Cuts solve for the weights that remain, unless the recipe says `reconstruct = false`: training then has less to
    bring back.
    """
    document = space.chosen(space.whole(0.5))
    place = Places.of(document["step"]).prune
    if place is not None:
        kept = {key: value for key, value in document["step"][place].items() if key not in DECIDED}
        document["step"][place] = {**kept, "reconstruct": kept.get("reconstruct", True)}
    return document


@dataclass(frozen=True, kw_only=True)
class SolvedSpace(Space):
    """The space of a solver's decisions.

    Attributes:
        decisions: the options, as those of an allocation problem.
        members: for each width decision the members of its group, "conv1.weight[0]".
        blocks: paths of the modules that go with each block.
        trained: values of earlier trials by number, which `AFTER` refers to.
    """

    decisions: tuple[Decision, ...] = ()
    members: Mapping[str, Sequence[str]] = field(default_factory=dict)
    blocks: Mapping[str, Collection[str]] = field(default_factory=dict)
    trained: dict[int, Values] = field(default_factory=dict)

    def chosen(self, values: Values) -> Document:
        """The document of a recipe: the steps of the trials that it starts from, then its own.

        Raises:
            RecipeError: the values name a trial that is not known.
        """
        document = copy.deepcopy({key: value for key, value in self.document.items() if key != "budget"})
        steps: list[Document] = document["step"]
        places = Places.of(steps)
        last = len(steps) if places.quantize is None else places.quantize
        cut = last if places.prune is None else places.prune
        trainings = steps[cut if places.prune is None else cut + 1 : last]
        written = steps[:cut]
        before: Values = {}
        for link in self._links(values):
            removals = self._removals(before, link, None if places.prune is None else steps[places.prune])
            if removals:
                written += copy.deepcopy([*removals, *(trainings if link.get(TRAIN, True) else [])])
            before = link
        document["step"] = [*written, *self._ending(values, steps[last:])]
        return document

    @property
    def strongest(self) -> dict[str, Any]:
        """The last option of every decision, from the original model."""
        return {**ALONE, **{decision.name: decision.options[-1] for decision in self.decisions}}

    @property
    def first(self) -> dict[str, Any]:
        """The options that change nothing."""
        return {**ALONE, **{decision.name: decision.options[0] for decision in self.decisions}}

    def whole(self, part: float) -> dict[str, Any]:
        """The options at the fraction `part` of the way from the first to the last."""
        return {parameter.name: parameter.at(part) for parameter in self.parameters} | {**ALONE}

    def _links(self, values: Values) -> list[Values]:
        """Values of the trials that a recipe starts from, the first one first, and its own."""
        links, seen = [values], set()
        while (number := links[0].get(AFTER, -1)) >= 0:
            if number in seen or number not in self.trained:
                raise RecipeError(f"a recipe starts from trial {number}, which is not known")
            seen.add(number)
            links.insert(0, self.trained[number])
        return links

    def _removals(self, before: Values, after: Values, prune: Mapping[str, Any] | None) -> list[Document]:
        """Steps that drop blocks and narrow widths from one choice to the next."""
        widths: dict[str, int] = {}
        blocks = []
        gone = self._gone(after)
        for decision in self.decisions:
            kind, _, name = decision.name.partition(" ")
            old = before.get(decision.name, decision.options[0])
            new: Any = after.get(decision.name, decision.options[0])
            if new == old:
                continue
            if kind == "block":
                blocks.append(name)
            elif kind == "width":
                stays = [member for member in self.members.get(decision.name, (name,)) if not inside(member, gone)]
                widths |= dict.fromkeys(stays[:1], new)
        steps: list[Document] = []
        if blocks:
            reconstruct = prune is not None and prune["reconstruct"]
            steps.append({"do": "prune", "pattern": "block", "blocks": blocks, "reconstruct": reconstruct})
        if widths and prune is not None:
            steps.append({**prune, "widths": widths})
        return steps

    def _gone(self, values: Values) -> set[str]:
        """Paths of the modules of dropped blocks."""
        return {path for name, paths in self.blocks.items() if values.get(f"block {name}") == DROP for path in paths}

    def _ending(self, values: Values, steps: Sequence[Document]) -> list[Document]:
        """The quantization with a scheme for each layer, and what follows it; without it if all stays in float."""
        gone = self._gone(values)
        schemes = {
            name: values.get(decision.name, decision.options[0])
            for decision in self.decisions
            for kind, _, name in [decision.name.partition(" ")]
            if kind == "scheme" and not inside(name, gone)
        }
        if not steps or not schemes:
            return list(steps)
        quantize, *rest = steps
        used = [scheme for scheme in schemes.values() if scheme != "float"]
        if not used:
            return rest
        main = quantize["scheme"] if quantize.get("scheme", "int8") in used else max(set(used), key=used.count)
        layers = {name: scheme for name, scheme in schemes.items() if scheme != main}
        given = quantize.get("layers", {})
        own = {} if given == "auto" else dict(given)
        ordered = dict(sorted(layers.items(), key=lambda pair: pair[0].count(".")))  # outer modules first
        written = {**quantize, "scheme": main, "layers": {**own, **ordered}}
        if not written["layers"]:
            del written["layers"]
        for key in ("metric_drop", "by"):
            written.pop(key, None)
        return [written, *rest]


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a module or a parameter of this path belongs to one of the modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def solved_space(
    space: Space,
    decisions: Sequence[Decision],
    members: Mapping[str, Sequence[str]] | None = None,
    blocks: Mapping[str, Collection[str]] | None = None,
) -> SolvedSpace:
    """The space of the decisions, in the recipe that a search's document describes.

    `members` and `blocks` are as for `SolvedSpace`.
    """
    parameters = [
        Parameter(name=decision.name, path=(decision.name,), kind="choice", choices=decision.options)
        for decision in decisions
        if len(decision.options) > 1
    ]
    after = Parameter(name=AFTER, path=(AFTER,), kind="int", low=-1, high=MOST_TRIALS)
    train = Parameter(name=TRAIN, path=(TRAIN,), kind="choice", choices=(True, False))
    return SolvedSpace(
        document={**template(space), "budget": space.document.get("budget", {})},
        parameters=(*parameters, after, train),
        budget=space.budget,
        where=space.where,
        decisions=tuple(decisions),
        members=members or {},
        blocks=blocks or {},
    )


def epochs_by_prefix(recipe: Recipe, document: Mapping[str, Any]) -> dict[str, int]:
    """Epochs of every step that trains, by the text of all steps up to it: equal texts share one training."""
    texts = [json.dumps(step, sort_keys=True, default=str) for step in document["step"]]
    epochs = {
        "\n".join(texts[: number + 1]): sum(step.trainings())
        for number, step in enumerate(recipe.steps)
        if isinstance(step, Trains)
    }
    return {text: count for text, count in epochs.items() if count}
