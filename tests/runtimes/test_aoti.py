"""AOTInductor packages: machine code that needs no compiler, is loaded only where it is trusted, and hides nothing.

Compiling takes long: one package is made for most of the tests.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.compiled import deploy
from tests.support.deployment_models import fresh_python
from tests.support.quantized import Tagger, quantized
from torchslim.errors import ArtifactError, DeployError
from torchslim.quantize import QuantizedModule, sqnr, static
from torchslim.runtimes import Deployed, find_runtime, kernels

pytestmark = pytest.mark.slow

CODE_BYTES = 600_000  # what the machine code of such a network takes


class Net(nn.Module):
    """A convolution, a wide linear, an addition to an input; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2)
        self.wide, self.head = nn.Linear(256, 1024), nn.Linear(1024, 5)

    def forward(self, x: Tensor, *, bias: Tensor) -> dict[str, Tensor]:
        x = self.pool(torch.relu(self.stem(x))).flatten(1)
        x = torch.relu(self.wide(x))
        return {"logits": bias + self.head(x)}


def inputs(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(count, 3, 8, 8, generator=generator),
        "bias": torch.randn(count, 5, generator=generator),
    }


@pytest.fixture(scope="module")
def model() -> QuantizedModule:
    torch.manual_seed(0)
    return static(Net().eval(), [inputs(16)], runtime="aoti")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def deployed(model: QuantizedModule) -> Deployed:
    return deploy(model, inputs(3), runtime="aoti", threads=1)


@pytest.fixture(scope="module")
def saved(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ts.save(deployed, tmp_path_factory.mktemp("aoti") / "saved")


def test_it_computes_what_the_graph_says_for_any_batch(model: QuantizedModule, deployed: Deployed) -> None:
    for count in (1, 2, 5):
        given = inputs(count)
        before = given["bias"].clone()
        answer = deployed(**given)
        assert list(answer) == ["logits"]
        assert sqnr(model(**inputs(count)), answer) >= 30
        assert torch.equal(given["bias"], before), "the caller's tensor was written to"


def test_every_layer_runs_in_integers_and_it_says_so(deployed: Deployed, saved: Path) -> None:
    found = kernels(deployed)
    assert {each.layer for each in found if each.integer} >= {"stem", "wide", "head"}
    assert kernels(ts.load(saved, trusted=True)) == found


def test_weights_are_stored_once_and_as_integers(deployed: Deployed) -> None:
    weights = 256 * 1024
    assert weights < deployed.size_bytes <= weights + CODE_BYTES < 4 * weights


def test_the_package_holds_no_sources_and_no_traces_of_this_machine(deployed: Deployed) -> None:
    with zipfile.ZipFile(io.BytesIO(deployed.payload)) as archive:
        assert {Path(name).suffix for name in archive.namelist()} <= {".so", ".json", ""}
        content = b"".join(map(archive.read, archive.namelist()))
    for trace in ("/tmp/", str(Path.home()) + "/", str(Path(__file__).parents[2]), str(Path(torch.__file__).parent)):
        assert trace.encode() not in content


def test_machine_code_is_loaded_only_where_it_is_trusted(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="machine code.*trusted=True.*runtime="):
        ts.load(saved)
    assert ts.load(saved, runtime="eager")(**inputs(2))["logits"].shape == (2, 5), "its program is no machine code"


def test_the_size_of_a_call_is_still_checked(saved: Path) -> None:
    """The package itself takes any size, and reads beyond the end of what is smaller."""
    found = ts.load(saved, trusted=True)
    with pytest.raises(DeployError, match=r"input 'x' must have the shape \(any, 3, 8, 8\)"):
        found(x=torch.randn(2, 3, 9, 9), bias=torch.randn(2, 5))
    with pytest.raises(DeployError, match="one batch size"):
        found(x=torch.randn(2, 3, 8, 8), bias=torch.randn(1, 5))


def test_a_fixed_batch_is_kept_to() -> None:
    found = deploy(nn.Linear(4, 2), (torch.randn(1, 4),), runtime="aoti", dynamic_shapes=None)
    assert found(torch.randn(1, 4)).shape == (1, 2)
    with pytest.raises(DeployError, match=r"must have the shape \(1, 4\), got \(2, 4\)"):
        found(torch.randn(2, 4))


FRESH = """
import sys, shutil, subprocess, numpy as np, torch, torchslim as ts
assert not any(map(shutil.which, ("g++", "c++", "gcc", "clang++")))
folder = sys.argv[1]
given = {name: torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ("x", "bias")}
found = ts.load(folder + "/saved", trusted=True)
assert (found.runtime, found.threads, found.quantized) == ("aoti", 1, True)
print(np.array_equal(found(**given)["logits"].numpy(), np.load(folder + "/logits.npy")))
"""


def test_a_fresh_process_without_a_compiler_computes_bitwise_the_same(
    deployed: Deployed, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "saved")
    given = inputs(4)
    for name, value in (*given.items(), *deployed(**given).items()):
        np.save(tmp_path / f"{name}.npy", value.numpy())
    done = fresh_python(FRESH, tmp_path, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


ALONE = """
import sys
sys.modules["torchslim"] = sys.modules["torchao"] = None
import torch
logits = torch._inductor.aoti_load_package(sys.argv[1])(torch.ones(2, 3, 8, 8), torch.zeros(2, 5))[0]
print(tuple(logits.shape))
"""


def test_torch_alone_loads_it(saved: Path) -> None:
    done = fresh_python(ALONE, saved / "model.aoti.pt2")
    assert (done.returncode, done.stdout) == (0, "(2, 5)\n"), done.stderr


def test_the_benchmark_inside_times_it(saved: Path) -> None:
    code = "import runpy, sys; path = sys.argv.pop(1); runpy.run_path(path, run_name='__main__')"
    done = fresh_python(code, saved / "bench.py", "--trusted", "--rounds", 3, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["largest_difference_to_recorded_outputs"] == 0


def test_a_package_for_something_else_is_no_crash(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(path: str) -> Any:
        raise RuntimeError("undefined symbol: aoti_torch_new")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", other)
    with pytest.raises(DeployError, match="undefined symbol.*deploy.*again"):
        ts.load(saved, trusted=True)


def test_another_processor_is_not_given_machine_code(saved: Path, processor: str) -> None:
    made_for = json.loads((saved / "artifact.json").read_text())["spec"]["instruction_set"]
    if processor == made_for:
        assert ts.load(saved, trusted=True).spec.instruction_set == processor
        return
    message = f"machine code.*{made_for}.*{processor}.*runtime="
    with pytest.raises(ArtifactError, match=message):
        ts.load(saved, trusted=True)


def test_weights_without_integer_kernels_are_integers_in_the_file() -> None:
    """And floats from the moment that it is loaded."""
    x = torch.randn(3, 9, 6)
    converted, captured = quantized(Tagger("LSTM"), x, "weights")
    found = find_runtime("aoti").compile(captured, source=converted, threads=1)
    assert sqnr(converted(x), found(x)) >= 100
    assert not any("dequantize" in each.node for each in kernels(found))
