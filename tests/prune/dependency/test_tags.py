"""Tags follow their elements through every operation, and what they couple may be removed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchslim.prune.dependency.coupling import Coupling, couple
from torchslim.prune.dependency.propagation import Tagger, varying
from torchslim.prune.dependency.trace import Trace, trace
from torchslim.prune.dependency.union_find import KEPT, Atoms
from torchslim.prune.structured.selection import Amount, select
from torchslim.prune.structured.surgery import cuts_of

# -- union-find ---------------------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


class Naive:
    """Sets, merged one pair at a time."""

    def __init__(self, count: int) -> None:
        self.sets = [{each} for each in range(count)]
        self.frozen = {KEPT}

    def of(self, atom: int) -> set[int]:
        return next(each for each in self.sets if atom in each)

    def union(self, left: int, right: int) -> None:
        if KEPT in (left, right):
            self.frozen.add(max(left, right))
            return
        one, two = self.of(left), self.of(right)
        if one is not two:
            self.sets.remove(two)
            one |= two

    def stays(self, atom: int) -> bool:
        return bool(self.of(atom) & self.frozen)


@given(pairs, st.lists(st.integers(0, 29), max_size=4), st.integers(0, 40))
def test_union_find_is_as_merging_sets_one_by_one(couples: list[tuple[int, int]], frozen: list[int], cut: int) -> None:
    atoms, naive = Atoms(), Naive(30)
    atoms.fresh(29)

    def union(some: list[tuple[int, int]]) -> None:
        if some:
            atoms.union(np.array([left for left, _ in some]), np.array([right for _, right in some]))
        for left, right in some:
            naive.union(left, right)

    union(couples[:cut])
    atoms.freeze(np.array(frozen, dtype=np.int64), "asked")
    naive.frozen |= set(frozen)
    union(couples[cut:])  # what is coupled with something frozen later on is frozen too
    everyone = np.arange(30)
    for atom, root in enumerate(atoms.find(everyone).tolist()):
        assert root == min(naive.of(atom))
    assert [reason > 0 for reason in atoms.frozen()] == [naive.stays(atom) for atom in range(30)]


def test_what_meets_kept_atoms_stays_and_is_not_coupled_with_all_else_that_does() -> None:
    atoms = Atoms()
    one, two, three = (atoms.fresh(3) for _ in range(3))
    atoms.union(one, np.full(3, KEPT))
    atoms.union(np.full(3, KEPT), two)
    assert len(set(atoms.find(np.concatenate([one, two])).tolist())) == 6
    frozen = atoms.frozen()
    assert frozen[one].all()
    assert frozen[two].all()
    assert not frozen[three].any()


# -- layout -------------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """A function of weights."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.function = function

    def forward(self) -> Any:
        result = self.function(*self.weights)
        results = result if isinstance(result, (tuple, list)) else [result]
        return sum(each.sum() for each in results)


def followed(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Trace, list[tuple[Tensor, ...]]]:
    """A trace, and the layers of what the function gives."""
    held = Held(function, *shapes)
    found = trace(held, ())
    wanted = function(*held.weights)
    wanted = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    assert not found.unruled
    sums = [each for each in found.operations if each.name == "aten.sum.default"][-len(wanted) :]
    return found, [each.inputs[0].layers for each in sums]


