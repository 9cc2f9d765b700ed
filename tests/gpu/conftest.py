"""The device of these tests: CUDA, or with `--gpu-device cpu` the CPU, on which the same tests must pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torchslim as ts
from tests.support.gpu import engine_of


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that is compared with the CPU; without it the test is skipped, with the reason."""
    name = request.config.getoption("--gpu-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; --gpu-device cpu runs these tests on the CPU")
    return torch.device(name)


@pytest.fixture
def engine(device: torch.device) -> ts.Engine:
    """Training on the device in float32."""
    return engine_of(device)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests of what only CUDA has, such as its memory counters."""
    if device.type != "cuda":
        pytest.skip("only CUDA has this: the CPU stands for a GPU here")
    return device


@pytest.fixture(autouse=True)
def _exact(device: torch.device) -> Iterator[None]:
    """Compute products in full float32: TF32 keeps 10 bits, too few to compare with the CPU."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
