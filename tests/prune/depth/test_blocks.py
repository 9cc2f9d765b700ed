"""Residual blocks: which are found, what a removal leaves, and that the result equals the masked original."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import channel_networks as net
from tests.support.random_networks import conv_networks, token_networks
from tests.support.residual_networks import TOKENS, PreNorm, stack
from torchslim.core.trees import tensors
from torchslim.errors import ArtifactError, PruneError
from torchslim.prune.depth.plan import DepthPlan, analyze_depth
from torchslim.prune.depth.removal import NoBlocks

QUICK = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(*inputs))


def muted(model: nn.Module, paths: set[str]) -> nn.Module:
    """A copy whose residual modules at `paths` return their input: hooks on their bodies, no dispatch mode."""
    copied = copy.deepcopy(model)
    for path in paths:
        body = copied.get_submodule(path).body
        body.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    return copied


def residuals(model: nn.Module) -> set[str]:
    kinds = (net.Residual, net.Normed)
    return {path for path, module in model.named_modules() if isinstance(module, kinds) and list(module.parameters())}


class PostNorm(nn.Module):
    """A layer whose norms follow its additions, with the feed-forward network inline."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(wide, wide), nn.Linear(wide, 3 * wide), nn.Linear(3 * wide, wide)
        self.norm1, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.norm1(x + self.mix(x.mean(1, keepdim=True).expand_as(x)))
        return (self.norm2(self.down(self.up(x).relu()) + x),)


def offered(plan: DepthPlan) -> dict[str, str]:
    return {name: plan.verify([], name) for name in plan.blocks}


@pytest.mark.slow
@QUICK
@given(conv_networks())
def test_random_networks_of_convolutions_lose_any_of_their_residual_blocks(drawn: Any) -> None:
    check_random(*drawn)


@pytest.mark.slow
@QUICK
@given(token_networks())
def test_random_networks_of_tokens_lose_any_of_their_residual_blocks(drawn: Any) -> None:
    check_random(*drawn)


