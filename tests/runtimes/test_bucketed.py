"""Sizes that cannot vary: a program for each listed size, and padding where the model's results prove it exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from torchslim.errors import ArtifactError, DeployError, ExportError, RecipeError
from torchslim.graph.buckets import listed_buckets
from torchslim.pipeline.recipe import Recipe
from torchslim.runtimes.bucketed import Bucketed

RUNTIMES = ("eager", "onnxruntime", "openvino")
LENGTHS = [3, 6]
COMPILED: dict[tuple[str, str], Any] = {}


class Steps(nn.Module):
    """A loop over the steps of a series, which a capture unrolls; masked steps keep the state."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.cell, self.head, self.masked = nn.GRUCell(3, 6), nn.Linear(6, 2), masked

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        state = x.new_zeros(x.shape[0], 6)
        outputs = []
        for step in range(int(x.shape[1])):
            new = self.cell(x[:, step], state)
            keep = mask[:, step, None] if self.masked else 1.0
            state = keep * new + (1 - keep) * state
            outputs.append(self.head(state))
        return self.head(state), torch.stack(outputs, 1)


def model(masked: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Steps(masked).eval()


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    mask = torch.ones(batch, length)
    mask[0, (length + 1) // 2 :] = 0
    return {"x": torch.randn(batch, length, 3, generator=generator), "mask": mask}


def compiled(kind: str, runtime: str) -> Any:
    """A deployment, made once: the masked model in buckets, or the one without a mask."""
    if (kind, runtime) not in COMPILED:
        sizes = {"x": {1: LENGTHS}, "mask": {1: LENGTHS}}
        COMPILED[kind, runtime] = ts.deploy(
            model(kind == "masked"), inputs(2, 5), runtime=runtime, threads=1, dynamic_shapes=sizes
        )
    return COMPILED[kind, runtime]


def agree(deployed: Any, own: nn.Module, batch: int, length: int) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            deployed(**inputs(batch, length)), own(**inputs(batch, length)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=10)
@given(batch=st.integers(1, 4), length=st.integers(1, max(LENGTHS)))
def test_sizes_between_buckets_are_padded_where_a_mask_makes_it_exact(runtime: str, batch: int, length: int) -> None:
    deployed = compiled("masked", runtime)
    assert deployed.padding is not None
    agree(deployed, model(), batch, length)


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=10)
@given(batch=st.integers(1, 4), length=st.integers(1, 8))
def test_without_a_mask_the_listed_sizes_alone_are_taken(runtime: str, batch: int, length: int) -> None:
    deployed = compiled("unmasked", runtime)
    assert deployed.padding is None
    if length in LENGTHS:
        agree(deployed, model(False), batch, length)
    else:
        with pytest.raises(DeployError, match=rf"x\.shape\[1\].*must be 3 or 6.*got x \({batch}, {length}, 3\)"):
            deployed(**inputs(batch, length))


def test_a_call_above_the_largest_bucket_is_refused() -> None:
    with pytest.raises(DeployError, match=r"x\.shape\[1\].*must be at most 6"):
        compiled("masked", "eager")(**inputs(2, 9))
    with pytest.raises(DeployError, match=r"x\.shape\[1\] == mask\.shape\[1\]"):
        compiled("masked", "eager")(inputs(2, 3)["x"], inputs(2, 6)["mask"])


def test_a_size_that_the_code_fixes_is_padded_to_the_largest_example() -> None:
    examples: Any = [inputs(2, 3), inputs(2, 5), inputs(2, 4)]
    deployed = ts.deploy(model(), examples, runtime="onnxruntime", threads=1)
    assert isinstance(deployed, Bucketed)
    assert any("padded to 5" in note for note in deployed.spec.notes)
    for length in (1, 4, 5):
        agree(deployed, model(), 3, length)
    fixed = ts.deploy(model(False), examples, runtime="onnxruntime", threads=1)
    assert not isinstance(fixed, Bucketed)
    (note,) = [note for note in fixed.spec.notes if "dynamic_shapes" in note]
    assert "'x': {1: [5, ...]}" in note
    with pytest.raises(DeployError, match="lists of the sizes"):
        fixed(**inputs(2, 4))


def test_two_dimensions_are_listed_in_pairs() -> None:
    class Grid(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images[:, :, row].mean(-1) for row in range(int(images.shape[2]))], -1).sum(-1)

    sizes = {"images": {2: [4, 6], 3: [8, 5]}}
    deployed: Any = ts.deploy(Grid(), (torch.randn(2, 3, 7, 7),), threads=1, dynamic_shapes=sizes)
    for height, width in ((4, 8), (6, 5)):
        x = torch.randn(3, 3, height, width)
        torch.testing.assert_close(deployed(x), Grid()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(DeployError, match=r"got images \(2, 3, 4, 5\)"):
        deployed(torch.randn(2, 3, 4, 5))
    eager = ts.runtimes.kernels(deployed)
    assert eager


@pytest.mark.parametrize(("sizes", "message"), [
    ({"x": {1: [4, 8]}, "mask": {1: [4]}}, "as many sizes for every dimension"),
    ({"x": {1: [4, 0]}}, "whole numbers from 1"),
    ({"x": {1: [4.5]}}, "whole numbers from 1"),
    ({"y": {1: [4]}}, "y.*the model takes x, mask"),
    ({"x": {7: [4]}}, "dimension 7 of input 'x', which has 3"),
    ({"x": {1: [4, 8]}}, "fails on its example inputs"),  # the mask keeps its size
])  # fmt: skip
def test_lists_that_do_not_fit_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ts.deploy(model(), inputs(2, 5), runtime="eager", dynamic_shapes=sizes)


def test_a_recipe_lists_sizes_too() -> None:
    assert listed_buckets({"x": {"1": [4, 8]}}) == {"x": {1: [4, 8]}}
    assert listed_buckets({"x": [0, 1]}) is None
    assert Recipe(model="a:b", task="a:c", steps=(), dynamic_shapes={"x": {"1": [4, 8]}})
    with pytest.raises(RecipeError, match="whole numbers"):
        Recipe(model="a:b", task="a:c", steps=(), dynamic_shapes={"x": {"1": [0]}})


@pytest.mark.parametrize("kind", ["masked", "unmasked"])
def test_the_programs_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    deployed = compiled(kind, "onnxruntime")
    ts.save(deployed, tmp_path)
    loaded: Any = ts.load(tmp_path)
    assert (loaded.buckets, loaded.padding, loaded.spec) == (deployed.buckets, deployed.padding, deployed.spec)
    assert loaded.size_bytes == deployed.size_bytes > 0
    for length in (2, 3) if kind == "masked" else (3, 6):
        for one, other in zip(loaded(**inputs(2, length)), deployed(**inputs(2, length)), strict=True):
            assert torch.equal(one, other)
    manifest = json.loads((tmp_path / "artifact.json").read_text())
    manifest["buckets"]["sizes"][0] = [1]
    (tmp_path / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError):
        ts.load(tmp_path)


@pytest.mark.slow
def test_a_run_ships_a_program_for_each_size(tmp_path: Path) -> None:
    """Costs 15 s: pruning, quantization, the report and the artifact of a model in two sizes."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    batches = [(torch.randn(4, 3, size, 8), torch.tensor([0, 1, 0, 1])) for size in (8, 12)]
    task = ts.Task(train=batches, val=batches, metric="accuracy")
    steps = [ts.Prune(sparsity=0.3), ts.Quantize("int8")]
    result = ts.compress(
        net, task, steps, runtime="onnxruntime", threads=1, workdir=tmp_path, dynamic_shapes={"input": {2: [8, 12]}}
    )
    assert isinstance(result.deployed, Bucketed)
    assert result.run["sizes"]["largest"] == "input (1, 3, 12, 8)"
    result.save(tmp_path / "out")
    loaded = ts.load(tmp_path / "out")
    for images, _ in batches:
        torch.testing.assert_close(loaded(images), result.deployed(images), rtol=0, atol=0)
    events: list[ts.Event] = []
    again = ts.compress(
        net, task, steps, runtime="onnxruntime", threads=1, workdir=tmp_path, dynamic_shapes={"input": {2: [8, 12]}},
        progress=events.append,
    )  # fmt: skip
    assert [event.step for event in events if event.phase == "resumed"] == ["prune", "quantize"]
    assert isinstance(again.deployed, Bucketed)
    for images, _ in batches:
        assert torch.equal(again.deployed(images), result.deployed(images))
        assert torch.equal(again.model(images), result.model(images))


class Named(nn.Module):
    """A part whose code fixes the number of steps, beside code that stays in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = model(), nn.Linear(2, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        last, _ = self.part(x, mask)
        return self.head(last) if bool(last.mean() > 0) else self.head(-last)


def test_a_part_has_a_program_for_each_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Named().eval()
    sizes = {"x": {1: LENGTHS}, "mask": {1: LENGTHS}}
    deployed: Any = ts.deploy(net, inputs(2, 6), part="part", dynamic_shapes=sizes, threads=1)
    assert isinstance(deployed.parts["part"], Bucketed)
    ts.save(deployed, tmp_path / "saved")
    whole: Any = ts.load(tmp_path / "saved", Named)
    part: Any = ts.load(tmp_path / "saved", part="part")
    copied: Any = ts.load(shutil.copytree(tmp_path / "saved" / "parts" / "part", tmp_path / "copied"))
    for length in (2, 3, 5, 6):
        given = inputs(3, length)
        with torch.no_grad():
            torch.testing.assert_close(deployed(**given), net(**given), rtol=1e-4, atol=1e-5)
        assert torch.equal(whole(**given), deployed(**given))
        for one in (part, copied):
            assert torch.equal(one(**given)[0], deployed.parts["part"](**given)[0])
    with pytest.raises(DeployError):
        deployed(**inputs(3, 7))


@pytest.mark.slow
def test_a_compiler_that_unrolls_takes_the_listed_lengths() -> None:
    """Costs 60 s: a recurrent layer on inductor, compiled for two lengths."""
    net = nn.Sequential(nn.GRU(3, 4, batch_first=True)).eval()
    deployed = ts.deploy(
        net, (torch.randn(2, 5, 3),), runtime="inductor", threads=1, dynamic_shapes={"input": {1: [4, 6]}}
    )
    for length in (4, 6):
        x = torch.randn(3, length, 3)
        torch.testing.assert_close(deployed(x)[0], net(x)[0].detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DeployError, match="must be 4 or 6"):
        deployed(torch.randn(3, 5, 3))
