"""Features inside a model: where they are taken, in which layout, and that nothing stays behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.distilled import Block, Lstm, Transformer, conv_net
from tests.support.states import hooks
from torchslim.core.trees import tensors
from torchslim.distill.features.matching import Pair, match
from torchslim.distill.features.probe import observe
from torchslim.distill.features.taps import Tap, Watch, graph_of, watched
from torchslim.errors import DistillError
from torchslim.quantize import convert, prepare


def seen(model: nn.Module, x: Tensor) -> list[Tap]:
    return observe(model, ts.Task(val=[(x,)], metric="accuracy", logits=lambda said: tensors(said)[0]), (x,))


def paired(student: nn.Module, teacher: nn.Module, x: Tensor, taps: Any = None) -> list[tuple[str, str]]:
    pairs = match(seen(student, x), seen(teacher, x), taps)
    return [(pair.student.name, pair.teacher.name) for pair in pairs]


def features(model: nn.Module, x: Tensor, *paths: str) -> list[Tensor]:
    taps = {tap.path: tap for tap in seen(model, x)}
    watch = Watch(paths)
    with watched(model, watch.keep, paths):
        model(x)
    found = watch.features([taps[path] for path in paths])
    return [each for each in found if each is not None]


IMAGES = torch.randn(2, 3, 32, 32)
TOKENS = torch.randn(2, 7, 6)


@pytest.mark.slow
def test_networks_of_other_making_are_matched_by_the_ends_of_their_stages() -> None:
    student, teacher = (torchvision.models.get_model(name, weights=None) for name in ("resnet18", "resnet50"))
    x = torch.randn(2, 3, 64, 64)
    assert paired(student, teacher, x) == [(name, name) for name in ("relu", "layer1", "layer2", "layer3", "layer4")]
    small = torchvision.models.get_model("mobilenet_v3_small", weights=None)
    assert paired(small, teacher, x) == [
        ("features.0", "relu"), ("features.1", "layer1"), ("features.3", "layer2"), ("features.8", "layer3"),
        ("features", "layer4"),
    ]  # fmt: skip


def test_blocks_of_transformers_are_matched_at_equal_distances_and_the_last_with_the_last() -> None:
    got = paired(Transformer(4, 3), Transformer(8, 6), TOKENS)
    assert got == [("blocks.0", "blocks.1"), ("blocks.1", "blocks.3"), ("blocks.2", "blocks.5")]


def test_a_pruned_student_is_matched_by_name() -> None:
    student, teacher = conv_net(4), conv_net(8)
    pairs = match(seen(student, IMAGES), seen(teacher, IMAGES))
    assert {pair.why for pair in pairs} == {"same name"}
    assert [pair.student.path for pair in pairs] == ["0", "1", "2"]
    assert next(str(pair) for pair in pairs) == "0 8x16x16 to 4x16x16, same name"


def test_networks_without_positions_are_matched_by_their_hidden_layers() -> None:
    student = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5))
    teacher = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5))
    pairs = paired(student, teacher, torch.randn(3, 6))
    assert pairs
    assert all("4" not in name[1] and name[0] != "2" for name in pairs)  # what they answer is no feature


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_give_channels_before_positions(batch_first: bool) -> None:
    model = Lstm(4, batch_first)
    (tap,) = [tap for tap in seen(model, TOKENS) if tap.path == "lstm"]
    assert tap.shape == (8, 7)
    (got,) = features(model, TOKENS, "lstm")
    given = TOKENS if batch_first else TOKENS.transpose(0, 1)
    expected = model.lstm(given)[0]
    expected = expected.transpose(1, 2) if batch_first else expected.permute(1, 2, 0)
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_maps_with_their_channels_last_are_turned() -> None:
    swin = torchvision.models.get_model("swin_t", weights=None)
    taps = {tap.path: tap for tap in seen(swin, torch.randn(2, 3, 64, 64))}
    assert taps["features.1"].shape == (96, 16, 16)  # (batch, 16, 16, 96)
    convnext = torchvision.models.get_model("convnext_tiny", weights=None)
    taps = {tap.path: tap for tap in seen(convnext, torch.randn(2, 3, 64, 64))}
    assert taps["features.1"].shape == (96, 16, 16)  # its last layer is linear, and its output has channels first


class Reused(nn.Module):
    """One block that is called three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(6, width), Block(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean(1))


