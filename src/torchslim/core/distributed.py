"""Processes that train one model together, as torchrun starts them: ranks and collective operations."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=6)  # timeout of processes that wait while another one deploys and measures


def launched() -> int:
    """Number of processes that torchrun has started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def connect() -> None:
    """Connect the processes that torchrun has started; does nothing for a single process."""
    if launched() > 1 and not distributed.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # weights are kept on the CPU
        distributed.init_process_group(backends, timeout=PATIENCE)


def count() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and reports."""
    if count() > 1:
        return distributed.get_rank() == 0
    return launched() == 1 or os.environ["RANK"] == "0"


def wait() -> None:
    """Block until all processes have called this."""
    if count() > 1:
        distributed.barrier()


def leave() -> None:
    """Wait for all processes, then disconnect them: a process that ends early may make others fail."""
    if count() > 1:
        wait()
        distributed.destroy_process_group()


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks, with gradients: (n, ...) -> (sum of n, ...).

    Processes may have different numbers of rows. If every process computes its loss from all rows, and gradients are
    averaged over processes as DistributedDataParallel does, the result is the gradient of that loss.
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
    """Value of the first process, broadcast to all processes."""
    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, 0)
    return box[0]


def agreed(value: bool) -> bool:
    """Whether `value` is true in all processes; each may have looked it up at a different moment."""
    return count() == 1 or int(summed(torch.tensor(int(value)))) == count()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of every process by their mean over all processes."""
    for parameter in parameters if count() > 1 else ():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= count()


@torch.no_grad()
def summed(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, in every process; changes `tensor` in place."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def share(tensors: Iterable[Tensor], through: torch.device | None = None) -> None:
    """Copy the first process's values to every process, through a device if the backend needs one."""
    for tensor in tensors if count() > 1 else ():
        sent = tensor if through is None else tensor.to(through)
        distributed.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)


# tensors that FSDP has sharded: each process holds some rows ----------------------------------------------------------


def is_spread(tensor: Any) -> bool:
    """Whether the tensor is sharded: each process holds only its part."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class is slow to import


def local(tensor: Any) -> Any:
    """This process's part of a sharded tensor; other tensors unchanged."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Any) -> Any:
    """All rows of a sharded tensor, with gradients; all processes must call this. Other tensors unchanged."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread(tensor: Any, like: Any) -> Any:
    """Shard of `tensor` for this process if `like` is sharded and has its shape; else `tensor` unchanged."""
    if not (is_spread(like) and isinstance(tensor, Tensor) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
