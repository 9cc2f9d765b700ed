"""Is a shrunk model right? It must equal the original with the removed elements zeroed after every operation.

Both models run operation by operation, in float64. The shrunk one runs first and leaves a few numbers of every value:
its shape, its norm and its product with a fixed random vector. The original follows with what was removed set to zero;
norms, softmax, means and the like see only what is kept. Each value, gathered, must leave the same numbers, so a swap
of two channels or a wrong attribute is found at the operation where it first shows, though the outputs may hide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchslim.channels.groups import Coupling, Mask
from torchslim.channels.runs import TOLERANCE, Divergence, Follower, Masked, Mismatch, Precise, Run
from torchslim.channels.trace import call, elementary, named_weights
from torchslim.channels.values import digest, zeroed
from torchslim.export import untouched
from torchslim.isolation import preserved_globals
from torchslim.steps import Inputs
from torchslim.task import tensors


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found."""

    divergence: Divergence | None  # the first one
    error: float = float("inf")  # the largest of any value, relative to its norm
    outputs: tuple[Tensor, ...] = ()  # of the shrunk model


@torch.no_grad()
def prepare(
    model: nn.Module, inputs: Inputs, seed: int = 0, *, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Inputs]:
    """Make a copy of a model fit for the check, in place: float64, no two weights alike, random inputs.

    A head that starts at zero or a scale of ones would hide what goes wrong before it. In float32 the numbers are the
    same but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    model.double() if dtype == torch.float64 else model.float()  # `to` would make complex buffers real
    for tensor in named_weights(model).values():
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
            level = float(tensor.reshape(-1)[0])
            tensor.copy_((level if np.isfinite(level) else 0.0) + 0.1 + 0.5 * random(tensor))

    def varied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf = leaf.double()
            return (leaf + (0.1 + leaf.abs().mean()) * (random(leaf) - 0.5)).to(dtype)
        return leaf

    flat, spec = tree_flatten(inputs)
    changed: Inputs = tree_unflatten([varied(leaf) for leaf in flat], spec)
    return model, changed


@torch.no_grad()
def mask_weights(model: nn.Module, coupling: Coupling, removed: Mask) -> None:
    """Set the removed elements of every weight to zero, in place."""
    own = named_weights(model)
    for name, value in coupling.trace.weights.items():
        zeroed(own[name].data, coupling.kept(value.layers, value.shape, removed))


def shapes_agree(model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> Divergence | None:
    """Does the shrunk model run with the predicted shape of every value? One forward pass, in evaluation mode."""
    run = Follower(model, coupling, removed, values=False)
    with untouched(model):
        return _outcome(run, model, inputs)


def _outcome(run: Run, model: nn.Module, inputs: Inputs) -> Divergence | None:
    try:
        run.follow(model, inputs)
    except Mismatch as mismatch:
        return mismatch.divergence
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises on wrong shapes is the finding
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Divergence(run.index, run.stack.paths[-1], what)  # the hooks that leave modules have not run
    return None


def verify(original: nn.Module, shrunk: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> Verdict:
    """Does the shrunk model compute what the masked original computes? Two forward passes.

    Args:
        original: as `prepare` made it; its weights are masked in place.
        shrunk: cut from the same weights.
    """
    follower = Follower(shrunk, coupling, removed, values=True)
    diverged = _outcome(follower, shrunk, inputs)
    if diverged is not None:
        return Verdict(diverged)
    mask_weights(original, coupling, removed)
    masked = Masked(original, coupling, removed, follower)
    diverged = _outcome(masked, original, inputs)
    if diverged is None and not _alike(follower.outputs, masked.outputs):
        diverged = masked.fail("an output of the model changes its shape or its values").divergence
    if diverged is not None:
        return Verdict(diverged)
    return Verdict(None, masked.largest, tuple(follower.outputs))


def _alike(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Do two runs give the same outputs, but for rounding?"""
    if [each.shape for each in one] != [each.shape for each in two]:
        return False
    pairs = [(digest(left), digest(right)) for left, right in zip(one, two, strict=True)]
    return all(
        max(abs(a - b) for a, b in zip(left[1:], right[1:], strict=True)) <= TOLERANCE * max(left[1], 1e-12)
        for left, right in pairs
    )


def change(original: nn.Module, inputs: Inputs, after: Sequence[Tensor]) -> float:
    """How much outputs differ from the unpruned model's, relative to their norm: at 0 the check has shown nothing.

    Infinite where they cannot be compared. One forward pass of a model that has not run yet, as it may fill caches.
    """
    before = outputs(original, inputs)
    if [each.shape for each in before] != [each.shape for each in after]:
        return float("inf")
    largest = 0.0
    for one, two in zip(before, after, strict=True):
        old, new = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (one, two))
        largest = max(largest, float((old - new).norm() / old.norm().clamp(min=1e-300)))
    return largest


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output tensors of a plain run, as precise as the check."""
    with elementary(model), preserved_globals(seed=0), Precise(model):
        return tensors(call(model, inputs))
