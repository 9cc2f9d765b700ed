"""One pass over data: every figure against a naive loop, and nothing of the model changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.support import models, toy
from torchslim.core.fingerprint import fingerprint
from torchslim.errors import TaskError
from torchslim.prune.criteria.statistics import Gathered, Statistic, Statistics, gather

EVERYTHING = frozenset(Statistic)
LABELED = frozenset(each for each in Statistic if each.needs_loss)


def of(gathered: Gathered, path: str) -> Statistics:
    return gathered.of(path, generator=torch.Generator())


def split(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = toy.images(count, 3)
    return list(zip(images.split(size), labels.split(size), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@pytest.mark.slow
@given(SIZES)
def test_taylor_and_squared_gradients_are_those_of_a_loop_over_batches(sizes: tuple[int, int]) -> None:
    model, batches = toy.model().eval(), split(*sizes)
    found = gather(model, LABELED, batches)
    weight = model.conv2.weight
    terms, squares, slices = 0.0, 0.0, [0.0] * 4
    for batch in batches:
        gradient = torch.autograd.grad(loss_of(model, batch), weight)[0].double().numpy()
        share, term = len(batch[0]) / sizes[0], gradient * weight.detach().double().numpy()
        terms, squares = terms + share * term**2, squares + share * len(batch[0]) * gradient**2
        for dim in range(4):
            slices[dim] += share * term.sum(tuple(each for each in range(4) if each != dim)) ** 2
    statistics = of(found, "conv2.weight")
    assert statistics.taylor.numpy() == pytest.approx(terms, rel=1e-3, abs=1e-12)
    assert statistics.squared_gradient.numpy() == pytest.approx(squares, rel=1e-3, abs=1e-12)
    for each, expected in zip(statistics.slice_taylor, slices, strict=True):
        assert each.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-10)


def test_with_one_sample_a_batch_the_squared_gradient_is_the_fisher_diagonal() -> None:
    model, samples = toy.model().eval(), split(20, 1)
    found = gather(model, [Statistic.SQUARED_GRADIENT], samples)
    for path, parameter in model.named_parameters():
        expected = sum(torch.autograd.grad(loss_of(model, each), parameter)[0].square() for each in samples) / 20
        torch.testing.assert_close(of(found, path).squared_gradient, expected)


@pytest.mark.slow
@given(SIZES)
def test_outputs_are_measured_sample_by_sample_behind_norm_addition_and_relu(sizes: tuple[int, int]) -> None:
    model = toy.model().eval()
    found = gather(model, EVERYTHING, split(*sizes))
    values: dict[str, list[Tensor]] = {"bn1": [], "conv1": [], "conv2": [], "head": []}
    tails: dict[str, list[Tensor]] = {name: [] for name in values}
    for image, label in split(sizes[0], 1):
        first = torch.relu(model.bn1(model.conv1(image)))
        second = torch.relu(model.conv2(first) + first)
        third = model.head(second.mean((2, 3)))
        loss = functional.cross_entropy(third, label)
        for names, value in ((("bn1", "conv1"), first), (("conv2",), second), (("head",), third)):
            gradient = torch.autograd.grad(loss, value, retain_graph=True)[0]
            for name in names:
                values[name].append(value.detach().flatten(2) if value.dim() > 2 else value.detach()[..., None])
                tails[name].append((value * gradient).detach().reshape(value.shape[1], -1).sum(1).abs())
    for name, parts in values.items():
        statistics, seen = of(found, f"{name}.weight"), torch.cat(parts)
        assert torch.equal(statistics.zeros, (seen == 0).sum((0, 2)) / (seen.numel() // seen.shape[1]))
        torch.testing.assert_close(statistics.activation, seen.abs().mean((0, 2)))
        torch.testing.assert_close(statistics.activation_taylor, torch.stack(tails[name]).mean(0), rtol=1e-4, atol=1e-7)


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 9)),
    "1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 6, 5)),
    "2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5)),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 1, 3), stride=2), (4, 4, 3, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("single", [False, True])
def test_the_input_norm_of_a_convolution_is_that_of_what_each_tap_meets(kind: str, single: bool) -> None:
    make, shape = CONVOLUTIONS[kind]
    layer = make()
    given = torch.randn(shape if single else (3, *shape))
    found = of(gather(nn.Sequential(layer), [Statistic.INPUT_NORM], [(given, torch.zeros(1))]), "0.weight").input_norm
    # each tap alone: a layer of one weight, whose output is what that weight is multiplied with
    expected = torch.zeros_like(layer.weight)
    samples = given.shape[0]
    with torch.no_grad():
        for index in product(*map(range, layer.weight.shape)):
            weight = torch.zeros_like(layer.weight)
            weight[index] = 1
            expected[index] = layer._conv_forward(given, weight, None).norm() / samples**0.5
    torch.testing.assert_close(found.expand_as(layer.weight), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.ConvTranspose1d(4, 6, 3), (4, 5)), (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
     (nn.ConvTranspose3d(4, 2, 2), (4, 3, 3, 3))],
)  # fmt: skip
def test_the_input_norm_of_a_transposed_convolution_is_that_of_its_channels(layer: nn.Module, shape: Any) -> None:
    given = torch.randn(3, *shape)
    found = of(gather(nn.Sequential(layer), EVERYTHING - LABELED, [(given, torch.zeros(1))]), "0.weight")
    expected = given.transpose(0, 1).flatten(1).norm(dim=1) / 3**0.5
    assert found.input_norm.dim() == layer.weight.dim()
    torch.testing.assert_close(found.input_norm.flatten(), expected)
    torch.testing.assert_close(found.activation, layer(given).abs().transpose(0, 1).flatten(1).mean(1))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 4, 5), (3, 2, 4, 5), (3, 5, 5)])
def test_a_linear_layer_has_its_features_last(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 5)
    given, target = torch.randn(shape), torch.randn(shape)
    found = of(gather(nn.Sequential(layer), EVERYTHING, [(given, target)]), "0.weight")
    rows, outputs = given.reshape(-1, 5), layer(given)
    torch.testing.assert_close(found.input_norm, rows.norm(dim=0, keepdim=True) / shape[0] ** 0.5)
    torch.testing.assert_close(found.activation, outputs.reshape(-1, 5).abs().mean(0))
    terms = (outputs * 2 * (outputs - target) / outputs.numel()).reshape(1 if len(shape) == 1 else shape[0], -1, 5)
    torch.testing.assert_close(found.activation_taylor * shape[0], shape[0] * terms.sum(1).abs().sum(0))


class Folded(nn.Module):
    """Two groups of positions in the batch dimension, as in window attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 5)
        return self.head(self.inner(x.reshape(-1, 2, 5)).reshape(len(x), 4, 6)).mean(1)


