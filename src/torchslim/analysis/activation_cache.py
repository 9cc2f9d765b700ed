"""Runs changed copies of a model, with cached outputs for modules that finish before the change takes effect.

The model may be any module with any Python code in it. One watched run records when each module was entered and left,
and when each weight was first used. A module that was called once, and was left before the first changed weight was
used, returns its cached output. Only outputs that something reads are cached; the others are replaced by placeholders
of their shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchslim.core.batches import call, predictor
from torchslim.core.trees import changed, tensors
from torchslim.prune.dependency.leaves import leaves

LIMIT = 2**30  # bytes of cached outputs


@dataclass
class Call:
    """One call of a module in a run: its start, its end, and the calls inside."""

    path: str
    entered: int
    left: int = 0
    inside: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """Record of one run of a model, with times in ticks of its own clock."""

    root: Call
    used: dict[str, int]  # time of first use by weight
    able: frozenset[str]  # modules that were called once and returned only tensors

    def begins(self, weights: Collection[str], modules: Collection[str]) -> int:
        """First time at which a change of these weights and of these modules' attributes may take effect.

        0 if it is not known.
        """
        entered = {record.path: record.entered for record in reversed(list(_walk(self.root)))}
        times = [self.used.get(name, 0) for name in weights]
        for path in modules:
            while path and path not in entered:  # never called: its parent reads from it
                path = path.rpartition(".")[0]
            times.append(entered.get(path, 0))
        return min(times, default=0)

    def before(self, time: int) -> list[str]:
        """Paths of the outermost modules that can return a cached output and were left before a time."""
        paths: list[str] = []

        def look(call: Call) -> None:
            if call.left <= time and call.path in self.able:
                paths.append(call.path)
            elif call.entered < time:
                for inner in call.inside:
                    look(inner)

        look(self.root)
        return paths


def story_of(model: nn.Module, inputs: Any) -> Story:
    """Run a model once and record the times of its calls and of the first use of its weights."""
    clock = [0]
    root = Call("", 0)
    stack, calls = [root], Counter[str]()
    opaque: set[str] = set()
    names = {id(weight): name for name, weight in (*model.named_parameters(), *model.named_buffers())}
    used: dict[str, int] = {}

    def tick() -> int:
        clock[0] += 1
        return clock[0]

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor) and id(leaf) in names:
                    used.setdefault(names[id(leaf)], tick())
            return func(*args, **(kwargs or {}))

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(Call(path, tick()))
            stack[-2].inside.append(stack[-1])
            calls[path] += 1

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        ended = stack.pop()
        ended.left = tick()
        if not _plain(output):
            opaque.add(ended.path)

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
    try:
        with Watching():
            call(predictor(model), inputs)
    finally:
        for handle in handles:
            handle.remove()
    root.left = tick()
    return Story(root, used, frozenset(path for path, count in calls.items() if count == 1) - opaque)


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A changed copy of a model, and the time at which the change takes effect (see `Story.begins`)."""

    model: nn.Module
    begins: int = 0


