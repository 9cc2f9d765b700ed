"""What every runtime gives: a `Deployed`, called like the model and answering like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.files import unbundle, write_bytes
from torchslim.core.folder_lock import writing
from torchslim.core.isolation import quiet
from torchslim.core.step import Inputs, LayerRecord
from torchslim.errors import DeployError, TorchslimError
from torchslim.graph.export import Captured, capture
from torchslim.graph.io_structure import build, flatten, tensors_of
from torchslim.runtimes.free_sizes import compiled
from torchslim.runtimes.pt2 import pack_program
from torchslim.runtimes.spec import Kernel, Session, Spec


def as_array(tensor: Tensor) -> Any:
    """A tensor as a NumPy array; bfloat16 and smaller floats, which NumPy lacks, become float32, which is exact."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


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
