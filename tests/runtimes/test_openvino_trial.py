"""A model that ends the process of OpenVINO ends a child process only; ordinary models are not tried."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import torchslim as ts
from tests.support.compiled import deploy
from torchslim.artifact.manifest import manifest_digest
from torchslim.core.hardware import cache_folder
from torchslim.core.seals import SECRET
from torchslim.errors import ArtifactError, DeployError
from torchslim.quantize import sqnr
from torchslim.runtimes import file_trial, openvino
from torchslim.runtimes.openvino_check import check_ir
from torchslim.runtimes.openvino_trial import survive, survive_files

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_spectrum_is_right_or_refused() -> None:
    model, x = Spectrum().eval(), torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    try:
        deployed = deploy(model, (x,), runtime="openvino", threads=1)
    except DeployError as error:
        assert re.match("OpenVINO (crashes|cannot read)", str(error))  # noqa: PT017
    else:
        assert sqnr(model(x), deployed(x)) > 60


# --- the files of artifacts ---


INPUT = [torch.ones(2, 3)]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return deploy(nn.Linear(3, 2).eval(), (INPUT[0],), runtime="openvino", threads=1).files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "message"),
    [
        (ABORT, "SIGABRT.*runtime='eager'"),
        ("raise ImportError('no numpy')", "did not start.*no numpy"),
        ("import time; time.sleep(60)", "within 0.5 s"),
    ],
)
def test_files_that_end_a_child_are_refused(files: dict[str, bytes], child: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        survive_files(files, INPUT, child=child, limit_s=0.5 if "sleep" in child else 60)


@pytest.mark.slow
def test_what_openvino_says_against_files_is_told(files: dict[str, bytes]) -> None:
    wrong = {**files, ".xml": files[".xml"].replace(b'type="MatMul"', b'type="NoSuchOperation"')}
    for _ in range(2):  # what failed is not remembered
        assert "NoSuchOperation" in survive_files(wrong, INPUT)
    assert "shape" in survive_files(files, [torch.ones(2, 4)])


def test_files_that_ran_are_remembered_by_this_user_alone(files: dict[str, bytes]) -> None:
    assert survive_files(files, INPUT) == ""
    assert survive_files(files, INPUT, child=ABORT) == ""
    for changed in (files | {".bin": files[".bin"] + b"\0"}, files | {".xml": files[".xml"] + b"\n"}):
        with pytest.raises(ArtifactError, match="SIGABRT"):
            survive_files(changed, INPUT, child=ABORT)
    (cache_folder() / SECRET).unlink()  # another user has another one
    with pytest.raises(ArtifactError, match="SIGABRT"):
        survive_files(files, INPUT, child=ABORT)


def test_without_a_secret_nothing_is_remembered(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_trial, "own_secret", lambda: None)
    assert survive_files(files, INPUT) == ""
    with pytest.raises(ArtifactError, match="SIGABRT"):
        survive_files(files, INPUT, child=ABORT)


def filled(count: int) -> dict[str, bytes]:
    """A model that adds up ones, as many as a sum of constants says."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([2, 3], np.float32, name="x")
    sizes = ops.add(ops.constant(np.array([5], np.int64)), ops.constant(np.array([0], np.int64)))
    ones = ops.broadcast(ops.constant(np.array(1, np.int64)), sizes)
    shape = ops.concat([ops.reduce_prod(ones, 0, keep_dims=True), ops.constant(np.array([-1], np.int64))], 0)
    with tempfile.TemporaryDirectory() as folder:
        ov.serialize(ov.Model([ops.reshape(x, shape, False)], [x]), f"{folder}/m.xml", f"{folder}/m.bin")
        xml, weights = (Path(f"{folder}/m{suffix}").read_bytes() for suffix in (".xml", ".bin"))
    assert weights.count(struct.pack("<q", 5)) == 1
    return {".xml": xml, ".bin": weights.replace(struct.pack("<q", 5), struct.pack("<q", count))}


@pytest.mark.slow
def test_a_sum_that_becomes_the_size_of_a_terabyte_is_refused() -> None:
    assert survive_files(filled(7), INPUT) == ""
    check_ir(*filled(2**38).values())  # the sum is not seen without computing it
    with pytest.raises(ArtifactError, match=r"takes more than 1,\d+,\d+,\d+ bytes"):
        survive_files(filled(2**38), INPUT)
    with pytest.raises(ArtifactError, match=r"takes more than 1,\d+,\d+,\d+ bytes"):
        survive_files(filled(2**28), INPUT)


@pytest.mark.slow
def test_an_artifact_is_tried_unless_it_is_trusted_or_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    deployed = deploy(nn.Linear(3, 2).eval(), (INPUT[0],), runtime="openvino", threads=1)
    ts.save(deployed, tmp_path, key=key)
    monkeypatch.setattr(openvino, "survive_files", partial(survive_files, child=ABORT))
    with pytest.raises(ArtifactError, match="SIGABRT"):
        ts.load(tmp_path)
    for loaded in (ts.load(tmp_path, trusted=True), ts.load(tmp_path, public_key=key.public_key())):
        assert torch.equal(loaded(INPUT[0]), deployed(INPUT[0]))
    monkeypatch.undo()
    assert torch.equal(ts.load(tmp_path)(INPUT[0]), deployed(INPUT[0]))


@pytest.mark.slow
def test_an_artifact_with_a_huge_size_ends_nothing(tmp_path: Path) -> None:
    ts.save(deploy(nn.Linear(3, 2).eval(), (INPUT[0],), runtime="openvino", threads=1), tmp_path)
    for suffix, data in filled(2**38).items():
        (tmp_path / f"model{suffix}").write_bytes(data)
    manifest = json.loads((tmp_path / "artifact.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    (tmp_path / "artifact.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    with pytest.raises(ArtifactError, match="takes more than"):
        ts.load(tmp_path)
    assert ts.load(tmp_path, runtime="eager")(INPUT[0]).shape == (2, 2)


def test_files_with_bfloat16_inputs_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    deployed = deploy(nn.Linear(3, 2).bfloat16().eval(), (x,), runtime="openvino", threads=1)
    tried: list[torch.dtype] = []

    def record(files: Any, inputs: Any) -> str:
        tried.extend(each.dtype for each in inputs)
        return survive_files(files, inputs)

    monkeypatch.setattr(openvino, "survive_files", record)
    assert openvino.RUNTIME.trial is not None
    openvino.RUNTIME.trial(deployed.files, [x])
    assert tried == [torch.float32]
