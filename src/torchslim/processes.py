"""Several processes that train one model, as torchrun starts them: who is who, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(hours=6)  # of those that wait while one deploys and measures


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def connect() -> None:
    """Let the processes that torchrun has started know each other; nothing where there is one."""
    if launched() > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Is this the process that writes files and reports?"""
    if count() > 1:
        return distributed.get_rank() == 0
    return launched() == 1 or os.environ["RANK"] == "0"


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, with gradients: (n, ...) -> (sum of n, ...).

    The processes may have different numbers of rows. Where each computes its loss from all rows and the gradients of
    the processes are averaged, as DistributedDataParallel does, the result is the gradient of that loss.
    """
    if count() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    sizes: list[Any] = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(count())]
    distributed.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    most = max(int(size) for size in sizes)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows
    parts = all_gather(padded.contiguous()) if rows.is_floating_point() else _plain(padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _plain(rows: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(rows) for _ in range(count())]
    distributed.all_gather(parts, rows.contiguous())
    return parts


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """The mean of all processes' gradients, in each."""
    for parameter in module.parameters() if count() > 1 else ():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= count()


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    for tensor in tensors if count() > 1 else ():
        distributed.broadcast(tensor, 0)
