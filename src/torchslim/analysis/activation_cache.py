"""Runs of changed copies of a model, in which modules that ran wholly before the change answer from memory.

The model is any module with any Python code in it. One watched run tells when each module was entered and left, and
when each weight was first used; a module that was called once, and was left before the first changed weight was used,
answers as it did. Of those, only outputs that something reads are held: the others stand for their shapes.
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

LIMIT = 2**30  # bytes of outputs that are held


@dataclass
class Call:
    """One call of a module in a run: when it began and ended, and the calls inside."""

    path: str
    entered: int
    left: int = 0
    inside: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """What one run of a model showed, in ticks of its own clock."""

    root: Call
    used: dict[str, int]  # by weight, when it was first used
    able: frozenset[str]  # modules that were called once, and answered with tensors

    def begins(self, weights: Collection[str], modules: Collection[str]) -> int:
        """When something may first be otherwise, where these weights and these modules' attributes change.

        0 where that is not known.
        """
        entered = {each.path: each.entered for each in reversed(list(_walk(self.root)))}
        times = [self.used.get(name, 0) for name in weights]
        for path in modules:
            while path and path not in entered:  # its parent reads from it
                path = path.rpartition(".")[0]
            times.append(entered.get(path, 0))
        return min(times, default=0)

    def before(self, time: int) -> list[str]:
        """The outermost modules that can answer from memory and were left before a time."""
        found: list[str] = []

        def look(each: Call) -> None:
            if each.left <= time and each.path in self.able:
                found.append(each.path)
            elif each.entered < time:
                for inner in each.inside:
                    look(inner)

        look(self.root)
        return found


def story_of(model: nn.Module, inputs: Any) -> Story:
    """Run a model once and watch it."""
    clock = [0]
    root = Call("", 0)
    stack, calls = [root], Counter[str]()
    opaque: set[str] = set()
    names = {id(each): name for name, each in (*model.named_parameters(), *model.named_buffers())}
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
    """A changed copy of a model, and when in its run the change begins (see `Story.begins`)."""

    model: nn.Module
    begins: int = 0


@dataclass
class Replays:
    """Runs of changed copies of a model on several inputs.

    Args:
        model: in eval mode; its modules are called otherwise for the time of a run.
        inputs: model inputs, one for each run.
        example: small inputs, on which it is found out what may answer from memory.
        limit: bytes of outputs that may be held.
    """

    model: nn.Module
    inputs: Sequence[Any]
    example: Any
    limit: int = LIMIT
    held: list[dict[str, Any]] = field(init=False)  # by input: by module, what it answers
    time: int = field(default=0, init=False)  # what ended before it is held

    def __post_init__(self) -> None:
        self.held = [{} for _ in self.inputs]
        self.known: dict[str, Any] = {}  # as `held`, of the example
        self.story = story_of(self.model, self.example)
        self.expected = call(predictor(self.model), self.example)

    def outputs(self, change: Changed | None = None) -> Iterator[Any]:
        """The outputs of a copy, or those of the model itself; changes are cheapest in the order of their times."""
        if change is None:
            yield from (call(predictor(self.model), input_) for input_ in self.inputs)
            return
        if change.begins > self.time:
            self._advance(change.begins)
        for inputs, held in zip(self.inputs, self.held, strict=True):
            known = held if change.begins >= self.time else {}
            with answering(change.model, known):
                output = call(predictor(change.model), inputs)
            if known and not _finite(output):  # what stands for a shape was read after all
                output = call(predictor(change.model), inputs)
            yield output

    def answer(self, change: Changed | None, inputs: Any) -> Any:
        """The outputs on any inputs."""
        return call(predictor(self.model if change is None else change.model), inputs)

    def _advance(self, time: int) -> None:
        """Hold what the modules before a time answer, where memory allows."""
        paths = self.story.before(time)
        wanted = [path for path in paths if path not in self.known]
        first = self._record(self.example, self.known, wanted)
        if not wanted or first is None:
            return
        everything = {path: first[path] if path in first else self.known[path] for path in paths}
        read, output = self._read(everything)
        pairs = zip(tensors(self.expected), tensors(output), strict=True)
        if not all(torch.equal(one, two) for one, two in pairs):
            return
        later: list[dict[str, Any]] = []
        for inputs, held in zip(self.inputs, self.held, strict=True):
            found = self._record(inputs, held, [path for path in wanted if path in read])
            if found is None:
                return
            answers = {path: found[path] if path in found else held[path] for path in paths if path in read}
            size = sum(tensor.untyped_storage().nbytes() for answer in answers.values() for tensor in tensors(answer))
            if size * len(self.inputs) > self.limit:
                return
            later.append({path: answers.get(path, _standing_for(everything[path])) for path in paths})
        self.held, self.known, self.time = later, everything, time

    def _record(self, inputs: Any, held: dict[str, Any], wanted: Collection[str]) -> dict[str, Any] | None:
        """What modules answer, in a run that ends when the last has; None where one gives something else."""
        found: dict[str, Any] = {}
        if not wanted:
            return found
        handles = []

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[path] = changed(output, lambda each: each.detach().clone())  # the next may work in place
                if len(found) == len(wanted):
                    raise _Enough

            return hook

        modules = dict(self.model.named_modules())
        try:
            handles = [modules[path].register_forward_hook(keep(path)) for path in wanted]
            with answering(self.model, held):
                call(predictor(self.model), inputs)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found if len(found) == len(wanted) else None

    def _read(self, held: dict[str, Any]) -> tuple[set[str], Any]:
        """Which of the answers something reads in a run on the first input, and its output."""
        read: set[str] = set()
        owners: dict[int, str] = {}
        kept = []

        def given(path: str, answer: Any) -> None:
            kept.append(answer)  # alive, so that no other tensor gets its id
            owners.update({id(tensor): path for tensor in tensors(answer)})

        class Reading(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                read.update(owners[id(leaf)] for leaf in leaves((args, kwargs or {})) if id(leaf) in owners)
                return func(*args, **(kwargs or {}))

        with answering(self.model, held, given), Reading():
            output = call(predictor(self.model), self.example)
        read |= {owners[id(tensor)] for tensor in tensors(output) if id(tensor) in owners}
        return read, output


@contextmanager
def answering(
    model: nn.Module, held: dict[str, Any], given: Callable[[str, Any], None] | None = None
) -> Iterator[None]:
    """Inside, these modules answer from memory; each answer is a copy, since what reads it may work in place."""
    modules = [(path, model.get_submodule(path)) for path in held]

    def answer(path: str) -> Callable[..., Any]:
        def respond(*args: Any, **kwargs: Any) -> Any:
            found = changed(held[path], _copy)
            if given is not None:
                given(path, found)
            return found

        return respond

    try:
        for path, module in modules:
            vars(module)["_call_impl"] = answer(path)  # not `forward`: hooks have had their say in what is held
        yield
    finally:
        for _, module in modules:
            vars(module).pop("_call_impl", None)


class _Enough(BaseException):
    """Ends a run; not an Exception, which the model's own code may catch."""


def _plain(output: Any) -> bool:
    """Nothing but tensors, in plain containers: what a copy is as good as."""
    if isinstance(output, Tensor):
        return True
    if isinstance(output, (tuple, list)):
        return all(each is None or _plain(each) for each in output)
    return isinstance(output, dict) and all(each is None or _plain(each) for each in output.values())


def _standing_for(output: Any) -> Any:
    """The shapes of an output without its memory; whoever computes with it gets no numbers."""

    def empty(each: Tensor) -> Tensor:
        value = float("nan") if each.is_floating_point() else 0
        return torch.full((), value, dtype=each.dtype, device=each.device).expand(each.shape)

    return changed(output, empty)


def _copy(each: Tensor) -> Tensor:
    stands = each.numel() > 1 and not any(each.stride())
    return each if stands else each.clone()


def _finite(output: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors(output) if tensor.is_floating_point())


def _walk(each: Call) -> Iterator[Call]:
    yield each
    for inner in each.inside:
        yield from _walk(inner)
