"""A deployed model of several programs, one for each listed size, and the choice between them at a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchslim.core.files import digest
from torchslim.core.step import Inputs
from torchslim.errors import DeployError, ExportError
from torchslim.graph.buckets import Buckets, Padding, Place, padded, proved_padding, resized_to
from torchslim.graph.calling import Flat, bind, examples_of
from torchslim.graph.export import capture_bound
from torchslim.graph.io_structure import Structure, build, describe, flatten, leaf_names
from torchslim.runtimes.base import Deployed

if TYPE_CHECKING:
    from torchslim.runtimes.base import Runtime


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A session that runs the program of the call's sizes, or of the next larger ones with padded inputs."""

    programs: Sequence[Deployed]
    buckets: Buckets
    padding: Padding | None

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]:
        sizes = tuple(leaves[index].shape[dim] for index, dim in self.buckets.places)
        if sizes in self.buckets.sizes:
            return self.programs[self.buckets.sizes.index(sizes)].run(leaves)
        larger = [own for own in self.buckets.sizes if own[0] >= sizes[0]]
        if self.padding is None or not larger:
            raise DeployError(f"no program has the sizes {sizes}; there are programs of {self.buckets.sizes}")
        chosen = min(larger)
        outputs = self.programs[self.buckets.sizes.index(chosen)].run(
            padded(leaves, self.buckets.places, chosen[0], self.padding.fills)
        )
        for index, dim in self.padding.outputs:
            outputs[index] = outputs[index].narrow(dim, 0, sizes[0])
        return outputs