def test_a_module_that_is_called_several_times_has_a_tap_for_each_call() -> None:
    model = Reused(4).eval()
    assert [tap.name for tap in seen(model, TOKENS) if tap.path == "block"] == ["block[0]", "block[1]", "block[2]"]
    watch = Watch(["block"])
    taps = [tap for tap in seen(model, TOKENS) if tap.path == "block"]
    with watched(model, watch.keep, watch.outputs):
        model(TOKENS)
    first, second, third = watch.features(taps)
    assert torch.allclose(model.block(first.transpose(1, 2)).transpose(1, 2), second, atol=1e-5)
    assert torch.allclose(model.block(second.transpose(1, 2)).transpose(1, 2), third, atol=1e-5)
    assert paired(model, Reused(8), TOKENS, {"block[0]": "block[1]", "block": "block"}) == [
        ("block[0]", "block[1]"), ("block[2]", "block[2]")
    ]  # fmt: skip


@dataclass
class Answer:
    text: str
    hidden: Tensor


class Wrapping(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 3, padding=1), kind

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return {"tuple": (None, y), "dict": {"a": 3, "b": y}, "dataclass": Answer("x", y)}[self.kind]


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wrapping, self.head = Wrapping(kind), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.wrapping(x)
        y = found[1] if isinstance(found, tuple) else found["b"] if isinstance(found, dict) else found.hidden
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_modules_may_return_containers(kind: str) -> None:
    model = Outer(kind)
    (got,) = features(model, IMAGES, "wrapping")
    assert torch.equal(got, model.wrapping.conv(IMAGES))


def test_a_feature_that_the_model_writes_over_is_noticed_and_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 900, 5))
    watch = Watch(["0", "1"])
    with watched(model, watch.keep, watch.outputs):
        model(IMAGES)
        assert watch.overwritten() == {"0"}
        watch.clear()
        watch.copied = frozenset({"0"})
        model(IMAGES)
    taps = {tap.path: tap for tap in seen(model, IMAGES)}
    before, after = watch.features([taps["0"], taps["1"]])
    assert torch.equal(before, model[0](IMAGES))
    assert torch.equal(after, before.relu())


