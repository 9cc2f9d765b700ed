"""Tries removals on the real model: a model without blocks must equal the original with their branches set to zero.

Both run in float64, or in the model's own precision if its code accepts nothing else, on varied inputs and without
weights of equal elements, so that a branch that starts at zero hides nothing. Every output tensor is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.isolation import preserved_globals, untouched
from torchslim.core.step import Inputs
from torchslim.prune.dependency import verification
from torchslim.prune.dependency.precision import Precise
from torchslim.prune.dependency.trace import call, elementary
from torchslim.prune.depth.find import Residual, Way
from torchslim.prune.depth.flow import Key, all_tensors, is_addition, watching
from torchslim.prune.structured.bypass import Place, arguments, bypassed, named_arguments, value_at

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The largest difference of an output relative to its norm, by the precision of the check."""


class Cut(Precise):
    """Runs a model with branches set to zero, and shows each residual addition to `seen`.

    Args:
        zeroed: the term of each addition that becomes zero.
        passed: for a module, the place of a result and that of the argument that replaces it.
        precision: of the run; None keeps the model's own.
        seen: called with the key, the shortcut and the sum of each addition among `watched`.
        watched: additions and the terms that are their branches.
        streams: modules with the places of a result and of an argument, which are shown to `seen` as well.
    """

    def __init__(
        self,
        zeroed: Mapping[Key, int],
        passed: Mapping[str, tuple[Place, Place]],
        precision: torch.dtype | None = None,
        *,
        watched: Mapping[Key, int] | None = None,
        streams: Mapping[str, tuple[Place, Place]] | None = None,
        seen: Callable[[Any, Tensor, Tensor], None] = lambda key, before, after: None,
    ) -> None:
        super().__init__(precision)
        self.zeroed, self.passed = zeroed, passed
        self.watched, self.streams, self.seen = watched or {}, streams or {}, seen
        self._given: list[Tensor] = []  # arguments of running modules among `streams`
        self._inside: list[list[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        if not is_addition(func, args) or not self._inside:
            return self.draw(func, args, kwargs) if self.noise.drawn_by(func) else self.execute(func, args, kwargs)
        path, number = self._inside[-1]
        self._inside[-1][1] += 1
        if (term := self.zeroed.get((path, number))) is not None:
            terms = list(args)
            # in place where the sum is written to its branch
            terms[term] = terms[term].zero_() if term == 0 and func._opname.endswith("_") else terms[term] * 0
            terms[term].zero_()  # 0 times infinity is no zero
            args = tuple(terms)
        watched = self.watched.get((path, number))
        before = None if watched is None else args[1 - watched].clone()
        result = self.execute(func, args, kwargs)
        if before is not None:
            self.seen((path, number), before, result)
        return result

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append([path, 0])
        if path in self.streams:
            _, entry = self.streams[path]
            self._given.append(value_at(entry, arguments(named_arguments(module), args, kwargs)).clone())

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._inside.pop()
        if path in self.streams:
            self.seen(path, self._given.pop(), value_at(self.streams[path][0], output))
        if path not in self.passed:
            return None
        exit_, entry = self.passed[path]
        return _replaced(output, exit_, value_at(entry, arguments(named_arguments(module), args, kwargs)))

    def run(self, model: nn.Module, forward: Callable[[nn.Module], Any]) -> Any:
        """The result of `forward(model)`."""
        with (
            elementary(model),
            preserved_globals(seed=0),
            untouched(model),
            watching(model, self._enter, self._leave),
            self.promoting(),
        ):
            return forward(model)

    def outputs(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """Output tensors of a run on example inputs."""
        return all_tensors(self.run(model, lambda model: call(model, inputs)))


def _replaced(tree: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    if isinstance(tree, dict):
        return {**tree, place[0]: _replaced(tree[place[0]], place[1:], value)}
    items = list(tree)
    items[int(place[0])] = _replaced(items[int(place[0])], place[1:], value)
    return type(tree)(items)


class Trial:
    """Verifies removals from one model on its example inputs.

    Args:
        model: the model as it is; only copies of it run.
        inputs: its example inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.precision = torch.float64
        self.imprecise = ""
        self._take(inputs, torch.float64)
        try:
            Cut({}, {}, self.precision).outputs(self.copy, self.inputs)
        except Exception as error:  # noqa: BLE001 - code that cannot run in float64 raises anything
            self.precision = verification.width(model)
            self.imprecise = f"checked in {str(self.precision).removeprefix('torch.')}: in float64 {error}"
            self._take(inputs, self.precision)

    def _take(self, inputs: Inputs, precision: torch.dtype) -> None:
        self.copy = verification.prepare(self.model, precision)
        self.inputs = verification.vary(inputs, precision)

    def objection(self, blocks: Sequence[Residual], ways: Sequence[Way], inputs: Inputs | None = None) -> str:
        """Why the model without these blocks is not the original with their branches at zero; empty if it is."""
        zeroed = {key: term for block in blocks for key, term in block.zeroed.items()}
        passed = {path: stream for block in blocks for path, stream in block.passed.items()}
        inputs = self.inputs if inputs is None else inputs
        try:
            expected = Cut(zeroed, passed, self.precision).outputs(self.copy, inputs)
        except Exception as error:  # noqa: BLE001 - values that depend on the branch may be out of range
            return f"with its branch at zero the model fails: {type(error).__name__}: {_line(error)}"
        try:
            with removed(self.copy, ways):
                results = Cut({}, {}, self.precision).outputs(self.copy, inputs)
        except Exception as error:  # noqa: BLE001 - code around the block may need more than the block's output
            return f"without it the model fails: {type(error).__name__}: {_line(error)}"
        return _difference(expected, results, TOLERANCE.get(self.precision, 1e-2))


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if len(text) < 160 else f"{text[:160]}..."


@contextmanager
def removed(model: nn.Module, ways: Sequence[Way]) -> Any:
    """Bypass the modules of several blocks for the duration of the block of code; outer modules cover inner ones."""
    with ExitStack() as stack:
        stack.enter_context(bypassed(model, merged(ways)))
        yield model


def merged(ways: Sequence[Way]) -> dict[str, Any]:
    """All modules that go, without those inside of others."""
    together = {path: returned for way in ways for path, returned in way.items()}
    return {
        path: returned
        for path, returned in together.items()
        if not any(path.startswith(f"{other}.") for other in together)
    }


def _difference(expected: Sequence[Tensor], results: Sequence[Tensor], tolerance: float) -> str:
    if len(expected) != len(results):
        return (
            f"an output would be lost: the call returns {len(expected)} tensors, and {len(results)} without it; if "
            "these are a cache, give example inputs with use_cache=False"
        )
    for place, (before, after) in enumerate(zip(expected, results, strict=True)):
        if before.shape != after.shape:
            return f"output {place} would have shape {tuple(after.shape)} instead of {tuple(before.shape)}"
        if not before.numel():
            continue
        old, new = (
            (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()
            for value in (before, after)
        )
        if not torch.equal(old.isfinite(), new.isfinite()):
            return f"output {place} would not be finite"
        old, new = (value.nan_to_num(0.0, 0.0, 0.0) for value in (old, new))
        error = float((old - new).norm() / old.norm().clamp(min=1e-12))
        if error > tolerance:
            return f"output {place} would differ by {error:.1e} of its norm from that of a zero branch"
    return ""