class Bucketed(Deployed):
    """A deployed model of several programs; a call runs the one of its sizes.

    Attributes:
        programs: the deployed programs, in the order of `buckets`.
        buckets: their sizes.
        padding: how inputs of other sizes are padded to the next larger one; None where that changes results.
    """

    def __init__(self, programs: Sequence[Deployed], buckets: Buckets, padding: Padding | None, on: Runtime) -> None:
        self.programs, self.buckets, self.padding = list(programs), buckets, padding
        by_size = sorted(self.programs, key=lambda program: sum(leaf.numel() for leaf in program.example))
        self.median, largest = by_size[(len(by_size) - 1) // 2], by_size[-1]
        spec = self.median.spec
        sizes = [list(own) for own in spec.sizes]
        for index, dim in buckets.places:
            sizes[index][dim] = None
        notes = list(dict.fromkeys(note for program in self.programs for note in program.spec.notes))
        if padding is not None:
            lengths = ", ".join(str(own[0]) for own in buckets.sizes)
            notes.append(f"shorter inputs are padded to {lengths}: the model's results do not change by it")
        spec = replace(
            spec,
            sizes=sizes,
            guards=[*spec.guards, *buckets.guards(padding)],
            notes=notes,
            structure=digest([program.spec.structure for program in self.programs]),
        )
        program = replace(self.median.program, spec=spec, largest=largest.example if len(self.programs) > 1 else None)
        session = _Choice(programs=self.programs, buckets=buckets, padding=padding)
        super().__init__(session, program, on, threads=self.median.threads, payload=None)
        self._no_file = "it has several programs; save them in a folder, with ts.save"

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the runtime's files of all programs; None where it has no file format."""
        sizes = [program.size_bytes for program in self.programs]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def to_dict(self) -> dict[str, Any]:
        """The choice between the programs, as an artifact's manifest holds it."""
        padding = None
        if self.padding is not None:
            padding = {"fills": list(self.padding.fills), "outputs": [list(place) for place in self.padding.outputs]}
        places, sizes = ([list(entry) for entry in entries] for entries in (self.buckets.places, self.buckets.sizes))
        return {"places": places, "sizes": sizes, "padding": padding}

    @classmethod
    def from_dict(cls, programs: Sequence[Deployed], content: Mapping[str, Any], on: Runtime) -> Bucketed:
        """The programs with the choice of `to_dict`.

        Raises:
            DeployError: the choice is not between these programs.
        """
        places = tuple((index, dim) for index, dim in content["places"])
        buckets = Buckets(places=places, sizes=tuple(map(tuple, content["sizes"])))
        for program, sizes in zip(programs, buckets.sizes, strict=True):
            own = program.spec.sizes
            fits = all(index < len(own) and dim < len(own[index]) for index, dim in places)
            if not fits or any(own[index][dim] != size for (index, dim), size in zip(places, sizes, strict=True)):
                raise DeployError(f"the program of the sizes {sizes} takes other ones: {own}; save the model again")
        padding = None
        if content["padding"] is not None:
            outputs = tuple((index, dim) for index, dim in content["padding"]["outputs"])
            padding = Padding(fills=tuple(content["padding"]["fills"]), outputs=outputs)
        return cls(programs, buckets, padding, on)

    def mapped(self, function: Callable[[Deployed], Deployed], on: Runtime) -> Bucketed:
        """The same choice between programs that `function` makes of these."""
        return Bucketed([function(program) for program in self.programs], self.buckets, self.padding, on)


@dataclass(frozen=True, kw_only=True)
class _Example:
    """A model's example inputs, named and flat."""

    model: nn.Module
    structure: Structure
    leaves: Sequence[Tensor]
    classes: Mapping[str, type]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> _Example:
        leaves: list[Tensor] = []
        classes: dict[str, type] = {}
        named = bind(model, example_inputs)
        structure = {"dict": {name: describe(value, leaves, classes) for name, value in named.items()}}
        return cls(model=model, structure=structure, leaves=leaves, classes=classes)

    def compiled(self, on: Runtime, buckets: Buckets, padding: Padding | None, threads: int | None) -> Bucketed:
        """A program for each bucket."""
        programs = []
        for sizes in buckets.sizes:
            named = build(self.structure, resized_to(self.leaves, buckets.places, sizes), self.classes)
            captured = capture_bound(self.model, named, "batch")
            programs.append(on.compile(captured, threads=threads, source=self.model))
        return Bucketed(programs, buckets, padding, on)

    def padding(self, buckets: Buckets) -> Padding | None:
        """How shorter inputs are padded, where that changes no result."""
        return proved_padding(Flat(self.model, self.structure, self.classes), self.leaves, buckets)


def compile_buckets(
    on: Runtime,
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    sizes: Mapping[str, Mapping[int, Sequence[int]]],
    threads: int | None,
) -> Bucketed:
    """Compile a program for each listed size.

    Raises:
        ExportError: an input or a dimension does not exist, or the model does not run at a listed size.
    """
    example = _Example.of(model, examples_of(example_inputs)[0])
    owners = [name for name, structure in example.structure["dict"].items() for _ in leaf_names(structure)]
    if unknown := sorted(set(sizes) - set(owners)):
        raise ExportError(
            f"dynamic_shapes names the inputs {', '.join(unknown)}; the model takes {', '.join(dict.fromkeys(owners))}"
        )
    listed: dict[Place, Sequence[int]] = {}
    for index, (owner, leaf) in enumerate(zip(owners, example.leaves, strict=True)):
        for dim, own in sizes.get(owner, {}).items():
            if not -leaf.dim() <= dim < leaf.dim():
                raise ExportError(f"dynamic_shapes lists dimension {dim} of input {owner!r}, which has {leaf.dim()}")
            listed[index, dim % leaf.dim()] = own
    buckets = Buckets(places=tuple(listed), sizes=tuple(zip(*listed.values(), strict=True)))
    return example.compiled(on, buckets, example.padding(buckets), threads)


def padded_where_fixed(
    on: Runtime, deployed: Deployed, model: nn.Module, example_inputs: Inputs | list[Inputs]
) -> Deployed:
    """The model with shorter inputs padded to the largest example, where a size is fixed that differs between examples.

    Only where that changes no result; else a note says how to deploy several sizes.
    """
    spec, first = deployed.spec, examples_of(example_inputs)[0]
    shapes = [
        [leaf.shape for leaf in flatten(spec.inputs, bind(model, example))] for example in examples_of(example_inputs)
    ]
    lengths: dict[Place, int] = {}
    for index, sizes in enumerate(spec.sizes):
        for dim, size in enumerate(sizes):
            own = {shape[index][dim] for shape in shapes}
            if size is not None and len(own) > 1 and dim != spec.batch_axis:
                lengths[index, dim] = max(own)
    if not lengths:
        return deployed
    fixed = [[shape[index][dim] for shape in shapes] for index, dim in lengths]
    for index, sizes in enumerate(spec.sizes):  # free sizes that follow a fixed one, such as that of a mask
        for dim in range(len(sizes)):
            if dim != spec.batch_axis and [shape[index][dim] for shape in shapes] in fixed:
                lengths.setdefault((index, dim), max(shape[index][dim] for shape in shapes))
    example = _Example.of(model, first)
    buckets = Buckets(places=tuple(lengths), sizes=(tuple(lengths.values()),))
    padding = example.padding(buckets)
    if padding is not None:
        return example.compiled(on, buckets, padding, deployed.threads)
    names = leaf_names(spec.inputs)
    listed = ", ".join(f"{names[index]!r}: {{{dim}: [{size}, ...]}}" for (index, dim), size in lengths.items())
    spec.notes.append(f"other sizes are refused; list those of later calls to allow them: dynamic_shapes={{{listed}}}")
    return deployed
