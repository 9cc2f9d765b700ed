"""Count a model's parameters, nonzeros and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchslim.artifact.assembled import AnyDeployed, DeployedParts, pieces
from torchslim.artifact.latency import resized
from torchslim.core.batches import call
from torchslim.core.isolation import quiet, unfused_attention, untouched
from torchslim.core.parts import Mounted, part_view
from torchslim.core.program_names import split_name
from torchslim.core.step import Inputs
from torchslim.core.trees import device_of, to_device
from torchslim.graph.calling import by_keyword
from torchslim.graph.io_structure import build


def stored_weights(model: nn.Module) -> list[Tensor]:
    """Learned tensors of a model, tied ones once; of a quantized graph the integers, without the scales.

    The further programs of a part have the weights of its first one.
    """
    further = {
        id(module)
        for part in model.modules()
        if isinstance(part, Mounted)
        for number, program in part.programs.items()
        if number > 1 and isinstance(program, nn.Module)
        for module in program.modules()
    }
    modules = [module for module in model.modules() if id(module) not in further]
    weights = [value for module in modules for value in module.parameters(recurse=False)]
    frozen = [value for module in modules for name, value in module._buffers.items() if "_frozen_param" in name]
    return list({id(value): value for value in (*weights, *frozen) if value is not None}.values())


def parameters(model: nn.Module) -> int:
    """Number of parameters of `model`, shared ones counted once."""
    return sum(value.numel() for value in stored_weights(model))


def nonzeros(model: nn.Module) -> int:
    """Number of parameters of `model` that are not exactly zero, shared ones counted once."""
    return sum(int(torch.count_nonzero(value)) for value in stored_weights(model))


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulate operations of one call, and the operations that are not counted."""

    total: int
    uncounted: tuple[str, ...]


def macs(model: nn.Module, inputs: Inputs) -> Macs:
    """Multiply-accumulates of one forward pass in eval mode, on the inputs as given.

    Counted by `torch.utils.flop_counter` (two operations each), with the fused kernels that it counts as zero
    (LSTM and GRU, scaled dot-product attention on CPU, multi-head attention in eval mode) split into parts first.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counter = FlopCounterMode(display=False)
    seen = _Operations()
    inputs = to_device(inputs, device_of(model))
    unfused = (unfused_attention(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH))
    with quiet(), untouched(model), unfused[0], unfused[1], unfused[2], counter, seen:
        call(model, inputs)
    uncounted = sorted(name for name, packet in seen.packets.items() if packet not in counter.flop_registry)
    return Macs(counter.get_total_flops() // 2, tuple(uncounted))


def sample_macs(model: nn.Module, deployed: AnyDeployed) -> Macs:
    """Multiply-accumulates of the module that was deployed, on one sample where the batch is free.

    Of a model with deployed parts, the sum over one call of each part.
    """
    parts = deployed.part_examples if isinstance(deployed, DeployedParts) else {}
    first: dict[str, Inputs] = {path: examples[0] for path, examples in parts.items()}
    counted = [
        macs(_Named(part_view(model, path, first.get(path, ()))), (build(piece.spec.inputs, resized(piece)),))
        for path, piece in pieces(deployed).items()
        if split_name(path)[1] == 1
    ]
    uncounted = sorted({name for part in counted for name in part.uncounted})
    return Macs(sum(part.total for part in counted), tuple(uncounted))


class _Named(nn.Module):
    """Calls a model with arguments by name, given as one argument; optional ones by keyword, as it was captured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, named: dict[str, Any]) -> Any:
        args, kwargs = by_keyword(self.model, named)
        return self.model(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Collects operations that may take more than one step per element, or that do not belong to torch."""

    KNOWN = ("aten", "prim", "prims", "quantized_decomposed")
    HEAVY = (
        "lstm",
        "gru",
        "rnn",
        "mkldnn",
        "fft",
        "_fft",
        "cdist",
        "_cdist",
        "_thnn",
        "quantized",
        "linalg",
        "_linalg",
    )

    def __init__(self) -> None:
        super().__init__()
        self.packets: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func._opname}"
        if func.namespace not in self.KNOWN or func._opname.startswith(self.HEAVY):
            self.packets[name] = func._overloadpacket
        return func(*args, **(kwargs or {}))
