"""The coverage benchmark of quantization: what counts, what is drawn, what is compared, and the page."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import one_zoo_quantized, quantize_page, runner, zoo
from benchmarks.one_zoo_quantized import another, compare, counts, kind, left_in_float, measure
from benchmarks.outputs import settle_norms, stacked
from torchslim.artifact.integer_coverage import LayerKernel
from torchslim.core.step import LayerRecord

MACHINE = {"processor": "a processor", "threads": 2, "versions": {"torch": "2.0"}}


def row(model="timm/a", side="ours", **more):
    base = {
        "model": model, "suite": model.partition("/")[0], "side": side, "version": "v1", "time_limit": 60.0,
        "exports": True, "quantizes": True, "runs": True, "sqnr_db": 31.25, "integer_share": 0.99, "silent": [],
        "left": [], "kind": "convolutions", "counts": True, "reason": "", "seconds": 3.4,
    }  # fmt: skip
    return base | more


def layer(operation="linear", macs=10, integer=True, why="", path="a"):
    return LayerKernel(
        layer=path, operation=operation, macs=macs, weight_bits=8, activations="static", kernel="k", integer=integer,
        why=why,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"sqnr_db": 20.0}, True),
        ({"sqnr_db": 19.9}, False),
        ({"sqnr_db": None}, False),
        ({"runs": False}, False),
        ({"quantizes": None}, False),
    ],
)
def test_what_counts(more, expected):
    assert counts(row(**more)) is expected


def test_other_inputs_are_drawn_as_the_example_was():
    torch.manual_seed(0)
    inputs = {
        "pixels": torch.randn(1, 3, 8, 8), "image": [torch.rand(3, 8, 8)], "flag": True,
        "tokens": torch.randint(5, zoo.VOCABULARY, (1, 16)), "mask": torch.ones(1, 16).long(),
    }  # fmt: skip
    drawn = another(inputs)
    assert not torch.equal(drawn["pixels"], inputs["pixels"])
    assert bool((drawn["pixels"] < 0).any())
    assert 0 <= float(drawn["image"][0].min()) < float(drawn["image"][0].max()) <= 1
    assert 5 <= int(drawn["tokens"].min()) < int(drawn["tokens"].max()) < zoo.VOCABULARY
    assert torch.equal(drawn["mask"], inputs["mask"])
    assert drawn["flag"] is True


def test_samples_become_one_batch():
    image = torch.zeros(1, 3, 2, 2)
    assert stacked([(image, {"x": image}), (image, {"x": image})])[1]["x"].shape == (2, 3, 2, 2)
    assert len(stacked([([image[0]],), ([image[0]],)])[0]) == 2
    assert stacked([{"flag": True}, {"flag": True}]) == {"flag": True}


def test_batch_norms_settle_on_the_inputs_where_the_model_takes_them_as_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    batches = [(torch.randn(1, 2, 4, 4) + 5,) for _ in range(4)]
    settle_norms(model, batches)
    assert torch.allclose(model[0].running_mean, torch.cat([each[0] for each in batches]).mean((0, 2, 3)))

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.norm(x).view(1, 32)

    fixed = Fixed().eval()
    settle_norms(fixed, batches)
    assert torch.equal(fixed.norm.running_mean, torch.zeros(2))
    assert not fixed.norm.training


def test_a_layer_in_float_without_a_recorded_reason_is_silent():
    records = [
        LayerRecord(layer="b", action="refused", reason="on purpose"), LayerRecord(layer="c", action="quantized"),
    ]  # fmt: skip
    layers = [
        layer(macs=60), layer(macs=30, integer=False, why="on purpose", path="b"),
        layer(macs=10, integer=False, why="no kernel", path="c"),
    ]  # fmt: skip
    found = left_in_float(layers, records)
    assert found["left"] == [["linear: on purpose", 0.3], ["linear: no kernel", 0.1]]
    assert found["silent"] == ["c (linear)"]


def test_the_kind_of_a_network_is_what_does_most_of_its_work():
    assert kind([layer("conv2d", 51), layer("linear", 49)]) == "convolutions"
    assert kind([layer("conv2d", 50), layer("matmul", 50)]) == "products"


def test_outputs_are_compared_or_it_is_said_why_not():
    x = torch.randn(4, 4)
    found = row()
    compare([x], [x * 1.001], found)
    assert found["sqnr_db"] == pytest.approx(60, abs=0.01)
    compare([x], [x * 2], found)
    assert found["reason"] == "only 0.0 dB from the float model"
    compare([x], [x[:2]], found)
    assert found["reason"] == "outputs 2x4 instead of 4x4"
    compare([x], [x * torch.nan], found)
    assert found["reason"] == "outputs that are not numbers"


@pytest.mark.slow
def test_a_small_network_is_measured_by_our_side_and_a_failure_tells_how_far_it_came(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    entry = zoo.Entry("toy/net", "toy", lambda: (net, (torch.randn(1, 3, 8, 8),)))
    found = measure(entry, "ours", 240)
    assert found["counts"], found["reason"]
    assert found["integer_share"] == 1.0
    assert found["worst_db"] is not None
    assert found["worst"]
    assert found["rolled_back"] == []
    assert found["kind"] == "convolutions"
    assert found["silent"] == []

    def fail(*_):
        raise ValueError("no kernel")

    monkeypatch.setattr(one_zoo_quantized, "convert", fail)
    found = measure(entry, "ours", 240)
    assert (found["exports"], found["quantizes"], found["runs"]) == (True, False, None)
    assert found["reason"] == "ValueError: no kernel"
    assert not found["counts"]


def test_what_failed_on_other_source_is_run_again_only_when_asked():
    rows = [row(counts=False, version="v0"), row("timm/b", version="v0")]
    names, versions = ["timm/a", "timm/b"], {"ours": "v1"}
    assert runner.missing(names, ("ours",), rows, versions) == []
    assert runner.missing(names, ("ours",), rows, versions, failed=True) == [("timm/a", "ours")]
    assert runner.missing(names, ("ours",), [row(counts=False)], versions, failed=True) == [("timm/b", "ours")]


def test_groups_of_the_page():
    group = quantize_page.group
    assert group("torchvision/fasterrcnn_resnet50_fpn") == group("torchvision/ssd300_vgg16") == "torchvision detection"
    assert group("torchvision/fcn_resnet50") == group("torchvision/lraspp_x") == "torchvision segmentation"
    assert group("torchvision/resnet18") == "torchvision classification"
    assert group("timm/fcn") == "timm"


def test_the_page_lists_what_was_lowered_for_phones():
    portable = [["cumsum: XNNPACK has no kernel for it", 2]]
    rows = [
        row("timm/a", "executorch", integer_share=0.9, portable=portable),
        row("timm/a", "executorch-float", counts=False, runs=False, sqnr_db=None, reason="ExportError: no"),
    ]
    lines = quantize_page.page(rows, MACHINE, ["timm/a", "timm/b"]).splitlines()
    assert "| timm/a | no (runs) | 31.2 dB | 90.0 % | 2 cumsum: XNNPACK has no kernel for it |" in lines
    assert "- `timm/a` (executorch-float): ExportError: no" in lines
    assert "## ExecuTorch" not in quantize_page.page([row("timm/a")], MACHINE, ["timm/a"])


def test_the_page_judges_the_bars_of_all_models_and_lists_what_misses_them():
    rows = [
        row("torchvision/x"),
        row("timm/a", integer_share=0.5, left=[["matmul: a | b", 0.5]]),
        row("timm/a", "nncf", counts=False, runs=False, sqnr_db=None, reason="RuntimeError: <no>"),
        row(
            "timm/b",
            counts=False,
            sqnr_db=12.0,
            worst_db=3.25,
            rolled_back=["cat went back to float: with it | it is lost"],
            reason="only 12.0 dB from the float model",
            silent=["q (linear)"],
        ),
    ]
    page = quantize_page.page(rows, MACHINE, ["torchvision/x", "timm/a", "timm/b", "timm/c"])
    lines = page.splitlines()
    assert "| timm | 3 | 2 | 1 of 3 (33 %) | not run | 0 of 1 (0 %) |" in lines
    assert "| torchvision classification counts | 100 % | 1 of 1 (100 %) | met |" in lines
    assert "| timm counts | 92 % | 1 of 3 (33 %) | **missed** |" in lines
    assert (
        "| MACs in int8, networks of convolutions | 95 % | median 99.0 %; 1 of 3 models are below | met in the median |"
        in lines
    )
    assert "| no silent float | 0 models | 1 models with layers in float without a reason | **missed** |" in lines
    assert "| a | yes | yes | yes | yes | 31.2 dB | - | - | 50.0 % | 3 | not run | no (runs) |" in lines
    assert "| b | **no** | yes | yes | yes | 12.0 dB | 3.2 dB | 1 | 99.0 % | 3 | not run | not run |" in lines
    assert "| nothing rolled back | 95 % | all but 1 of 1 (100 %) | **missed** |" in lines
    assert "- `timm/b`: cat went back to float: with it \\| it is lost" in lines
    assert "- `timm/a`: 50.0 %; in float: 50 % matmul: a \\| b" in lines
    assert "- `timm/b`: q (linear)" in lines
    assert "- `timm/b`: only 12.0 dB from the float model" in lines
    assert "- `timm/a`: RuntimeError: &lt;no>" in lines
    assert lines[-1] == "`timm/c`"
    tables = [line for line in lines if line.startswith(("| a |", "| b |", "| c |"))]
    assert {line.count("|") for line in tables} == {len(quantize_page.COLUMNS) + 1}
