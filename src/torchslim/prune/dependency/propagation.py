"""Tags: which atoms an element of a value stands and falls with, and how operations carry them along.

A value carries a list of *layers*. A layer is an integer tensor of atoms with the value's number of dimensions, of
size 1 along every dimension in which it does not vary; the value's element goes when its atom in any layer goes.
Layout operations are applied to the layers themselves, so views, shuffles and windows need no rule of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchslim.core.reason import Reason
from torchslim.prune.dependency.union_find import KEPT, Atoms, Ids

Layers = tuple[Tensor, ...]
Shape = Sequence[int]
Operand = tuple[Layers, Shape]


"""The reason to stay that says least: what made the value so is told where that is known."""


def varying(core: Tensor) -> frozenset[int]:
    """The dimensions along which a layer varies."""
    return frozenset(dim for dim, size in enumerate(core.shape) if size > 1)


def compressed(layer: Tensor) -> Tensor:
    """The layer with size 1 along every dimension in which all its atoms are the same."""
    for dim, size in enumerate(layer.shape):
        if size > 1:
            first = layer.narrow(dim, 0, 1)
            if layer.stride(dim) == 0 or bool((layer == first).all()):
                layer = first
    return layer


def _repetition(core: Tensor) -> bytes:
    """Which elements of a layer share an atom, whatever the atoms are."""
    flat = core.numpy().reshape(-1)
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    labels: bytes = first[inverse.reshape(-1)].tobytes()
    return labels


JointKey = tuple[tuple[int, ...], bytes]


@dataclass(frozen=True)
class Derived:
    """`targets[i]` goes exactly when all of `sources[i]` go: what is left of a layer after a sum over a dimension."""

    targets: Ids
    sources: Ids
    joint: JointKey  # the layer that it was derived from
    axes: tuple[int, ...]  # and the axes of it that are left


@dataclass(frozen=True)
class Joint:
    """A layer that varies along several dimensions: what goes must leave it rectangular."""

    atoms: Ids
    where: str  # the module


def joint_key(core: Tensor) -> tuple[Ids, JointKey]:
    """A layer without its dimensions of size 1, and how it is known."""
    array = core.numpy()
    shape = tuple(size for size in array.shape if size > 1)
    array = np.ascontiguousarray(array).reshape(shape)
    return array, (shape, array.tobytes())


@dataclass(frozen=True)
class Balance:
    """Parts of a dimension that must stay of equal size."""

    parts: tuple[Ids, ...]
    where: str
    fixed: Ids  # what stays if the parts are cut at given positions, and not in equal shares; empty if they never are


@dataclass
class Tagger:
    """The atoms of one model and the constraints between them, as they are found."""

    atoms: Atoms = field(default_factory=Atoms)
    derived: list[Derived] = field(default_factory=list)
    joints: dict[JointKey, Joint] = field(default_factory=dict)
    balances: dict[bytes, Balance] = field(default_factory=dict)
    where: str = ""  # the module and operation at work, for the reasons
    cause: str = ""  # why what it is given is of a fixed size, where an earlier operation made it so
    path: str = ""  # the module alone; empty for the model itself

    def __post_init__(self) -> None:
        self._derived: dict[tuple[JointKey, tuple[int, ...]], Tensor] = {}

    def own(self, shape: Shape, *, elastic: bool = False) -> Layers:
        """Fresh atoms for every dimension of more than one element."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[dim] = size
                layers.append(torch.from_numpy(self.atoms.fresh(size, elastic=elastic)).view(view))
        return tuple(layers)

    def freeze(self, layers: Iterable[Tensor], why: str) -> None:
        """Nothing of these layers may go."""
        reason = f"{why} ({self.where})" if self.where else why
        for core in layers:
            self.atoms.freeze(core.numpy(), reason)

    def _meet(self, core: Tensor) -> None:
        """A layer meets a value of a fixed size: the first cause is told, not each of the places that it reaches."""
        if self.cause:
            self.atoms.freeze(core.numpy(), self.cause)
        else:
            self.freeze([core], Reason.FIXED_SIZE)

    def note(self, layers: Layers) -> Layers:
        """Remember layers that vary along several dimensions at once: what goes must leave them rectangular."""
        for core in layers:
            if len(varying(core)) > 1:
                array, key = joint_key(core)
                if key not in self.joints:
                    self.joints[key] = Joint(array, self.path)
        return layers

    def balance(self, parts: Sequence[Tensor], fixed: Tensor | None = None) -> None:
        """These parts must stay equally long, or else those are `fixed` that a position in the code cuts off."""
        arrays = tuple(np.ascontiguousarray(part.numpy()).reshape(-1) for part in parts)
        key = b"|".join(array.tobytes() for array in arrays)
        ids = np.zeros(0, dtype=np.int64) if fixed is None else np.ascontiguousarray(fixed.numpy()).reshape(-1)
        if key in self.balances:
            ids = np.union1d(self.balances[key].fixed, ids)
        self.balances[key] = Balance(arrays, self.where, ids)

    # -- the primitives ---------------------------------------------------------------------------------------------

    def onto(self, core: Tensor, dims: frozenset[int]) -> Tensor:
        """The layer that is left on `dims` alone: its atoms go when all atoms of their slice go."""
        if varying(core) <= dims:
            return core
        kept = sorted(dims & varying(core))
        _, joint = joint_key(core)
        order = sorted(varying(core))
        axes = tuple(order.index(dim) for dim in kept)
        shape = [core.shape[dim] if dim in kept else 1 for dim in range(core.dim())]
        if (joint, axes) in self._derived:
            return self._derived[joint, axes].reshape(shape)
        others = [dim for dim in range(core.dim()) if dim not in kept]
        sizes = [core.shape[dim] for dim in kept]
        sources = core.permute(*kept, *others).reshape(int(np.prod(sizes)), -1).numpy()
        roots = self.atoms.find(sources)
        single = (roots == roots[:, :1]).all(1)
        targets = sources[:, 0].copy()
        if not single.all():
            # a batch folded into the heads repeats its slices: those that are the same share their atom
            _, first, same = np.unique(sources[~single], axis=0, return_index=True, return_inverse=True)
            fresh = self.atoms.fresh(len(first))
            targets[~single] = fresh[same.reshape(-1)]
            self.derived.append(Derived(fresh, sources[~single][first], joint, axes))
        self._derived[joint, axes] = torch.from_numpy(targets)
        return self._derived[joint, axes].reshape(shape)

    def merge(self, operands: Sequence[Operand], shape: Shape) -> Layers:
        """Elementwise, with broadcasting: layers that vary along the same dimensions are one from now on.

        A dimension that one operand has atoms for and another spans without any is of a fixed size, and freezes them.
        """
        if not any(layers for layers, _ in operands):
            return ()
        rank = len(shape)
        aligned = [
            (
                [core.reshape((1,) * (rank - core.dim()) + tuple(core.shape)) for core in layers],
                (1,) * (rank - len(size)) + tuple(size),
            )
            for layers, size in operands
        ]
        found = [(index, varying(core), core) for index, (cores, _) in enumerate(aligned) for core in cores]
        left: list[tuple[int, frozenset[int], Tensor]] = []
        for index, dims, core in self._folded(found):
            twins = [twin for other, same, twin in left if same == dims and (other != index)]
            for twin in twins:
                if twin is not core:
                    self.atoms.union(twin.numpy(), core.numpy())
            if dims and not twins:
                left.append((index, dims, core))
        implied = set()
        for place, (index, dims, core) in enumerate(left):
            for other_place, (other, dims_of_other, core_of_other) in enumerate(left[:place]):
                common = dims & dims_of_other
                if other != index and common and dims != dims_of_other:
                    self.atoms.union(self.onto(core, common).numpy(), self.onto(core_of_other, common).numpy())
                    # a layer that goes with whole slices of another says nothing that the other does not
                    implied |= {place} if common == dims else {other_place} if common == dims_of_other else set()
        result = [core for place, (_, _, core) in enumerate(left) if place not in implied]
        for cores, size in aligned:
            owned = frozenset().union(*map(varying, cores))
            fixed = frozenset(dim for dim in range(rank) if size[dim] > 1) - owned
            for core in result:
                if varying(core) & fixed:
                    self._meet(self.onto(core, varying(core) & fixed))
        return tuple(result)

    def _folded(self, found: list[tuple[int, frozenset[int], Tensor]]) -> list[tuple[int, frozenset[int], Tensor]]:
        """The layers to couple where an operand has several along the same dimensions.

        Folding channels and something else into one dimension, as `weight.view(out, -1)` does, leaves one layer of
        both. Each goes with its like in the other operands: the one that repeats in the same way. Where the others
        have a like for one layer alone, they are of a fixed size along what the rest stands for.
        """
        slots = Counter((index, dims) for index, dims, _ in found)
        folded = {dims for (_, dims), count in slots.items() if count > 1}
        result = [each for each in found if each[1] not in folded]
        for along in folded:
            inside = [each for each in found if each[1] == along]
            kinds: dict[bytes, list[tuple[int, frozenset[int], Tensor]]] = {}
            for each in inside:
                kinds.setdefault(_repetition(each[2]), []).append(each)
            paired = {kind for kind, same in kinds.items() if len({index for index, _, _ in same}) > 1}
            if not paired:
                result += inside
                continue
            for kind, (first, *others) in kinds.items():
                for _, _, core in others:
                    self.atoms.union(first[2].numpy(), core.numpy())
                if kind in paired:
                    result.append((-1, along, first[2]))
                else:
                    self._meet(first[2])
        return result

    def reduce(self, layers: Layers, dims: Iterable[int]) -> Layers:
        """Sum over `dims`, which stay as dimensions of size 1."""
        gone = frozenset(dims)
        left = [self.onto(core, varying(core) - gone) for core in layers if not varying(core) <= gone]
        return tuple(core for core in left if not any(self._implies(other, core) for other in left))

    def _implies(self, other: Tensor, core: Tensor) -> bool:
        """Does a layer go with whole slices of another one, and so say nothing that the other does not?"""
        dims = varying(core)
        if not dims < varying(other):
            return False
        slices = self.onto(other, dims)
        return np.array_equal(self.atoms.find(slices.numpy()), self.atoms.find(core.numpy()))

    def along(self, layers: Layers, dims: Iterable[int], why: str = "positions along space stay") -> Layers:
        """Operations that mix neighbors along `dims`: a layer may vary only across them, never along them."""
        mixed = frozenset(dims)
        result = []
        for core in layers:
            inside = varying(core) & mixed
            if not inside:
                result.append(core)
            elif inside == varying(core):
                self.freeze([core], why)
            else:
                first = core
                for dim in inside:
                    first = first.narrow(dim, 0, 1)
                self.atoms.union(core.numpy(), first.numpy())
                result.append(first)
        return tuple(result)

    def layout(self, layers: Layers, shape: Shape, move: Callable[[Tensor], Tensor]) -> Layers:
        """Apply a layout operation to the layers themselves."""
        moved = [compressed(move(core.expand(*shape) if len(shape) else core)) for core in layers]
        self.freeze((core for core in moved if not varying(core)), "a single one is taken")
        return self.note(tuple(core for core in self._without_loose(moved) if varying(core)))

    def _without_loose(self, layers: list[Tensor]) -> list[Tensor]:
        # an expanded dimension folded into one that has atoms adapts by itself: its own atoms would only over-couple
        firm = [varying(core) for core in layers if not self.atoms.is_elastic(core.numpy())]
        return [
            core
            for core in layers
            if not (self.atoms.is_elastic(core.numpy()) and any(varying(core) & dims for dims in firm))
        ]

    def contract(self, operands: Sequence[tuple[Layers, Shape, str]], out: str) -> Layers:
        """Products summed over shared labels, as in einsum: merge in the space of all labels, then reduce.

        Each operand is (layers, shape, one label per dimension).
        """
        labels = list(dict.fromkeys("".join(each for _, _, each in operands)))
        sizes = dict.fromkeys(labels, 1)
        embedded: list[Operand] = []
        for layers, shape, mine in operands:
            for label, size in zip(mine, shape, strict=True):
                sizes[label] = max(sizes[label], size)
            order = [mine.index(label) for label in labels if label in mine]
            place = [label in mine for label in labels]

            def embed(core: Tensor, order: list[int] = order, place: list[bool] = place) -> Tensor:
                core = core.permute(order)
                for dim, present in enumerate(place):
                    if not present:
                        core = core.unsqueeze(dim)
                return core

            shape_of = dict(zip(mine, shape, strict=True))
            embedded.append((tuple(map(embed, layers)), [shape_of.get(label, 1) for label in labels]))
        merged = self.merge(embedded, [sizes[label] for label in labels])
        summed = [dim for dim, label in enumerate(labels) if label not in out]
        left = self.reduce(merged, summed)
        kept = [label for label in labels if label in out]
        squeezed = [core.reshape([core.shape[labels.index(label)] for label in kept]) for core in left]
        return self.note(tuple(core.permute([kept.index(label) for label in out]) for core in squeezed))

    def join(self, operands: Sequence[Operand], dim: int) -> Layers:
        """Concatenate along `dim`: layers along it are joined, those across it are merged."""
        if not any(layers for layers, _ in operands):
            return ()
        rank = len(operands[0][1])
        across = []
        for layers, shape in operands:
            flat = list(shape)
            flat[dim] = 1
            across.append((tuple(core for core in layers if dim not in varying(core)), flat))
        common = np.broadcast_shapes(*(tuple(shape) for _, shape in across))
        result = list(self.merge(across, common))
        inside = [[core for core in layers if dim in varying(core)] for layers, _ in operands]
        for slot in range(max(map(len, inside))):
            cores = [cores[slot] if slot < len(cores) else torch.full([1] * rank, KEPT) for cores in inside]
            sizes = [max(core.shape[index] for core in cores) for index in range(rank)]
            parts = []
            for core, (_, shape) in zip(cores, operands, strict=True):
                sizes[dim] = shape[dim]
                parts.append(core.expand(sizes))
            joined = compressed(torch.cat(parts, dim))
            if varying(joined):
                result.append(joined)
        return self.note(tuple(result))
