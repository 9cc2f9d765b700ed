"""Sizes that differ between examples are free: deployed models answer as PyTorch at sizes in and between those seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.varying import VARYING, image, text
from torchslim.core.batches import call
from torchslim.errors import DeployError, ExportError, QuantizeError
from torchslim.graph import size_guards
from torchslim.graph.dynamic_sizes import fixed_sizes
from torchslim.graph.export import capture
from torchslim.graph.lifting import lifted
from torchslim.graph.recurrent_shapes import recurrent_kept_whole
from torchslim.quantize import sqnr
from torchslim.quantize.preparation import convert, prepare

RUNTIMES = ("eager", "onnxruntime", "openvino")
COMPILED: dict[tuple[str, ...], Any] = {}


def compiled(name: str, runtime: str, scheme: str = "") -> tuple[nn.Module, Any]:
    """A network or its int8 graph, and its deployment; each is made once."""
    if (name, runtime, scheme) not in COMPILED:
        case = VARYING[name]
        model, examples = case.model(), case.examples()
        if scheme:
            prepared = prepare(model, examples, runtime=runtime, scheme=scheme)
            if scheme == "int8":
                prepared.calibrate(examples)
            model = convert(prepared, checks=None)
        COMPILED[name, runtime, scheme] = model, ts.deploy(model, examples, runtime=runtime, threads=1)
    return COMPILED[name, runtime, scheme]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", VARYING)
@settings(max_examples=8)
@given(batch=st.integers(1, 4), height=st.integers(3, 12), width=st.integers(3, 12))
def test_a_deployed_model_answers_as_pytorch_at_any_size(
    name: str, runtime: str, batch: int, height: int, width: int
) -> None:
    case = VARYING[name]
    model, deployed = compiled(name, runtime)
    inputs = case.inputs(batch, height * case.multiple, width * case.multiple)
    with torch.no_grad():
        torch.testing.assert_close(call(deployed, inputs), call(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weights"])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", VARYING)
def test_an_int8_model_answers_as_its_graph_at_other_sizes(name: str, runtime: str, scheme: str) -> None:
    case = VARYING[name]
    model, deployed = compiled(name, runtime, scheme)
    for sizes in ((1, 4, 3), (4, 12, 8)):
        inputs = case.inputs(sizes[0], sizes[1] * case.multiple, sizes[2] * case.multiple)
        # of three outputs with a range of each call, one that is rounded the other way weighs more
        assert sqnr(call(model, inputs), call(deployed, inputs)) > (25 if scheme == "int8-dynamic" else 35)


def test_a_quantized_program_is_lifted_with_its_free_sizes() -> None:
    model, _ = compiled("text", "onnxruntime", "int8")
    examples = VARYING["text"].examples()
    captured = lifted(model, examples, "auto")
    assert captured is not None
    assert [str(size).isdigit() for size in captured.inputs_of_program()[0].shape] == [False, False]
    assert len(captured.variants) == len(examples) - 1
    for each in (captured, capture(model, examples, "auto")):  # what is timed: the first example, with two samples
        assert each.example["input_ids"].shape == (2, 5)


def test_sizes_that_the_code_fixes_are_named_with_the_line() -> None:
    class Pinned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 3, -1) if x.shape[1] == 12 else x.reshape(x.shape[0], 2, -1)

    captured = capture(Pinned(), [(torch.randn(2, 12),), (torch.randn(2, 8),)], "auto")
    (note,) = captured.notes
    assert "dimension 1 of input 'x' at 12" in note
    assert "test_varying_sizes.py" in note


def test_a_size_on_the_other_side_of_a_branch_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x) if x.shape[1] > 10 else self.layer(x)

    model = Branch()
    quantized = ts.quantize.static(model, [(torch.randn(2, 12, 4),), (torch.randn(2, 20, 4),)])
    with pytest.raises(QuantizeError, match=r"x\.shape\[1\] > 10"):
        quantized(torch.randn(3, 6, 4))
    examples: list[Any] = [(torch.randn(2, 12, 4),), (torch.randn(2, 20, 4),)]
    for runtime in RUNTIMES:
        deployed = ts.deploy(model, examples, runtime=runtime, threads=1)
        x = torch.randn(3, 15, 4)
        torch.testing.assert_close(deployed(x), model(x).detach(), rtol=1e-5, atol=1e-5)
        with pytest.raises(DeployError, match=r"x\.shape\[1\] must be at least 11.*> 10.*got x \(3, 6, 4\)"):
            deployed(torch.randn(3, 6, 4))


def test_a_size_that_is_no_multiple_is_an_error() -> None:
    for runtime in RUNTIMES:
        with pytest.raises(DeployError, match=r"x\.shape\[2\].*got x \(1, 3, 18, 16\)"):
            compiled("u-net", runtime)[1](*image(1, 18, 16))


def test_guards_are_kept_in_an_artifact_and_only_data_is_read(tmp_path: Any) -> None:
    deployed = compiled("u-net", "onnxruntime")[1]
    ts.save(deployed, tmp_path)
    with pytest.raises(DeployError, match=r"got x \(1, 3, 18, 16\)"):
        ts.load(tmp_path)(*image(1, 18, 16))
    for code in (
        "__import__('os')",
        "s0_1 ** 9 ** 9",
        "(lambda: 1)()",
        "max(x for x in s0_1)",
        "s0_1 if 1 else 2",
        "1" * 2000,
    ):
        with pytest.raises(ValueError, match="sizes|relation"):
            size_guards.parse(code)
    assert size_guards.broken(["2 * (s0_2 // 4) == s0_2 // 2", "s0_2 >= 8"], [(1, 3, 16)]) is None
    assert size_guards.broken(["max(1, s0_2) % 4 == 0 and not s0_1 == 3"], [(1, 3, 16)]) is not None


@pytest.mark.parametrize(("other", "message"), [
    ((torch.randn(2, 3, 8),), "differ in more than sizes.*'input'.*4 dimensions.*3 in example 2"),
    ((torch.randn(2, 3, 8, 8).double(),), "'input'.*float32.*float64.*example 2"),
    (((torch.randn(2, 3, 8, 8),) * 2,), "differ in more than sizes.*tensor.*tuple"),
])  # fmt: skip
def test_examples_of_several_kinds_are_refused(other: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        capture(nn.Flatten(), [(torch.randn(2, 3, 8, 8),), other], "auto")


def test_calibration_batches_of_other_sizes_are_named() -> None:
    case = VARYING["text"]
    prepared = prepare(case.model(), case.examples()[0])
    with pytest.raises(QuantizeError, match=r"'input_ids'.*\(any, 5\).*\(2, 9\).*list of example inputs"):
        prepared.calibrate([text(2, 9)])


def test_one_example_leaves_the_batch_alone_free() -> None:
    captured = capture(VARYING["convolutions"].model(), image(2, 8, 8))
    free = [str(size).isdigit() for size in captured.inputs_of_program()[0].shape]
    assert free == [False, True, True, True]


def test_a_smaller_last_batch_is_no_further_size() -> None:
    model = VARYING["convolutions"].model()
    captured = capture(model, [image(8, 9, 9), image(3, 9, 9), image(8, 12, 9), image(5, 12, 9)])
    assert [tuple(leaf.shape for leaf in leaves) for leaves in captured.variants] == [((2, 3, 12, 9),)]
    assert not capture(model, [image(8, 9, 9), image(3, 9, 9)]).variants


def padded(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Pad sentences to the longest one."""
    longest = max(len(ids) for ids, _ in samples)
    ids, mask = torch.zeros(len(samples), longest, dtype=torch.long), torch.zeros(len(samples), longest)
    for row, (words, _) in enumerate(samples):
        ids[row, : len(words)], mask[row, : len(words)] = words, 1
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([label for _, label in samples])}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_a_job_on_sentences_padded_to_the_longest_runs_to_its_end(mode: str, tmp_path: Any) -> None:
    """Costs 10 s: pruning, distillation, quantization and resuming on batches of many lengths."""
    generator = torch.Generator().manual_seed(0)

    def data(count: int) -> list[Any]:
        lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
        words = [torch.randint(2, 50, (length,), generator=generator) for length in lengths]
        samples = [(ids, int((ids < 25).sum() * 2 > len(ids))) for ids in words]
        return [padded(samples[start : start + 8]) for start in range(0, count, 8)]

    task = ts.Task(train=data(32), val=data(20), metric="accuracy")
    quantize = ts.Quantize("int8", mode=mode, train=ts.Finetune(epochs=1) if mode == "qat" else None)  # type: ignore[arg-type]
    steps = [ts.Prune(pattern="channel", sparsity=0.3, of="params", round_to=4), ts.Distill(epochs=1), quantize]
    results = [
        ts.compress(VARYING["text"].model(), task, steps, runtime="onnxruntime", threads=1, workdir=tmp_path)
        for _ in range(2)
    ]
    assert results[0].deployed.spec.sizes == [[None, None], [None, None]]
    assert results[0].run["rows"][-1]["metric"] == results[1].run["rows"][-1]["metric"]
    for length in (3, 30):
        batch = text(2, length)
        assert call(results[1].deployed, batch).shape == (2, 3)


