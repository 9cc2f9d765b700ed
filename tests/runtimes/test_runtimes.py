"""Runtimes: called like the model, answering like the model, and telling what does not fit."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.support.compiled import deploy
from tests.support.deployment_models import (
    Prediction,
    Recurrent,
    TokenClassifier,
    architectures,
    resize,
    same_structure,
    trained_conv,
)
from torchslim.core.batches import call, predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.errors import DeployError, ExportError, RecipeError, RuntimeUnavailable
from torchslim.quantize import sqnr, static
from torchslim.runtimes import RUNTIMES, Deployed, find_runtime

ARCHITECTURES = architectures()
WITH_FILES = ("eager", "onnxruntime", "openvino", "executorch")  # and aoti, which compiles for long: test_aoti.py
# lowering the unrolled steps of recurrent layers takes ExecuTorch a minute; the contracts of runtimes have short ones
CASES = [
    (name, runtime)
    for name in ARCHITECTURES
    for runtime in WITH_FILES
    if runtime != "executorch" or name not in ("lstm", "gru")
]


@pytest.fixture(scope="module")
def deployed() -> dict[tuple[str, str], Deployed]:
    """Each architecture on each runtime, made when a test first asks for it."""

    class Cache(dict):  # type: ignore[type-arg]
        def __missing__(self, key: tuple[str, str]) -> Deployed:
            model, inputs = ARCHITECTURES[key[0]]
            self[key] = deploy(model, inputs, runtime=key[1])
            return self[key]

    return Cache()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runtime"), CASES)
def test_called_like_the_model_and_answering_like_it(name: str, runtime: str, deployed: Any) -> None:
    model, inputs = ARCHITECTURES[name]
    for count in (1, 2, 5):
        others = resize(inputs, count)
        answer = call(deployed[name, runtime], others)
        assert same_structure(answer, call(predictor(model), others), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", WITH_FILES[:3])
def test_sequence_first_networks_keep_their_batch_free(runtime: str) -> None:
    model = Recurrent("LSTM", batch_first=False).eval()
    found = deploy(model, (torch.randn(7, 3, 6),), runtime=runtime)
    assert found.spec.sizes == [[7, None, 6]]
    for count in (1, 2, 5):
        x = torch.randn(7, count, 6)
        assert torch.allclose(found(x), model(x), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", WITH_FILES)
def test_defaults_positions_and_names_are_those_of_the_forward(runtime: str) -> None:
    model = TokenClassifier().eval()
    ids = torch.randint(20, (3, 6))
    found = deploy(model, (ids,), runtime=runtime)
    expected = model(ids)
    for args, kwargs in (
        ((ids,), {}),
        ((ids, None), {}),
        ((), {"ids": ids}),
        ((ids,), {"mask": None, "scale": 1.0}),
    ):
        assert same_structure(found(*args, **kwargs), expected, 1e-4)


def test_inputs_need_be_neither_contiguous_nor_without_gradients(deployed: Any) -> None:
    model, _ = ARCHITECTURES["attention"]
    x = torch.randn(8, 5, 3).requires_grad_().permute(2, 1, 0)
    for runtime in WITH_FILES:
        answer, weights = deployed["attention", runtime](x)
        assert not answer.requires_grad
        assert torch.allclose(answer, model.eval()(x)[0], atol=1e-4)
        assert weights.shape == (3, 5, 5)


ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((ids.float(), mask), {}, "'ids'.*int64.*float32.*convert"),
        ((ids, mask.long()), {}, "'mask'.*bool.*int64"),
        ((ids[:, :4], mask[:, :4]), {}, r"'ids'.*shape \(any, 6\).*\(3, 4\).*deploy"),
        ((ids[0], mask), {}, r"'ids'.*shape \(any, 6\).*\(6,\)"),
        ((ids, mask[:2]), {}, "batch size.*3 in 'ids', 2 in 'mask'"),
        ((ids,), {}, "ids, mask, scale.*1 by position.*'mask'"),
        ((ids, None), {}, r"inputs\['mask'\] must be a tensor, got NoneType"),
        ((ids, mask, 2.0), {}, "too many positional arguments"),
        ((ids, mask), {"scale": 3.0}, r"inputs\['scale'\].*fixed at 1.0.*3.0.*capture"),
        ((ids, mask), {"labels": ids}, "2 by position, labels.*unexpected.*'labels'"),
        ((ids, mask), {"mask": mask}, "multiple values for argument 'mask'"),
        (([1, 2], mask), {}, r"inputs\['ids'\] must be a tensor, got list"),
    ],
)
def test_calls_that_do_not_fit_are_refused(args: Any, kwargs: Any, words: str, deployed: Any) -> None:
    with pytest.raises(DeployError, match=words):
        deployed["tokens", "eager"](*args, **kwargs)


def test_a_value_other_than_the_default_must_be_given_again(deployed: Any) -> None:
    """Captured with double=True: leaving it out would mean False, and that is another program."""
    x, more = torch.randn(3, 4), torch.randn(3, 2)
    with pytest.raises(DeployError, match="missing a required .*argument: 'double'"):
        deployed["variadic", "eager"](x, more=more)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", WITH_FILES)
def test_threads_are_the_deployments_own(runtime: str) -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    model = nn.Linear(4, 2)
    found = deploy(model, (torch.randn(3, 4),), runtime=runtime, threads=1)
    assert torch.get_num_threads() == 2
    if runtime == "eager":
        session = found.session

        def watched(tensors: list[Tensor]) -> Any:
            return session(tensors)

        found.session = watched
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: seen.append(torch.get_num_threads())
        )
        found(torch.randn(3, 4))
        hook.remove()
        assert set(seen) == {1}
    found(torch.randn(3, 4))
    assert torch.get_num_threads() == 2
    assert found.threads == 1


@pytest.mark.slow
@pytest.mark.parametrize("runtime", WITH_FILES)
def test_a_deployed_model_does_not_follow_its_model(runtime: str) -> None:
    model = trained_conv()
    x = torch.randn(2, 3, 8, 8)
    found = deploy(model, (x,), runtime=runtime)
    before, program = found(x), found.program.pack()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(found(x), before)
    assert found.program.pack() == program


@pytest.mark.slow
def test_deploying_leaves_the_model_as_it_was() -> None:
    model = trained_conv().train()
    state, random = fingerprint(model.state_dict()), torch.get_rng_state()
    for runtime in WITH_FILES:
        deploy(model, (torch.ones(2, 3, 8, 8),), runtime=runtime)
    assert all(module.training for module in model.modules())
    assert fingerprint(model.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), random)


def test_the_onnx_file_speaks_the_models_names_and_nobodys_paths(deployed: Any) -> None:
    payload = deployed["tokens", "onnxruntime"].payload
    graph = onnx.load_from_string(payload).graph
    assert [each.name for each in graph.input] == ["ids", "mask"]
    assert [each.name for each in graph.output] == ["logits", "hidden_0"]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(Path(__file__).parents[2]).encode() not in payload
    onnx.checker.check_model(payload)
    lone = onnx.load_from_string(deployed["identity", "onnxruntime"].payload).graph
    assert lone.output[0].name != lone.input[0].name == "input"


def test_the_pt2_file_holds_nobodys_paths(deployed: Any) -> None:
    payload = deployed["conv", "eager"].payload
    assert b"deployment_models" not in payload
    assert str(Path(__file__).parents[2]).encode() not in payload


def test_a_pt2_file_runs_without_torchslim(deployed: Any) -> None:
    model, inputs = ARCHITECTURES["two inputs"]
    program = torch.export.load(io.BytesIO(deployed["two inputs", "eager"].payload)).module()
    first, second = program(inputs["left"], inputs["right"], inputs["unused"])
    assert torch.allclose(first, model.left(inputs["left"]), atol=1e-6)
    assert torch.allclose(second, model.right(inputs["right"]), atol=1e-6)


@pytest.mark.parametrize("runtime", WITH_FILES)
def test_the_saved_file_is_the_payload(runtime: str, deployed: Any, tmp_path: Path) -> None:
    found = deployed["conv", runtime]
    path = found.save(tmp_path / f"model{find_runtime(runtime).suffix}")
    assert {each.suffix: each.read_bytes() for each in tmp_path.iterdir()} == found.files
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) == found.size_bytes
    assert f"{found.size_bytes:,} bytes" in repr(found)
    assert path.read_bytes() == next(iter(found.files.values()))


def test_the_first_of_several_files_is_named(deployed: Any, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="'openvino'.*.xml.*.bin.*first"):
        deployed["conv", "openvino"].save(tmp_path / "model.onnx")


def test_a_dataclass_comes_back_as_itself(deployed: Any) -> None:
    _, inputs = ARCHITECTURES["structured"]
    for runtime in WITH_FILES:
        answer = deployed["structured", runtime](*inputs)
        assert isinstance(answer, Prediction)
        assert answer.values is None


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_every_runtime(dtype: torch.dtype, runtime: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(dtype)
    x = torch.randn(3, 4).to(dtype)
    found = deploy(model, (x,), runtime=runtime)(x)
    assert found.dtype == dtype
    assert torch.allclose(found, model(x), atol=1e-2)


@torch.library.custom_op("torchslim_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.slow
def test_an_operation_that_onnx_has_not_is_named() -> None:
    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    x = torch.randn(3, 4)
    assert torch.equal(deploy(Custom(), (x,), runtime="eager")(x), 2 * x)
    with pytest.raises(ExportError, match="exported to ONNX.*twice.*'eager'"):
        deploy(Custom(), (x,), runtime="onnxruntime")


def test_openvino_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailable, match=r"'openvino' is not installed: pip install 'torchslim\[openvino\]'"):
        deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime="openvino")


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install onnx onnxscript onnxruntime"):
        deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime="onnxruntime")


@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_a_missing_compiler_says_what_to_install(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeUnavailable, match=rf"'{runtime}' needs a C\+\+ compiler: apt-get install g\+\+"):
        deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime=runtime)


def test_an_unknown_runtime_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="'tensorrt'.*eager, aoti, inductor, onnxruntime, executorch, openvino"):
        find_runtime("tensorrt")
    assert {find_runtime(name).name for name in RUNTIMES} == set(RUNTIMES)


@pytest.mark.slow
def test_inductor_computes_integers_as_the_converted_graph_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Max pool, residual addition and relu included; and it has no file to save."""
    x = torch.randn(16, 3, 8, 8)
    quantized = static(trained_conv(), [(x,)], runtime="inductor")
    found = deploy(quantized, (x[:3],), runtime="inductor", threads=1)
    others = torch.randn(5, 3, 8, 8)
    assert sqnr(quantized(others), found(others)) >= 30
    assert sqnr(quantized(others[:1]), found(others[:1])) >= 30
    assert found.size_bytes is None
    assert "no file" in repr(found)
    with pytest.raises(DeployError, match="'inductor'.*no file format"):
        found.save(tmp_path / "model")
    assert not os.listdir(tmp_path)  # noqa: PTH208
    assert capfd.readouterr() == ("", "")


class Clipped(nn.Module):
    """One value between three pairs of bounds, as after a shared scaling in front of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        for index in range(3):
            self.register_buffer(f"low{index}", torch.tensor(-0.1 * (index + 1)))
            self.register_buffer(f"high{index}", torch.tensor(0.2 * (index + 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * self.layer(x)
        bounds = [(getattr(self, f"low{index}"), getattr(self, f"high{index}")) for index in range(3)]
        return torch.cat([y.clamp(low, high) for low, high in bounds], -1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_several_clips_of_one_value_keep_their_bounds(runtime: str) -> None:
    torch.manual_seed(0)
    model, x = Clipped().eval(), torch.randn(64, 4)
    deployed = deploy(model, (x,), runtime=runtime, threads=1)
    torch.testing.assert_close(deployed(x), model(x).detach(), rtol=0, atol=1e-5)
