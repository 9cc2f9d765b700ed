"""Training with the model spread over two processes: as with a copy in each, with half of the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support.distributed import torchslim_on_two, two_processes
from torchslim import distill
from torchslim.core import distributed
from torchslim.errors import TrainError
from torchslim.prune.structured.penalties import GroupLasso
from torchslim.training.fsdp import blocks, check_shardable, explained
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings

CLASSES = 3


class Block(nn.Module):
    """Attention-like in its size, with a norm, and a scale that has no dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mlp(self.norm(x))


class Net(nn.Module):
    """A stem with batch norm, an LSTM, blocks in a list, and a head whose weight the stem shares."""

    def __init__(self, width: int = 9, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.first, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.head.weight = self.first.weight
        self.shift = nn.Parameter(torch.zeros(1))  # one row: the second process has none of it

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x))).flatten(2).transpose(1, 2)
        x = self.rnn(self.first(x))[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) + self.shift)[:, :CLASSES]


def model() -> nn.Module:
    torch.manual_seed(3)
    return Net().double().to(memory_format=torch.channels_last)


def task() -> ts.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 4, 4, generator=generator)
    y = torch.arange(40) % CLASSES
    x = (x + y.view(-1, 1, 1, 1)).double()
    train = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    return ts.Task(train=train, val=[(x[:16], y[:16])], metric="accuracy")


def masks(net: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(each.shape, generator=generator) > 0.4
        for name, each in net.named_parameters()
        if each.dim() > 1
    }


class Killed(Exception):
    pass


class Kill(Hook):
    """As a machine that stops in the middle of an epoch."""

    def on_step(self, loop: Loop) -> None:
        if loop.epoch == 2:
            raise Killed


class Measure(Hook):
    """Bytes of parameters and of the optimizer's state that this process holds between two steps."""

    held = 0

    def on_step(self, loop: Loop) -> None:
        state = [each for values in loop.optimizer.state.values() for each in values.values()]
        tensors = [*loop.model.parameters(), *state]
        self.held = sum(each.numel() * each.element_size() for each in map(distributed.local, tensors))


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"settings": {"optimizer": "sgd", "lr": 0.05, "clip_norm": 0.5}},
    "masks": {"masks": True, "settings": {"optimizer": "sgd", "lr": 0.05}},
    "frozen": {"frozen": True, "settings": {"clip_norm": 0.1, "lr": 1e-2}},
    "last": {"evaluate": False},
    "penalty": {"penalty": True},
    "accumulate": {"penalty": True, "settings": {"accumulate": 3, "clip_norm": 0.5}},  # of five batches in each process
    "options": {
        "masks": True, "patience": 1,
        "settings": {"accumulate": 2, "average": 0.9, "lr_scale": {"blocks.1": 0, "head.bias": 0.1}, "lr": 0.05},
    },
}  # fmt: skip


def train(
    case: dict[str, Any], strategy: str, hooks: tuple[Hook, ...] = (), state: Path | None = None
) -> dict[str, Any]:
    net, data = model(), task()
    if case.get("frozen"):
        net.blocks[1].requires_grad_(False)  # type: ignore[union-attr,index]
    own = list(hooks)
    if case.get("penalty"):
        from torchslim.prune.structured.plan import analyze

        own.append(GroupLasso(analyze(net, data.inputs(next(iter(data.val)))).coupling(), 1e-2))
    held = masks(net) if case.get("masks") else {}
    parameters = dict(net.named_parameters())
    report = ts.fit(
        net, data.train, LabelLoss(data), epochs=4, evaluate=data if case.get("evaluate", True) else None, hooks=own,
        settings=OptimizerSettings(**{"lr": 1e-2, **case.get("settings", {})}), masks=held, seed=2,
        patience=case.get("patience"),
        engine=ts.Engine(accelerator="cpu", strategy=strategy), state=state,
    )  # fmt: skip
    assert all(parameters[name] is each for name, each in net.named_parameters())  # whoever holds one finds it trained
    assert type(net) is Net
    assert all(not bool(net.state_dict()[name][~mask].any()) for name, mask in held.items())
    again = ts.fit(  # a model that was spread once can be spread again
        net, data.train, LabelLoss(data), epochs=1, masks=held,
        engine=ts.Engine(accelerator="cpu", strategy=strategy),
    ) if case == {} else None  # fmt: skip
    return {"weights": dict(net.state_dict()), "history": [dict(row) for row in report.history],
            "best": report.best_epoch, "again": again and dict(again.history[0])}  # fmt: skip