def test_rows_that_are_folded_into_the_batch_are_positions_of_their_sample() -> None:
    model, given, target = Folded(), torch.randn(3, 4, 5), torch.randn(3, 2)
    found = of(gather(model, EVERYTHING, [(given, target)]), "inner.weight").activation_taylor
    hidden = model.inner(given)
    loss = functional.mse_loss(model.head(hidden).mean(1), target)
    terms = hidden * torch.autograd.grad(loss, hidden)[0] * 3
    torch.testing.assert_close(found, terms.sum(1).abs().mean(0))


class Twice(nn.Module):
    """A layer used twice, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.body(x)))))


def test_the_uses_of_a_layer_add_up_and_an_unused_one_has_no_statistics() -> None:
    model, given, target = Twice(), torch.randn(7, 5), torch.randn(7, 2)
    found = gather(model, EVERYTHING, [(given, target)])
    first = torch.relu(model.body(given))
    second = torch.relu(model.body(first))
    loss = functional.mse_loss(model.head(second), target)
    terms = sum(use * torch.autograd.grad(loss, use, retain_graph=True)[0] * 7 for use in (first, second))
    body = of(found, "body.weight")
    torch.testing.assert_close(body.activation_taylor, terms.abs().mean(0))
    torch.testing.assert_close(body.activation, torch.cat([first, second]).mean(0))
    torch.testing.assert_close(body.input_norm[0], torch.cat([given, first]).norm(dim=0) / 7**0.5)
    unused = of(found, "unused.weight")
    assert unused.gathered == EVERYTHING
    assert all(getattr(unused, each.value) is None for each in Statistic)


class InPlace(nn.Module):
    """Activations and additions that overwrite what they are given."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU6(inplace), nn.Linear(4, 4)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.one(x)))
        z = self.two(y)
        if self.inplace:
            z += y
        else:
            z = z + y
        return self.head(functional.leaky_relu(z, inplace=self.inplace).mean((2, 3)))