SHAPE = (4, 6, 2)
dims = st.integers(-3, 2)
LAYOUTS: dict[str, Any] = {
    "permute": st.permutations([0, 1, 2]).map(lambda order: lambda x: x.permute(order)),
    "transpose": st.tuples(dims, dims).map(lambda pair: lambda x: x.transpose(*pair)),
    "view": st.sampled_from([(24, 2), (4, 12), (48,), (2, 2, 6, 2), (4, 2, 3, 2), (8, 6), (3, 16), (4, 1, 12)]).map(
        lambda size: lambda x: x.reshape(size)),
    "expand": st.just(lambda x: x[:, None].expand(4, 3, 6, 2)),
    "flatten expanded": st.just(lambda x: x[:, None].expand(4, 3, 6, 2).reshape(4, 18, 2)),
    "split": st.tuples(st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([0, 1])).map(lambda pair: lambda x: x.split(*pair)),
    "sizes": st.sampled_from([[1, 5], [2, 4], [3, 3], [1, 2, 3]]).map(lambda sizes: lambda x: x.split(sizes, 1)),
    "chunk": st.tuples(st.sampled_from([1, 2, 3, 4]), dims).map(lambda pair: lambda x: x.chunk(*pair)),
    "slice": st.tuples(st.integers(-7, 7), st.integers(-7, 7), st.integers(1, 3)).map(
        lambda cut: lambda x: x[:, slice(*cut)]),
    "select": st.tuples(st.sampled_from([0, 1]), st.integers(-4, 3)).map(lambda pair: lambda x: x.select(*pair)),
    "unbind": dims.map(lambda dim: lambda x: x.unbind(dim)),
    "roll": st.tuples(st.integers(-5, 5), dims).map(lambda pair: lambda x: x.roll(*pair)),
    "flip": st.lists(st.integers(0, 2), unique=True).map(lambda over: lambda x: x.flip(over)),
    "repeat": st.tuples(*[st.integers(1, 3)] * 3).map(lambda times: lambda x: x.repeat(times)),
    "interleave": st.tuples(st.integers(1, 3), dims).map(lambda pair: lambda x: x.repeat_interleave(*pair)),
    "tile": st.integers(1, 3).map(lambda times: lambda x: x.tile(times)),
    "unfold": st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(1, 3)).map(lambda to: lambda x: x.unfold(*to)),
    "pixel shuffle": st.just(lambda x: F.pixel_shuffle(x, 2)),
    "pixel unshuffle": st.just(lambda x: F.pixel_unshuffle(x, 2)),
    "channel shuffle": st.sampled_from([1, 2, 3]).map(lambda groups: lambda x: F.channel_shuffle(x.movedim(1, 0)[None], groups)),
    "squeeze": st.just(lambda x: x[:, :1].squeeze(1)),
    "cat": dims.map(lambda dim: lambda x: torch.cat([x, x.flip(dim)], dim)),
    "stack": st.integers(-4, 3).map(lambda dim: lambda x: torch.stack([x, x], dim)),
    "index": st.lists(st.integers(0, 3), min_size=1, max_size=5).map(lambda at: lambda x: x[torch.tensor(at)]),
    "movedim": st.tuples(dims, dims).map(lambda pair: lambda x: x.movedim(*pair)),
    "rot90": st.integers(0, 3).map(lambda times: lambda x: x.rot90(times, (0, 1))),
    "diagonal": st.integers(-2, 2).map(lambda offset: lambda x: x.diagonal(offset)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "pixel shuffle"])
@given(st.data())
@settings(max_examples=12)
def test_a_layout_moves_tags_as_it_moves_elements(name: str, data: st.DataObject) -> None:
    assert_moved(data.draw(LAYOUTS[name]), SHAPE, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 9)))


@given(st.integers(0, 2), st.integers(0, 9))
@settings(max_examples=10)
def test_pixel_shuffle_moves_tags_as_it_moves_elements(dim: int, seed: int) -> None:
    assert_moved(lambda x: F.pixel_shuffle(x, 2), (8, 3, 2), dim, seed)


def assert_moved(function: Callable[[Tensor], Any], shape: tuple[int, ...], dim: int, seed: int) -> None:
    """What goes of the input is gone where it went to, and nothing else is; what is frozen aside."""
    wanted = function(torch.zeros(shape))
    wanted = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    if not all(each.numel() for each in wanted):
        return
    found, outputs = followed(function, shape)
    atoms = found.tagger.atoms
    own = next(core for core in found.weights["weights.0"].layers if varying(core) == {dim})
    coupling = couple(found)
    classes = [each for unit in coupling.units for cell in unit.cells for each in cell.classes]
    free = np.isin(coupling.roots[own.numpy().reshape(-1)], classes)
    gone = free & (np.random.default_rng(seed).random(shape[dim]) < 0.5)
    roots = atoms.find(np.arange(atoms.count))
    removed = np.isin(roots, roots[own.numpy().reshape(-1)[gone]])
    view = [1] * len(shape)
    view[dim] = -1
    element = torch.from_numpy(removed[own.numpy()]).reshape(view).expand(shape)
    moved = function(element.long())
    moved = moved if isinstance(moved, (tuple, list)) else [moved]
    for values, layers in zip(moved, outputs, strict=True):
        tagged = torch.zeros(values.shape, dtype=torch.bool)
        for core in layers:
            tagged |= torch.from_numpy(removed[core.numpy()])
        assert torch.equal(tagged, values.bool())


@given(st.tuples(*[st.integers(0, 2)] * 4), st.integers(0, 9))
@settings(max_examples=15)
def test_padding_never_goes_along_its_dimension(pad: tuple[int, ...], seed: int) -> None:
    shape = (4, 6)
    found, (layers,) = followed(lambda x: F.pad(x, pad), shape)
    roots = found.tagger.atoms.find(np.arange(found.tagger.atoms.count))
    for dim, core in enumerate(found.weights["weights.0"].layers):
        gone = np.random.default_rng(seed).random(shape[dim]) < 0.5
        removed = np.isin(roots, roots[core.numpy().reshape(-1)[gone]])
        left, right = pad[2 * (1 - dim) : 2 * (1 - dim) + 2]
        after = next(each for each in layers if varying(each) == {dim})
        expected = np.concatenate([np.zeros(left, bool), gone, np.zeros(right, bool)])
        assert np.array_equal(removed[after.numpy().reshape(-1)], expected)


# -- products, sums -----------------------------------------------------------------------------------------------------


