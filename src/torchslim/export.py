"""A model as a graph: `torch.export`, tried the ways that work, with the batch dimension left free."""

from __future__ import annotations

import inspect
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from torchslim.errors import ExportError
from torchslim.isolation import quiet
from torchslim.steps import Inputs
from torchslim.structure import Structure, describe
from torchslim.task import tensors

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Captured:
    """An exported program and how it is called.

    `names` are the parameters of the model's forward in order; `inputs` and `outputs` the structures of what goes in
    (a dict by those names) and comes out; `batch_axis` the dimension of the inputs that is free, None when fixed.
    """

    program: ExportedProgram
    names: tuple[str, ...]
    inputs: Structure
    outputs: Structure
    classes: Mapping[str, type]
    example: Mapping[str, Any]
    batch_axis: int | None
    notes: tuple[str, ...] = ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's mode is as before afterwards."""
    modes = [module for module in model.modules() if module.training]
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modes:
            module.training = True


def capture(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any = "batch") -> Captured:
    """Export `model` in eval mode; the model is left as it was.

    Args:
        model: any module, a quantized one included.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        dynamic_shapes: "batch" finds the batch dimension by running two batch sizes and leaves it free (where the
            model's own code fixes it, the program is captured with a fixed batch and says so in its notes); None
            fixes every size; anything else goes to `torch.export.export` as it is.

    Raises:
        ExportError: naming the line of the model's code that cannot be captured.
    """
    bound = bind(model, example_inputs)
    example: dict[str, Any] = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), bound)
    axis: int | None = None
    spec, notes = dynamic_shapes, []
    with evaluating(model):
        if isinstance(dynamic_shapes, str) and dynamic_shapes == "batch":
            whole = example
            axis, example = find_batch_axis(model, whole)
            spec = None
            if axis is None:
                notes.append(
                    "no batch dimension was found: the sizes are fixed at those of the example inputs"
                )
            else:
                spec = pytree.tree_map(lambda leaf: _free(leaf, axis, 2), example)
        elif isinstance(dynamic_shapes, str):
            raise ExportError(
                f"dynamic_shapes must be 'batch', None or a torch.export spec, got {dynamic_shapes!r}"
            )
        try:
            result = _run(model, example)
        except Exception as error:
            raise ExportError(
                f"the model fails on its example inputs at {user_line(error)}: {_first(error)}"
            ) from error
        leaves: list[Tensor] = []
        classes: dict[str, type] = {}
        outputs = describe(result, leaves, classes)
        # a dataclass that torch does not know cannot be exported, and one that it knows here may be unknown elsewhere
        target = _FlatOutputs(model) if '"record"' in json.dumps(outputs) else model
        program, failure = _export(target, model, example, spec)
        if program is None and axis is not None:
            program, _ = _export(target, model, whole, None)
            if program is not None:
                size = _sizes(whole, axis)[0]
                notes.append(
                    f"the model's code fixes the batch size ({failure}): captured with batch size {size}"
                )
                axis, example = None, whole
        if program is None:
            raise ExportError(f"torch.export cannot capture the model; {failure}")
    given: list[Tensor] = []
    structure = {"dict": {name: describe(value, given, classes, "input") for name, value in example.items()}}
    return Captured(
        program=program,
        names=tuple(example),
        inputs=structure,
        outputs=outputs,
        classes=classes,
        example=example,
        batch_axis=axis,
        notes=tuple(notes),
    )


def bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Example inputs by the names of the model's forward (varargs as one tuple, extra keywords as one dict)."""
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise ExportError(
            f"example inputs must be a tuple of positional or a dict of keyword arguments, got {type(inputs).__name__}"
        )
    if not tensors(inputs):
        raise ExportError("example inputs hold no tensor")
    signature = signature_of(model)
    try:
        bound = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*inputs)
    except TypeError as error:
        raise ExportError(
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    return dict(bound.arguments)


def signature_of(model: nn.Module) -> inspect.Signature:
    """How the model's forward is called; a converted graph remembers that of the model it was made from."""
    remembered = getattr(model, "forward_signature", None)
    return remembered if isinstance(remembered, inspect.Signature) else inspect.signature(model.forward)


def find_batch_axis(model: nn.Module, example: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The axis along which samples are independent, and two of the example's samples (or None and all of them).

    For axis 0 and then 1, the model runs on three samples, and on two of them in another order: where the outputs
    are the same samples in that order, the axis is the batch.
    """
    for axis in (0, 1):
        sizes = _sizes(example, axis)
        if not sizes:
            continue
        three = _samples(example, axis, sizes[0], 3)
        order = torch.tensor([2, 0])
        two = pytree.tree_map(lambda leaf: _pick(leaf, axis, 3, order), three)  # noqa: B023 - used at once
        try:
            full, part = tensors(_leaves(_run(model, three))), tensors(_leaves(_run(model, two)))
        except Exception:  # noqa: BLE001 - whatever is raised, this axis cannot vary
            continue
        if len(full) == len(part) and all(_follows(a, b, order) for a, b in zip(full, part, strict=True)):
            if any(a.shape != b.shape for a, b in zip(full, part, strict=True)):
                return axis, two
    return None, example


def user_line(error: BaseException) -> str:
    """The innermost line outside torch that an error passed through, as 'file:line in function: code'."""
    found = None
    current: BaseException | None = error
    while current is not None and found is None:
        frames = traceback.extract_tb(current.__traceback__)
        own = [
            frame
            for frame in frames
            if TORCH not in Path(frame.filename).parents
            and Path(frame.filename).parent != Path(__file__).parent
            and not frame.filename.startswith("<")
        ]
        found = own[-1] if own else None
        current = current.__cause__ or current.__context__
    if found is None:
        text = str(error)  # strict export quotes the frames in its message
        quoted = [
            line.strip()
            for line in text.splitlines()
            if line.strip().startswith("File ") and str(TORCH) not in line
        ]
        return quoted[-1] if quoted else "an unknown line"
    return f"{found.filename}:{found.lineno} in {found.name}: {found.line}"


class _FlatOutputs(nn.Module):
    """Gives a model's output tensors as a tuple: torch.export refuses dataclasses that nobody registered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(_leaves(self.model(*args, **kwargs)))


def _leaves(value: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return leaves


def _run(model: nn.Module, example: dict[str, Any]) -> Any:
    args, kwargs = positional(model, example)
    return model(*args, **kwargs)


def positional(model: nn.Module, example: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bound arguments as what the model is called with."""
    bound = inspect.BoundArguments(signature_of(model), example)
    return bound.args, bound.kwargs


def _export(
    target: nn.Module, model: nn.Module, example: dict[str, Any], spec: Any
) -> tuple[ExportedProgram | None, str]:
    args, kwargs = positional(model, example)
    if spec is not None and (isinstance(target, _FlatOutputs) or hasattr(model, "forward_signature")):
        # these forward (*args, **kwargs), and torch.export wants the spec in that shape
        by_position, by_keyword = positional(model, spec)
        spec = {"args": by_position, **({"kwargs": by_keyword} if by_keyword else {})}
    failure = ""
    for strict in (False, True):
        try:
            with quiet():
                return torch.export.export(target, args, kwargs, dynamic_shapes=spec, strict=strict), ""
        except Exception as error:  # noqa: BLE001 - torch.export raises many kinds; all become one message
            failure = failure or f"{user_line(error)}: {_first(error)}"
    return None, failure


def _first(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _sizes(example: Any, axis: int) -> list[int]:
    """The size along `axis` of the first tensor that has one, as a list of at most one."""
    return [int(each.shape[axis]) for each in tensors(example) if each.dim() > axis][:1]


def _free(leaf: Any, axis: int, size: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() > axis and leaf.shape[axis] == size:
        return {axis: Dim.DYNAMIC}
    return None


def _samples(example: Any, axis: int, size: int, count: int) -> Any:
    """`count` samples along the axis; where the example has fewer, scaled copies, so that samples differ."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() <= axis or leaf.shape[axis] != size:
            return leaf
        index = torch.arange(count, device=leaf.device) % size
        taken = leaf.index_select(axis, index)
        if size < count and leaf.is_floating_point():
            view = [1] * leaf.dim()
            view[axis] = count
            taken = taken * (1 - 0.25 * torch.arange(count, device=leaf.device, dtype=leaf.dtype)).view(view)
        return taken.clone()

    return pytree.tree_map(resize, example)


def _pick(leaf: Any, axis: int, size: int, order: Tensor) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() > axis and leaf.shape[axis] == size:
        return leaf.index_select(axis, order.to(leaf.device)).clone()
    return leaf


def _follows(full: Tensor, part: Tensor, order: Tensor) -> bool:
    """Is `part` the samples `order` of `full` along some axis (or does this output not vary at all)?"""
    if full.shape == part.shape:
        return True
    for axis in range(full.dim()):
        expected = [*full.shape]
        expected[axis] = len(order)
        if full.shape[axis] == 3 and list(part.shape) == expected:
            picked = full.index_select(axis, order.to(full.device)).double().nan_to_num()
            error = (picked - part.double().nan_to_num()).square().sum()
            # kernels differ with the batch size, and in a quantized model one rounding moves a whole step
            if error <= 1e-2 * picked.square().sum() + 1e-12:
                return True
    return False