def free(captured: Any) -> list[list[bool]]:
    return [[size is None for size in fixed_sizes(value)] for value in captured.inputs_of_program()]


def test_dimensions_can_be_listed() -> None:
    model, inputs = VARYING["text"].model(), text(3, 8)
    captured = capture(model, inputs, {"input_ids": [1], "attention_mask": [0, -1]})
    assert free(captured) == [[True, True], [True, True]]
    assert captured.batch_axis == 0
    assert free(capture(model, inputs, "fixed")) == free(capture(model, inputs, None)) == [[False, False]] * 2
    assert free(capture(model, inputs, "auto")) == free(capture(model, inputs, "batch")) == [[True, False]] * 2
    quantized = ts.quantize.static(model, [inputs], dynamic_shapes={"input_ids": [1], "attention_mask": [1]})
    deployed = ts.deploy(quantized, inputs, dynamic_shapes={"input_ids": [1], "attention_mask": [1]})
    other = text(2, 13)
    assert sqnr(call(quantized, other), call(deployed, other)) > 35


@pytest.mark.parametrize(("shapes", "message"), [
    ("every", "'auto', 'batch', 'fixed'.*'every'"),
    ({"ids": [1]}, "ids.*input_ids, attention_mask"),
    ({"input_ids": [2]}, r"\[2\] of input 'input_ids', which has 2"),
])  # fmt: skip
def test_sizes_that_cannot_be_free_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        capture(VARYING["text"].model(), text(3, 8), shapes)


