"""Which layers are faster in float: a bisection over kinds of layers, judged by paired timings of whole programs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.reason import Reason

MOST_PROGRAMS = 16  # that a search makes, the two ends included
SESSION = 4  # programs that are timed in turn with the current one
PROFILES = 3  # choices that a profile may propose, each after a look at the last one
FASTER = 1.02  # speed-up from which layers go back to float
UNUSABLE = 1e-9  # speed-up that stands for a program which the runtime does not take
NOT_SLOWER = 0.99  # of the faster end, which the result may reach

Layers = frozenset[str]
"""Layers in float, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers of one kind that change sides together, in the order of execution."""

    kind: str
    layers: tuple[str, ...]
    of: int  # layers of this kind in the model

    @property
    def name(self) -> str:
        """The group in words."""
        return f"{len(self.layers)} of {self.of} {self.kind}" if len(self.layers) < self.of else f"all {self.kind}"

    def halves(self) -> list[Group]:
        """The two halves in the order of execution; none for a single layer."""
        middle = len(self.layers) // 2
        parts = (self.layers[:middle], self.layers[middle:]) if middle else ()
        return [Group(kind=self.kind, layers=part, of=self.of) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Milliseconds of a program, and how many times faster it is than the program that it was timed with.

    Without a latency the runtime does not take the program.
    """

    latency: Measurement | None
    speedup: Speedup

    @property
    def share(self) -> str:
        """Share of the time, in words."""
        return "cannot be deployed" if self.latency is None else f"takes {1 / self.speedup.value:.2f} of the time"


Compare = Callable[[Layers, Sequence[Layers]], Sequence[Timed]]
"""Makes and times programs in turn with a reference; all are given by their layers in float."""
Propose = Callable[[Layers], Layers | None]
"""Layers that a profile of the program with these layers in float shows to be faster there; None without a profile."""


@dataclass(kw_only=True)
class Fastest:
    """The layers in float of the fastest program, with the reasons.

    Attributes:
        reasons: for every layer in float, what was measured.
        float_latency, integer_latency: of the program in float, and of the one with every layer on integers; None
            where the runtime does not take it.
        latency: of the chosen program, when it was last timed.
        programs: how many were made.
        layers: how many layers could be on integers.
    """

    reasons: dict[str, str]
    float_latency: Measurement | None
    integer_latency: Measurement | None
    latency: Measurement | None
    programs: int
    layers: int


@dataclass
class _Search:
    groups: Sequence[Group]
    compare: Compare
    most: int
    programs: int = 0
    notes: dict[str, str] = field(default_factory=dict)  # by layer, what its last trial showed

    def run(self, propose: Propose) -> Fastest:
        none: Layers = frozenset()
        every: Layers = frozenset(layer for group in self.groups for layer in group.layers)
        integers, floats = self._timed(none, [none, every])
        self.from_float = integers.latency is None or floats.speedup.value >= FASTER
        start, self.latency = (every, floats.latency) if self.from_float else (none, integers.latency)
        whole = f"with every layer in float the model {floats.share}"
        if integers.latency is None:
            whole = f"with every layer on integers the model {integers.share}"
        self.notes = dict.fromkeys(every, whole)
        current, moves, profiled = self._proposed(start, propose)
        if not profiled:
            current, more = self._bisected(current)
            moves += more
        if moves > 1 and current != start:  # a chain of moves, none of them slower than the last by more than noise
            (last,) = self._timed(start, [current], made=True)
            self.latency = last.latency
            if last.speedup.value < NOT_SLOWER:
                current, self.notes = start, dict.fromkeys(every, whole)
                self.latency = floats.latency if self.from_float else integers.latency
        return Fastest(
            reasons={layer: Reason.FASTER_IN_FLOAT.with_detail(self.notes[layer]) for layer in sorted(current)},
            float_latency=floats.latency,
            integer_latency=integers.latency,
            latency=self.latency,
            programs=self.programs,
            layers=len(every),
        )

    def _proposed(self, current: Layers, propose: Propose) -> tuple[Layers, int, bool]:
        """Follow profiles while they make the program faster; returns the layers, the moves, and if there are profiles.

        Conversions between integers and floats move with the choice, so each new program is profiled again.
        """
        moves = 0
        for _ in range(PROFILES):
            proposed = propose(current)
            if proposed is None:
                return current, moves, False
            if proposed == current or self.programs >= self.most:
                break
            (timed,) = self._timed(current, [proposed])
            self._note(f"{len(current ^ proposed)} layers chosen by a profile", current, proposed, timed)
            if not self._better(timed):
                break
            current, self.latency, moves = proposed, timed.latency, moves + 1
        return current, moves, True

    def _bisected(self, current: Layers) -> tuple[Layers, int]:
        """Change the side of one group after the other where this pays, and of halves of the groups where it does not.

        Several groups that pay are changed together where that pays as well, else the best one alone.
        """
        moves = 0
        queue = deque(self.groups)
        while queue and self.programs < self.most:
            room = min(SESSION, self.most - self.programs)
            batch = [queue.popleft() for _ in range(min(room, len(queue)))]
            timings = self._timed(current, [current ^ frozenset(group.layers) for group in batch])
            paying = []
            for group, timed in zip(batch, timings, strict=True):
                self._note(group.name, current, current ^ frozenset(group.layers), timed)
                if self._better(timed):
                    paying.append((group, timed))
                else:
                    queue += group.halves()
            if not paying:
                continue
            best, fastest = max(paying, key=lambda pair: pair[1].speedup.value)
            changed = frozenset(best.layers)
            if len(paying) > 1 and self.programs < self.most:
                together = frozenset(layer for group, _ in paying for layer in group.layers)
                (timed,) = self._timed(current, [current ^ together])
                if self._better(timed) and (self.from_float or timed.speedup.value >= fastest.speedup.value):
                    changed, fastest = together, timed
            current, self.latency, moves = current ^ changed, fastest.latency, moves + 1
        return current, moves

    def _timed(self, reference: Layers, candidates: Sequence[Layers], *, made: bool = False) -> Sequence[Timed]:
        self.programs += 0 if made else len(candidates)
        return self.compare(reference, candidates)

    def _better(self, timed: Timed) -> bool:
        """Whether a change pays: layers leave integers only for speed, and return to them if that costs none."""
        return timed.speedup.value >= (1.0 if self.from_float else FASTER)

    def _note(self, name: str, before: Layers, after: Layers, timed: Timed) -> None:
        """Say of the layers of a trial what it showed."""
        for changed, side in ((after - before, "in float"), (before - after, "on integers")):
            text = f"with {name} {side} the model {timed.share}"
            self.notes |= dict.fromkeys(changed, text)


def fastest(
    groups: Sequence[Group],
    compare: Compare,
    propose: Propose = lambda current: None,
    *,
    most: int = MOST_PROGRAMS,
) -> Fastest:
    """The layers to leave in float so that a program is at least as fast as in float and as all on integers.

    The search starts from the faster of these two ends. Layers go back to float if that is at least 2 % faster; from
    the end in float, they return to integers if that is not slower. Where profiles of single layers exist, they propose
    the layers; else groups change sides, then halves of the groups that did not pay. Every choice is timed as a whole
    program, in turn with the one before it.

    Args:
        groups: all layers that could be on integers, by kind.
        compare: makes and times programs.
        propose: gives the layers that a profile shows to be faster in float.
        most: how many programs are made at most.
    """
    return _Search(groups=groups, compare=compare, most=most).run(propose)
