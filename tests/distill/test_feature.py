"""Feature losses: against NumPy from the papers' formulas, and their laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchslim.distill.features.align import Project, Shape, align, bridge, check_alignable, pooled
from torchslim.distill.losses.feature import (
    FSP,
    VID,
    AttentionTransfer,
    FeatureLoss,
    Hint,
    TokenCosine,
    TokenMSE,
)
from torchslim.distill.losses.feature_formulas import (
    attention,
    attention_transfer,
    cosine,
    flow,
    fsp,
    hint,
    variational_information,
)
from torchslim.distill.losses.review_kd import ReviewKD, hierarchical_context
from torchslim.errors import DistillError

SEEDS = st.integers(0, 2**31 - 1)
LOSSES: list[FeatureLoss] = [Hint(), TokenMSE(), TokenCosine(), AttentionTransfer(), FSP(), VID(), ReviewKD()]
BARE: list[FeatureLoss] = [TokenMSE(), TokenCosine(), AttentionTransfer(), FSP()]
"""Those that learn nothing where widths are equal."""

MIXES: dict[str, tuple[Shape, Shape]] = {
    "maps of one size": ((3, 4, 4), (3, 4, 4)),
    "maps, wider": ((3, 4, 4), (5, 4, 4)),
    "maps that shrink": ((3, 7, 6), (5, 4, 4)),
    "maps that grow": ((3, 2, 3), (4, 5, 7)),
    "maps that shrink and grow": ((3, 8, 2), (4, 3, 5)),
    "volumes": ((2, 4, 2, 3), (3, 2, 3, 3)),
    "tokens": ((4, 6), (4, 6)),
    "tokens of other widths and lengths": ((4, 5), (6, 9)),
    "vectors": ((4,), (7,)),
    "a vector against a map": ((4,), (6, 3, 2)),
    "a map against a vector": ((4, 3, 2), (6,)),
    "tokens against a vector": ((4, 5), (6,)),
    "tokens against a map": ((4, 6), (5, 3, 2)),
    "tokens with a class token against a map": ((4, 7), (5, 3, 2)),
    "a map against tokens with a class token": ((4, 3, 2), (5, 7)),
}


def draw(shape: Shape, seed: int = 0, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def works_with(loss: FeatureLoss, pair: tuple[Shape, Shape]) -> bool:
    return not (isinstance(loss, AttentionTransfer | ReviewKD) and min(map(len, pair)) == 1)


def built(loss: FeatureLoss, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
    torch.manual_seed(1)
    return loss.build(pairs).double()


# ------------------------------------------------------------------------------------------------------- by hand


def test_by_hand() -> None:
    student, teacher = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [3.0, 1.0]]])
    assert hint(student, teacher).item() == (4 + 9) / 4
    assert hint(student, teacher, torch.tensor([[True, False]])).item() == 0
    assert TokenMSE()(student, teacher).item() == (4 + 9) / 4
    # the first position is equal; at the second (2, 4) against (0, 1)
    assert cosine(student, teacher).item() == pytest.approx((1 - 4 / math.sqrt(20)) / 2)
    assert attention(student).tolist() == [[10.0, 20.0]]
    assert attention(student, 1).tolist() == [[4.0, 6.0]]
    left, right = (1 / math.sqrt(5), 2 / math.sqrt(5)), (10 / math.sqrt(101), 1 / math.sqrt(101))
    expected = ((left[0] - right[0]) ** 2 + (left[1] - right[1]) ** 2) / 2
    assert attention_transfer(student, teacher).item() == pytest.approx(expected)
    assert AttentionTransfer(weight=2.0)(student, teacher).item() == pytest.approx(2 * expected)
    assert flow(student, teacher).tolist() == [[[0.5, 2.5], [1.5, 6.5]]]
    assert fsp((student, student), (student, teacher)).item() == ((2.5 - 0.5) ** 2 + 3**2 + 4**2 + 6**2) / 4
    value = variational_information(student, torch.tensor([1.0, 4.0]), teacher)
    assert value.item() == pytest.approx((4 + 2 * math.log(4) + 9 / 4) / 8)
    # two positions, and their average
    first, second = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 0.0]]])
    assert hierarchical_context(first, second).item() == pytest.approx((5 + 4 / 2) / 1.5)


# ------------------------------------------------------------------------------------------------------- references


def np_pool(x: Any, grid: Sequence[int], reduce: Any = np.mean) -> Any:
    """Adaptive: cell i of n covers floor(i h / n) to ceil((i + 1) h / n)."""
    for axis, n in enumerate(grid, 2):
        h = x.shape[axis]
        cells = [range(i * h // n, -(-(i + 1) * h // n)) for i in range(n)]
        x = np.stack([reduce(x.take(cell, axis), axis=axis) for cell in cells], axis)
    return x


def np_linear(layer: Project, x: Any) -> Any:
    out = np.einsum("oc,bc...->bo...", layer.linear.weight.detach().numpy(), x)
    if layer.linear.bias is not None:
        out = out + layer.linear.bias.detach().numpy().reshape(1, -1, *[1] * (x.ndim - 2))
    return out


def np_hint(module: Any, s: Any, t: Any) -> float:
    return 100 * float(np.mean((np_linear(module.parts[0].projector, s) - t) ** 2))


def np_token_mse(module: Any, s: Any, t: Any) -> float:
    return float(np.mean((np_linear(module.parts[0].projector, s) - t) ** 2))


def np_token_cosine(module: Any, s: Any, t: Any) -> float:
    s = np_linear(module.parts[0].projector, s)
    return float(np.mean(1 - (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)))


def np_attention(module: Any, s: Any, t: Any) -> float:
    unit = []
    for x in (s, t):
        rows = (np.abs(x) ** 2).sum(1).reshape(len(x), -1)
        unit.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return 1000 * float(np.mean((unit[0] - unit[1]) ** 2))


def np_vid(module: Any, s: Any, t: Any) -> float:
    part = module.parts[0]
    hidden = s
    for layer in part.regressor:
        hidden = np_linear(layer, hidden) if isinstance(layer, Project) else np.maximum(hidden, 0)
    variance = (np.log1p(np.exp(part.alpha.detach().numpy())) + 1e-5).reshape(1, -1, *[1] * (s.ndim - 2))
    assert variance == pytest.approx(5, abs=1e-4)
    return float(np.mean(np.log(np.sqrt(variance)) + (t - hidden) ** 2 / (2 * variance)))


REFERENCES = [
    (Hint(weight=100.0), np_hint), (TokenMSE(), np_token_mse), (TokenCosine(), np_token_cosine),
    (AttentionTransfer(), np_attention), (VID(), np_vid),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "reference"), REFERENCES)
@pytest.mark.parametrize("positions", [(4,), (3, 2)])
@settings(max_examples=15)
@given(seed=SEEDS)
def test_losses_are_the_papers_formulas(loss: Any, reference: Any, positions: Shape, seed: int) -> None:
    student, teacher = draw((3, *positions), seed), draw((5, *positions), seed + 1)
    module = built(loss, [((3, *positions), (5, *positions))])
    expected = reference(module, student.numpy(), teacher.numpy())
    assert module([student], [teacher]).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=15)
@given(seed=SEEDS)
def test_flows_are_the_papers_formula(seed: int) -> None:
    shapes = [((2, 6, 4), (3, 8, 8)), ((4, 3, 2), (5, 8, 8)), ((5, 3, 2), (5, 4, 4))]
    students, teachers = ([draw(pair[side], seed + i) for i, pair in enumerate(shapes)] for side in (0, 1))
    module = built(FSP(), shapes)
    flows: list[list[Any]] = []
    for side, grids in ((students, [(3, 2), (3, 2)]), (teachers, [(8, 8), (4, 4)])):
        layers = [each.numpy() for each in side]
        if side is students:
            layers[:2] = [np_linear(module.projectors[i], layers[i]) for i in range(2)]
        flows.append([])
        for first, second, grid in zip(layers, layers[1:], grids, strict=False):
            first, second = (np_pool(each, grid, np.max) for each in (first, second))
            flows[-1].append(np.einsum("bihw,bjhw->bij", first, second) / math.prod(grid))
    expected = 50 * np.mean([np.mean((s - t) ** 2) for s, t in zip(*flows, strict=True)])
    assert isinstance(module.projectors[2], nn.Identity)
    assert module(students, teachers).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("positions", [(1,), (3,), (9,), (5, 7), (3, 6, 4)])
def test_hierarchical_context_is_the_papers_formula(positions: Shape) -> None:
    s, t = draw((2, *positions), 1).numpy(), draw((2, *positions), 2).numpy()
    total, weight, weights = np.mean((s - t) ** 2), 1.0, 1.0
    for level in (4, 2, 1):
        if level < max(positions):
            grid = [min(level, size) for size in positions]
            weight /= 2
            total, weights = total + weight * np.mean((np_pool(s, grid) - np_pool(t, grid)) ** 2), weights + weight
    value = hierarchical_context(torch.from_numpy(s), torch.from_numpy(t)).item()
    assert value == pytest.approx(total / weights, rel=1e-9)


def test_review_is_the_papers_formula() -> None:
    def read(parameter: Tensor) -> Any:
        return parameter.detach().numpy()

    def convolve(layer: Any, x: Any) -> Any:
        weight, reach = read(layer.weight), layer.weight.shape[2] // 2
        x = np.pad(x, ((0, 0), (0, 0), (reach, reach)))
        length = x.shape[2] - 2 * reach
        out = sum(np.einsum("oc,bcl->bol", weight[:, :, k], x[:, :, k : k + length]) for k in range(2 * reach + 1))
        return out if layer.bias is None else out + read(layer.bias)[:, None]

    def normed(x: Any) -> Any:
        return (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)

    module: Any = built(ReviewKD(channels=4, weight=3.0), [((3, 6), (5, 6)), ((7, 3), (2, 3))])
    shallow, deep = draw((3, 6), 1), draw((7, 3), 2)
    teachers = [draw((5, 6), 3), draw((2, 3), 4)]
    first, second = module.fusions
    assert second.gates is None
    fused = normed(convolve(second.inward[0], deep.numpy()))
    assert fused.shape[1] == 4
    outs = [normed(convolve(second.outward[0], fused))]
    own, deeper = normed(convolve(first.inward[0], shallow.numpy())), fused.repeat(2, axis=2)
    gates = 1 / (1 + np.exp(-convolve(first.gates, np.concatenate([own, deeper], 1))))
    outs.insert(0, normed(convolve(first.outward[0], own * gates[:, :1] + deeper * gates[:, 1:])))
    expected = [hierarchical_context(torch.from_numpy(o), t).item() for o, t in zip(outs, teachers, strict=True)]
    assert module([shallow, deep], teachers).item() == pytest.approx(3 * np.mean(expected), rel=1e-9)


# ------------------------------------------------------------------------------------------------------- laws


@pytest.mark.slow
@pytest.mark.parametrize("loss", BARE, ids=lambda each: type(each).__name__)
@given(seed=SEEDS)
def test_laws_of_those_that_learn_nothing(loss: Any, seed: int) -> None:
    shapes: list[Shape] = [(4, 4, 4), (4, 2, 4)]
    students, teachers = ([draw(shape, seed + i + 9 * side) for i, shape in enumerate(shapes)] for side in (0, 1))
    value = loss(students, teachers).item()
    assert value > 0
    assert loss(teachers, teachers).item() == pytest.approx(0, abs=1e-12)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    turned = loss([each[order] for each in students], [each[order] for each in teachers])
    assert turned.item() == pytest.approx(value, rel=1e-9)
    if isinstance(loss, AttentionTransfer | TokenCosine):
        assert loss([each * 3 for each in students], teachers).item() == pytest.approx(value, rel=1e-9)
    double = type(loss)(weight=2 * loss.weight)
    assert double(students, teachers).item() == pytest.approx(2 * value, rel=1e-9)


@given(SEEDS)
def test_laws_of_hierarchical_context(seed: int) -> None:
    student, teacher = draw((2, 5, 8), seed), draw((2, 5, 8), seed + 1)
    assert hierarchical_context(teacher, teacher).item() == 0
    plain = hierarchical_context(student, teacher).item()
    assert 0 < plain <= hint(student, teacher).item() + 1e-12  # averages differ by no more


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_builds_runs_and_teaches(loss: FeatureLoss, mix: str) -> None:
    pairs = [MIXES[mix], MIXES[mix]]
    if not works_with(loss, MIXES[mix]):
        with pytest.raises(DistillError):
            loss.build(pairs)
        return
    module = built(loss, pairs)
    for batch in (3, 1):
        students = [draw(pair[0], i, batch).requires_grad_() for i, pair in enumerate(pairs)]
        teachers = [draw(pair[1], 5 + i, batch).requires_grad_() for i, pair in enumerate(pairs)]
        module.zero_grad()
        value = module(students, teachers, [(None, None)] * 2)
        assert value.shape == ()
        value.backward()
        assert all(each.grad is None for each in teachers)
        learned = [*students, *module.parameters()]
        assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in learned)
        assert all(bool(each.grad.any()) for each in students if each.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("mix", ["tokens of other widths and lengths", "maps that shrink"])
def test_gradients(loss: FeatureLoss, mix: str) -> None:
    pairs = [MIXES[mix], MIXES[mix]]
    module = built(loss, pairs)
    students = [draw(pair[0], i, 2).requires_grad_() for i, pair in enumerate(pairs)]
    teachers = [draw(pair[1], 5 + i, 2) for i, pair in enumerate(pairs)]
    assert torch.autograd.gradcheck(lambda *each: module(each, teachers), students)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("mix", ["tokens", "tokens of other widths and lengths", "tokens with a class token against a map"])  # fmt: skip
def test_what_is_masked_does_not_count(loss: FeatureLoss, mix: str) -> None:
    pairs = [MIXES[mix], MIXES[mix]]
    module = built(loss, pairs)
    students = [draw(pair[0], i) for i, pair in enumerate(pairs)]
    teachers = [draw(pair[1], 5 + i) for i, pair in enumerate(pairs)]
    length = pairs[0][0][1]
    mask = torch.arange(length) < torch.tensor([[length], [length - 2], [2]])

    def both(kind: Tensor) -> list[Any]:
        return [(kind, kind if mix == "tokens" else None)] * 2

    value = module(students, teachers, both(mask))
    wild = [each.masked_fill(~mask[:, None], torch.nan).requires_grad_() for each in students]
    others = teachers
    if mix == "tokens":
        others = [each.masked_fill(~mask[:, None], torch.nan) for each in teachers]
    for kind in (mask, mask.long()):
        again = module(wild, others, both(kind))
        assert again.item() == pytest.approx(value.item(), rel=1e-9)
    again.backward()
    assert all(torch.isfinite(each.grad).all() for each in (*wild, *module.parameters()) if each.grad is not None)
    every = torch.ones_like(mask)
    plain = module(students, teachers).item()
    assert module(students, teachers, both(every)).item() == pytest.approx(plain, rel=1e-9)
    assert value.item() != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("loss", [Hint(), TokenMSE(), TokenCosine(), AttentionTransfer(), VID()])
def test_padding_of_tokens_changes_no_mean(loss: FeatureLoss) -> None:
    module = built(loss, [((4, 5), (6, 5))])
    student, teacher = draw((4, 5)), draw((6, 5), 1)
    padded = [torch.cat([each, draw((each.shape[1], 3), 2)], 2) for each in (student, teacher)]
    mask = (torch.arange(8) < 5).expand(3, 8)
    expected = module([student], [teacher]).item()
    assert module([padded[0]], [padded[1]], [(mask, mask)]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: type(each).__name__)
def test_half_precision_is_computed_in_float32(loss: FeatureLoss, dtype: torch.dtype) -> None:
    pairs = [MIXES["maps that shrink"], MIXES["maps that shrink"]]
    module = loss.build(pairs)
    students = [(draw(pair[0], i) * 500).to(dtype) for i, pair in enumerate(pairs)]
    teachers = [(draw(pair[1], 5 + i) * 500).to(dtype) for i, pair in enumerate(pairs)]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = module(students, teachers)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        wide = module([each.float() for each in students], [each.float() for each in teachers])
        assert value.item() == pytest.approx(wide.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [*BARE, Hint(), VID(), ReviewKD()], ids=lambda each: type(each).__name__)
def test_features_of_zeros_have_finite_gradients(loss: FeatureLoss) -> None:
    pairs: list[tuple[Shape, Shape]] = [((2, 3, 3), (2, 3, 3))] * 2
    students = [torch.zeros(2, 2, 3, 3, requires_grad=True) for _ in pairs]
    loss.build(pairs)(students, [torch.zeros(2, 2, 3, 3) for _ in pairs]).backward()
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in students)


@pytest.mark.slow
def test_the_teachers_feature_is_learned() -> None:
    for loss in LOSSES:
        torch.manual_seed(0)
        pairs = [((3, 4, 4), (2, 2, 2)), ((3, 2, 2), (2, 2, 2))]
        students = [draw(pair[0], i, 4, torch.float32).requires_grad_() for i, pair in enumerate(pairs)]
        teachers = [draw(pair[1], 5 + i, 4, torch.float32) for i, pair in enumerate(pairs)]
        module = loss.build(pairs)
        optimizer = torch.optim.Adam([*students, *module.parameters()], lr=0.05)
        before = module(students, teachers).item()
        for _ in range(40):
            optimizer.zero_grad()
            value = module(students, teachers)
            value.backward()
            optimizer.step()
        assert value.item() < 0.8 * before, loss


# ------------------------------------------------------------------------------------------------------- positions


def test_positions_are_brought_together() -> None:
    tokens, grid = torch.arange(7.0).view(1, 1, 7), torch.zeros(1, 2, 2, 3)
    assert align(tokens, grid)[0].tolist() == [[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]
    assert align(tokens[..., 1:], grid)[0].tolist() == [[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]
    assert align(grid, tokens)[1].shape == (1, 1, 2, 3)
    assert align(tokens, torch.zeros(1, 5))[0].tolist() == [[3.0]]
    assert align(tokens[..., :4], torch.zeros(1, 1, 2))[0].tolist() == [[[0.5, 2.5]]]
    assert align(tokens[..., :2], torch.zeros(1, 1, 4))[0].tolist() == [[[0.0, 0.25, 0.75, 1.0]]]
    # a masked token has no part in an average, nor in what it was averaged to
    mask = torch.tensor([[True, False, False, False]])
    student, teacher, counts = align(tokens[..., 1:5], torch.ones(1, 1, 2), (mask, None))
    assert (student.tolist(), teacher.tolist()) == ([[[1.0, 0.0]]], [[[1.0, 0.0]]])
    assert counts is not None
    assert counts.tolist() == [[True, False]]
    student, _, counts = align(tokens[..., 1:5], torch.ones(1, 1), (mask, None))
    assert counts is not None
    assert (student.tolist(), counts.tolist()) == ([[1.0]], [True])
    assert TokenMSE().build([((1, 4), (1, 2))])([tokens[..., 1:5]], [torch.ones(1, 1, 2)], [(mask, None)]).item() == 0
    assert hint(tokens[..., 1:5], tokens[..., :4], torch.zeros(1, 4)).item() == 0
    assert [tuple(each.shape) for each in pooled([torch.zeros(1, 2, 4, 2), torch.zeros(1, 3)])] == [(1, 2), (1, 3)]


def test_widths_are_brought_together() -> None:
    assert isinstance(bridge((3, 2), (3, 9)), nn.Identity)
    assert bridge((3, 2), (5, 9))(torch.zeros(2, 3, 4)).shape == (2, 5, 4)
    assert not isinstance(Hint().build([((3, 2), (3, 2))]).parts[0].projector, nn.Identity)
    convolution = nn.Conv2d(3, 5, 1)
    project = Project(3, 5)
    project.load_state_dict({"linear.weight": convolution.weight[:, :, 0, 0], "linear.bias": convolution.bias})
    feature = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(project(feature), convolution(feature))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 6), (5, 2, 2)), ((4, 2, 2), (5, 6)), ((4, 2, 2), (5, 2, 2, 2)), ((4, 0), (4, 3)), ((), (3,)), ((1,) * 5, (1,) * 5)],
)  # fmt: skip
def test_shapes_with_nothing_in_common_are_named(student: Shape, teacher: Shape) -> None:
    for check in (lambda: check_alignable(student, teacher), lambda: Hint().build([(student, teacher)])):
        with pytest.raises(DistillError, match="tap other layers") as caught:
            check()
        assert str(student) in str(caught.value)
        assert str(teacher) in str(caught.value)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DistillError, match="two pairs.*got 1"):
        FSP().build([((3, 2, 2), (3, 2, 2))])
    with pytest.raises(DistillError, match="needs channels"):
        FSP().build([((), (3,)), ((), (3,))])
    with pytest.raises(DistillError, match=r"\(3, 4, 4\) and \(3, 4\)"):
        FSP().build([((3, 4, 4), (3, 2)), ((3, 4), (3, 2))])
    with pytest.raises(DistillError, match=r"\(2, 3, 4\).*\(2, 3, 3\)"):
        fsp((torch.ones(2, 3, 2), torch.ones(2, 4, 2)), (torch.ones(2, 3, 2), torch.ones(2, 3, 2)))
    with pytest.raises(DistillError, match=r"\(3,\).*\(5, 4, 4\).*maps or tokens"):
        AttentionTransfer().build([((3,), (5, 4, 4))])
    with pytest.raises(DistillError, match="maps or tokens"):
        attention_transfer(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(DistillError, match="got 1 and 2"):
        ReviewKD().build([((3, 4), (3, 4)), ((3, 4, 4), (3, 4, 4))])
    with pytest.raises(DistillError, match="got none"):
        ReviewKD().build([((3,), (3,))])
    with pytest.raises(DistillError, match=r"\(2, 3\) and \(2, 3\)"):
        hierarchical_context(torch.ones(2, 3), torch.ones(2, 3))
    for compare in (hint, cosine):
        with pytest.raises(DistillError, match=r"\(2, 3, 4\).*\(2, 5, 4\)"):
            compare(torch.ones(2, 3, 4), torch.ones(2, 5, 4))
    with pytest.raises(DistillError, match="of 2 and 3 samples"):
        TokenMSE()(torch.ones(2, 3), torch.ones(3, 3))
    module = TokenMSE().build([((3, 4), (3, 4))])
    with pytest.raises(DistillError, match=r"feature \(2, 3, 4\).*\(2, 3\)"):
        module([torch.ones(2, 3, 4)], [torch.ones(2, 3, 4)], [(torch.ones(2, 3), None)])
    with pytest.raises(DistillError, match="one for the student"):
        module([torch.ones(2, 3, 4)], [torch.ones(2, 3, 4)], [torch.ones(2, 4)])
    with pytest.raises(DistillError, match=r"built for .*\[\(3, 3\)\]"):
        module([torch.ones(2, 5, 4)], [torch.ones(2, 3, 4)])
    with pytest.raises(DistillError, match="2 features of the student"):
        TokenMSE()([torch.ones(2, 3)] * 2, torch.ones(2, 3))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: type(each).__name__)
def test_settings_and_calls_are_checked(loss: FeatureLoss) -> None:
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DistillError, match="weight must be"):
            type(loss)(weight=value)
    if not isinstance(loss, FSP):
        with pytest.raises(DistillError, match="at least one pair"):
            loss.build([])
    features = [torch.ones(2, 3, 4), torch.ones(2, 3, 4)]
    if loss in BARE:
        assert loss(features, features).shape == ()
    if not isinstance(loss, AttentionTransfer):
        with pytest.raises(DistillError, match=r"build\(\.\.\.\).*Distill\(feature=\.\.\.\)"):
            loss(features, [torch.ones(2, 5, 4)] * 2)
    for make, name in ((AttentionTransfer, "power"), (VID, "variance"), (ReviewKD, "channels")):
        with pytest.raises(DistillError, match=f"{name} must be"):
            make(**{name: 0})
    assert VID(variance=1e4).build([((1,), (1,))]).parts[0].alpha.item() == pytest.approx(1e4)


def test_a_built_module_is_saved_and_loaded() -> None:
    pairs: list[tuple[Shape, Shape]] = [((3, 4, 4), (5, 2, 2)), ((3, 4, 4), (5, 2, 2))]
    students, teachers = [torch.randn(2, 3, 4, 4)] * 2, [torch.randn(2, 5, 2, 2)] * 2
    for loss in LOSSES:
        one, two = loss.build(pairs).eval(), loss.build(pairs).eval()
        two.load_state_dict(one.state_dict())
        assert one(students, teachers).item() == two(students, teachers).item()
