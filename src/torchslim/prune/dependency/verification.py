"""Checks that a shrunk model equals the original with the removed elements set to zero after every operation.

Both models run operation by operation, in float64, or in float32 if the model's own code accepts nothing else. The
shrunk model runs first and records a few numbers of every value: its shape, its norm and its product with a fixed
random vector. Then the original runs with the removed elements set to zero; norms, softmax, means and similar
operations get only the kept elements. The kept part of every value must give the same numbers. So a swap of two
channels or a wrong attribute is found at the operation where it first shows, even if the outputs hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchslim.core.isolation import duplicate, preserved_globals, trim, untouched
from torchslim.core.step import Inputs
from torchslim.core.trees import tensors
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.masked import Masked
from torchslim.prune.dependency.precision import Precise, widened
from torchslim.prune.dependency.trace import call, elementary, named_weights
from torchslim.prune.dependency.verify_runs import Divergence, Follower, Mismatch, Run
from torchslim.prune.dependency.verify_values import digest, zeroed


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a check."""

    divergence: Divergence | None  # the first one; None if the runs agree
    error: float = float("inf")  # the largest of all values, each relative to its norm
    outputs: tuple[Tensor, ...] = ()  # of the shrunk model


@torch.no_grad()
def prepare(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A copy of a model for the check: in eval mode, in one precision, with no weight of equal elements.

    A head that starts at zero, or a scale of ones, would hide errors before it. The new values are float32 numbers in
    every precision. Weights are never stored in a precision other than the model's and `dtype`.
    """
    weights: dict[int, Tensor] = {}
    for parameter in (*model.parameters(), *model.buffers()):
        wide = widened(parameter.detach(), dtype)
        if wide.dtype != parameter.dtype:
            weights[id(parameter)] = (
                nn.Parameter(wide, parameter.requires_grad) if isinstance(parameter, nn.Parameter) else wide
            )
    copied = duplicate(model, weights).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in named_weights(copied).values():
        numeric = tensor.is_floating_point() or tensor.is_complex()
        if numeric and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
            level = tensor.reshape(-1)[0].item()
            tensor.copy_(((level if np.isfinite(level) else 0.0) + 0.1 + 0.5 * _random(tensor, generator)).float())
    return copied


def width(model: nn.Module) -> torch.dtype:
    """Lowest precision in which a model is compared: float64 if any weight has it, else float32."""
    wide = any(weight.dtype in (torch.float64, torch.complex128) for weight in named_weights(model).values())
    return torch.float64 if wide else torch.float32


@torch.no_grad()
def vary(inputs: Inputs, dtype: torch.dtype, seed: int = 1) -> Inputs:
    """Inputs for the check: floating and complex tensors near their own values, with no two elements alike."""
    generator = torch.Generator().manual_seed(seed)

    def varied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf = leaf.double()
            return (leaf + (0.1 + leaf.abs().mean()) * (_random(leaf, generator) - 0.5)).float().to(dtype)
        if isinstance(leaf, Tensor) and leaf.is_complex():
            leaf = leaf.to(torch.complex128)
            moved = leaf + (0.1 + leaf.abs().mean()) * (_random(leaf, generator) - 0.5)
            return widened(moved.to(torch.complex64), dtype)
        return leaf

    flat, spec = tree_flatten(inputs)
    changed: Inputs = tree_unflatten([varied(leaf) for leaf in flat], spec)
    return changed


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)


@torch.no_grad()
def mask_weights(model: nn.Module, coupling: Coupling, removed: Mask) -> None:
    """Set the removed elements of every weight to zero, in place."""
    weights = named_weights(model)
    for name, value in coupling.trace.weights.items():
        zeroed(weights[name].data, coupling.kept(value.layers, value.shape, removed))


def shapes_agree(model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> Divergence | None:
    """First divergence of the shrunk model from the predicted shapes, in one forward pass in evaluation mode."""
    run = Follower(model, coupling, removed)
    with untouched(model):
        return _outcome(run, model, inputs)


def _outcome(run: Run, model: nn.Module, inputs: Inputs) -> Divergence | None:
    try:
        run.follow(model, inputs)
    except Mismatch as mismatch:
        return mismatch.divergence
    except Exception as error:  # noqa: BLE001 - any error that the user's code raises on wrong shapes is a divergence
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Divergence(run.index, run.stack.paths[-1], message)  # hooks on leaving modules did not run
    return None


def verify(
    shrunk: Callable[[], nn.Module],
    original: Callable[[], nn.Module],
    coupling: Coupling,
    removed: Mask,
    inputs: Inputs,
    precision: torch.dtype = torch.float64,
) -> Verdict:
    """Compare the shrunk model with the masked original in two forward passes, with one model in memory at a time.

    Args:
        shrunk: makes the model that was cut from the original's weights.
        original: makes the unpruned model, as `prepare` does in `precision`; its weights are masked in place.
        coupling: of the trace that both runs are compared with.
        removed: one boolean per atom, True where it was removed.
        inputs: of both models, in `precision`.
        precision: torch.float64, or torch.float32 if `runs` shows that the model accepts nothing else.
    """
    model = shrunk()
    follower = Follower(model, coupling, removed, precision)
    diverged = _outcome(follower, model, inputs)
    if diverged is not None:
        return Verdict(diverged)
    del model  # frees its weights
    trim()
    unpruned = original()
    mask_weights(unpruned, coupling, removed)
    masked = Masked(unpruned, coupling, removed, follower)
    diverged = _outcome(masked, unpruned, inputs)
    if diverged is None and not _alike(follower.outputs, masked.outputs, masked.tolerance):
        diverged = masked.fail("an output of the model changes its shape or its values").divergence
    if diverged is not None:
        return Verdict(diverged)
    return Verdict(None, masked.largest, tuple(follower.outputs))


def runs(original: nn.Module, coupling: Coupling, inputs: Inputs, precision: torch.dtype) -> Divergence | None:
    """First divergence of the unpruned model from its own trace in a precision, which its code may not support."""
    none_removed = np.zeros(coupling.atoms.count, dtype=bool)
    none_removed.setflags(write=False)
    return _outcome(Follower(original, coupling, none_removed, precision), original, inputs)


def _alike(one: Sequence[Tensor], two: Sequence[Tensor], tolerance: float) -> bool:
    """Do two runs give the same outputs, up to rounding?"""
    if [output.shape for output in one] != [output.shape for output in two]:
        return False
    pairs = [(digest(left), digest(right)) for left, right in zip(one, two, strict=True)]
    return all(
        max(abs(a - b) for a, b in zip(left[1:], right[1:], strict=True)) <= tolerance * max(left[1], 1e-12)
        for left, right in pairs
    )


def change(original: nn.Module, inputs: Inputs, after: Sequence[Tensor], precision: torch.dtype) -> float:
    """Largest difference of the outputs from the unpruned model's, relative to their norm; 0 means nothing was checked.

    Infinite if they cannot be compared. Runs one forward pass of a model that has not run yet, as it may fill caches.
    """
    before = outputs(original, inputs, precision)
    if [output.shape for output in before] != [output.shape for output in after]:
        return float("inf")
    largest = 0.0
    for unpruned, pruned in zip(before, after, strict=True):
        old, new = (
            (torch.view_as_real(output) if output.is_complex() else output).double().nan_to_num(0.0, 0.0, 0.0)
            for output in (unpruned.resolve_conj(), pruned.resolve_conj())
        )
        largest = max(largest, float((old - new).norm() / old.norm().clamp(min=1e-300)))
    return largest


def outputs(model: nn.Module, inputs: Inputs, precision: torch.dtype) -> list[Tensor]:
    """Output tensors of a run without checks."""
    with elementary(model), preserved_globals(seed=0), Precise(precision).promoting():
        return tensors(call(model, inputs))