def check_random(model: nn.Module, inputs: Any) -> None:
    paths = residuals(model)
    plan = analyze_depth(model, inputs)
    found = {name for name in plan.blocks if name in paths}
    assert found == paths
    before = copy.deepcopy(model.state_dict())
    for path in sorted(paths):
        smaller = ts.prune.blocks(model, inputs, blocks=[path])
        assert not [name for name in smaller.state_dict() if name.startswith(f"{path}.")]
        close(run(smaller, inputs), run(muted(model, {path}), inputs))
    if paths:
        everything = ts.prune.blocks(model, inputs, blocks=sorted(paths))
        close(run(everything, inputs), run(muted(model, paths), inputs))
        again = ts.prune.apply_surgery(model, json.loads(json.dumps(ts.surgery(everything))))
        assert all(map(torch.equal, run(again, inputs), run(everything, inputs)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def close(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


# --- names and kinds of blocks ---


def test_a_layer_of_two_branches_is_three_blocks() -> None:
    plan = analyze_depth(stack(PreNorm), TOKENS)
    assert list(plan.blocks)[:3] == ["layers.0", "layers.0.attention", "layers.0.mlp"]
    assert set(offered(plan).values()) == {""}
    assert plan.total("blocks") == 6


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("layers.1", ["mix.", "up.", "down.", "norm1.", "norm2."]),
        ("layers.1.mix", ["mix."]),
        ("layers.1.up", ["up.", "down."]),
    ],
)
def test_a_layer_with_norms_after_its_additions(name: str, gone: list[str]) -> None:
    model = stack(PostNorm)
    smaller = ts.prune.blocks(model, TOKENS, blocks=name)
    lost = set(model.state_dict()) - set(smaller.state_dict())
    assert lost == {each for each in model.state_dict() if each.startswith(tuple(f"layers.1.{part}" for part in gone))}
    layer = model.layers[1]  # type: ignore[index]
    x = model.layers[0](model.embed(TOKENS[0]))[0]  # type: ignore[index,operator]
    if name == "layers.1.mix":
        x = layer.norm1(x)
        x = layer.norm2(layer.down(layer.up(x).relu()) + x)
    elif name == "layers.1.up":
        x = layer.norm2(layer.norm1(x + layer.mix(x.mean(1, keepdim=True).expand_as(x))))
    close(run(smaller, TOKENS), [model.head(model.layers[2](x)[0])])  # type: ignore[index,operator]


class Strided(nn.Module):
    """A block that halves its input, and one whose activation is no identity on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.narrow, self.short = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 8, 1, stride=2)
        self.keep = net.Residual(nn.Conv2d(8, 8, 3, padding=1))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.narrow(x) + self.short(x)
        x = self.keep(x)
        x += self.last(x.tanh()) * self.scale
        return x.tanh().flatten(2).mean(2)


def test_blocks_that_change_shapes_are_protected() -> None:
    model = Strided().eval()
    inputs = (torch.randn(2, 3, 8, 8),)
    plan = analyze_depth(model, inputs)
    assert list(plan.blocks) == ["keep", "last"]
    smaller = ts.prune.blocks(model, inputs, blocks=["keep", "last"])
    with torch.no_grad():
        x = model.stem(inputs[0])
        expected = (model.narrow(x) + model.short(x)).tanh().flatten(2).mean(2)
    close(run(smaller, inputs), [expected])


class Shared(nn.Module):
    """One residual module that runs three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(5, 8), net.Residual(nn.Linear(8, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        answer: Tensor = self.head(x)
        return answer


def test_a_block_that_runs_several_times_goes_from_all_its_calls() -> None:
    model = Shared().eval()
    smaller = ts.prune.blocks(model, TOKENS, blocks="block")
    close(run(smaller, TOKENS), [model.head(model.embed(TOKENS[0]))])


class Leaky(nn.Module):
    """The branch of the first block is read again by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.branch, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.branch(x)
        return self.head((x + y) * y.sigmoid())  # type: ignore[no-any-return]


def test_a_branch_that_is_read_elsewhere_is_no_block() -> None:
    model = Leaky().eval()
    assert not analyze_depth(model, TOKENS).blocks
    with pytest.raises(NoBlocks, match="no residual block"):
        ts.prune.blocks(model, TOKENS, 0.1)


class Choosy(nn.Module):
    """Code around the block reads the block's weight, which an identity does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(5, 8), net.Residual(nn.Linear(8, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x)) + 0 * self.block.body.weight.sum()
        return self.head(x)  # type: ignore[no-any-return]


def test_a_block_that_code_around_it_needs_stays() -> None:
    with pytest.raises(NoBlocks, match="could not be verified.*without it the model fails"):
        ts.prune.blocks(Choosy().eval(), TOKENS, blocks="block")


def test_inspect_lists_blocks_as_a_removal_then_takes_them() -> None:
    model = stack(PreNorm, count=1)
    found = ts.prune.inspect(model, TOKENS, exclude="*.attention")
    assert [block.name for block in found.blocks if block.prunable] == ["layers.0.mlp"]
    assert {block.name: block.reason for block in found.blocks if not block.prunable} == {
        "layers.0": "excluded",
        "layers.0.attention": "excluded",
    }
    (block,) = (block for block in found.blocks if block.prunable)
    smaller = ts.prune.blocks(model, TOKENS, blocks=block.name)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, smaller)]
    assert block.parameters == sizes[0] - sizes[1]
    assert block.modules == ("layers.0.mlp", "layers.0.norm2")
    assert "residual blocks: 1 may go, 2 stay" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["blocks"][0]["prunable"] is False


# --- amounts ---


@pytest.mark.parametrize("of", ["params", "macs", "blocks"])
@pytest.mark.parametrize("criterion", ["kl", "error", "influence", "random"])
def test_at_least_the_sparsity_goes(of: Any, criterion: str) -> None:
    model = stack(PreNorm)
    smaller = ts.prune.blocks(model, TOKENS, 0.3, of=of, criterion=criterion)
    about = ts.surgery(smaller)["rounds"][0]["about"]  # type: ignore[index]
    assert about["left"] <= 0.7
    assert about["criterion"] == criterion
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, smaller)]
    assert about["parameters"] == counts
    assert all(torch.isfinite(output).all() for output in run(smaller, TOKENS))


def test_macs_of_the_record_are_those_of_the_captured_models() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = stack(PostNorm)
    smaller = ts.prune.blocks(model, TOKENS, 0.3, of="macs")
    macs = []
    for each in (model, smaller):
        with FlopCounterMode(display=False) as counter:
            run(each, TOKENS)
        macs.append(counter.get_total_flops() // 2)
    assert ts.surgery(smaller)["rounds"][0]["about"]["macs"] == macs  # type: ignore[index]


def test_the_block_that_matters_least_goes_first() -> None:
    model = stack(PreNorm)
    with torch.no_grad():
        for parameter in model.layers[1].parameters():  # type: ignore[index]
            parameter.mul_(1e-3)
    for criterion in ("error", "kl", "influence"):
        smaller = ts.prune.blocks(model, TOKENS, blocks=None, sparsity=0.3, criterion=criterion)
        assert ts.surgery(smaller)["rounds"][0]["about"]["blocks"] == ["layers.1"]  # type: ignore[index]


def test_too_much_is_refused_with_the_largest_fraction() -> None:
    with pytest.raises(NoBlocks, match=r"are 0\.\d\d of its params, less than 0.99"):
        ts.prune.blocks(stack(PreNorm), TOKENS, 0.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either sparsity"),
        ({"sparsity": 0.3, "blocks": ["layers.0"]}, "give either sparsity"),
        ({"sparsity": 1.0}, r"sparsity must be in \(0, 1\)"),
        ({"blocks": []}, "blocks is empty"),
        ({"blocks": ["layers.0.atention"]}, "near names: layers.0.attention"),
        ({"sparsity": 0.3, "criterion": "lamp"}, "not known for blocks"),
        ({"sparsity": 0.3, "of": "latency"}, "workbench"),
    ],
)
def test_wrong_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        ts.prune.blocks(stack(PreNorm), TOKENS, **arguments)


