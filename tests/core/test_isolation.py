"""Copies of models share nothing with the original, and global state is left as it was found."""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

import torchslim as ts
from tests.support import models, toy
from torchslim.core.batches import predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import (
    copy_model,
    differentiable_checkpoints,
    preserved_globals,
    quiet,
    seed_everything,
    torch_threads,
)
from torchslim.errors import ModelError

IMAGES = (torch.randn(2, 1, 8, 8),)
STEPS = (torch.randn(2, 4, 5),)
TOKENS = (torch.randint(models.WORDS, (2, 5)),)


def plain() -> tuple[nn.Module, Any]:
    return toy.model(), IMAGES


def pruned_cnn() -> tuple[nn.Module, Any]:
    model = toy.model()
    torch_prune.l1_unstructured(model.conv1, "weight", 0.4)
    torch_prune.ln_structured(model.conv2, "weight", 0.5, n=2, dim=0)
    torch_prune.random_unstructured(model.conv2, "weight", 0.3)  # a second time: a container
    torch_prune.l1_unstructured(model.head, "bias", 2)
    return model, IMAGES


def pruned_lstm() -> tuple[nn.Module, Any]:
    model = models.Recurrent()
    torch_prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.5)
    torch_prune.l1_unstructured(model.lstm, "weight_ih_l1_reverse", 0.5)
    return model, STEPS


def pruned_tied() -> tuple[nn.Module, Any]:
    model = models.Tied()
    torch_prune.l1_unstructured(model.head, "weight", 0.5)  # the embedding keeps its whole table
    return model, TOKENS


def normalized() -> tuple[nn.Module, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(weight_norm(nn.Linear(5, 6)), spectral_norm(nn.Linear(6, 4)))
    return nn.Sequential(model, parametrizations.orthogonal(nn.Linear(4, 4))), (torch.randn(2, 5),)


class Remembers(nn.Module):
    """Keeps what it computed, as models with attention maps or losses on features do."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.last, self.all = nn.Linear(5, 3), None, {"kept": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.line(x)
        self.all["kept"].append(self.last * 2)
        return self.last


def remembering() -> tuple[nn.Module, Any]:
    return Remembers(), STEPS


MAKERS = [plain, pruned_cnn, pruned_lstm, pruned_tied, normalized, remembering]


@pytest.mark.parametrize("make", MAKERS)
def test_a_copy_computes_the_same_and_shares_nothing(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, inputs = make()
    model(*inputs)  # hooks have run, and what a forward pass leaves behind is there
    model.train()
    before, attributes = fingerprint(model.state_dict()), [sorted(vars(each)) for each in model.modules()]
    expected = predictor(model)(*inputs)
    copied, _ = copy_model(model)
    assert torch.equal(predictor(copied)(*inputs), expected)
    assert [each.training for each in copied.modules()] == [each.training for each in model.modules()]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(7)
        for buffer in copied.buffers():
            buffer.fill_(3)
    assert fingerprint(model.state_dict()) == before
    assert [sorted(vars(each)) for each in model.modules()] == attributes
    assert torch.equal(predictor(model)(*inputs), expected)


@pytest.mark.parametrize("make", [pruned_cnn, pruned_lstm, pruned_tied])
def test_masks_become_data_and_the_copy_is_free_of_torchs_pruning(
    make: Callable[[], tuple[nn.Module, Any]],
) -> None:
    model, _ = make()
    buffers = {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if "_mask" in name}
    copied, masks = copy_model(model)
    parameters = dict(copied.named_parameters())
    assert torch_prune.is_pruned(model)
    assert not torch_prune.is_pruned(copied)
    assert not any(name.endswith(("_orig", "_mask")) for name in copied.state_dict())
    assert masks.keys() == buffers.keys() <= parameters.keys()
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, buffers[name])
        assert bool((parameters[name][~mask] == 0).all())
        assert isinstance(parameters[name], nn.Parameter)
        assert parameters[name].is_leaf


def test_what_is_shared_stays_shared_unless_a_mask_divides_it() -> None:
    copied, _ = copy_model(models.Tied())
    assert copied.head.weight is copied.embed.weight
    divided, _ = copy_model(pruned_tied()[0])
    assert divided.head.weight is not divided.embed.weight
    assert not bool((divided.embed.weight == 0).any())


def test_frozen_weights_stay_frozen_in_a_copy() -> None:
    model, _ = pruned_cnn()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in copy_model(model)[0].parameters())


def state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.backends.quantized.engine, torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_globals_survive_whatever_happens_inside(error: type[BaseException] | None) -> None:
    before = state()
    with pytest.raises(error) if error else nullcontext(), preserved_globals(1):
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        engines = torch.backends.quantized.supported_engines
        torch.backends.quantized.engine = next(each for each in engines if each != before[6])
        torch.rand(3), np.random.rand(3), random.random()
        assert all(now != then for now, then in zip(state(), before, strict=True))
        if error:
            raise error
    assert state() == before


@pytest.mark.slow
@given(st.integers(0, 2**40))
def test_one_seed_decides_all_three_generators(seed: int) -> None:
    def draw(number: int) -> list[float]:
        with preserved_globals(number):
            return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    assert draw(seed) == draw(seed)
    assert all(a != b for a, b in zip(draw(seed), draw(seed + 1), strict=True))
    with preserved_globals():
        seed_everything(seed)
        assert [torch.rand(1).item(), float(np.random.rand()), random.random()] == draw(seed)


def test_quiet_hides_everything_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("noisy")
    with pytest.raises(ValueError, match="kept"), warnings.catch_warnings(), quiet():
        warnings.simplefilter("error")
        print("printed")
        print("printed", file=sys.stderr)
        logger.error("logged")
        raise ValueError("kept")
    with quiet():
        warnings.warn("unseen", stacklevel=1)
    assert capsys.readouterr() == ("", "")
    assert logger.isEnabledFor(logging.ERROR)
    with pytest.warns(UserWarning, match="seen again"):
        warnings.warn("seen again", stacklevel=1)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_output_is_back_in_whatever_order_two_threads_leave(order: list[int]) -> None:
    before = sys.stdout, sys.stderr, warnings.filters[:]
    inside = [quiet(), quiet()]
    for context in inside:
        context.__enter__()
    inside[order[0]].__exit__(None, None, None)
    assert logging.root.manager.disable == logging.CRITICAL
    assert sys.stdout is not before[0]
    inside[order[1]].__exit__(None, None, None)
    assert logging.root.manager.disable == 0
    assert (sys.stdout, sys.stderr, warnings.filters) == before


def test_threads_are_set_back() -> None:
    with pytest.raises(ValueError), torch_threads(2):
        assert torch.get_num_threads() == 2
        raise ValueError
    assert torch.get_num_threads() == 1
    with torch_threads(None):
        assert torch.get_num_threads() == 1


class Guarded(nn.Module):
    """Holds what deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.lock = nn.Linear(5, 3), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


def test_an_attribute_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(ModelError, match=r"attribute '1\.lock', a lock,.*outside"):
        copy_model(nn.Sequential(nn.ReLU(), Guarded()))
    with pytest.raises(ModelError, match="attribute 'lock'"):
        ts.prune.channels(Guarded(), (torch.randn(2, 5),), 0.5)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(weight_norm(nn.Linear(5, 16)), nn.Tanh(), weight_norm(nn.Linear(16, 4), dim=1))


def old_spectral_norm() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(5, 16)), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def new_weight_norm() -> nn.Module:
    norm = parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(5, 16)), nn.Tanh(), norm(nn.Linear(16, 4)))


