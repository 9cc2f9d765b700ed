"""What every runtime gives: a `Deployed`, called like the model and answering like the model."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from torchslim.core.files import unbundle, write_bytes
from torchslim.core.folder_lock import writing
from torchslim.core.isolation import quiet
from torchslim.core.parts import Fitted
from torchslim.core.step import Inputs, LayerRecord
from torchslim.errors import DeployError, TorchslimError
from torchslim.graph.buckets import listed_buckets
from torchslim.graph.calling import examples_of
from torchslim.graph.export import Captured
from torchslim.graph.io_structure import build, flatten, tensors_of
from torchslim.graph.lifting import captured_of
from torchslim.runtimes.free_sizes import compiled
from torchslim.runtimes.pt2 import load_program, pack_program
from torchslim.runtimes.spec import Kernel, Session, Spec


def as_array(tensor: Tensor) -> Any:
    """A tensor as a NumPy array; bfloat16 and smaller floats, which NumPy lacks, become float32, which is exact."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


@dataclass(frozen=True, kw_only=True)
class Program:
    """The captured program that a deployed model computes.

    Attributes:
        spec: how it is called.
        example: flat input tensors of the captured sizes; where sizes vary, that of the median size.
        largest: the largest example; None where sizes do not vary.
        pack: gives the program as the bytes of a `.pt2`.
        exported: the program in memory; None for a loaded artifact.
        quantized: does it hold quantized values?
        classes: the classes of its structured outputs, by name; outputs of other classes come back as plain dicts.
    """

    spec: Spec
    example: Sequence[Tensor]
    pack: Callable[[], bytes]
    quantized: bool
    classes: Mapping[str, type] = field(default_factory=dict)
    exported: ExportedProgram | None = None
    largest: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, captured: Captured, spec: Spec) -> Program:
        """The program of a capture."""
        examples = sorted(
            [flatten(captured.inputs, captured.example), *map(list, captured.variants)],
            key=lambda leaves: sum(leaf.numel() for leaf in leaves),
        )
        return cls(
            spec=spec,
            example=examples[(len(examples) - 1) // 2],
            largest=examples[-1] if len(examples) > 1 else None,
            pack=lambda: pack_program(captured.program),
            quantized=any("quantized_decomposed" in str(node.target) for node in captured.program.graph.nodes),
            classes=captured.classes,
            exported=captured.program,
        )

    def loaded(self) -> ExportedProgram:
        """The program in memory, read from its bytes where it is not there yet."""
        return self.exported or load_program(io.BytesIO(self.pack()))


class Deployed:
    """A model on a runtime. Called like the model, on tensors of any device; answers on the CPU without gradients.

    Attributes:
        program: the program that it computes.
        runtime: the runtime's name.
        threads: how many threads compute, None for the runtime's own choice.
        payload: the bytes of the runtime's files, None where it has no file format.
        records: what the quantization did to each layer, where that is known.
        made_from: the model that was deployed in place of the one that was given, if any.
    """

    def __init__(
        self, session: Session, program: Program, on: Runtime, *, threads: int | None, payload: bytes | None
    ) -> None:
        self.session, self.threads, self.payload = session, threads, payload
        self.runtime, self.suffixes, self._no_file = on.name, on.suffixes, on.no_file
        self.program = program
        self.records: list[LayerRecord] = []
        self.made_from: nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf.detach().cpu() for leaf in self.spec.leaves(args, kwargs)]
        outputs, count = self.run(leaves), tensors_of(self.spec.outputs)
        if len(outputs) != count:
            raise DeployError(f"the model gives {len(outputs)} tensors, its spec lists {count}; deploy it again")
        return build(self.spec.outputs, outputs, self.program.classes)

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        """Compute flat output tensors from flat input tensors without checks; benchmarks time this call.

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

    def fitted(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, sizes: bool = False) -> Fitted | None:
        """The flat tensors of a call of the captured structure, types and ranks (and `sizes`); None for other calls."""
        return self.spec.fitted(args, kwargs, sizes=sizes)

    @property
    def spec(self) -> Spec:
        """How the model is called."""
        return self.program.spec

    @property
    def example(self) -> list[Tensor]:
        """Flat input tensors of the captured sizes; where sizes vary, of the median size."""
        return list(self.program.example)

    @property
    def largest(self) -> list[Tensor] | None:
        """The largest example; None where sizes do not vary."""
        return None if self.program.largest is None else list(self.program.largest)

    @property
    def quantized(self) -> bool:
        """Whether the program holds quantized values."""
        return self.program.quantized

    @property
    def notes(self) -> list[str]:
        """Notes on the capture and on the deployment."""
        return self.spec.notes

    @property
    def takes_single_samples(self) -> bool:
        """Whether the batch is free, so that a call may hold one sample."""
        return self.spec.batch_axis is not None

    @property
    def structure(self) -> str:
        """Digest of the program without its numbers."""
        return self.spec.structure

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the runtime's files on disk; None where it has no file format."""
        return None if self.payload is None else sum(map(len, self.files.values()))

    @property
    def files(self) -> dict[str, bytes]:
        """The runtime's files by suffix; several of them travel as one bundle in `payload`."""
        if self.payload is None:
            return {}
        return unbundle(self.payload) if len(self.suffixes) > 1 else dict.fromkeys(self.suffixes or [""], self.payload)

    def save(self, path: str | Path) -> Path:
        """Write the runtime's file; further files get the same name with another suffix.

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
    """A way to run a model: how programs are compiled, and how files are read back.

    Attributes:
        name: the key in `RUNTIMES`.
        suffix: of the main file; None where the runtime has no file format.
        make: turns a captured program into a session and the bytes of its files (None without a format, a `bundle` of
            several files).
        read: makes a session of such bytes.
        no_file: why there is no file format.
        beside: suffixes of the further files.
        native: is the file machine code? It is then loaded only where it is trusted.
        check: refuses harmful files, given by suffix, before `read` sees them.
        trial: runs files on example inputs in a child process, because the runtime may crash.
        converts: does it convert programs to a format of its own, which may fix sizes in silence? A free batch is then
            tried with another size.
        kernels: lists the kernels that are executed.
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
        """Suffixes of the files that it writes, the main one first."""
        return () if self.suffix is None else (self.suffix, *self.beside)

    def compile(
        self,
        model: nn.Module | Captured,
        example_inputs: Inputs | list[Inputs] = (),
        dynamic_shapes: Any = "auto",
        threads: int | None = None,
        *,
        source: nn.Module | None = None,
    ) -> Deployed:
        """Deploy a model, or a program captured before (then `source` is the model it was captured from)."""
        if isinstance(model, Captured):
            assert source is not None, "a captured program needs its model for the names of its inputs"
            captured, original = model, source
        elif (sizes := listed_buckets(dynamic_shapes)) is not None:
            from torchslim.runtimes.bucketed import compile_buckets

            return compile_buckets(self, model, example_inputs, sizes, threads)
        else:
            captured, original = captured_of(model, example_inputs, dynamic_shapes), model

        def make(variant: Captured) -> tuple[Spec, Session, bytes | None]:
            described = Spec.of(variant, original)
            with quiet(), torch.no_grad():
                return described, *self.make(variant, described, threads)

        captured, spec, session, payload = compiled(make, captured, original, trial=self.converts)
        deployed = Deployed(session, Program.of(captured, spec), self, threads=threads, payload=payload)
        if isinstance(model, Captured) or dynamic_shapes != "auto" or len(examples_of(example_inputs)) == 1:
            return deployed
        from torchslim.runtimes.bucketed import padded_where_fixed

        return padded_where_fixed(self, deployed, original, example_inputs)
