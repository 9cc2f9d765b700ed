"""Check the models that public functions receive: unwrap them, and refuse unusable ones with a remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from torchslim.errors import TorchslimError

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""Packages whose modules PyTorch's own quantization puts into a model."""


def usable(model: Any, error: type[TorchslimError] = TorchslimError, what: str = "the model") -> nn.Module:
    """Module inside `model`, without wrappers of `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Args:
        model: the caller's model.
        error: the class of the error.
        what: name of the model in messages.

    Raises:
        TorchslimError: of the class `error`: `model` is not a module, or cannot be captured as a graph: TorchScript, a
            quantized module of PyTorch's, a wrapper further inside, parameters without a shape or without values.
    """
    while _is_compiled(model) or isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model._orig_mod if _is_compiled(model) else model.module
    if not isinstance(model, nn.Module):
        raise error(_no_module(model, what))
    for path, module in model.named_modules():
        reason = _unusable(module)
        if reason:
            raise error(f"{f'module {path!r} of {what}' if path else what} {reason}")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise error(f"{path!r} of {what} has no shape yet; call the model once on example inputs before")
        if tensor.is_meta:
            raise error(
                f"{path!r} of {what} is on the meta device and has no values; make the model with real weights, or "
                "load them with load_state_dict(..., assign=True)"
            )
    return model


def _is_compiled(module: Any) -> bool:
    # by the class's name: importing the class loads the compiler
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


def _unusable(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return (
            f"is a TorchScript module ({type(module).__name__}), which cannot be changed or captured; give the "
            "original module, as it was before torch.jit.script or torch.jit.trace"
        )
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return f"is wrapped by {type(module).__name__}; give the original, its attribute `module`"
    if type(module).__module__.startswith(QUANTIZED):
        return (
            f"is quantized already, by torch.ao ({type(module).__module__}.{type(module).__name__}); give the float "
            "model, as it was before its conversion"
        )
    return ""


def _no_module(model: Any, what: str) -> str:
    if isinstance(model, ExportedProgram):
        return (
            f"{what} is an ExportedProgram; give the module that it was exported from, or its module() to deploy it "
            "as it is"
        )
    if isinstance(model, type):
        return (
            f"{what} must be an instance of nn.Module, got the class {model.__name__}; make one: {model.__name__}(...)"
        )
    if isinstance(model, torch.jit.ScriptFunction):
        return f"{what} is a TorchScript function; give the nn.Module that it was made from"
    hint = "; load its weights into a module with load_state_dict" if isinstance(model, dict) else ""
    return f"{what} must be an nn.Module, got {type(model).__name__}{hint or '; give the trained module'}"
