"""Inputs, outputs and layers of a deployed model, as an artifact's manifest holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchslim.core.hardware import instruction_set
from torchslim.core.parts import Fitted, signature_of
from torchslim.errors import DeployError, ExportError
from torchslim.graph.allowed_sizes import refusal
from torchslim.graph.calling import positional
from torchslim.graph.export import Captured
from torchslim.graph.io_structure import Structure, build, describe, flatten, leaf_names
from torchslim.graph.layers import layers_of, structure_of
from torchslim.graph.size_guards import InputSizes, shape_fits

KINDS = {
    "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "varargs": inspect.Parameter.VAR_POSITIONAL,
    "varkwargs": inspect.Parameter.VAR_KEYWORD,
}
"""Kinds of inputs in a manifest, as Python has them."""


class Session(Protocol):
    """A compiled model: flat tensors in, flat tensors out."""

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How a deployed model is called; JSON-able.

    `kinds` maps the arguments of the model's forward to "positional", "keyword", "varargs" or "varkwargs"; `optional`
    lists those that were captured with their default; `sizes` and `dtypes` are those of the flat input tensors, with
    None for a free size; `guards` are the relations of free sizes that the program needs, as of
    `torchslim.graph.size_guards`, and `guard_places` the lines of the model's code that need them; `bfloat16` holds the
    indices of output tensors of that type; `layers` lists the operations that multiply, as dicts of
    `torchslim.graph.layers.Layer`; `structure` is the digest of the program without its numbers.
    """

    kinds: dict[str, str]
    inputs: Structure
    outputs: Structure
    sizes: list[list[int | None]]
    dtypes: list[str]
    batch_axis: int | None
    instruction_set: str
    optional: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    structure: str = ""
    bfloat16: list[int] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    guard_places: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, captured: Captured, model: nn.Module) -> Spec:
        """Spec of a captured program."""
        parameters = signature_of(model).parameters
        _, keywords = positional(model, captured.example)
        varying: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "varargs",
            inspect.Parameter.VAR_KEYWORD: "varkwargs",
        }

        def kind(name: str) -> str:
            return varying.get(parameters[name].kind, "keyword" if name in keywords else "positional")

        leaves = flatten(captured.inputs, captured.example)
        sizes = [list(sizes) for sizes in captured.input_sizes.sizes]
        assert len(sizes) == len(leaves), "a program takes each input tensor, used or not"
        return cls(
            kinds={name: kind(name) for name in captured.names},
            inputs=captured.inputs,
            outputs=captured.outputs,
            sizes=sizes,
            dtypes=[str(leaf.dtype).removeprefix("torch.") for leaf in leaves],
            batch_axis=captured.batch_axis,
            instruction_set=instruction_set(),
            optional=[
                name
                for name in captured.names
                if parameters[name].kind not in varying and _is_default(captured, name, parameters[name].default)
            ],
            notes=list(captured.notes),
            layers=[layer.to_dict() for layer in layers_of(captured.program, captured.batch_axis)],
            structure=structure_of(captured.program),
            guards=list(captured.guards),
            guard_places=dict(captured.guard_places),
            bfloat16=[n for n, output in enumerate(captured.outputs_of_program()) if output.dtype == torch.bfloat16],
        )

    @property
    def input_sizes(self) -> InputSizes:
        """Sizes of the flat inputs that the program takes."""
        return InputSizes(sizes=self.sizes, guards=self.guards)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return asdict(self)

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Flat tensors of a call, checked against the sizes and dtypes that the program was made for.

        Raises:
            DeployError: an input does not fit; the message says which, and how to fix it.
        """
        if len(args) == 1 and isinstance(args[0], Fitted):
            leaves = args[0].leaves
        else:
            leaves = flatten(self.inputs, self._bind(args, kwargs), "inputs")
        names = leaf_names(self.inputs)
        for name, leaf, dtype in zip(names, leaves, self.dtypes, strict=True):
            if str(leaf.dtype) != f"torch.{dtype}":
                got = str(leaf.dtype).removeprefix("torch.")
                raise DeployError(f"input {name!r} must be {dtype}, got {got}; convert it with .to(torch.{dtype})")
        shapes = [leaf.shape for leaf in leaves]
        if any(not shape_fits(*pair) for pair in zip(self.sizes, shapes, strict=True)):
            raise DeployError(
                f"{refusal(self.input_sizes, shapes, names)}; deploy again with other example inputs, or with "
                "dynamic_shapes: lists of the sizes that a call may have compile a program for each of them"
            )
        self._check_batch(names, leaves)
        if (reason := refusal(self.input_sizes, shapes, names, self.guard_places)) is not None:
            raise DeployError(
                f"{reason}; pad the inputs to sizes that fit, or deploy with example inputs of such sizes"
            )
        return leaves

    def _check_batch(self, names: Sequence[str], leaves: Sequence[Tensor]) -> None:
        """Raise DeployError for inputs of several batch sizes."""
        axis = self.batch_axis
        if axis is None:
            return
        batch_sizes: dict[int, str] = {}
        for name, leaf, sizes in zip(names, leaves, self.sizes, strict=True):
            if len(sizes) > axis and sizes[axis] is None:
                batch_sizes.setdefault(leaf.shape[axis], name)
        if len(batch_sizes) > 1:
            got = ", ".join(f"{size} in {name!r}" for size, name in batch_sizes.items())
            raise DeployError(f"the inputs must have one batch size, got {got}; give every input the same samples")

    def fitted(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, sizes: bool = False) -> Fitted | None:
        """The flat tensors of a call of the captured structure, types and ranks (and `sizes`); None for other calls."""
        try:
            leaves = flatten(self.inputs, self._bind(args, kwargs))
        except DeployError:
            return None
        alike = all(
            str(leaf.dtype) == f"torch.{dtype}" and leaf.dim() == len(own)
            for leaf, own, dtype in zip(leaves, self.sizes, self.dtypes, strict=True)
        )
        return Fitted(leaves) if alike and (not sizes or self.fits(leaves)) else None

    def fits(self, leaves: Sequence[Tensor]) -> bool:
        """Whether flat tensors have the dtypes and sizes of a call."""
        dtypes_fit = all(str(leaf.dtype) == f"torch.{dtype}" for leaf, dtype in zip(leaves, self.dtypes, strict=True))
        return dtypes_fit and self.input_sizes.misfit([leaf.shape for leaf in leaves]) is None

    def narrowed(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs of a runtime without bfloat16, converted to the model's types."""
        return [output.bfloat16() if n in self.bfloat16 else output for n, output in enumerate(outputs)]

    def call_arguments(self, leaves: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the model, made from flat tensors."""
        named = build(self.inputs, leaves)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            if kind == "varargs":
                args += named[name]
            elif kind == "varkwargs":
                kwargs |= named[name]
            elif kind == "keyword":
                kwargs[name] = named[name]
            else:
                args.append(named[name])
        return args, kwargs

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = self._signature().bind(*args, **kwargs)
        except TypeError as error:
            raise DeployError(
                f"the model was captured with the inputs {', '.join(self.kinds)}; got {len(args)} by position"
                f"{''.join(f', {name}' for name in kwargs)}: {error}; call it as it was captured, or capture it again "
                "with these inputs"
            ) from error
        bound.apply_defaults()
        return dict(bound.arguments)

    def _signature(self) -> inspect.Signature:
        """The signature of the captured call; an input that was captured with its default may be left out."""
        parameters = [
            inspect.Parameter(
                name,
                KINDS[kind],
                default=build(self.inputs["dict"][name], ()) if name in self.optional else inspect.Parameter.empty,
            )
            for name, kind in self.kinds.items()
        ]
        # a required input may follow an optional one, which Python's own signatures exclude
        return inspect.Signature(parameters, __validate_parameters__=False)


def _is_default(captured: Captured, name: str, default: Any) -> bool:
    """Whether the input was captured with its default value."""
    try:
        return bool(describe(default, [], {}) == captured.inputs["dict"][name])
    except ExportError:  # the default is no plain value, or there is none
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that a runtime executes.

    Attributes:
        node: name of the kernel: the path of the layer and the operation, `layer1.0.conv1/Conv`; the runtime's own name
            if the kernel belongs to no layer.
        type: the runtime's name for what the kernel computes.
        integer: whether it computes on 8-bit integers or on integer weights (conversions do not count).
        fused: names of all nodes that the kernel computes at once, its own included, if the runtime lists them.
        why: why the runtime has no better kernel for it, where it says so.
    """

    node: str
    type: str
    integer: bool
    fused: tuple[str, ...] = ()
    why: str = ""

    @property
    def layer(self) -> str:
        """Path of the kernel's layer; empty if it belongs to none."""
        return self.node.rpartition("/")[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all layers that the kernel computes."""
        paths = (name.rpartition("/")[0] for name in (self.node, *self.fused))
        return tuple(dict.fromkeys(path for path in paths if path))
