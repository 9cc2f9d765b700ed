"""A model that ends the process of OpenVINO ends a child process only; ordinary models are not tried."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from torchslim.errors import DeployError
from torchslim.quantize import sqnr
from torchslim.runtimes import deploy
from torchslim.runtimes.openvino_trial import survive

ABORT = "import os; os.abort()"


def one_operation(kind: str) -> bytes:
    shape = ["n", 3]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def test_a_child_that_is_ended_by_a_signal_is_an_error_that_names_the_operation() -> None:
    with pytest.raises(DeployError, match=r"SIGABRT.*Acos.*use runtime 'onnxruntime'"):
        survive(one_operation("Acos"), [torch.zeros(2, 3)], child=ABORT)


def test_a_child_that_hangs_is_ended() -> None:
    with pytest.raises(DeployError, match="within 0.5 s"):
        survive(one_operation("Acos"), [torch.zeros(2, 3)], child="import time; time.sleep(60)", limit_s=0.5)


def test_an_error_in_the_child_is_left_to_be_raised_here() -> None:
    survive(one_operation("Acos"), [torch.zeros(2, 3)], child="raise RuntimeError('no such operation')")


def test_ordinary_operations_cost_no_child() -> None:
    survive(one_operation("Relu"), [torch.zeros(2, 3)], child=ABORT)


class Angles(nn.Module):
    """An unusual operation, and an input that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return self.layer(torch.acos(x.clamp(-1, 1)))


def test_an_unusual_model_that_runs_is_deployed() -> None:
    model, x = Angles().eval(), torch.linspace(-1, 1, 12).view(4, 3)
    deployed = deploy(model, (x, torch.zeros(4, 2)), runtime="openvino", threads=1)
    np.testing.assert_allclose(deployed(x, torch.zeros(4, 2)), model(x, x).detach(), atol=1e-5)


class Spectrum(nn.Module):
    """OpenVINO 2026.4.1 ends with a segmentation fault when it reads this."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Buffer(torch.hann_window(64))
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stft(x, 64, 32, window=self.window, return_complex=True).abs().clamp_min(1e-5)
        return self.layer(parts.log()[:, None])


def test_a_spectrum_is_right_or_refused() -> None:
    model, x = Spectrum().eval(), torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    try:
        deployed = deploy(model, (x,), runtime="openvino", threads=1)
    except DeployError as error:
        assert re.match("OpenVINO (crashes on|cannot read) the model", str(error))  # noqa: PT017
    else:
        assert sqnr(model(x), deployed(x)) > 60
