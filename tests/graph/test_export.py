"""Capturing: the graph is the model, the batch is found, and nothing of the caller's changes."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support.deployment_models import (
    Recurrent,
    TokenClassifier,
    Variadic,
    architectures,
    fresh_python,
    resize,
    same_structure,
    trained_conv,
)
from torchslim.core.batches import call, predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import evaluating, untouched
from torchslim.core.trees import tensors
from torchslim.errors import ExportError
from torchslim.graph.calling import bind
from torchslim.graph.export import Captured, capture, user_line
from torchslim.graph.io_structure import build, flatten

ARCHITECTURES = architectures()


def run(captured: Captured, model: nn.Module, inputs: Any) -> Any:
    """The captured program called as the model is."""
    leaves = captured.program.module()(*flatten(captured.inputs, bind(model, inputs)))
    return build(captured.outputs, leaves, captured.classes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_program_answers_as_the_model_for_any_batch(name: str) -> None:
    model, inputs = ARCHITECTURES[name]
    captured = capture(model, inputs)
    assert captured.batch_axis == 0
    assert captured.notes == ()
    for count in (1, 2, 5):
        others = resize(inputs, count)
        assert same_structure(run(captured, model, others), call(predictor(model), others), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_the_batch_of_a_sequence_first_network_is_its_second_axis(samples: int) -> None:
    model = Recurrent("LSTM", batch_first=False).eval()
    captured = capture(model, (torch.randn(7, samples, 6),))
    assert captured.batch_axis == 1
    x = torch.randn(7, 3, 6)
    assert torch.allclose(run(captured, model, (x,)), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_example_inputs_of_one_value_are_enough(fill: float) -> None:
    captured = capture(Recurrent("GRU"), (torch.full((1, 7, 6), fill),))
    assert captured.batch_axis == 0


def test_the_example_is_the_users_own_samples() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    captured = capture(nn.Linear(4, 2), (x,))
    assert torch.equal(captured.example["input"], x[:2])
    single = capture(nn.Linear(4, 2), (x[:1],))
    assert torch.equal(single.example["input"], x[[0, 0]])


def test_the_batch_need_not_be_the_first_inputs_size() -> None:
    class Positions(nn.Module):
        def forward(self, positions: Tensor, x: Tensor) -> Tensor:
            return x + positions

    captured = capture(Positions(), (torch.randn(6, 4), torch.randn(3, 6, 4)))
    assert captured.batch_axis == 0
    positions, x = torch.randn(6, 4), torch.randn(5, 6, 4)
    assert torch.equal(run(captured, Positions(), (positions, x)), x + positions)


def test_positions_that_hardly_depend_on_each_other_are_no_batch() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # (time, batch, width): a step sees a little of those before
            return self.linear(x + 0.05 * x.cumsum(0))

    torch.manual_seed(0)
    assert capture(Causal(), (torch.randn(6, 3, 4),)).batch_axis == 1


def test_samples_that_depend_on_each_other_are_no_batch() -> None:
    class Normalized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, 0)

    captured = capture(Normalized(), (torch.randn(3, 4),))
    # along axis 1 every column stands for itself
    assert captured.batch_axis == 1


class ReadsItsBatch(nn.Module):
    """Its code asks for the batch size as a number: the program is good for one size only."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [x[index] * 2 for index in range(x.shape[0])]
        return torch.stack(rows)


def test_a_batch_that_the_models_code_fixes_is_noted() -> None:
    captured = capture(ReadsItsBatch(), (torch.randn(3, 4),))
    assert captured.batch_axis is None
    (note,) = captured.notes
    assert "captured with batch size 3" in note
    x = torch.randn(3, 4)
    assert torch.equal(run(captured, ReadsItsBatch(), (x,)), 2 * x)


def test_no_batch_at_all_is_noted() -> None:
    captured = capture(nn.Linear(4, 2), (torch.randn(4),))
    assert captured.batch_axis is None
    assert "no batch dimension" in captured.notes[0]


def test_sizes_are_fixed_when_asked() -> None:
    captured = capture(nn.Linear(4, 2), (torch.randn(3, 4),), None)
    assert captured.batch_axis is None
    assert captured.notes == ()
    assert captured.example["input"].shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dict", "tuple", "collection"])
def test_a_torch_export_spec_is_read_as_torch_reads_it(form: str) -> None:
    model = TokenClassifier().eval()
    ids = torch.randint(20, (2, 6))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=2, max=64)
    free = {0: batch, 1: time}
    spec: Any = {"ids": free, "mask": free, "scale": None}
    if form == "tuple":
        spec = (free, free)
    if form == "collection":
        spec = torch.export.ShapesCollection()
        spec[ids] = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 3)).eval()
        captured = capture(model, (ids,), spec)
        others: Any = (torch.randint(20, (5, 9)),)
    else:
        captured = capture(model, (ids, mask), spec)
        others = (torch.randint(20, (5, 9)), torch.zeros(5, 9, dtype=torch.bool))
    assert same_structure(run(captured, model, others), call(predictor(model), others), 1e-5)


@pytest.mark.parametrize("spec", ["time", {"y": None}, 3])
def test_other_dynamic_shapes_are_refused(spec: Any) -> None:
    with pytest.raises(ExportError, match="dynamic_shapes.*'batch'.*None"):
        capture(nn.Linear(4, 2), (torch.randn(3, 4),), spec)


