"""What a run must leave as it was: the state of a model, of its hooks and of the process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from torchslim.core.fingerprint import fingerprint


def global_state() -> dict[str, Any]:
    """Everything process-wide that a step could leave changed."""
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": str(np.random.get_state()),
        "python rng": random.getstate(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "quantized engine": torch.backends.quantized.engine,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a step could leave changed."""
    return {
        "weights": fingerprint(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def hooks(model: nn.Module) -> int:
    """Number of forward hooks of a model's modules."""
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
