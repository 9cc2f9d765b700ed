"""Capture of a model as a graph: `torch.export`, non-strict and then strict, with the batch dimension left free.

Every program takes its input tensors flat and by position, and returns its output tensors as one tuple, whatever the
model takes and returns: a `.pt2` is called like a `.onnx`. The structures around the tensors are kept beside the
program.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from torchslim.core.isolation import quiet, unfused_attention, untouched
from torchslim.core.step import Inputs
from torchslim.core.trees import device_of, to_device
from torchslim.errors import ExportError
from torchslim.graph.allowed_sizes import refusal
from torchslim.graph.batch_order import drop_batch_order
from torchslim.graph.calling import Flat, bind, examples_of
from torchslim.graph.capture_sizes import FreeSizes, free_sizes_of, other_sizes
from torchslim.graph.dynamic_sizes import (
    fixed_sizes,
    normalized,
    pinned_sizes,
)
from torchslim.graph.io_structure import Structure, build, describe, leaf_names
from torchslim.graph.packed_sequences import drop_unused_cells, packed_as_padded
from torchslim.graph.recurrent_shapes import recurrent_kept_whole
from torchslim.graph.size_guards import InputSizes, guards_of
from torchslim.graph.size_places import places_of_guards, places_recorded

TORCH = Path(torch.__file__).parent
OURS = Path(__file__).parents[1]
WRAPPED = "model."  # prefix of the names of a captured model's modules inside its program


@dataclass(frozen=True, kw_only=True)
class Captured:
    """An exported program and how to call it.

    `names` are the parameters of the model's forward in order; `inputs` (a dict by those names) and `outputs` are the
    structures of the model's inputs and outputs; `batch_axis` is the free dimension of the inputs, None when fixed.
    `example` are inputs of the sizes that the program was captured with, `given` the inputs that the caller passed,
    `variants` flat inputs of further examples of other sizes that the program takes, with as many samples; `guards` the
    relations of free sizes that the program needs.
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
    variants: tuple[tuple[Tensor, ...], ...] = ()
    guards: tuple[str, ...] = ()
    guard_places: Mapping[str, str] = field(default_factory=dict)

    def inputs_of_program(self) -> list[Any]:
        """Return the example values of the program's inputs; free sizes are symbols."""
        input_names = set(self.program.graph_signature.user_inputs)
        return [
            node.meta["val"]
            for node in self.program.graph.nodes
            if node.op == "placeholder" and node.name in input_names
        ]

    @property
    def input_sizes(self) -> InputSizes:
        """Sizes of the flat inputs that the program takes."""
        return InputSizes(sizes=[fixed_sizes(value) for value in self.inputs_of_program()], guards=self.guards)

    @property
    def batched(self) -> list[bool]:
        """Which of the program's inputs have a free batch dimension."""
        axis = self.batch_axis
        return [axis is not None and len(sizes) > axis and sizes[axis] is None for sizes in self.input_sizes.sizes]

    def takes(self, leaves: Sequence[Tensor]) -> bool:
        """Return whether the program takes flat inputs of these sizes."""
        return self.input_sizes.misfit([leaf.shape for leaf in leaves]) is None

    def outputs_of_program(self) -> list[Tensor]:
        """Return the example values of the program's outputs that are tensors."""
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes}
        outputs = [
            values.get(output) for output in self.program.graph_signature.user_outputs if isinstance(output, str)
        ]
        return [value for value in outputs if isinstance(value, Tensor)]


def capture(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    dynamic_shapes: Any = "auto",
    *,
    outside: torch.dtype | None = None,
) -> Captured:
    """Export `model` in eval mode, for the CPU; the model is not modified and shares no memory with the program.

    Args:
        model: any module, quantized or not.
        example_inputs: a tuple of positional or a dict of keyword arguments; for "auto" a list of these, whose sizes
            span those of later calls.
        dynamic_shapes: "batch" finds the batch dimension by running two batch sizes and leaves it free (where the
            model's own code fixes it, the program is captured with a fixed batch, and a note says so); "auto" also
            frees every size that differs between the examples; a dict such as `{"input_ids": [0, 1]}` frees the batch
            and the listed dimensions of inputs; "fixed" or None fixes every size; any other value is read as
            `torch.export.export` reads it.
        outside: type of the program's floating-point inputs and outputs; it computes in the model's type, float32.

    Raises:
        ExportError: naming the line of the model's code that cannot be captured.
    """
    examples = [bind(model, example) for example in examples_of(example_inputs)]
    return capture_bound(model, examples[0], dynamic_shapes, outside, examples[1:])