def test_included_and_excluded_blocks() -> None:
    model = stack(PreNorm)
    only = ts.prune.blocks(model, TOKENS, 0.2, of="blocks", include="layers.2*")
    assert all(name.startswith("layers.2") for name in ts.surgery(only)["rounds"][0]["about"]["blocks"])  # type: ignore[index]
    with pytest.raises(NoBlocks):
        ts.prune.blocks(model, TOKENS, 0.9, of="blocks", exclude="*.attention")


# --- records ---


@st.composite
def subsets(draw: Any) -> list[str]:
    names = [f"layers.{place}{branch}" for place in range(3) for branch in ("", ".attention", ".mlp")]
    return draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))  # type: ignore[no-any-return]


@pytest.mark.slow
@settings(QUICK, max_examples=6)
@given(subsets())
def test_a_record_makes_the_smaller_model_again(names: list[str]) -> None:
    smaller = ts.prune.blocks(stack(PreNorm), TOKENS, blocks=names)
    again = ts.prune.apply_surgery(stack(PreNorm, seed=1), json.loads(json.dumps(ts.surgery(smaller))))
    again.load_state_dict(smaller.state_dict())
    assert all(map(torch.equal, run(again, TOKENS), run(smaller, TOKENS)))


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    smaller = ts.prune.blocks(stack(PreNorm), TOKENS, blocks=["layers.0", "layers.1.mlp"])
    ts.save(smaller, tmp_path / "out")
    loaded = ts.load_module(tmp_path / "out", lambda: stack(PreNorm, seed=5))
    assert ts.surgery(loaded) == ts.surgery(smaller)
    assert all(map(torch.equal, run(loaded, TOKENS), run(smaller, TOKENS)))
    program = torch.export.export(smaller, TOKENS)
    products = [node for node in program.graph.nodes if "linear" in str(node.target)]
    assert set(program.state_dict) == set(smaller.state_dict())
    assert len(products) == 2 + 2 + (2 + 2)  # embedding and head, one attention, one whole layer


@pytest.mark.parametrize("first", ["blocks", "channels"])
def test_channels_go_before_and_after_blocks(first: str) -> None:
    def channels(model: nn.Module) -> nn.Module:
        return ts.prune.channels(model, TOKENS, 0.3, round_to=1, min_channels=1)

    def blocks(model: nn.Module) -> nn.Module:
        return ts.prune.blocks(model, TOKENS, blocks=["layers.1.attention", "layers.2"])

    model = stack(PreNorm)
    smaller = blocks(channels(model)) if first == "channels" else channels(blocks(model))
    record = ts.surgery(smaller)
    assert record is not None
    assert len(record["rounds"]) == 2
    again = ts.prune.apply_surgery(stack(PreNorm, seed=2), record)
    again.load_state_dict(smaller.state_dict())
    assert all(map(torch.equal, run(again, TOKENS), run(smaller, TOKENS)))


def test_blocks_go_in_several_rounds() -> None:
    once = ts.prune.blocks(stack(PreNorm), TOKENS, blocks="layers.0.mlp")
    twice = ts.prune.blocks(once, TOKENS, blocks=["layers.0*", "layers.2.mlp"])
    again = ts.prune.apply_surgery(stack(PreNorm), ts.surgery(twice))  # type: ignore[arg-type]
    assert all(map(torch.equal, run(again, TOKENS), run(twice, TOKENS)))
    assert not [name for name in twice.state_dict() if name.startswith("layers.0.mlp")]


def broken(change: Any) -> dict[str, Any]:
    record = ts.surgery(ts.prune.blocks(stack(PreNorm), TOKENS, blocks="layers.0.mlp"))
    assert record is not None
    change(record["rounds"][0]["drops"][0], record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda drop, record: drop.update(module=""), "damaged"),
        (lambda drop, record: drop.update(module="nowhere"), "does not fit"),
        (lambda drop, record: drop.update(module="layers.1"), "tensors differ"),
        (lambda drop, record: drop.update(returned={"eval": "x"}), "damaged"),
        (lambda drop, record: drop.update(returned={"given": []}), "damaged"),
        (lambda drop, record: drop.update(more=1), "damaged"),
        (lambda drop, record: drop["tensors"].clear(), "tensors differ"),
        (lambda drop, record: drop["tensors"].update(x=[-1]), "damaged"),
        (lambda drop, record: drop.update(returned={"zeros": ["x"], "shape": [2**50]}), "damaged"),
        (lambda drop, record: record["base"].update(shapes="0" * 64), "other weights"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(change: Any, message: str) -> None:
    with pytest.raises((PruneError, ArtifactError), match=message):
        ts.prune.apply_surgery(stack(PreNorm), broken(change))