def assert_compact_equals_masked(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], seed: int) -> None:
    """For a random removal that the tags allow: on small weights as on zeroed ones, where elements are left."""
    held = Held(function, *shapes).double()
    coupling = couple(trace(held, ()))
    rng = np.random.default_rng(seed)
    selection = select(
        coupling, Amount(round_to=1, min_channels=1), [], lambda _, group: rng.random(len(group.classes))
    )
    removed = selection.removed([int(rng.integers(1, unit.width + 1)) for unit in coupling.units])
    small = [each.detach() for each in held.weights]
    zeroed = [each.detach().clone() for each in held.weights]
    for cut in cuts_of(coupling, removed):
        place = int(cut.weight.rpartition(".")[2])
        kept = torch.tensor(cut.kept)
        small[place] = small[place].index_select(cut.dim, kept)
        gone = torch.tensor([index for index in range(cut.size) if index not in cut.kept])
        zeroed[place].index_fill_(cut.dim, gone, 0)
    full = function(*zeroed)
    for dim, mask in enumerate(kept_of(coupling, removed, tuple(full.shape))):
        if mask is not None:
            full = full.index_select(dim, torch.from_numpy(np.flatnonzero(mask)))
    torch.testing.assert_close(function(*small), full)


def kept_of(coupling: Coupling, removed: Any, shape: tuple[int, ...]) -> list[Any]:
    last = [each for each in coupling.trace.operations if each.name == "aten.sum.default"][-1]
    assert last.inputs[0].shape == shape
    return coupling.kept(last.inputs[0].layers, shape, removed)


@st.composite
def einsums(draw: Any) -> tuple[str, list[tuple[int, ...]]]:
    sizes = {label: draw(st.sampled_from([1, 2, 3, 4])) for label in "abcd"}
    operands = draw(
        st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True), min_size=1, max_size=3)
    )
    known = sorted(set().union(*operands))
    out = draw(st.lists(st.sampled_from(known), unique=True, max_size=3))
    equation = ",".join(map("".join, operands)) + "->" + "".join(out)
    return equation, [tuple(sizes[label] for label in operand) for operand in operands]


@pytest.mark.slow
@given(einsums(), st.integers(0, 9))
@settings(max_examples=150)
def test_einsum_on_small_operands_equals_einsum_on_zeroed_ones(case: tuple[str, Any], seed: int) -> None:
    equation, shapes = case
    assert_compact_equals_masked(lambda *each: torch.einsum(equation, *each), shapes, seed)


@pytest.mark.slow
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.integers(0, 9)
)
@settings(max_examples=40)
def test_convolutions_lose_groups_or_a_part_of_each(rank: int, groups: int, inner: int, outer: int, seed: int) -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.reshape(1, -1, *[1] * rank).expand(1, -1, *[3] * rank)
        left = x.shape[1] // weight.shape[1]
        return getattr(F, f"conv{rank}d")(x, weight, bias, groups=left).flatten(2).sum(2)

    shapes: list[tuple[int, ...]] = [(groups * inner,), (groups * outer, inner, *[2] * rank), (groups * outer,)]
    assert_compact_equals_masked(function, shapes, seed)


@pytest.mark.slow
@given(st.tuples(*[st.sampled_from([1, 2, 4])] * 3), st.tuples(*[st.booleans()] * 6), st.integers(0, 9))
@settings(max_examples=60)
def test_broadcasting(shape: tuple[int, ...], ones: tuple[bool, ...], seed: int) -> None:
    shapes = [tuple(1 if one else size for size, one in zip(shape, ones[at : at + 3], strict=True)) for at in (0, 3)]
    assert_compact_equals_masked(lambda x, y: x * y, shapes, seed)


@given(st.sets(st.integers(0, 2), min_size=1), st.booleans(), st.integers(0, 9))
@settings(max_examples=30)
def test_sums(over: set[int], keepdim: bool, seed: int) -> None:
    assert_compact_equals_masked(lambda x, y: (x * y).sum(sorted(over), keepdim), [(3, 4, 2), (4, 1)], seed)


# -- the primitives -----------------------------------------------------------------------------------------------------


def test_a_dimension_of_a_fixed_size_freezes_what_it_meets() -> None:
    tagger = Tagger()
    layers = tagger.own((3, 4))
    left = tagger.merge([(layers, (3, 4)), ((), (1, 4))], (3, 4))
    frozen = tagger.atoms.frozen()
    assert [bool(frozen[core.numpy()].all()) for core in left] == [False, True]


def test_the_sum_over_a_joint_layer_goes_when_all_that_was_summed_goes() -> None:
    tagger = Tagger()
    (own,) = tagger.own((6,))
    (joint,) = tagger.layout((own,), (6,), lambda core: core.reshape(2, 3))
    (rows,) = tagger.reduce((joint,), [1])
    (derived,) = tagger.derived
    assert rows.shape == (2, 1)
    assert np.array_equal(derived.targets, rows.numpy().reshape(-1))
    assert np.array_equal(derived.sources, joint.numpy())
    assert torch.equal(tagger.onto(joint, frozenset({0})), rows)
    assert len(tagger.derived) == 1
