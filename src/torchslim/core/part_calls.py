"""Calls of parts, recorded while the whole model runs.

So the example inputs of a part and its calibration data are those that the whole model gives it.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchslim.core.batches import EXAMPLES, Batch, batch_size, call, predictor, spanning
from torchslim.core.object_states import detached_copy
from torchslim.core.parts import signature_of
from torchslim.core.step import Inputs
from torchslim.core.task import Task
from torchslim.core.tensor_objects import by_structure, holds_objects, named_arguments, unpacked
from torchslim.core.trees import tensors
from torchslim.errors import TaskError

MOST_CALLS = 2_000  # recorded calls of a part that are kept; a seeded sample of all where there are more
MOST_BYTES = 2**31  # of the tensors in them


class Calls:
    """Calls of one part: the inputs of all, or a seeded sample of them where there are very many."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature, self.inputs, self.count, self.bytes = signature, list[Inputs](), 0, 0
        self.random = random.Random(0)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call: a copy, because code may change the arguments in place later."""
        self.count += 1
        place = len(self.inputs)
        if place >= MOST_CALLS or self.bytes > MOST_BYTES:
            place = self.random.randrange(self.count)
            if place >= len(self.inputs):
                return
        inputs = self._named(detached_copy(args), detached_copy(kwargs))
        self.bytes += sum(tensor.nbytes for tensor in tensors(unpacked(inputs)))
        if place < len(self.inputs):
            self.inputs[place] = inputs
        else:
            self.inputs.append(inputs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Positional arguments alone, or all arguments by name: either form that example inputs may have."""
        return named_arguments(self.signature, args, kwargs) if kwargs or holds_objects(args) else args


@contextmanager
def recording(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Calls]]:
    """Record the calls of parts while the block runs the model; by path."""
    calls: dict[str, Calls] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path) if path else model
        calls[path] = record = Calls(signature_of(module))

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], record: Calls = record) -> None:
            record.add(args, kwargs)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: nn.Module, task: Task, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, list[Inputs]]:
    """Inputs of every call of the parts while the task's metric is computed on the batches.

    The metric runs the model as it will be used. A metric that cannot be computed on so few batches counts as far as it
    got; where it calls a part not at all, the model is called on the batches' inputs, as in a training.

    Raises:
        TaskError: neither calls the part.
    """
    predict = predictor(model)
    with recording(model, paths) as calls:
        failure: Exception | None = None
        try:
            task.as_metric().fn(predict, list(batches))
        except Exception as error:  # noqa: BLE001 - a user's metric may raise anything on a few batches
            failure = error
        if not all(record.count for record in calls.values()):
            for batch in batches:
                task.forward(predict, batch)
    for path, record in calls.items():
        if not record.count:
            why = f" (the metric raised {type(failure).__name__}: {failure})" if failure else ""
            raise TaskError(
                f"part {path!r} is never called by the metric or on the inputs of a batch{why}; name a submodule that "
                "is called itself, not only through its methods or weights"
            )
    return {path: record.inputs for path, record in calls.items()}


def recorded_calls(model: nn.Module, paths: Sequence[str], inputs: Sequence[Inputs]) -> dict[str, list[Inputs]]:
    """Inputs of every call of the parts while the model runs on the given inputs.

    Raises:
        TaskError: a part is never called.
    """
    predict = predictor(model)
    with recording(model, paths) as calls:
        for given in inputs:
            if isinstance(given, Mapping) and "method" in given:  # as in `Task.examples`
                _method(model, predict, given["method"])(*given.get("args", ()), **given.get("kwargs", {}))
            else:
                call(predict, given)
    if silent := next((path for path, record in calls.items() if not record.count), None):
        raise TaskError(
            f"part {silent!r} is never called when the model runs on the example inputs; name a submodule that is "
            "called itself, not only through its methods or weights"
        )
    return {path: record.inputs for path, record in calls.items()}


def _method(model: nn.Module, predict: Any, name: Any) -> Callable[..., Any]:
    """A method of the model by name.

    Raises:
        TaskError: the model has no such method; names near ones.
    """
    if not (isinstance(name, str) and callable(getattr(model, name, None))):
        near = difflib.get_close_matches(str(name), [known for known in dir(model) if not known.startswith("_")])
        raise TaskError(
            f"an example names the method {name!r}, which {type(model).__name__} does not have"
            + (f"; near names: {', '.join(near)}" if near else "; name a method that runs the model")
        )
    method: Callable[..., Any] = getattr(predict, name)
    return method


def examples_of_part(calls: Sequence[Inputs]) -> list[Inputs]:
    """Up to `EXAMPLES` calls of the most frequent structure, whose sizes span those of all, then one of each other."""
    frequent, *others = by_structure(calls)
    return [*spanning(frequent, EXAMPLES, unpacked), *(group[0] for group in others)]


def first_samples(calls: Sequence[Inputs], samples: int) -> list[Inputs]:
    """The first calls that hold at least `samples` samples."""
    chosen: list[Inputs] = []
    count = 0
    for inputs in calls:
        if count >= samples:
            break
        chosen.append(inputs)
        count += batch_size(inputs)
    return chosen