def capture_bound(
    model: nn.Module,
    named: Mapping[str, Any],
    dynamic_shapes: Any = "auto",
    outside: torch.dtype | None = None,
    others: Sequence[Mapping[str, Any]] = (),
) -> Captured:
    """Export as `capture` does, with inputs by the names of the model's forward; `others` are further examples."""
    bound = to_device(dict(named), device_of(model))
    classes: dict[str, type] = {}
    leaves: list[Tensor] = []
    inputs: Structure = {
        "dict": {name: describe(value, leaves, classes, f"input {name!r}") for name, value in bound.items()}
    }
    given = [leaf.detach().clone() for leaf in leaves]
    flat = Flat(model, inputs, classes, outside)
    with untouched(model), unfused_attention():
        sizes = free_sizes_of(flat, given, normalized(dynamic_shapes), bound, others)
        try:
            result = flat.natural(sizes.leaves)
        except Exception as error:
            raise ExportError(
                f"the model fails on its example inputs at {user_line(error)}: {_first(error)}"
            ) from error
        outputs = describe(result, [], classes)
        program, sizes = _program(flat, sizes, given)
    example = sizes.sampled(given) if sizes.variants else sizes.leaves
    guards = guards_of(program, sizes.axis)
    captured = Captured(
        program=own(program),
        names=tuple(bound),
        inputs=inputs,
        outputs=outputs,
        classes=classes,
        example=build(inputs, [leaf.cpu() for leaf in example], classes),
        given=build(inputs, [leaf.cpu() for leaf in given], classes),
        batch_axis=sizes.axis,
        notes=sizes.notes,
        guards=guards,
        guard_places=places_of_guards(program, guards),
    )
    return _with_examples(captured, example, [sizes.sampled(variant) for variant in sizes.variants], sizes.leaves)


def _with_examples(
    captured: Captured, first: list[Tensor], others: Sequence[list[Tensor]], largest: list[Tensor]
) -> Captured:
    """The capture with the examples that its program takes; notes name relations of sizes that keep one out."""
    takes, names = captured.input_sizes, leaf_names(captured.inputs)
    notes, taken = list(captured.notes), list[list[Tensor]]()
    for leaves in (first, *others):
        shapes = [leaf.shape for leaf in leaves]
        misfit = takes.misfit(shapes)
        if misfit is None:
            taken.append(leaves)
        elif isinstance(misfit, str):  # a size that is fixed has its note
            notes.append(f"an example is refused: {refusal(takes, shapes, names, captured.guard_places)}")
    example = taken[0] if taken else largest
    return replace(
        captured,
        example=build(captured.inputs, [leaf.cpu() for leaf in example], captured.classes),
        variants=other_sizes(example, taken),
        notes=tuple(dict.fromkeys(notes)),
    )


def _program(flat: Flat, sizes: FreeSizes, given: list[Tensor]) -> tuple[ExportedProgram, FreeSizes]:
    """Export with all free sizes, else with the batch alone free, else with fixed sizes.

    Raises:
        ExportError: none of these can be captured.
    """
    program, failure = _export(flat, sizes.leaves, sizes.spec)
    if program is None and sizes.axis is not None and sizes.spec != sizes.batch:
        note = f"only the batch can be free, not further sizes ({failure})"
        sizes = replace(sizes, spec=sizes.batch, notes=(*sizes.notes, note))
        program, failure = _export(flat, sizes.leaves, sizes.spec)
    if program is None and sizes.axis is not None:
        batched = zip(given, sizes.spec or (), strict=True)
        size = next(leaf.shape[sizes.axis] for leaf, free in batched if free)
        note = f"the model's code fixes the batch size ({failure}): captured with batch size {size}"
        sizes = replace(sizes, leaves=given, axis=None, spec=None, notes=(*sizes.notes, note))
        program, _ = _export(flat, given, None)
    if program is None:
        raise ExportError(f"torch.export cannot capture the model; {failure}")
    if sizes.spec is not None and sizes.spec != sizes.batch and (sizes.variants or sizes.batch is not None):
        pinned = pinned_sizes(sizes.spec, program, leaf_names(flat.inputs))
        sizes = replace(sizes, notes=(*sizes.notes, *pinned))
    return program, sizes