@pytest.mark.slow
def test_defaults_may_be_given_or_left_out() -> None:
    model = TokenClassifier().eval()
    ids = torch.randint(20, (3, 6))
    captured = capture(model, (ids,))
    expected = call(predictor(model), (ids,))
    for inputs in ((ids,), (ids, None), {"ids": ids, "scale": 1.0}, {"ids": ids, "mask": None}):
        assert same_structure(run(captured, model, inputs), expected, 1e-5)


def test_arguments_without_names_are_captured() -> None:
    x = torch.randn(3, 4)
    captured = capture(Variadic(), (x, x, x))
    assert torch.allclose(run(captured, Variadic(), (x, 2 * x, x))[0], 4 * x)


def test_a_program_shares_no_memory_with_its_model() -> None:
    model = trained_conv()
    x = torch.randn(2, 3, 8, 8)
    captured = capture(model, (x,))
    before = run(captured, model, (x,))
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert torch.equal(run(captured, model, (x,)), before)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = capture(model, (torch.randn(2, 4),)).program.state_dict
    weights = [value for name, value in state.items() if name.endswith("weight")]
    assert len({value.data_ptr() for value in weights}) == 1


class Counting(nn.Module):
    """Changes a buffer and draws random numbers at every call, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.drop = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.replaced: Tensor
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.drop(self.linear(x)) + 0 * torch.rand(())


def test_the_model_the_random_state_and_the_modes_are_as_before() -> None:
    model = Counting().train()
    model.drop.eval()
    replaced = model.replaced
    before = fingerprint(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    grads = [parameter.requires_grad for parameter in model.parameters()]

    capture(model, (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),))

    assert fingerprint(model.state_dict()) == before
    assert model.replaced is replaced
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("manager", [evaluating, untouched])
def test_an_error_inside_leaves_the_model_as_it_was(manager: Any) -> None:
    model = Counting().train()
    with pytest.raises(KeyError), manager(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # MARK: depends on the data
            return x
        return -x


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.new_zeros(7, 7)  # MARK: shapes do not fit


def line_of(mark: str) -> int:
    with open(__file__) as file:  # noqa: PTH123
        return next(number for number, line in enumerate(file, 1) if f"# MARK: {mark}" in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mark", "words"),
    [
        (Branches(), "depends on the data", "torch.export.*capture"),
        (Fails(), "shapes do not fit", "fails.*example inputs"),
    ],
)
def test_what_resists_is_named_by_file_and_line(model: nn.Module, mark: str, words: str) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        capture(nn.Sequential(nn.ReLU(), model), (torch.ones(3, 4),))
    assert f"test_export.py:{line_of(mark)} in forward" in str(caught.value)


class Packs(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0].data  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_size_that_depends_on_the_lengths_is_named_with_what_to_write(kind: type[nn.RNNBase]) -> None:
    with pytest.raises(ExportError, match=r"shape \(.*\) becomes \(.*total_length=inputs.shape\[1\]"):
        capture(Packs(kind), (torch.zeros(3, 5, 4), torch.tensor([5, 2, 3])))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 4), r"tuple.*dict.*got Tensor.* \(x,\)"),
        ((), "do not fit Linear.forward"),
        ({"x": torch.zeros(2, 4)}, "Linear.forward.*'input'"),
        ((1.0,), "hold no tensor"),
        ((torch.zeros(2, 4), 3), "too many positional arguments"),
        (({"set": {1}, "x": torch.zeros(2, 4)},), "input 'input' has the type set"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused(inputs: Any, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        capture(nn.Linear(4, 2), inputs)


def test_an_output_without_a_runtime_form_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, object()

    with pytest.raises(ExportError, match="an output has the type object"):
        capture(Odd(), (torch.zeros(2, 4),))


def test_an_output_that_is_a_cache_says_how_to_do_without() -> None:
    class DynamicCache:
        pass

    class Decoder(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, DynamicCache()

    with pytest.raises(ExportError, match="type DynamicCache.*model.config.use_cache is False"):
        capture(Decoder(), (torch.zeros(2, 4),))


def test_a_model_without_tensors_among_its_outputs_is_captured_as_it_is() -> None:
    class Shape(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.new_zeros(3), 4, "five"

    captured = capture(Shape(), (torch.zeros(2, 4),), None)
    assert run(captured, Shape(), (torch.zeros(2, 4),))[1:] == (4, "five")


def test_capturing_warns_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(trained_conv(), (torch.randn(2, 3, 8, 8),))
    assert capfd.readouterr() == ("", "")


QUIET = """
import torch, torchslim as ts
from tests.support.deployment_models import trained_conv
torch.manual_seed(0)
x = torch.randn(4, 3, 8, 8)
quantized = ts.quantize.static(trained_conv(), [(x,)])
ts.deploy(quantized, (x,), runtime="eager")(x)
ts.deploy(quantized, (x,), runtime="onnxruntime")(x)
ts.save(quantized, "{folder}", example_inputs=(x,))
ts.load("{folder}")(x)
"""


@pytest.mark.slow
def test_nothing_is_printed_in_a_fresh_process(tmp_path: Any) -> None:
    """torchao, the ONNX exporter and torch.export talk at their first import and use; the library keeps silent."""
    done = fresh_python(QUIET.format(folder=tmp_path / "a"), PYTHONWARNINGS="ignore")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_flat_inputs_are_the_inputs_tensors() -> None:
    for name in ("tokens", "structured", "two inputs"):
        model, inputs = ARCHITECTURES[name]
        captured = capture(model, inputs)
        assert len(flatten(captured.inputs, bind(model, inputs))) == len(tensors(inputs))


def test_errors_that_cause_each_other_have_no_line() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert user_line(first) == "an unknown line"
