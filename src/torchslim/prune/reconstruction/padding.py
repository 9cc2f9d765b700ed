"""Which rows of an operation are padding, and how samples and positions follow each other in the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchslim.core.batches import Batch, Outputs, batch_size
from torchslim.core.trees import changed
from torchslim.prune.reconstruction.uses import Use, Watch

Order = Literal["samples", "positions"]
"""Whether rows list the positions of one sample after another, or all samples of one position after another."""

NEAR = 1e-3
"""How far apart, relative to their size, sums of equal rows may be: batches of another order round differently."""


def valid_rows(use: Use, mask: Tensor | None, order: Order | None) -> Tensor:
    """Numbers of the rows that are no padding; all rows where the mask does not say which rows are.

    Shapes: mask (batch, positions), true or 1 where there is data.
    """
    if mask is not None and mask.numel() == use.rows:
        if use.convolution is not None and mask.shape == (use.made.shape[0], *use.made.shape[2:]):
            return mask.reshape(-1).nonzero().squeeze(1)
        if use.convolution is None and mask.dim() == 2 and order is not None:
            return (mask if order == "samples" else mask.mT).reshape(-1).nonzero().squeeze(1)
    return torch.arange(use.rows, device=use.made.device)


def row_orders(
    model: nn.Module, batch: Batch, mask: Tensor, forward: Callable[[nn.Module, Batch], Outputs]
) -> dict[tuple[Any, ...], Order]:
    """The order of the rows of every product with one row for each element of a mask, by the key of the use.

    It is the order in which the rows of the batch with its samples reversed are those of the batch. Uses without an
    entry have neither order.
    """
    if mask.dim() != 2:
        return {}
    size = batch_size(batch)
    reversed_batch = changed(batch, lambda value: value.flip(0) if value.dim() and len(value) == size else value)
    forth, back = (_sums(model, given, mask.numel(), forward) for given in (batch, reversed_batch))
    return {key: order for key, sums in forth.items() if key in back and (order := _order(sums, back[key], mask))}


def _sums(
    model: nn.Module, batch: Batch, rows: int, forward: Callable[[nn.Module, Batch], Outputs]
) -> Mapping[tuple[Any, ...], Tensor]:
    """The sum of each row of the outputs, for products of this number of rows."""
    sums: dict[tuple[Any, ...], Tensor] = {}

    def note(use: Use) -> None:
        if use.convolution is None and use.rows == rows:
            sums[use.key] = use.made.float().abs().sum(-1).reshape(-1)

    with Watch(model, note):
        forward(model, batch)
    return sums


def _order(forth: Tensor, back: Tensor, mask: Tensor) -> Order | None:
    samples, positions = mask.shape
    distances: dict[Order, float] = {
        "samples": float((forth.view(samples, positions).flip(0) - back.view(samples, positions)).abs().max()),
        "positions": float((forth.view(positions, samples).flip(1) - back.view(positions, samples)).abs().max()),
    }
    nearest = min(distances, key=lambda order: distances[order])
    return nearest if distances[nearest] <= NEAR * float(forth.abs().max()) else None
