"""Several processes that train one model, as torchrun starts them: who is who, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=6)  # of those that wait while one deploys and measures


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def connect() -> None:
    """Let the processes that torchrun has started know each other; nothing where there is one."""
    if launched() > 1 and not distributed.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # weights rest on the CPU
        distributed.init_process_group(backends, timeout=PATIENCE)


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


def leave() -> None:
    """Wait for the last, then close what connects the processes: one that is gone early may take others with it."""
    if count() > 1:
        wait()
        distributed.destroy_process_group()


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


def told(value: Any) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, 0)
    return box[0]


def agreed(value: bool) -> bool:
    """Is it so in all processes? What each has looked up by itself may have changed in between."""
    return count() == 1 or int(summed(torch.tensor(int(value)))) == count()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean of all processes' gradients, in each."""
    for parameter in parameters if count() > 1 else ():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= count()


@torch.no_grad()
def summed(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in each."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def share(tensors: Iterable[Tensor], through: torch.device | None = None) -> None:
    """Give every process the first one's values; by way of a device where the backend asks for it."""
    for tensor in tensors if count() > 1 else ():
        sent = tensor if through is None else tensor.to(through)
        distributed.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)


# tensors that FSDP has spread: each process holds some rows -----------------------------------------------------------


def is_spread(tensor: Any) -> bool:
    """Does each process hold only its part of it?"""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class is slow to import


def local(tensor: Any) -> Any:
    """This process's part; a tensor that is not spread as it is."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Any) -> Any:
    """The tensor with all its rows, with gradients; all processes must ask. One that is not spread as it is."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread(tensor: Any, like: Any) -> Any:
    """A whole tensor as `like` is: each process takes its part of it, where that is spread and has its shape."""
    if not (is_spread(like) and isinstance(tensor, Tensor) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
