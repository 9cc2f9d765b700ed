"""What every runtime gives: a `Deployed`, called like the model and answering like the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchslim.core.files import unbundle, write_bytes
from torchslim.core.folder_lock import writing
from torchslim.core.hardware import instruction_set
from torchslim.core.isolation import quiet
from torchslim.core.step import Inputs, LayerRecord
from torchslim.errors import DeployError, ExportError, TorchslimError
from torchslim.graph.export import Captured, capture, positional, signature_of
from torchslim.graph.io_structure import Structure, build, describe, flatten, leaf_names, tensors_of
from torchslim.graph.layers import layers_of, structure_of
from torchslim.runtimes.free_sizes import compiled
from torchslim.runtimes.kernel_listing import Kernel
from torchslim.runtimes.pt2 import pack_program


def as_array(tensor: Tensor) -> Any:
    """A tensor as NumPy has it: bfloat16 and smaller floats, which it has not, as float32, which holds them exactly."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


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
            layers=[layer.to_json() for layer in layers_of(captured.program, captured.batch_axis)],
            structure=structure_of(captured.program),
            bfloat16=[n for n, each in enumerate(captured.outputs_of_program()) if each.dtype == torch.bfloat16],
        )

    def to_json(self) -> dict[str, Any]:
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


class Deployed:
    """A model on a runtime. Called like the model, on tensors of any device; answers on the CPU without gradients."""

    def __init__(
        self,
        session: Session,
        spec: Spec,
        *,
        runtime: str,
        threads: int | None,
        payload: bytes | None,
        example: Sequence[Tensor],
        program: Callable[[], bytes],
        quantized: bool,
        classes: Mapping[str, type] | None = None,
        no_file: str = "",
        suffixes: Sequence[str] = (),
    ) -> None:
        self.session, self.spec, self.runtime, self.threads = session, spec, runtime, threads
        self.payload, self.example, self.classes = payload, list(example), dict(classes or {})
        self.program, self.quantized = program, quantized  # the exported program as the bytes of a .pt2
        self.suffixes = tuple(suffixes)
        self._no_file = no_file
        self.records: list[LayerRecord] = []  # of the quantization, where it is known
        self.made_from: nn.Module | None = None  # the model in the place of the one that was given to be deployed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf.detach().cpu() for leaf in self.spec.leaves(args, kwargs)]
        found, count = self.run(leaves), tensors_of(self.spec.outputs)
        if len(found) != count:
            raise DeployError(f"the model gives {len(found)} tensors, its spec lists {count}; deploy it again")
        return build(self.spec.outputs, found, self.classes)

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        """Flat tensors in, flat tensors out, unchecked: what the benchmark times.

        Raises:
            DeployError: the runtime cannot compute these inputs.
        """
        try:
            return list(self.session(leaves))
        except TorchslimError:
            raise
        except Exception as error:
            raise DeployError(
                f"runtime {self.runtime!r} cannot run the model on inputs of the sizes "
                f"{', '.join(str(tuple(leaf.shape)) for leaf in leaves)}: {type(error).__name__}: {str(error)[:300]}; "
                "deploy the model again, with example inputs like these"
            ) from error

    @property
    def size_bytes(self) -> int | None:
        """The bytes on disk of what ships; None where the runtime has no file."""
        return None if self.payload is None else sum(map(len, self.files.values()))

    @property
    def files(self) -> dict[str, bytes]:
        """What ships, by the suffixes of the files; one of several files is a bundle in `payload`."""
        if self.payload is None:
            return {}
        return unbundle(self.payload) if len(self.suffixes) > 1 else dict.fromkeys(self.suffixes or [""], self.payload)

    def save(self, path: str | Path) -> Path:
        """Write the runtime's file; where it has several, those beside it are called like it.

        Raises:
            DeployError: where the runtime has no file format.
        """
        if self.payload is None:
            raise DeployError(f"runtime {self.runtime!r} has no file format: {self._no_file}")
        path = Path(path)
        if len(self.suffixes) > 1 and path.suffix != self.suffixes[0]:
            raise DeployError(f"runtime {self.runtime!r} writes {' and '.join(self.suffixes)}; name the first of them")
        first, *beside = self.files.items()
        with writing(path.parent):  # files of two writers never stand side by side
            for suffix, data in beside:
                write_bytes(path.with_suffix(suffix), data)
            write_bytes(path, first[1])
        return path

    def __repr__(self) -> str:
        size = "no file" if self.payload is None else f"{self.size_bytes:,} bytes"
        return f"Deployed(runtime={self.runtime!r}, threads={self.threads}, {size})"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run a model: how it is compiled, and how its file is read back.

    `make` turns a captured program into a session and the bytes of its file (None where there is no format; a
    `bundle` where there are several files, `suffix` and those `beside`); `read` makes a session of such bytes.
    A `native` file is machine code: it is loaded only where it is trusted. `check` looks at files that others may have
    written, by their suffixes, before `read` does; `trial` then runs them on example inputs in a child process, where
    the runtime may end the process. `kernels` tells what is executed. What `converts` programs to a format of its own
    may fix sizes in silence: a free batch is tried.
    """

    name: str
    suffix: str | None
    make: Callable[[Captured, Spec, int | None], tuple[Session, bytes | None]]
    read: Callable[[bytes, Spec, int | None], Session] | None = None
    no_file: str = ""
    beside: tuple[str, ...] = ()
    native: bool = False
    check: Callable[[Mapping[str, bytes]], None] | None = None
    trial: Callable[[Mapping[str, bytes], Sequence[Tensor]], None] | None = None
    converts: bool = False
    kernels: Callable[[Deployed], list[Kernel]] | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it writes, the main one first."""
        return () if self.suffix is None else (self.suffix, *self.beside)

    def compile(
        self,
        model: nn.Module | Captured,
        example_inputs: Inputs = (),
        dynamic_shapes: Any = "batch",
        threads: int | None = None,
        *,
        source: nn.Module | None = None,
    ) -> Deployed:
        """Deploy a model, or a program captured before (then `source` is the model it was captured from)."""
        if isinstance(model, Captured):
            assert source is not None, "a captured program needs its model for the names of its inputs"
            captured, original = model, source
        else:
            captured, original = capture(model, example_inputs, dynamic_shapes), model

        def make(program: Captured) -> tuple[Spec, Session, bytes | None]:
            described = Spec.of(program, original)
            with quiet(), torch.no_grad():
                return described, *self.make(program, described, threads)

        captured, spec, session, payload = compiled(make, captured, original, trial=self.converts)
        return Deployed(
            session,
            spec,
            runtime=self.name,
            threads=threads,
            payload=payload,
            example=flatten(captured.inputs, captured.example),
            program=lambda: pack_program(captured.program),
            quantized=any("quantized_decomposed" in str(node.target) for node in captured.program.graph.nodes),
            classes=captured.classes,
            no_file=self.no_file,
            suffixes=self.suffixes,
        )
