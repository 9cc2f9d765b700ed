"""Whole programs of joint choices: a narrowed model with a scheme for each layer, compiled for the target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from torchslim.core.step import Inputs, Target
from torchslim.errors import QuantizeError
from torchslim.prune.latency.table import narrowed
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.selection import Selection
from torchslim.quantize import convert, prepare
from torchslim.quantize.schemes import FLOAT, find_scheme
from torchslim.runtimes import Deployed, find_runtime

DRAWN = 30
"""Random schemes from which the one with the rarest ways of computing is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A joint choice: the number of steps that every unit keeps, and the schemes of layers that leave float."""

    kept: tuple[int, ...]
    schemes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes programs of joint choices.

    Args:
        plan, selection: of the model; which channels go does not affect the time.
        target: the runtime and its threads.
        dynamic_shapes: as for `torchslim.deploy`.
        batches: calibration data; by default the plan's example inputs, since only the speed counts.
    """

    plan: Plan
    selection: Selection
    inputs: Inputs
    target: Target
    dynamic_shapes: Any = "auto"
    batches: Sequence[Inputs] = ()

    def schemes(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """For each layer that can leave float, "float" and the schemes of `names` that it takes on the runtime."""
        options: dict[str, list[str]] = {}
        for name in names:
            try:
                prepared = self._prepared(self.plan.model, name, {})
            except QuantizeError:  # nothing in the model takes this scheme
                continue
            scheme = find_scheme(name)
            for record in prepared.records:
                if record.action == "quantized" and record.weight_bits == scheme.weight_bits:
                    options.setdefault(record.layer, [FLOAT]).append(name)
        modules = dict(self.plan.model.named_modules())
        return {layer: tuple(dict.fromkeys(own)) for layer, own in options.items() if modules.get(layer) is not None}

    def model(self, choice: Choice) -> nn.Module | None:
        """The model of a choice, quantized where the choice says so; None if its widths cannot be built."""
        full = [unit.width for unit in self.selection.coupling.units]
        model: nn.Module | None = self.plan.model
        if list(choice.kept) != full:
            model = narrowed(self.plan, self.selection, choice.kept)
        schemes = {layer: scheme for layer, scheme in choice.schemes.items() if scheme != FLOAT}
        if model is None or not schemes:
            return model
        # operations between layers take the scheme of the recipe: static if any layer has a static one
        by_rank = sorted(schemes.values(), key=lambda name: (find_scheme(name).activations != "static", name))
        try:
            prepared = self._prepared(model, by_rank[0], _outer_first(choice.schemes))
        except QuantizeError:  # nothing is left that takes its scheme
            return model
        prepared.calibrate(list(self.batches) or [self.inputs])
        converted: nn.Module = convert(prepared, checks=None)
        return converted

    def compile(self, model: nn.Module) -> Deployed:
        """Compile a model for the target."""
        runtime = find_runtime(self.target.runtime)
        return runtime.compile(model, self.inputs, self.dynamic_shapes, self.target.threads)

    def _prepared(self, model: nn.Module, scheme: str, layers: Mapping[str, str]) -> Any:
        return prepare(
            model,
            self.inputs,
            runtime=self.target.runtime,
            scheme=scheme,
            layers=layers,
            observer="min-max",
            dynamic_shapes=self.dynamic_shapes,
        )


def _outer_first(schemes: Mapping[str, str]) -> dict[str, str]:
    """The schemes with outer modules first: a name covers all modules inside, and the last match counts."""
    return dict(sorted(schemes.items(), key=lambda pair: pair[0].count(".")))


def spread_choices(
    options: Sequence[Sequence[int]],
    schemes: Mapping[str, Sequence[str]],
    count: int,
    seed: int = 0,
    ways: Callable[[Mapping[str, str]], Iterable[Hashable]] | None = None,
) -> list[Choice]:
    """Joint choices that cover every option of every decision about equally often.

    Widths form a Latin hypercube. A quarter of the choices gives every layer its first scheme, float, a quarter gives
    every layer one other scheme, and in the rest each layer takes all of its schemes equally often, in an order of its
    own. With `ways`, the rest are random schemes that lead to ways of computing which few choices before them have.

    Args:
        options: for each unit the numbers of steps that it may keep.
        schemes: for each layer the schemes that it takes, float first.
        count: number of choices.
        seed: of the permutations.
        ways: how modules compute under the schemes of layers.
    """
    generator = np.random.default_rng(seed)
    seen: Counter[Hashable] = Counter()
    places = [generator.permutation(count) for _ in options]
    others = sorted({name for own in schemes.values() for name in own[1:]})
    mixed = [number for number in range(count) if number % 4 > 1]
    orders = {layer: dict(zip(mixed, generator.permutation(len(mixed)), strict=True)) for layer in schemes}
    choices = []
    for number in range(count):
        kept = tuple(
            int(own[int(place[number]) * len(own) // count]) for own, place in zip(options, places, strict=True)
        )
        kind = number % 4 if others else 0
        if kind == 0:
            chosen = {layer: own[0] for layer, own in schemes.items()}
        elif kind == 1:
            name = others[number // 4 % len(others)]
            chosen = {layer: name if name in own else own[-1] for layer, own in schemes.items()}
        else:
            chosen = {layer: own[int(orders[layer][number]) % len(own)] for layer, own in schemes.items()}
            if ways is not None:
                drawn = [{layer: str(generator.choice(own)) for layer, own in schemes.items()} for _ in range(DRAWN)]
                chosen = max([chosen, *drawn], key=lambda each: sum((1 + seen[way]) ** -2 for way in ways(each)))
        if ways is not None:
            seen.update(ways(chosen))
        choices.append(Choice(kept=kept, schemes=chosen))
    return choices


def random_choices(
    options: Sequence[Sequence[int]], schemes: Mapping[str, Sequence[str]], count: int, seed: int
) -> list[Choice]:
    """Independent draws: widths uniformly from their options, schemes with a share of float that varies by choice."""
    generator = np.random.default_rng(seed)
    choices = []
    for _ in range(count):
        share = generator.uniform()
        kept = tuple(int(generator.choice(own)) for own in options)
        chosen = {layer: _drawn(own, share, generator) for layer, own in schemes.items()}
        choices.append(Choice(kept=kept, schemes=chosen))
    return choices


def _drawn(schemes: Sequence[str], share: float, generator: np.random.Generator) -> str:
    """One of the schemes: one other than the first with the probability `share`, if there are several."""
    others = schemes[1:]
    return str(generator.choice(others)) if others and generator.uniform() < share else schemes[0]
