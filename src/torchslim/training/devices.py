"""Devices of training: Lightning Fabric for the requested devices, and the placement of the model on them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchslim.core import distributed
from torchslim.core.distributed import average_gradients, launched, local, share, summed
from torchslim.core.step import Engine
from torchslim.core.trees import device_of
from torchslim.errors import TrainError
from torchslim.training.fsdp import Shards, check_shardable, clip, collected, explained
from torchslim.training.optimizer import OptimizerSettings

FSDP = "fsdp"


@dataclass
class Placement:
    """A model on its devices, and the operations of a training step; without `shards` each process has all weights."""

    fabric: Any
    model: nn.Module
    wrapped: nn.Module  # called in training in place of `model`
    companion: nn.Module
    optimizer: Optimizer
    stepper: Any
    shards: Shards | None

    def whole(self) -> AbstractContextManager[None]:
        """Gather all weights of the model in each process for the duration of a block."""
        return self.shards.whole() if self.shards else nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Return the context in which a training step's loss is computed."""
        if self.shards is None:
            return nullcontext()
        share(self.model.buffers())  # as DistributedDataParallel does: the first process's statistics and ranges
        return explained()

    def accumulating(self, unfinished: bool) -> AbstractContextManager[None]:
        """Return the context of a batch's forward and backward pass; `unfinished` if others of the same step follow.

        DDP averages the gradients over the processes in a step's last batch only. FSDP does so in every batch, so that
        gradients stay sharded.
        """
        if not unfinished or self.shards is not None or self.fabric.world_size == 1:
            return nullcontext()
        context: AbstractContextManager[None] = self.fabric.no_backward_sync(self.wrapped)
        return context

    def backward(self, losses: Sequence[Tensor], penalties: Sequence[Tensor], *, unfinished: bool = False) -> None:
        """Add the gradients of the sum of losses and penalties, which depend on the weights alone.

        In a step's last batch, with `unfinished` False, the gradients are averaged over the processes.
        """
        if self.shards is None:
            self.fabric.backward(_sum([*losses, *penalties]))
        else:
            # penalties first: a block adds its own gradients to the existing ones
            for part in (penalties, losses):
                if part and (total := _sum(part)).requires_grad:
                    self.fabric.backward(total)
        if not unfinished:
            average_gradients([] if self.shards is None else self.shards.kept)
            average_gradients(self.companion.parameters())

    def clip(self, max_norm: float) -> float | None:
        """Scale the gradients to a joint norm of at most `max_norm`; return the norm before, None where unknown.

        With "16-mixed" a norm that is not finite counts as unknown: the scale of the losses was too large, as it often
        is in the first steps. The scaler then skips the step and lowers the scale.
        """
        if self.shards is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            return float(clip(parameters, max_norm))
        norm: Any = self.fabric.clip_gradients(self.wrapped, self.stepper, max_norm=max_norm, error_if_nonfinite=False)
        if norm is None or (self.scales_losses and not bool(torch.isfinite(norm))):
            return None
        return float(norm)

    @property
    def scales_losses(self) -> bool:
        """Whether losses are multiplied by a scale that keeps gradients in the range of float16."""
        return bool(self.fabric.strategy.precision.state_dict())  # only a gradient scaler has a state

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """Copy the module's state to the CPU; spread tensors are copied in the first process only, None elsewhere."""
        state = collected(module.state_dict(), self.fabric.is_global_zero)
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Load a copy made by `weights` into the model, which must hold all its weights again."""
        if self.shards is None or self.fabric.is_global_zero:
            self.model.load_state_dict(weights)
        if self.shards is not None:
            share((*self.model.parameters(), *self.model.buffers()), through=self.fabric.device)

    def broken(self) -> list[str]:
        """Return the names of parameters with values that are not finite in any process."""
        named = dict(self.model.named_parameters())
        flags = torch.stack([(~torch.isfinite(local(parameter))).any() for parameter in named.values()]).to(torch.int32)
        flags = flags if self.shards is None else summed(flags)
        return [name for name, flag in zip(named, flags.tolist(), strict=True) if flag]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.reshape(()) for part in parts]).sum()


@contextmanager
def placed(
    fabric: Any, engine: Engine, model: nn.Module, companion: nn.Module, settings: OptimizerSettings
) -> Iterator[Placement]:
    """Place the model on Fabric's devices with its optimizer; afterwards all its weights are back on its own device."""
    home = device_of(model)
    companion = companion.to(fabric.device)
    if engine.strategy != FSDP or fabric.world_size == 1:  # one process has no other to spread weights to
        optimizer = settings.build(model, companion)
        with _forgotten(model):
            try:
                wrapped, stepper = fabric.setup(model, optimizer)
                yield Placement(fabric, model, wrapped, companion, optimizer, stepper, None)
            finally:
                model.to(home)
        return
    check_shardable(model, engine.precision or _precision(engine))
    wrapped = fabric.setup_module(model)
    share(model.parameters(), through=fabric.device)  # all start from the same weights
    shards = Shards(model, fabric.strategy.device_mesh["data_parallel"], fabric.device)
    intact = True
    try:
        optimizer = settings.build(model, companion)
        stepper = fabric.setup_optimizers(optimizer)
        intact = False
        yield Placement(fabric, model, wrapped, companion, optimizer, stepper, shards)
        intact = True
    finally:
        shards.close(home if intact else None)
        for buffer in (*shards.kept, *model.buffers()):
            buffer.data = buffer.data.to(home)