def test_hooks_are_gone_after_the_block_even_when_it_raises() -> None:
    model = conv_net(4)

    def fail() -> None:
        with watched(model, lambda path, output: None, ["0", "1.0"]):
            assert hooks(model) == 2
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert hooks(model) == 0
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    seen(model, IMAGES)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("way", ["wrapped", "in place", "inner"])
def test_compiled_models_are_tapped(way: str, called_before: bool) -> None:
    torch._dynamo.reset()
    net = conv_net(4)
    model, block = net, net[1]  # type: Any, Any
    if way == "wrapped":
        model = torch.compile(net, backend="eager")
    elif way == "in place":
        net.compile(backend="eager")
    else:
        model[1] = torch.compile(net[1], backend="eager")
    if called_before:
        model(IMAGES)
    watch = Watch(["0", "1", "1.0"])
    taps = {tap.path: tap for tap in seen(model, IMAGES)}
    with watched(model, watch.keep, watch.outputs):
        for _ in range(3):
            watch.clear()
            model(IMAGES)
            assert all(len(found) == 1 for found in watch.outputs.values())
        first, second, inner = watch.features([taps["0"], taps["1"], taps["1.0"]])
    assert torch.allclose(block(first), second, atol=1e-5)
    assert torch.allclose(block[0](first), inner, atol=1e-5)
    second.sum().backward()
    assert net[0][0].weight.grad is not None
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_graph_that_is_trained_on_its_grid_is_tapped_where_its_modules_were() -> None:
    net = conv_net(4)
    prepared = prepare(net, (IMAGES,), qat=True, runtime="eager")
    program = graph_of(prepared)
    assert program is not None
    before = [str(node) for node in program.graph.nodes]
    prepared.eval()
    for module in prepared.modules():
        if hasattr(module, "disable_fake_quant"):
            module.disable_fake_quant()
    taps = {tap.path: tap for tap in seen(prepared, IMAGES)}
    assert taps["1"].shape == (8, 8, 8)
    watch = Watch(["0", "1"])
    with watched(prepared, watch.keep, watch.outputs):
        prepared(IMAGES)
        got = watch.features([taps["0"], taps["1"]])
    net.eval()
    assert torch.allclose(got[0], net[0](IMAGES), atol=1e-4)
    assert torch.allclose(got[1], net[1](net[0](IMAGES)), atol=1e-4)
    assert [str(node) for node in program.graph.nodes] == before
    assert not any("_reader" in name for name, _ in prepared.named_modules())
    prepared.train()
    prepared(IMAGES)
    convert(prepared)(IMAGES)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ({"layer": "1"}, "tap 'layer'.*student.*feature"),
        ({"1": "1.o"}, "tap '1.o'.*teacher.*near.*1.0"),
        ({"1[3]": "1"}, r"tap '1\[3\]'.*student"),
    ],
)
def test_a_tap_that_matches_nothing_names_what_is_near(taps: dict[str, str], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        match(seen(conv_net(4), IMAGES), seen(conv_net(8), IMAGES), taps)


def test_globs_are_paired_in_order_and_spread_where_one_side_has_more() -> None:
    pairs = paired(Transformer(4, 2), Transformer(8, 6), TOKENS, {"blocks.*": "blocks.*"})
    assert pairs == [("blocks.0", "blocks.2"), ("blocks.1", "blocks.5")]


@given(st.integers(1, 9), st.integers(1, 9))
def test_pairs_are_in_order_and_never_shared(ours: int, theirs: int) -> None:
    def blocks(count: int) -> list[Tap]:
        return [Tap(f"b.{number}", 0, 1, (4, 7), 0, -1, None, "Block", 10) for number in range(count)]

    pairs: list[Pair] = match(blocks(ours), blocks(theirs), {"b.*": "b.*"})
    assert len(pairs) == min(ours, theirs)
    for side in ("student", "teacher"):
        places = [int(getattr(pair, side).path[2:]) for pair in pairs]
        assert places == sorted(set(places))
    assert (pairs[-1].student.path, pairs[-1].teacher.path) == (f"b.{ours - 1}", f"b.{theirs - 1}")


@pytest.mark.parametrize("model", [Lstm(5), Lstm(5, batch_first=False), Transformer(8, 2)])
def test_as_many_steps_as_samples_are_not_taken_for_them(model: nn.Module) -> None:
    square = {tap.path: tap for tap in seen(model, torch.randn(4, 4, 6))}
    oblong = {tap.path: tap for tap in seen(model, torch.randn(4, 7, 6))}
    assert {path: tap.batch_dim for path, tap in square.items()} == {
        path: tap.batch_dim for path, tap in oblong.items()
    }
    assert [tap.channel_dim for tap in square.values()] == [tap.channel_dim for tap in oblong.values()]


class Packed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, width, batch_first=True), nn.Linear(width, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


def test_packed_sequences_are_features_that_are_padded() -> None:
    x, lengths = torch.randn(4, 7, 6), torch.tensor([3, 7, 2, 5])
    model = Packed(8)
    batch = (x, lengths, lengths % 5)
    task = ts.Task(val=[batch], train=[batch], metric="accuracy")
    tap = next(each for each in observe(model, task, batch) if each.path == "lstm")
    assert tap.shape == (8, 7)
    watch = Watch(["lstm"])
    with watched(model, watch.keep, ["lstm"]):
        model(x, lengths)
    feature = watch.features([tap])[0]
    assert feature is not None
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    assert torch.equal(feature.mT, nn.utils.rnn.pad_packed_sequence(model.lstm(packed)[0], batch_first=True)[0])
    ctx = ts.Context(task=task, teacher=Packed(9), model=model, example_inputs=(x, lengths))
    ts.Distill(feature="hint", relation="rkd").check(ctx)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.turn = nn.Conv2d(3, 8, 3, padding=1), Turn()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turn(self.conv(x)).mean((1, 2)))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_channels_are_found_behind_a_convolution_with_as_many_rows(memory: torch.memory_format) -> None:
    model = Turned().to(memory_format=memory)
    taps = {tap.path: tap for tap in seen(model, torch.randn(2, 3, 8, 8).to(memory_format=memory))}
    assert (taps["conv"].channel_dim, taps["turn"].channel_dim) == (1, -1)


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_tokens_of_other_patches_are_laid_out_on_their_grids(size: tuple[int, int]) -> None:
    class Vit(nn.Module):
        def __init__(self, patch: int, first: int) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, patch, patch)
            self.first = nn.Parameter(torch.randn(1, first, 8))
            self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).mT
            return self.head(self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], 1))[:, 0])

    student, teacher, x = Vit(8, 1), Vit(4, 5), torch.randn(2, 3, *size)
    pair = match(seen(student, x), seen(teacher, x), {"blocks.1": "blocks.1"})[0]
    assert pair.shapes == ((8, size[0] // 8, size[1] // 8), (8, size[0] // 4, size[1] // 4))
    output = torch.arange(5 + size[0] * size[1] // 16).expand(2, 8, -1).mT
    found = pair.teacher.feature(output)
    assert found[0, 0].flatten().tolist() == list(range(5, output.shape[1]))
    same = match(seen(teacher, x), seen(Vit(4, 5), x), {"blocks.1": "blocks.1"})[0]  # class tokens teach class tokens
    assert same.shapes[0] == (8, 5 + size[0] * size[1] // 16)


class Windowed(nn.Module):
    """A block of maps, channels last, that works on tokens inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x.flatten(1, 2)).view_as(x)


class Merge(nn.Module):
    """A quarter of the positions, twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 2, 4, 5)
        return self.linear(x.flatten(3))


class Hierarchy(nn.Module):
    """A stem, then a chain of stages in one module, each of which may begin with a merge."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        stages = []
        for number, depth in enumerate(depths):
            parts: list[nn.Module] = [Merge(width * 2 ** (number - 1))] if number else []
            stages.append(nn.Sequential(*parts, *(Windowed(width * 2**number) for _ in range(depth))))
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(width * 2 ** (len(depths) - 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x).movedim(1, -1)).mean((1, 2)))


def test_a_chain_of_stages_ends_where_each_of_them_does() -> None:
    student, teacher = Hierarchy(4, (1, 1, 1, 1)), Hierarchy(8, (2, 1, 3, 2))
    expected = [("stages.0", "stages.0"), ("stages.1", "stages.1"), ("stages.2", "stages.2"), ("stages", "stages")]
    assert paired(student, teacher, torch.randn(2, 3, 32, 32)) == expected
    # the last stage has one position: it is no map, and what leads to it is not the end of the one before
    assert paired(student, teacher, torch.randn(2, 3, 16, 16)) == expected[:3]


class Shrinking(nn.Module):
    """Tokens that become fewer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.stages = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(depth)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
            x = x[:, ::2]
        return self.head(x.mean(1))


def test_tokens_that_become_fewer_are_matched_stage_by_stage() -> None:
    found = paired(Shrinking(8, 2), Shrinking(16, 3), torch.randn(2, 16, 6))
    assert found == [(f"stages.{number}.1", f"stages.{number}.2") for number in range(3)]


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stacks(nn.Module):
    """Two stacks, as an encoder and a decoder are."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.encoder, self.decoder = Stack(width, depth), Stack(width, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(self.embed(x))).mean(1))


def test_blocks_of_an_encoder_and_a_decoder_are_matched_in_both() -> None:
    names = [("encoder.layers.0", "encoder.layers.1"), ("encoder.layers.1", "encoder.layers.3")]
    names += [("decoder.layers.0", "decoder.layers.1"), ("decoder.layers.1", "decoder.layers.3")]
    assert paired(Stacks(8, 2), Stacks(16, 4), TOKENS) == names


def test_tokens_of_patches_learn_from_maps_of_any_size() -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.first = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
            self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).mT
            return self.head(self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], 1))[:, 0])

    batch = torch.randn(4, 3, 16, 16), torch.arange(4)
    task = ts.Task(train=[batch], val=[batch], metric="accuracy")
    for student, teacher in ((Vit(), conv_net(4)), (conv_net(4), Vit())):
        ctx = ts.Context(task=task, teacher=teacher, model=student, example_inputs=batch[:1])
        ts.Distill(feature=["hint", "attention_transfer"], relation="rkd").check(ctx)