def test_what_works_in_place_gives_the_same_statistics() -> None:
    plain, inplace = InPlace(False), InPlace(True)
    inplace.load_state_dict(plain.state_dict())
    for path, _ in plain.named_parameters():
        one, other = (of(gather(model, EVERYTHING, split(8, 4)), path) for model in (plain, inplace))
        for each in Statistic:
            torch.testing.assert_close(getattr(one, each.value), getattr(other, each.value))


@dataclass
class Answer:
    logits: Tensor


class Wrapped(nn.Module):
    """Dicts in, a record or a dict out."""

    def __init__(self, record: bool) -> None:
        super().__init__()
        self.layer, self.record = nn.Linear(5, 3), record

    def forward(self, features: Tensor) -> Any:
        logits = self.layer(features)
        return Answer(logits) if self.record else {"logits": logits}


@pytest.mark.parametrize("record", [False, True])
def test_batches_and_outputs_are_read_as_a_task_reads_them(record: bool) -> None:
    model, given, labels = Wrapped(record), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    found = of(gather(model, [Statistic.TAYLOR], [{"features": given, "labels": labels}]), "layer.weight").taylor
    gradient = torch.autograd.grad(functional.cross_entropy(model.layer(given), labels), model.layer.weight)[0]
    torch.testing.assert_close(found, (gradient * model.layer.weight).square().detach())
    doubled = gather(
        model, [Statistic.TAYLOR], [given], forward=lambda model, batch: model(batch),
        loss=lambda outputs, batch: 2 * functional.cross_entropy(model.layer(batch), labels),
    )  # fmt: skip
    torch.testing.assert_close(of(doubled, "layer.weight").taylor, 4 * found)


def test_a_shared_weight_gathers_from_all_that_use_it_under_each_of_its_names() -> None:
    model = models.Tied()
    tokens = torch.randint(models.WORDS, (4, 6))
    found = gather(model, EVERYTHING, [(tokens, tokens)])
    embed, head = of(found, "embed.weight"), of(found, "head.weight")
    assert embed.taylor is head.taylor
    assert embed.input_norm is head.input_norm
    hidden = torch.tanh(model.body(model.embed(tokens)))
    torch.testing.assert_close(head.input_norm[0], hidden.flatten(0, 1).norm(dim=0) / 2)
    assert embed.activation.shape == (8,)  # outputs are the module's own
    assert head.activation.shape == (models.WORDS,)


@pytest.mark.parametrize("make", [models.Recurrent, models.Encoder])
def test_recurrent_and_attention_layers_have_gradients_and_what_their_parts_have(make: Any) -> None:
    model = make()
    given = torch.randn(4, 3, 5) if make is models.Recurrent else torch.randint(models.WORDS, (4, 5))
    labels = torch.zeros((4,) if make is models.Recurrent else (4, 5), dtype=torch.long)
    found = gather(model, EVERYTHING, [(given, labels)])
    for path, parameter in model.named_parameters():
        assert of(found, path).squared_gradient.shape == parameter.shape
    if make is models.Encoder:
        layer = of(found, "encoder.layers.0.linear1.weight")
        assert layer.input_norm.shape == (1, 8)
        assert bool((layer.zeros > 0).any())  # the ReLU behind it
        assert (
            of(gather(model, [Statistic.ZEROS], [(given, labels)]), "encoder.layers.0.linear1.weight").zeros is not None
        )