@contextmanager
def _forgotten(model: nn.Module) -> Iterator[None]:
    """Remove the references that Fabric adds to a LightningModule, to itself and the optimizer: they block a copy."""
    before: dict[str, Any] = {
        name: vars(model)[name] for name in ("_fabric", "_fabric_optimizers") if name in vars(model)
    }
    vars(model).update({name: copy.copy(value) for name, value in before.items()})
    try:
        yield
    finally:
        vars(model).update(before)


def _precision(engine: Engine) -> Any:
    on_gpu = engine.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


@contextmanager
def fabric_for(engine: Engine) -> Iterator[Any]:
    """Yield Fabric for these devices, without its log messages about other devices."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

        precision: Any = engine.precision or _precision(engine)
        devices, nodes, strategy = engine.devices, 1, engine.strategy
        if launched() > 1:  # torchrun sets the number of processes
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = launched() // devices
            strategy = "ddp" if strategy == "auto" else strategy
            distributed.connect()
        # torchrun alone joins processes: those of one srun or mpirun are workers of their own, which Fabric would join
        torchrun = torch.distributed.is_torchelastic_launched()
        try:
            fabric = Fabric(
                accelerator=engine.accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=_spread(devices, nodes) if strategy == FSDP else strategy,
                precision=precision,
                plugins=[TorchElasticEnvironment() if torchrun else LightningEnvironment()],
            )
        except TrainError:
            raise
        except Exception as error:  # Fabric raises many types, all about the engine's settings
            raise TrainError(f"{engine} cannot be used here: {error}") from error
        if fabric.world_size > 1:
            fabric.launch()
        yield fabric
    finally:
        logger.setLevel(level)


def _spread(devices: int | str, nodes: int) -> Any:
    """Return Fabric's strategy for modules that `placed` spreads itself; Fabric's own FSDP requires CUDA."""
    if devices == 1 and nodes == 1:
        return "auto"
    if not isinstance(devices, int) or devices < 1:
        raise TrainError(f'strategy="fsdp" needs to know the number of devices, got {devices!r}; give a number')
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    return ModelParallelStrategy(
        lambda module, mesh: module,
        data_parallel_size=devices * nodes,
        tensor_parallel_size=1,
        timeout=distributed.PATIENCE,
    )
