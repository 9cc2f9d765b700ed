"""A model as a graph: `torch.export`, tried the ways that work, with the batch dimension left free.

Every program takes its input tensors flat and by position, and gives its output tensors as one tuple, whatever the
model takes and gives: the contract of a `.pt2` is that of a `.onnx`. The structures around the tensors are kept
beside the program.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from torchslim.core.isolation import preserved_globals, quiet, unfused_attention
from torchslim.core.step import Inputs
from torchslim.core.task import device_of, to_device
from torchslim.errors import ExportError
from torchslim.graph.io_structure import Structure, build, describe

TORCH = Path(torch.__file__).parent
OURS = Path(__file__).parents[1]
CERTAIN = 1e-3  # so near to one another samples are the same; else the next axis may be nearer
WRAPPED = "model."  # what the names of a captured model's modules start with inside its program


@dataclass(frozen=True, kw_only=True)
class Captured:
    """An exported program and how it is called.

    `names` are the parameters of the model's forward in order; `inputs` and `outputs` the structures of what goes in
    (a dict by those names) and comes out; `batch_axis` the dimension of the inputs that is free, None when fixed.
    `example` are inputs of the sizes that the program was captured with, `given` those that the caller gave.
    """

    program: ExportedProgram
    names: tuple[str, ...]
    inputs: Structure
    outputs: Structure
    classes: Mapping[str, type]
    example: Mapping[str, Any]
    given: Mapping[str, Any]
    batch_axis: int | None
    notes: tuple[str, ...] = ()

    def inputs_of_program(self) -> list[Any]:
        """The example values of the program's inputs, whose sizes are symbols where they are free."""
        wanted = set(self.program.graph_signature.user_inputs)
        return [
            node.meta["val"] for node in self.program.graph.nodes if node.op == "placeholder" and node.name in wanted
        ]

    def outputs_of_program(self) -> list[Tensor]:
        """The example values of the program's outputs that are tensors."""
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes}
        found = [values.get(each) for each in self.program.graph_signature.user_outputs if isinstance(each, str)]
        return [each for each in found if isinstance(each, Tensor)]


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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and afterwards the buffers and the random state are as before: a forward pass may change both."""
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    with preserved_globals(), evaluating(model):
        try:
            yield
        finally:
            for module, name, buffer, version, value in before:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


def capture(
    model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any = "batch", *, outside: torch.dtype | None = None
) -> Captured:
    """Export `model` in eval mode, for the CPU; the model is left as it was, and shares no memory with the program.

    Args:
        model: any module, a quantized one included.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        dynamic_shapes: "batch" finds the batch dimension by running two batch sizes and leaves it free (where the
            model's own code fixes it, the program is captured with a fixed batch and says so in its notes); None
            fixes every size; anything else is read as `torch.export.export` reads it.
        outside: the program takes and gives floating-point tensors of this type, and computes in the model's, float32.

    Raises:
        ExportError: naming the line of the model's code that cannot be captured.
    """
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "batch":
        raise ExportError(f"dynamic_shapes must be 'batch', None or a torch.export spec, got {dynamic_shapes!r}")
    return capture_bound(model, bind(model, example_inputs), dynamic_shapes, outside)


def capture_bound(
    model: nn.Module, named: Mapping[str, Any], dynamic_shapes: Any = "batch", outside: torch.dtype | None = None
) -> Captured:
    """`capture` with inputs by the names of the model's forward."""
    bound = to_device(dict(named), device_of(model))
    classes: dict[str, type] = {}
    leaves: list[Tensor] = []
    inputs: Structure = {
        "dict": {name: describe(value, leaves, classes, f"input {name!r}") for name, value in bound.items()}
    }
    leaves = [leaf.detach().clone() for leaf in leaves]
    flat = Flat(model, inputs, classes, outside)
    axis: int | None = None
    notes: list[str] = []
    spec: list[Any] | None = None
    with untouched(model), unfused_attention():
        whole = leaves
        if dynamic_shapes == "batch":
            axis, leaves, spec = find_batch_axis(flat, whole)
            if axis is None:
                notes.append("no batch dimension was found: the sizes are fixed at those of the example inputs")
        elif dynamic_shapes is not None:
            spec = _user_spec(flat, dynamic_shapes, bound)
        try:
            result = flat.natural(leaves)
        except Exception as error:
            raise ExportError(
                f"the model fails on its example inputs at {user_line(error)}: {_first(error)}"
            ) from error
        outputs = describe(result, [], classes)
        program, failure = _export(flat, leaves, spec)
        if program is None and axis is not None:
            fixed, _ = _export(flat, whole, None)
            if fixed is not None:
                size = next(leaf.shape[axis] for leaf, each in zip(whole, spec or (), strict=True) if each)
                notes.append(f"the model's code fixes the batch size ({failure}): captured with batch size {size}")
                program, axis, leaves = fixed, None, whole
    if program is None:
        raise ExportError(f"torch.export cannot capture the model; {failure}")
    return Captured(
        program=_own(program),
        names=tuple(bound),
        inputs=inputs,
        outputs=outputs,
        classes=classes,
        example=build(inputs, [leaf.cpu() for leaf in leaves], classes),
        given=build(inputs, [leaf.cpu() for leaf in whole], classes),
        batch_axis=axis,
        notes=tuple(notes),
    )


class Flat(nn.Module):
    """A model as a function of flat tensors, giving flat tensors: what is exported."""

    def __init__(
        self, model: nn.Module, inputs: Structure, classes: Mapping[str, type], outside: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.inputs, self.classes, self.outside = inputs, classes, outside

    def natural(self, leaves: Sequence[Tensor]) -> Any:
        """What the model itself returns."""
        if self.outside is not None:
            leaves = [leaf.float() if leaf.dtype == self.outside else leaf for leaf in leaves]
        args, kwargs = positional(self.model, build(self.inputs, leaves, self.classes))
        return self.model(*args, **kwargs)

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        answers = tensors_of(self.natural(leaves))
        if self.outside is not None:
            answers = [each.to(self.outside) if each.dtype == torch.float32 else each for each in answers]
        return tuple(answers)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output, in its structure's order."""
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return leaves


def bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names of the model's forward, defaults included (varargs as one tuple, extra keywords as a dict).

    Raises:
        ExportError: when they do not fit the forward's signature, or hold no tensor.
    """
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise ExportError(
            "example inputs must be a tuple of positional or a dict of keyword arguments, got "
            f"{type(inputs).__name__}; put a single input in a tuple: (x,)"
        )
    signature = signature_of(model)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        named = bind_call(signature, args, kwargs)
    except TypeError as error:
        raise ExportError(
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}; give them as it takes them"
        ) from error
    leaves: list[Tensor] = []
    for name, value in named.items():
        describe(value, leaves, {}, f"input {name!r}")
    if not leaves:
        raise ExportError("example inputs hold no tensor; give at least one")
    return named


def bind_call(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those left out (but defaults that JSON cannot hold)."""
    bound = signature.bind(*args, **kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name in given or _plain(value)}


def _plain(value: Any) -> bool:
    leaves: list[Tensor] = []
    try:
        describe(value, leaves, {})
    except ExportError:
        return False
    return not leaves


def signature_of(model: nn.Module) -> inspect.Signature:
    """How the model's forward is called; a converted graph remembers that of the model it was made from."""
    remembered = getattr(model, "forward_signature", None)
    return remembered if isinstance(remembered, inspect.Signature) else inspect.signature(model.forward)


def positional(model: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bound arguments as what the model is called with."""
    bound = inspect.BoundArguments(signature_of(model), dict(named))
    return bound.args, bound.kwargs


def find_batch_axis(
    flat: Flat, leaves: Sequence[Tensor]
) -> tuple[int | None, list[Tensor], list[dict[int, Any] | None] | None]:
    """The axis along which samples are independent, two of the example's samples, and which sizes are free.

    For axis 0 and then 1, and each size that an input has there, the model runs on three samples and on two of them
    in another order: where the outputs are the same samples in that order, the axis is the batch. Where they are only
    nearly the same, as those of integers or of a causal sequence are, the nearest axis is it. Without one: None, the
    example as it is, None.
    """
    order = torch.tensor([2, 0])
    best: tuple[float, tuple[int, list[Tensor], list[dict[int, Any] | None]]] | None = None
    for axis in (0, 1):
        for size in dict.fromkeys(leaf.shape[axis] for leaf in leaves if leaf.dim() > axis):
            batched = [leaf.dim() > axis and leaf.shape[axis] == size for leaf in leaves]
            three = [_samples(leaf, axis, 3) if each else leaf for leaf, each in zip(leaves, batched, strict=True)]
            two = [_pick(leaf, axis, order) if each else leaf for leaf, each in zip(three, batched, strict=True)]
            try:
                full, part = flat(*three), flat(*two)
            except Exception:  # noqa: BLE001 - whatever is raised, this axis cannot vary
                continue
            if len(full) != len(part) or all(a.shape == b.shape for a, b in zip(full, part, strict=True)):
                continue
            apart = max(_apart(*each, order) for each in zip(full, part, strict=True))
            if apart <= 1 and (best is None or apart < best[0]):
                index = torch.arange(2) % max(size, 1)
                example = [
                    _pick(leaf, axis, index) if each else leaf for leaf, each in zip(leaves, batched, strict=True)
                ]
                best = apart, (axis, example, [{axis: Dim.DYNAMIC} if each else None for each in batched])
                if apart <= CERTAIN:
                    return best[1]
    if best is not None:
        return best[1]
    return None, list(leaves), None


def user_line(error: BaseException) -> str:
    """The innermost line outside torch that an error passed through, as 'file:line in function: code'."""
    found = None
    current: BaseException | None = error
    while current is not None and found is None:
        own = [
            frame
            for frame in traceback.extract_tb(current.__traceback__)
            if not {TORCH, OURS} & set(Path(frame.filename).parents) and not frame.filename.startswith("<")
        ]
        found = own[-1] if own else None
        current = current.__cause__ or current.__context__
    if found is None:
        # strict export quotes the frames in its message
        quoted = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
        own_lines = [line for line in quoted if str(TORCH) not in line and str(OURS) not in line]
        return own_lines[-1] if own_lines else "an unknown line"
    return f"{found.filename}:{found.lineno} in {found.name}: {found.line}"


def layer_of(node: Node) -> str:
    """The path of the module that a node of a captured program belongs to; the node's name where there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    return scope_path([entry[0] for entry in stack.values() if entry[0]]) or node.name


def scope_path(scopes: Sequence[str]) -> str:
    """The innermost of nested module paths, without the module that wraps a captured model."""
    path = f"{scopes[-1] if scopes else ''}.".removeprefix("L['self'].").removeprefix(WRAPPED)
    return path.removesuffix(".")


def _export(flat: Flat, leaves: Sequence[Tensor], spec: list[Any] | None) -> tuple[ExportedProgram | None, str]:
    shapes = None if spec is None else {"leaves": tuple(spec)}
    failure = ""
    for strict in (False, True):
        try:
            with quiet(), contextlib.nullcontext() if strict else _layers_remembered(flat):
                return torch.export.export(flat, tuple(leaves), dynamic_shapes=shapes, strict=strict), ""
        except Exception as error:  # noqa: BLE001 - torch.export raises many kinds; all become one message
            failure = failure or f"{user_line(error)}: {_advice(error) or _first(error)}"
    return None, failure


def _advice(error: BaseException) -> str:
    """What to write in place of packed sequences, where the error is about them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        packs = path == TORCH / "nn" / "utils" / "rnn.py"
        if packs or (path == TORCH / "nn" / "modules" / "rnn.py" and frame.f_locals.get("batch_sizes") is not None):
            return (
                "packed sequences have sizes that depend on the data; call the layer on the padded batch and take each "
                "sequence's last step, outputs[torch.arange(len(outputs)), lengths - 1] (batch first; for the backward "
                "direction, reverse each sequence within its length first)"
            )
    return ""


@contextmanager
def _layers_remembered(flat: Flat) -> Iterator[None]:
    """Inside, graphs that the model holds (a quantized model is one) hand on which layer each node comes from."""
    graphs = [module for module in flat.modules() if isinstance(module, GraphModule)]

    def run(graph: GraphModule) -> Any:
        def forward(*args: Any) -> Any:
            with preserve_node_meta():
                return Interpreter(graph).run(*args)

        return forward

    for each in graphs:
        each.forward = run(each)
    try:
        yield
    finally:
        for each in graphs:
            del each.forward


def _own(program: ExportedProgram) -> ExportedProgram:
    """The program on the CPU and with its own weights: the model may go on training after the capture."""
    if any(each.device.type != "cpu" for each in program.state_dict.values()):
        from torch.export.passes import move_to_device_pass

        with quiet():
            program = move_to_device_pass(program, "cpu")
    copies: dict[int, Tensor] = {}
    for owner in (program.state_dict, program.constants):
        for name, value in owner.items():
            if isinstance(value, Tensor):
                if id(value) not in copies:  # tied weights stay tied
                    copy = value.detach().clone()
                    copies[id(value)] = nn.Parameter(copy, False) if isinstance(value, nn.Parameter) else copy
                owner[name] = copies[id(value)]
    return program


def _user_spec(flat: Flat, spec: Any, bound: Mapping[str, Any]) -> list[Any]:
    """A dynamic_shapes argument as one entry for each tensor."""
    args, kwargs = positional(flat.model, bound)
    if hasattr(spec, "dynamic_shapes"):  # torch.export.ShapesCollection, AdditionalInputs
        spec = spec.dynamic_shapes(flat.model, args, kwargs)
    if isinstance(spec, (tuple, list)):
        spec = dict(zip(bound, spec, strict=False))
    if not isinstance(spec, Mapping) or not set(spec) <= set(bound):
        raise ExportError(
            f"dynamic_shapes must be 'batch', None, or name the inputs {', '.join(bound)} as torch.export wants it; "
            f"got {spec!r}"
        )
    entries: list[Any] = []
    for name, structure in flat.inputs["dict"].items():
        _spread(structure, spec.get(name), entries, name)
    return entries


def _spread(structure: Structure, spec: Any, entries: list[Any], path: str) -> None:
    kind = next(iter(structure))
    if kind == "tensor":
        entries.append(spec)
        return
    if kind in ("const", "float"):
        return
    content = structure["fields"] if kind in ("named", "record") else structure[kind]
    inner = content if isinstance(content, dict) else dict(enumerate(content))
    if spec is not None and not isinstance(spec, (tuple, list, Mapping)):
        raise ExportError(f"dynamic_shapes of {path} must be nested as the input is, got {spec!r}")
    given = spec if isinstance(spec, Mapping) else dict(zip(inner, spec or (), strict=False))
    for key, each in inner.items():
        _spread(each, given.get(key), entries, f"{path}[{key!r}]")


def _first(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _samples(leaf: Tensor, axis: int, count: int) -> Tensor:
    """`count` samples along the axis; real values are scaled so that samples differ even where the example's do not."""
    taken = _pick(leaf, axis, torch.arange(count) % max(leaf.shape[axis], 1))
    if leaf.is_floating_point():
        view = [1] * leaf.dim()
        view[axis] = count
        taken = taken * (1 - 0.25 * torch.arange(count, device=leaf.device, dtype=leaf.dtype)).view(view)
    return taken


def _pick(leaf: Tensor, axis: int, order: Tensor) -> Tensor:
    return leaf.index_select(axis, order.to(leaf.device))


def _apart(full: Tensor, part: Tensor, order: Tensor) -> float:
    """How far `part` is from the samples `order` of `full` along some axis; above 1 it is not them.

    0 where this output does not vary at all, infinite where the shapes tell.
    """
    if full.shape == part.shape:
        return 0.0
    found = math.inf
    for axis in range(full.dim()):
        expected = [*full.shape]
        expected[axis] = len(order)
        if full.shape[axis] == 3 and list(part.shape) == expected:
            double = full.double().nan_to_num()
            picked = double.index_select(axis, order.to(full.device))
            error = (picked - part.double().nan_to_num()).square().sum()
            # what a sample's own data changes, not what a bias gives to all of them
            differences = (double - double.mean(axis, keepdim=True)).square().sum()
            # kernels differ with the batch size, and in a quantized model one rounding moves a whole step
            found = min(found, float(error / (0.1 * differences + 1e-10 * picked.square().sum() + 1e-20)))
    return found
