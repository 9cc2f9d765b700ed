"""Training with the model spread over two processes: as with a copy in each, with half of the memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.test_distill_processes import free_port
from torchslim import processes
from torchslim.optimizer import OptimizerSettings
from torchslim.prune.penalties import GroupLasso
from torchslim.training import Hook, LabelLoss, Loop

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

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x))).flatten(2).transpose(1, 2)
        x = self.rnn(self.first(x))[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))[:, :CLASSES]


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
        self.held = sum(each.numel() * each.element_size() for each in map(processes.local, tensors))


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"settings": {"optimizer": "sgd", "lr": 0.05, "clip_norm": 0.5}},
    "masks": {"masks": True, "settings": {"optimizer": "sgd", "lr": 0.05}},
    "frozen": {"frozen": True, "settings": {"clip_norm": 0.1, "lr": 1e-2}},
    "last": {"evaluate": False},
    "penalty": {"penalty": True},
}


def train(
    case: dict[str, Any], strategy: str, hooks: tuple[Hook, ...] = (), state: Path | None = None
) -> dict[str, Any]:
    net, data = model(), task()
    if case.get("frozen"):
        net.blocks[1].requires_grad_(False)  # type: ignore[union-attr,index]
    own = list(hooks)
    if case.get("penalty"):
        from torchslim.prune.plan import analyse

        own.append(GroupLasso(analyse(net, data.inputs(next(iter(data.val)))).coupling(), 1e-2))
    held = masks(net) if case.get("masks") else {}
    parameters = dict(net.named_parameters())
    report = ts.fit(
        net, LabelLoss(data), data.train, epochs=4, evaluate=data if case.get("evaluate", True) else None, hooks=own,
        settings=OptimizerSettings(**{"lr": 1e-2, **case.get("settings", {})}), masks=held, seed=2,
        engine=ts.Engine(accelerator="cpu", strategy=strategy), state=state,
    )  # fmt: skip
    assert all(parameters[name] is each for name, each in net.named_parameters())  # whoever holds one finds it trained
    assert type(net) is Net
    assert all(not bool(net.state_dict()[name][~mask].any()) for name, mask in held.items())
    again = ts.fit(  # a model that was spread once can be spread again
        net, LabelLoss(data), data.train, epochs=1, masks=held,
        engine=ts.Engine(accelerator="cpu", strategy=strategy),
    ) if case == {} else None  # fmt: skip
    return {"weights": dict(net.state_dict()), "history": [dict(row) for row in report.history],
            "best": report.best_epoch, "again": again and dict(again.history[0])}  # fmt: skip


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    processes.connect()
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for strategy in ("ddp", "fsdp"):
            found[f"{name}/{strategy}"] = train(case, strategy)
    bytes_held = {}
    for strategy in ("ddp", "fsdp"):
        measure = Measure()
        train(CASES["last"], strategy, (measure,))
        bytes_held[strategy] = measure.held
    state = Path(folder) / "state.ckpt"
    with pytest.raises(Killed):
        train(CASES["masks"], "fsdp", (Kill(),), state)
    processes.wait()
    found["resumed"] = train(CASES["masks"], "fsdp", (), state)
    torch.save({"found": found, "bytes": bytes_held}, f"{folder}/{rank}.pt")
    processes.wait()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(_worker, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_a_spread_model_ends_as_a_copied_one(runs: list[dict[str, Any]], name: str) -> None:
    copied, spread = (runs[0]["found"][f"{name}/{strategy}"] for strategy in ("ddp", "fsdp"))
    assert copied["best"] == spread["best"]
    assert [row.keys() for row in copied["history"]] == [row.keys() for row in spread["history"]]
    for before, after in zip(copied["history"], spread["history"], strict=True):
        assert before == pytest.approx(after, rel=1e-7)
    moved = 0.0
    start = model().state_dict()
    for key, weight in copied["weights"].items():
        assert torch.allclose(weight, spread["weights"][key], rtol=1e-6, atol=1e-8), key
        moved = max(moved, float((weight - start[key]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_process_ends_with_all_weights(runs: list[dict[str, Any]], name: str) -> None:
    first, second = (run["found"][f"{name}/fsdp"] for run in runs)
    assert [row.get("val") for row in first["history"]] == [row.get("val") for row in second["history"]]
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(runs: list[dict[str, Any]]) -> None:
    undisturbed, resumed = runs[0]["found"]["masks/fsdp"], runs[0]["found"]["resumed"]
    assert resumed["history"] == undisturbed["history"]
    assert all(torch.equal(each, resumed["weights"][key]) for key, each in undisturbed["weights"].items())


def test_a_process_holds_half_of_the_weights_and_of_what_the_optimizer_remembers(runs: list[dict[str, Any]]) -> None:
    held = [run["bytes"] for run in runs]
    assert held[0]["ddp"] == held[1]["ddp"]
    for each in held:  # rows are dealt out whole, and 9 do not halve
        assert 0.45 < each["fsdp"] / each["ddp"] < 0.55


def test_blocks_are_the_repeated_parts_and_leave_shared_weights_alone() -> None:
    net = Net()
    assert blocks(net) == list(net.blocks)
    net.blocks[1].mlp[0].weight = net.blocks[2].mlp[0].weight
    assert blocks(net) == [net.blocks[0]]


def test_a_large_block_is_taken_apart() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(4) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    net = nn.Sequential(Stage(), nn.Linear(4, 2))
    assert blocks(net) == [*net[0].blocks, net[1]]