def module_of(program: ExportedProgram) -> GraphModule:
    """Return a module that runs the program's nodes, without PyTorch's checks of input sizes.

    Those also check relations that hold for the example by chance; callers check `sizes` and `guards` themselves.
    """
    module = program.module(check_guards=False)
    module._forward_pre_hooks.clear()
    return module


def user_line(error: BaseException) -> str:
    """Return the innermost line outside torch and torchslim in a traceback, as 'file:line in function: code'."""
    innermost = None
    current: BaseException | None = error
    seen: set[int] = set()  # the causes of errors that are raised again may form a circle
    while current is not None and innermost is None and id(current) not in seen:
        seen.add(id(current))
        own = [
            frame
            for frame in traceback.extract_tb(current.__traceback__)
            if not {TORCH, OURS} & set(Path(frame.filename).parents) and not frame.filename.startswith("<")
        ]
        innermost = own[-1] if own else None
        current = current.__cause__ or current.__context__
    if innermost is None:
        # strict export quotes the frames in its message
        quoted = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
        own_lines = [line for line in quoted if str(TORCH) not in line and str(OURS) not in line]
        return own_lines[-1] if own_lines else "an unknown line"
    return f"{innermost.filename}:{innermost.lineno} in {innermost.name}: {innermost.line}"


def layer_of(node: Node) -> str:
    """Return the path of the module that a node of a captured program belongs to; the node's name without a module."""
    stack = node.meta.get("nn_module_stack") or {}
    return scope_path([entry[0] for entry in stack.values() if entry[0]]) or node.name


def scope_path(scopes: Sequence[str]) -> str:
    """Return the innermost of nested module paths, without the module that wraps a captured model."""
    path = f"{scopes[-1] if scopes else ''}.".removeprefix("L['self'].").removeprefix(WRAPPED)
    return path.removesuffix(".")


def _export(flat: Flat, leaves: Sequence[Tensor], spec: list[Any] | None) -> tuple[ExportedProgram | None, str]:
    shapes = None if spec is None else {"leaves": tuple(spec)}
    failure = ""
    for strict in (False, True):
        try:
            with (
                quiet(),
                packed_as_padded() as packing,
                recurrent_kept_whole(),
                places_recorded(),
                contextlib.nullcontext() if strict else _layers_remembered(flat),
            ):
                program = torch.export.export(flat, tuple(leaves), dynamic_shapes=shapes, strict=strict)
            if packing.used:
                _check_padded(flat, leaves)
                drop_unused_cells(program)
                drop_batch_order(program)
            return program, ""
        except ExportError:  # raised by us: the other way of exporting would fail the same way
            raise
        except Exception as error:  # noqa: BLE001 - torch.export raises many types; all become one message
            failure = failure or f"{user_line(error)}: {_first(error)}"
    return None, failure


def _check_padded(flat: Flat, leaves: Sequence[Tensor]) -> None:
    """Compare the outputs of a model that packs sequences with its outputs on padded batches.

    Raises:
        ExportError: their sizes or values differ.
    """
    packed = flat(*leaves)
    with packed_as_padded():
        padded = flat(*leaves)
    for expected, output in zip(packed, padded, strict=True):
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ExportError(
                f"the sizes of packed sequences depend on the data: an output of shape {tuple(expected.shape)} becomes "
                f"{tuple(output.shape)} where the padding is kept. Give the padded size to pad_packed_sequence "
                "(total_length=inputs.shape[1]), and read no PackedSequence.data whose rows of padding would count"
            )


@contextmanager
def _layers_remembered(flat: Flat) -> Iterator[None]:
    """Keep each node's layer when the export traces graphs inside the model, such as a quantized model."""
    graphs = [module for module in flat.modules() if isinstance(module, GraphModule)]

    def run(graph: GraphModule) -> Any:
        def forward(*args: Any) -> Any:
            with preserve_node_meta():
                return Interpreter(graph).run(*args)

        return forward

    for module in graphs:
        module.forward = run(module)
    try:
        yield
    finally:
        for module in graphs:
            del module.forward


def own(program: ExportedProgram) -> ExportedProgram:
    """Return the program on the CPU with its own copies of the weights: the model may be trained after the capture."""
    if any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
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


def _first(error: BaseException) -> str:
    """Return the error's type and the first line of its message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
