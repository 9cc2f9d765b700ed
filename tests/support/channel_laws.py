"""What holds for every removal from every model, and random choices of what goes."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.groups import Group
from torchslim.prune.dependency.trace import named_weights
from torchslim.prune.structured.plan import Plan, analyze
from torchslim.prune.structured.removal import Shrunk, shrink
from torchslim.prune.structured.selection import Amount
from torchslim.prune.structured.surgery import Surgery

Inputs = tuple[Any, ...] | dict[str, Any]


def random_scores(seed: int, spread: float = 2.0) -> Callable[[Coupling, Group], np.ndarray]:
    """Scores that rank at random, and groups against each other too, so that widths differ."""

    def score(_: Coupling, group: Group) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(group.name.encode())])
        return np.exp(spread * rng.normal()) * rng.random(len(group.classes))

    return score


def remove(
    model: nn.Module, inputs: Inputs, seed: int = 0, sparsity: float = 0.5, **fields: Any
) -> tuple[Plan, Shrunk]:
    """A random removal, verified."""
    amount = Amount(sparsity=sparsity, **{"of": "channels", "round_to": 1, "min_channels": 1, **fields})
    plan = analyze(model, inputs)
    return plan, shrink(plan, amount, random_scores(seed))


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of any structure, dataclasses and mappings included."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (list, tuple)):
        return [each for value in outputs for each in tensors(value)]
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output tensors."""
    return tensors(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def batch(inputs: Inputs, size: int) -> Inputs:
    """The first sample again and again."""
    return tree_map(lambda x: torch.cat([x[:1]] * size) if isinstance(x, Tensor) else x, inputs)  # type: ignore[no-any-return]


def assert_runs(original: nn.Module, shrunk: nn.Module, inputs: Inputs, sizes: tuple[int, ...] = (1, 3)) -> None:
    """Same output shapes as the original, at other batch sizes too, and finite gradients."""
    for size in sizes:
        given = batch(inputs, size)
        with torch.no_grad():
            wanted = [tuple(each.shape) for each in run(original.eval(), given)]
        outputs = run(shrunk.eval(), given)
        assert [tuple(each.shape) for each in outputs] == wanted
        assert all(bool(each.isfinite().all()) for each in outputs)
        losses = [each.double().square().mean() for each in outputs if each.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
            for name, each in shrunk.named_parameters():
                assert each.grad is None or (each.grad.shape == each.shape and bool(each.grad.isfinite().all())), name
            shrunk.zero_grad()


@torch.no_grad()
def masked(model: nn.Module, surgery: Surgery) -> nn.Module:
    """The original with the removed slices of its parameters set to zero."""
    model = copy.deepcopy(model).double().eval()
    weights = named_weights(model)
    for cut in surgery.cuts:
        if isinstance(weights[cut.weight], nn.Parameter):
            gone = [index for index in range(cut.size) if index not in set(cut.kept)]
            weights[cut.weight].index_fill_(cut.dim, torch.tensor(gone), 0)
    return model


def as_double(inputs: Inputs) -> Inputs:
    """Floating inputs in float64."""
    return tree_map(  # type: ignore[no-any-return]
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


@torch.no_grad()
def assert_equals_masked(model: nn.Module, done: Shrunk, inputs: Inputs) -> None:
    """Without any code of the library: for models in which zero weights are as good as none."""
    wanted = run(masked(model, done.surgery), as_double(inputs))
    got = run(copy.deepcopy(done.model).double().eval(), as_double(inputs))
    for left, right in zip(wanted, got, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-8, atol=1e-10)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: each.detach().clone() for name, each in named_weights(model).items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit by bit."""
    after = named_weights(model)
    assert before.keys() == after.keys()
    for name, each in before.items():
        assert torch.equal(each, after[name].detach()), name


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """No weight at its special initial value, so that nothing hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in named_weights(model).items():
            if each.is_floating_point() and each.dim() <= 1 and "weight" not in name:
                each.add_(0.1 + 0.2 * torch.rand(each.shape, generator=generator))
            elif each.is_floating_point() and each.dim() <= 1:
                each.mul_(0.5 + torch.rand(each.shape, generator=generator))
    return model.eval()