@dataclass
class Replays:
    """Runs of changed copies of a model on several inputs.

    Args:
        model: in eval mode; calls of its modules are replaced during a run.
        inputs: model inputs, one for each run.
        example: small inputs, on which it is tested which modules can return cached outputs.
        limit: bytes of outputs that may be cached.
    """

    model: nn.Module
    inputs: Sequence[Any]
    example: Any
    limit: int = LIMIT
    held: list[dict[str, Any]] = field(init=False)  # cached outputs by module path, for each of the inputs
    time: int = field(default=0, init=False)  # modules that were left before it are cached

    def __post_init__(self) -> None:
        self.held = [{} for _ in self.inputs]
        self.known: dict[str, Any] = {}  # cached outputs on the example, by module path
        self.story = story_of(self.model, self.example)
        self.expected = call(predictor(self.model), self.example)

    def outputs(self, change: Changed | None = None) -> Iterator[Any]:
        """Outputs of a copy, or of the model itself; changes are cheapest in the order of their times."""
        if change is None:
            yield from (call(predictor(self.model), input_) for input_ in self.inputs)
            return
        if change.begins > self.time:
            self._advance(change.begins)
        for inputs, held in zip(self.inputs, self.held, strict=True):
            cached = held if change.begins >= self.time else {}
            with answering(change.model, cached):
                output = call(predictor(change.model), inputs)
            if cached and not _finite(output):  # a placeholder was read after all
                output = call(predictor(change.model), inputs)
            yield output

    def answer(self, change: Changed | None, inputs: Any) -> Any:
        """Outputs on any inputs, without cached outputs."""
        return call(predictor(self.model if change is None else change.model), inputs)

    def _advance(self, time: int) -> None:
        """Cache the outputs of the modules that were left before a time, if memory allows."""
        paths = self.story.before(time)
        missing = [path for path in paths if path not in self.known]
        first = self._record(self.example, self.known, missing)
        if not missing or first is None:
            return
        everything = {path: first[path] if path in first else self.known[path] for path in paths}
        read, output = self._read(everything)
        pairs = zip(tensors(self.expected), tensors(output), strict=True)
        if not all(torch.equal(one, two) for one, two in pairs):
            return
        later: list[dict[str, Any]] = []
        for inputs, held in zip(self.inputs, self.held, strict=True):
            recorded = self._record(inputs, held, [path for path in missing if path in read])
            if recorded is None:
                return
            answers = {path: recorded[path] if path in recorded else held[path] for path in paths if path in read}
            size = sum(tensor.untyped_storage().nbytes() for answer in answers.values() for tensor in tensors(answer))
            if size * len(self.inputs) > self.limit:
                return
            later.append({path: answers.get(path, _standing_for(everything[path])) for path in paths})
        self.held, self.known, self.time = later, everything, time

    def _record(self, inputs: Any, held: dict[str, Any], paths: Collection[str]) -> dict[str, Any] | None:
        """Outputs of modules by path, from a run that stops after the last of them; None if one of them did not run."""
        outputs: dict[str, Any] = {}
        if not paths:
            return outputs
        handles = []

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[path] = changed(output, lambda tensor: tensor.detach().clone())  # the next may work in place
                if len(outputs) == len(paths):
                    raise _Enough

            return hook

        modules = dict(self.model.named_modules())
        try:
            handles = [modules[path].register_forward_hook(keep(path)) for path in paths]
            with answering(self.model, held):
                call(predictor(self.model), inputs)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return outputs if len(outputs) == len(paths) else None

    def _read(self, held: dict[str, Any]) -> tuple[set[str], Any]:
        """Paths of the cached outputs that are read in a run on the example, and the output of this run."""
        read: set[str] = set()
        owners: dict[int, str] = {}
        alive = []

        def record(path: str, answer: Any) -> None:
            alive.append(answer)  # so that no other tensor gets its id
            owners.update({id(tensor): path for tensor in tensors(answer)})

        class Reading(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                read.update(owners[id(leaf)] for leaf in leaves((args, kwargs or {})) if id(leaf) in owners)
                return func(*args, **(kwargs or {}))

        with answering(self.model, held, record), Reading():
            output = call(predictor(self.model), self.example)
        read |= {owners[id(tensor)] for tensor in tensors(output) if id(tensor) in owners}
        return read, output


@contextmanager
def answering(
    model: nn.Module, held: dict[str, Any], given: Callable[[str, Any], None] | None = None
) -> Iterator[None]:
    """Let modules return copies of cached outputs inside the block; copies, because a reader may work in place."""
    modules = [(path, model.get_submodule(path)) for path in held]

    def answer(path: str) -> Callable[..., Any]:
        def respond(*args: Any, **kwargs: Any) -> Any:
            output = changed(held[path], _copy)
            if given is not None:
                given(path, output)
            return output

        return respond

    try:
        for path, module in modules:
            vars(module)["_call_impl"] = answer(path)  # not `forward`: cached outputs include the effect of hooks
        yield
    finally:
        for _, module in modules:
            vars(module).pop("_call_impl", None)


class _Enough(BaseException):
    """Stops a run; no Exception, because the model's own code may catch those."""


def _plain(output: Any) -> bool:
    """Is the output only tensors and None in plain containers, so that a copy can replace it?"""
    if isinstance(output, Tensor):
        return True
    if isinstance(output, (tuple, list)):
        return all(item is None or _plain(item) for item in output)
    return isinstance(output, dict) and all(item is None or _plain(item) for item in output.values())


def _standing_for(output: Any) -> Any:
    """Placeholders with the shapes of an output but not its memory: NaN for floats, else 0."""

    def empty(tensor: Tensor) -> Tensor:
        value = float("nan") if tensor.is_floating_point() else 0
        return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    return changed(output, empty)


def _copy(tensor: Tensor) -> Tensor:
    is_placeholder = tensor.numel() > 1 and not any(tensor.stride())
    return tensor if is_placeholder else tensor.clone()


def _finite(output: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors(output) if tensor.is_floating_point())


def _walk(call: Call) -> Iterator[Call]:
    yield call
    for inner in call.inside:
        yield from _walk(inner)