class ImageNorm(nn.LayerNorm):
    """A layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_norm_that_has_its_channels_second_is_told_by_their_number() -> None:
    model, given = nn.Sequential(ImageNorm(4)), torch.randn(2, 4, 5, 6)
    found = of(gather(model, [Statistic.ACTIVATION], [(given,)]), "0.weight").activation
    torch.testing.assert_close(found, model(given).abs().mean((0, 2, 3)))


class Checkpointed(nn.Module):
    """Computes its middle again in the backward pass, reentrantly or not; with None it does not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.one, self.two, self.reentrant = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), reentrant

    def middle(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.two(self.middle(x))
        return self.two(checkpoint(self.middle, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_counted_once(reentrant: bool) -> None:
    plain, again = Checkpointed(None), Checkpointed(reentrant)
    again.load_state_dict(plain.state_dict())
    one, other = (of(gather(model, EVERYTHING, split(8, 4)), "one.weight") for model in (plain, again))
    for each in Statistic:
        torch.testing.assert_close(getattr(one, each.value), getattr(other, each.value))


class Busy(nn.Module):
    """Counts its calls, replaces a buffer, draws random numbers, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = toy.Net(), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.ones(1)
        random.random()
        return self.drop(self.net(x)) + 0 * torch.rand(1)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a pass could leave behind: everything but the random states that a failing user's code may own."""

    def state() -> Any:
        return (
            fingerprint(model.state_dict()),
            [id(each) for each in model.state_dict(keep_vars=True).values()],
            [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
            [(each.requires_grad, None if each.grad is None else each.grad.tolist()) for each in model.parameters()],
            torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled,
        )  # fmt: skip

    before = state()
    yield
    assert state() == before


def test_a_pass_leaves_the_model_and_the_process_as_they_were() -> None:
    model = Busy()
    model.net.bn1.eval()
    model.net.conv1.weight.requires_grad_(False)
    model.net.head.weight.grad = torch.ones(4, 8)
    called = []
    model.net.head.weight.register_post_accumulate_grad_hook(called.append)
    with unchanged(model), torch.no_grad():
        found = gather(model, EVERYTHING, split(8, 4))
    assert not called
    assert of(found, "net.conv1.weight").taylor is not None  # frozen ones are scored too
    batches = split(8, 4)
    with unchanged(model), torch.inference_mode():
        gather(model, EVERYTHING, batches)

    def broken(outputs: Any, batch: Any) -> Tensor:
        raise ValueError("mine")

    with unchanged(model), pytest.raises(ValueError, match="mine"):
        gather(model, EVERYTHING, split(8, 4), loss=broken)


def test_a_pass_runs_in_eval_mode_and_twice_gives_the_same() -> None:
    model = Busy().train()
    results = [gather(model, EVERYTHING, split(8, 4)) for _ in range(2)]
    for path, _ in model.named_parameters():
        one, other = (of(each, path) for each in results)
        assert all(
            torch.equal(getattr(one, each.value), getattr(other, each.value))
            for each in EVERYTHING - {Statistic.SLICE_TAYLOR, Statistic.INPUT_NORM}
        )


def test_half_precision_is_summed_wide() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    found = of(
        gather(model, EVERYTHING, [(torch.full((2, 4), 300.0).bfloat16(), torch.zeros(2, 4).bfloat16())]), "0.weight"
    )
    assert {
        getattr(found, each.value).dtype for each in (Statistic.TAYLOR, Statistic.INPUT_NORM, Statistic.ACTIVATION)
    } == {torch.float32}


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "batches gave no batch"),
        ([(torch.randn(2, 1, 8, 8),)], None, "batch 1.*no labels.*gradients"),
        (split(4, 4), lambda outputs, batch: outputs, "loss.*one number.*tensor"),
        (split(4, 4), lambda outputs, batch: outputs.detach().sum(), "depends.*model's weights"),
        (split(4, 2), lambda outputs, batch: outputs.sum() / 0, "loss of batch 1"),
    ],
)
def test_data_that_cannot_be_used_is_refused_clearly(batches: Any, loss: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        gather(toy.model(), [Statistic.TAYLOR], batches, loss=loss)


def test_nothing_needed_is_nothing_done() -> None:
    assert gather(toy.model(), [], iter(())) == Gathered()
    unlabeled = gather(toy.model(), EVERYTHING - LABELED, [(torch.randn(2, 1, 8, 8),)])
    assert of(unlabeled, "conv1.weight").activation.shape == (8,)