STEPS: dict[str, Any] = {
    "gradual": ts.Prune(
        sparsity=0.5, criterion="taylor", schedule="gradual", train=ts.Finetune(epochs=2, lr=0.01, optimizer="sgd")
    ),
    "average": ts.Distill(
        epochs=2, lr=0.01, optimizer="sgd", clip_norm=0.5, teacher="ema", feature=distill.Hint(),
        relation=distill.RKD(gather=True), taps={"body.1": "body.1"},
    ),
}  # fmt: skip


def take(step: Any, strategy: str) -> dict[str, Any]:
    """A step on a model in double precision."""
    net, data = small().double(), task()
    ctx = ts.Context(
        task=data, teacher=small().double(), example_inputs=data.inputs(next(iter(data.val))),
        engine=ts.Engine(accelerator="cpu", strategy=strategy), seed=3,
    )  # fmt: skip
    outcome = step(net, ctx)
    return {"weights": dict(outcome.model.state_dict()), "history": [dict(row) for row in outcome.history]}


def _worker(rank: int, folder: str) -> None:
    distributed.connect()
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        for name, case in CASES.items():
            found[f"{name}/{strategy}"] = train(case, strategy)
        for name, step in STEPS.items():
            found[f"{name}/{strategy}"] = take(step, strategy)
    bytes_held = {}
    for strategy in ("ddp", "fsdp"):
        measure = Measure()
        train(CASES["last"], strategy, (measure,))
        bytes_held[strategy] = measure.held
    state = Path(folder) / "state.ckpt"
    with pytest.raises(Killed):
        train(CASES["masks"], "fsdp", (Kill(),), state)
    distributed.wait()
    found["masks/resumed"] = train(CASES["masks"], "fsdp", (), state)
    state = Path(folder) / "options.ckpt"
    with pytest.raises(Killed):
        train(CASES["options"], "fsdp", (Kill(),), state)
    distributed.wait()
    found["options/resumed"] = train(CASES["options"], "fsdp", (), state)
    with pytest.raises(TrainError, match="became"):  # in both, or one would wait for the other
        train({"settings": {"optimizer": "sgd", "lr": 1e9}}, "fsdp")
    data = single()
    with pytest.raises(TrainError, match="without calling the block"):
        ts.fit(Past(), data.train, LabelLoss(data), epochs=1, engine=ts.Engine(accelerator="cpu", strategy="fsdp"))
    torch.save({"found": found, "bytes": bytes_held}, f"{folder}/{rank}.pt")
    distributed.wait()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    two_processes(_worker, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


class Small(nn.Module):
    """What every step of a recipe takes: convolutions in a sequence, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Past(Small):
    """Uses the weights of a block without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.body[0].weight, padding=1)
        return self.head(self.body[1:](x).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(4)
    return Small()


def single() -> ts.Task:
    data = task()
    x, y = data.train.dataset.tensors  # type: ignore[union-attr]
    train = DataLoader(TensorDataset(x.float(), y), batch_size=4, shuffle=True)
    return ts.Task(train=train, val=[(x[:16].float(), y[:16])], metric="accuracy")


RECIPE = """
model = "tests.training.test_fsdp:small"
task = "tests.training.test_fsdp:single"
runtime = "eager"

[engine]
accelerator = "cpu"
strategy = "STRATEGY"

[[step]]
do = "distill"
epochs = 2
optimizer = "sgd"
lr = 0.01
clip_norm = 1.0
feature = [{ do = "hint" }]
relation = { do = "rkd", gather = true }
teacher = "ema"

[[step]]
do = "prune"
sparsity = 0.5
criterion = "taylor"
schedule = "gradual"
train = { do = "finetune", epochs = 2, optimizer = "sgd", lr = 0.01 }

[[step]]
do = "quantize"
mode = "qat"
learned_step = true
train = { do = "finetune", epochs = 2, optimizer = "sgd", lr = 0.01 }
"""


@pytest.mark.distributed
def test_a_recipe_runs_as_with_copies(tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {}
    for strategy in ("ddp", "fsdp"):
        recipe, out = tmp_path / f"{strategy}.toml", tmp_path / strategy
        recipe.write_text(RECIPE.replace("STRATEGY", strategy))
        printed = torchslim_on_two(["run", str(recipe), "--out", str(out), "--json"], tmp_path)
        runs[strategy] = json.loads(printed)
    for before, after in zip(runs["ddp"]["rows"], runs["fsdp"]["rows"], strict=True):
        assert before["name"] == after["name"]
        assert before["nonzero"]["value"] == after["nonzero"]["value"]
        for epoch, same in zip(before["history"], after["history"], strict=True):
            assert epoch == pytest.approx(same, rel=1e-3), before["name"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*CASES, *STEPS])
def test_a_spread_model_ends_as_a_copied_one(runs: list[dict[str, Any]], name: str) -> None:
    copied, spread = (runs[0]["found"][f"{name}/{strategy}"] for strategy in ("ddp", "fsdp"))
    assert copied.get("best") == spread.get("best")
    assert [row.keys() for row in copied["history"]] == [row.keys() for row in spread["history"]]
    for before, after in zip(copied["history"], spread["history"], strict=True):
        assert before == pytest.approx(after, rel=1e-7)
    moved = 0.0
    start = (small() if name in STEPS else model()).double().state_dict()
    for key, weight in copied["weights"].items():
        assert torch.allclose(weight, spread["weights"][key], rtol=1e-6, atol=1e-8), key
        moved = max(moved, float((weight - start[key]).abs().max()))
    assert moved > 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*CASES, *STEPS])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_process_ends_with_the_same_weights(runs: list[dict[str, Any]], name: str, strategy: str) -> None:
    first, second = (run["found"][f"{name}/{strategy}"] for run in runs)
    assert [row.get("val") for row in first["history"]] == [row.get("val") for row in second["history"]]
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["masks", "options"])
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(runs: list[dict[str, Any]], name: str) -> None:
    undisturbed, resumed = (runs[0]["found"][f"{name}/{how}"] for how in ("fsdp", "resumed"))
    assert resumed["history"] == undisturbed["history"]
    assert all(torch.equal(each, resumed["weights"][key]) for key, each in undisturbed["weights"].items())


