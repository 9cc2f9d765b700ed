"""What a deployment takes and gives: the part of a program that an artifact's manifest holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchslim.core.hardware import instruction_set
from torchslim.errors import DeployError, ExportError
from torchslim.graph.calling import positional, signature_of
from torchslim.graph.export import Captured
from torchslim.graph.io_structure import Structure, build, describe, flatten, leaf_names
from torchslim.graph.layers import layers_of, structure_of


class Session(Protocol):
    """A compiled model: flat tensors in, flat tensors out."""

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How a deployed model is called; JSON-able.

    `kinds` maps the names of the model's forward to "positional", "keyword", "varargs" or "varkwargs"; `optional` are
    those that were captured with their default; `sizes` and `dtypes` are those of the flat input tensors, a size None
    where it is free; `bfloat16` are the numbers of the output tensors of that type; `layers` are the operations that
    multiply, as `torchslim.graph.layers.Layer` has them; `structure` is the digest of the program without its numbers.
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

    @classmethod
    def of(cls, captured: Captured, model: nn.Module) -> Spec:
        """The spec of a captured program."""
        parameters = signature_of(model).parameters
        _, keywords = positional(model, captured.example)
        varying: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "varargs",
            inspect.Parameter.VAR_KEYWORD: "varkwargs",
        }

        def kind(name: str) -> str:
            return varying.get(parameters[name].kind, "keyword" if name in keywords else "positional")

        leaves = flatten(captured.inputs, captured.example)
        sizes = [_free_sizes(value) for value in captured.inputs_of_program()]
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
            bfloat16=[n for n, each in enumerate(captured.outputs_of_program()) if each.dtype == torch.bfloat16],
        )

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors of a call, checked against the sizes and dtypes that the program was made for.

        Raises:
            DeployError: saying which input does not fit, and how to mend it.
        """
        leaves = flatten(self.inputs, self._bind(args, kwargs), "inputs")
        names = leaf_names(self.inputs)
        free: dict[int, str] = {}
        for name, leaf, sizes, dtype in zip(names, leaves, self.sizes, self.dtypes, strict=True):
            if str(leaf.dtype) != f"torch.{dtype}":
                got = str(leaf.dtype).removeprefix("torch.")
                raise DeployError(f"input {name!r} must be {dtype}, got {got}; convert it with .to(torch.{dtype})")
            wrong = len(sizes) != leaf.dim() or any(
                size is not None and size != got for size, got in zip(sizes, leaf.shape, strict=True)
            )
            if wrong:
                wanted = ", ".join("any" if size is None else str(size) for size in sizes)
                raise DeployError(
                    f"input {name!r} must have the shape ({wanted}), got {tuple(leaf.shape)}; deploy again with other "
                    "example inputs, or with dynamic_shapes"
                )
            if self.batch_axis is not None and len(sizes) > self.batch_axis and sizes[self.batch_axis] is None:
                free.setdefault(leaf.shape[self.batch_axis], name)
        if len(free) > 1:
            got = ", ".join(f"{size} in {name!r}" for size, name in free.items())
            raise DeployError(f"the inputs must have one batch size, got {got}; give every input the same samples")
        return leaves

    def narrowed(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs of a runtime without bfloat16, in the types that the model gives."""
        return [each.bfloat16() if n in self.bfloat16 else each for n, each in enumerate(outputs)]

    def call_arguments(self, leaves: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Flat tensors as the arguments that the model itself takes."""
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
        named: dict[str, Any] = {}
        rest, extra = list(args), dict(kwargs)
        for name, kind in self.kinds.items():
            if kind == "varargs":
                named[name], rest = tuple(rest), []
            elif kind == "positional" and rest:
                named[name] = rest.pop(0)
            elif kind != "varkwargs" and name in extra:
                named[name] = extra.pop(name)
            elif name in self.optional:
                named[name] = build(self.inputs["dict"][name], ())
        for name, kind in self.kinds.items():
            if kind == "varkwargs":
                named[name], extra = extra, {}
        missing = [name for name in self.kinds if name not in named]
        if missing or rest or extra:
            wrong = [
                f"{', '.join(missing)} missing" if missing else "",
                f"{len(rest)} too many by position" if rest else "",
                f"{', '.join(extra)} not known or given twice" if extra else "",
            ]
            raise DeployError(
                f"the model was captured with the inputs {', '.join(self.kinds)}; got {len(args)} by position"
                f"{''.join(f', {name}' for name in kwargs)}: {'; '.join(filter(None, wrong))}; call it as it was "
                "captured, or capture it again with these inputs"
            )
        return named


def _is_default(captured: Captured, name: str, default: Any) -> bool:
    """Was the input captured with the value that it has when it is left out?"""
    try:
        return bool(describe(default, [], {}) == captured.inputs["dict"][name])
    except ExportError:  # a default that is no plain value, or none at all
        return False


def _free_sizes(value: Tensor) -> list[int | None]:
    return [int(size) if isinstance(size, int) or str(size).isdigit() else None for size in value.shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One thing that a runtime executes.

    Attributes:
        node: its name: the path of the layer and the operation, `layer1.0.conv1/Conv`; the runtime's own where it
            belongs to no layer.
        type: what the runtime calls it.
        integer: whether it computes on 8-bit integers or on integer weights (conversions do not count).
        fused: the names of all nodes that it does at once, its own included, where the runtime tells.
    """

    node: str
    type: str
    integer: bool
    fused: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        """The path of its layer; empty where the runtime made it for itself."""
        return self.node.rpartition("/")[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of all layers that it computes."""
        paths = (name.rpartition("/")[0] for name in (self.node, *self.fused))
        return tuple(dict.fromkeys(path for path in paths if path))