def new_spectral_norm() -> nn.Module:
    norm = parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(5, 16)), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def old_pruning() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.3)
    return model


class Keeps(nn.Module):
    """Keeps a tensor that its own weights were computed to, beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 16), nn.Linear(16, 4)
        self.level = {"mean": [self.one.weight.mean()]}

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()) + self.level["mean"][0].detach()


WRAPPED = [old_weight_norm, old_spectral_norm, new_weight_norm, new_spectral_norm, old_pruning, Keeps]


@pytest.mark.slow
@pytest.mark.parametrize("make", WRAPPED)
def test_a_wrapped_module_is_pruned_saved_and_made_again(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), (torch.randn(3, 5),)
    model(*inputs)
    before = fingerprint(model.state_dict())
    small = ts.prune.channels(model, inputs, 0.4, round_to=1, min_channels=1)
    assert fingerprint(model.state_dict()) == before
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
    ts.save(small, tmp_path / "a")
    torch.manual_seed(0)  # `Keeps` has a tensor that no state holds
    again = ts.load_module(tmp_path / "a", make).eval()
    assert torch.equal(again(*inputs), small(*inputs))
    assert ts.surgery(again) == ts.surgery(small)
    for norm in (each for each in small.modules() if "weight_g" in each._parameters):
        assert norm.weight.shape == norm.weight_v.shape
    twice = ts.prune.channels(again, inputs, 0.2, round_to=1, min_channels=1)
    ts.save(twice, tmp_path / "b")
    torch.manual_seed(0)
    assert torch.equal(ts.load_module(tmp_path / "b", make).eval()(*inputs), twice(*inputs))
    (again.train()(*inputs)).sum().backward()


def test_reentrant_checkpoints_can_be_differentiated_inside_the_block_only() -> None:
    weight, x = torch.ones(3, requires_grad=True), torch.arange(3.0, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        outputs = checkpoint(lambda x: (weight * x).square(), x, use_reentrant=True)
        return torch.autograd.grad(outputs.sum(), (weight, x))

    with pytest.raises(KeyError), differentiable_checkpoints(), differentiable_checkpoints():
        assert torch.equal(torch.stack(gradients()), torch.stack([2 * x.detach() ** 2, 2 * x.detach()]))
        raise KeyError
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradients()