@pytest.mark.distributed
def test_a_process_holds_half_of_the_weights_and_of_what_the_optimizer_remembers(runs: list[dict[str, Any]]) -> None:
    held = [run["bytes"] for run in runs]
    assert held[0]["ddp"] == held[1]["ddp"]
    for each in held:  # rows are dealt out whole, and 9 do not halve
        assert 0.45 < each["fsdp"] / each["ddp"] < 0.55


def test_blocks_are_the_repeated_parts_and_leave_shared_weights_alone() -> None:
    net = Net()
    assert blocks(net) == list(net.blocks)
    net.blocks[1].mlp[0].weight = net.blocks[2].mlp[0].weight
    assert blocks(net) == [net.blocks[0], net.blocks[1].mlp[2], net.blocks[2].mlp[2]]


def test_a_large_block_is_taken_apart() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(4) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    net = nn.Sequential(Stage(), nn.Linear(4, 2))
    assert blocks(net) == [*net[0].blocks, net[1]]


def test_what_cannot_be_spread_is_said_before_training() -> None:
    check_shardable(Net(), "bf16-mixed")
    mixed = Net()
    mixed.head.bias.data = mixed.head.bias.data.double()
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    for net, precision, said in (
        (mixed, "32-true", "2 formats.*float32.*float64.*ddp"),
        (compiled, "32-true", "torch.compile.*uncompiled"),
        (Net(), "16-mixed", "scales the loss.*bf16-mixed"),
    ):
        with pytest.raises(TrainError, match=said):
            check_shardable(net, precision)


def test_a_model_that_uses_weights_past_their_block_is_told_what_to_do() -> None:
    with pytest.raises(TrainError, match='without calling the block.*strategy="ddp"'), explained():
        raise RuntimeError("aten.mm: got mixed torch.Tensor and DTensor")
    with pytest.raises(RuntimeError, match="shapes"), explained():
        raise RuntimeError("shapes do not fit")


def test_one_process_trains_the_model_as_it_is() -> None:
    outcomes = []
    for strategy in ("auto", "fsdp"):
        net, data = small(), single()
        ts.fit(net, data.train, LabelLoss(data), epochs=1, engine=ts.Engine(accelerator="cpu", strategy=strategy))
        outcomes.append(net.state_dict())
    assert all(torch.equal(outcomes[0][key], outcomes[1][key]) for key in outcomes[0])


def test_the_number_of_devices_must_be_known() -> None:
    data = single()
    engine = ts.Engine(accelerator="cpu", strategy="fsdp", devices="auto")
    with pytest.raises(TrainError, match="number of devices, got 'auto'"):
        ts.fit(small(), data.train, LabelLoss(data), epochs=1, engine=engine)