def test_recurrent_layers_are_unrolled_again_whoever_leaves_last() -> None:
    layers = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    before = [dict(layer.py_kernels) for layer in layers]
    first, second = recurrent_kept_whole(), recurrent_kept_whole()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [dict(layer.py_kernels) for layer in layers] != before
    second.__exit__(None, None, None)
    assert [dict(layer.py_kernels) for layer in layers] == before


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True, "bias": False}]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_shapes_are_those_of_pytorch(kind: str, options: dict[str, Any]) -> None:
    model = getattr(nn, kind)(3, 5, **options, **({"proj_size": 2} if kind == "LSTM" and not options else {})).eval()
    x = torch.randn(4, 6, 3)
    captured = capture(model, (x,), None)
    states = model(x)[1]
    expected = [model(x)[0], *(states if kind == "LSTM" else [states])]
    assert [tuple(value.shape) for value in captured.outputs_of_program()] == [tuple(part.shape) for part in expected]
    for one, two in zip(captured.program.module()(x), expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_compilers_that_unroll_keep_the_number_of_steps(runtime: str) -> None:
    """Costs 20 s: they would compute something else for a series of another length."""
    case = VARYING["lstm"]
    model, examples = case.model(), case.examples()
    deployed = ts.deploy(model, examples, runtime=runtime, threads=1)
    (note,) = [note for note in deployed.spec.notes if "fixed sizes" in note]
    assert "unrolls" in note
    torch.testing.assert_close(deployed(*examples[0]), model(*examples[0]).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(DeployError, match=r"\(any, 5, 4\).*\(2, 7, 4\)"):
        deployed(*examples[2])
    other = VARYING["text"]
    deployed = ts.deploy(other.model(), other.examples(), runtime=runtime, threads=1)
    inputs = other.inputs(1, 13)
    torch.testing.assert_close(call(deployed, inputs), call(other.model(), inputs).detach(), rtol=1e-4, atol=1e-4)
