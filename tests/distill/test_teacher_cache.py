"""A teacher's answers on disk: asked once, refused where samples change, and right after a shuffle."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint
from torchslim.distill import RKD, Hint
from torchslim.distill.teacher_cache import TeacherCache, checks
from torchslim.errors import DistillError
from torchslim.training.loaders import Indexed, indexed, sample_count, why_not_repeatable


class Counting(nn.Module):
    """Counts its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.samples = toy.model(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.net(x)


def context(batches: Any, **fields: Any) -> ts.Context:
    teacher = toy.model()
    nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(1))
    task = ts.Task(train=batches, val=[toy.images(16, 3)], metric="accuracy")
    return ts.Context(task=task, teacher=teacher, model=toy.model(), example_inputs=(toy.images(2, 0)[0],), **fields)


def loader(**fields: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*toy.images(40, 1)), **{"batch_size": 8, "shuffle": True, **fields})


def forwards(step: ts.Distill, ctx: ts.Context, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the teacher sees, epoch by epoch."""
    from torchslim.distill import teacher

    seen: list[int] = []
    original = teacher.Teachers.__call__

    def counted(self: Any, batch: Any, index: Any, device: Any) -> Any:
        if index is not None:  # else it is only asked who it is
            seen.append(len(ctx.task.inputs(batch)[0]))
        return original(self, batch, index, device)

    monkeypatch.setattr(teacher.Teachers, "__call__", counted)
    step(copy.deepcopy(ctx.model) if ctx.model is not None else toy.model(), ctx)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_the_second_epoch_asks_no_teacher_and_learns_the_same(
    features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = {"feature": Hint(), "relation": RKD()} if features else {}
    cached = ts.Distill(epochs=3, cache=tmp_path, **parts)
    cached.check(context(loader()))
    assert sum(forwards(cached, context(loader()), monkeypatch)) == 40
    assert forwards(cached, context(loader()), monkeypatch) == []  # a later run with the same teacher
    with_cache, without = toy.model(), toy.model()
    cached(with_cache, context(loader()))
    ts.Distill(epochs=3, **parts)(without, context(loader()))
    for name, value in with_cache.state_dict().items():
        assert torch.allclose(value, without.state_dict()[name], atol=1e-5), name


def test_another_teacher_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ts.Distill(epochs=1, cache=tmp_path)
    step(toy.model(), context(loader()))
    ctx = context(loader())
    nn.init.zeros_(ctx.teacher.head.weight)
    assert sum(forwards(step, ctx, monkeypatch)) == 40


class Noisy(Dataset[Any]):
    def __init__(self, where: str) -> None:
        self.x, self.y, self.where = *toy.images(40, 1), where

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        x = self.x[place]
        if self.where == "sample":
            x = x + torch.randn_like(x)
        return x, self.y[place]


def noisy_collate(samples: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return x + torch.randn_like(x), y


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(*toy.images(40, 1), strict=True))


@pytest.mark.parametrize(
    "batches",
    [DataLoader(Noisy("sample"), batch_size=8), DataLoader(Noisy("none"), batch_size=8, collate_fn=noisy_collate)],
)
def test_a_loader_that_augments_is_refused_before_training(batches: Any, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="cache.*same sample.*loader augments"):
        ts.Distill(cache=tmp_path).check(context(batches))


def test_batches_in_one_order_are_cached_and_shuffled_streams_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [tuple(each[start : start + 8] for each in toy.images(40, 1)) for start in range(0, 40, 8)]
    step = ts.Distill(epochs=3, cache=tmp_path / "list")
    step.check(context(batches))
    assert sum(forwards(step, context(batches), monkeypatch)) == 40
    stream = DataLoader(Stream(), batch_size=8)
    assert why_not_repeatable(stream, lambda batch: len(batch[0])) is None

    class Shuffled:
        def __iter__(self) -> Any:
            return iter([batches[place] for place in torch.randperm(5)])

        def __len__(self) -> int:
            return 5

    with pytest.raises(DistillError, match="shuffles or augments"):
        ts.Distill(cache=tmp_path / "other").check(context(Shuffled()))


def test_samples_that_changed_since_are_an_error(tmp_path: Path) -> None:
    step = ts.Distill(epochs=1, cache=tmp_path)
    step(toy.model(), context(loader()))
    x, y = toy.images(40, 1)
    x[7] = x[7].flip(-1)
    with pytest.raises(DistillError, match="sample 7 differs"):
        step(toy.model(), context(loader() if x is None else DataLoader(TensorDataset(x, y), batch_size=8)))
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    before = fingerprint(ts.Distill(epochs=1)(toy.model(), context(loader())).model.state_dict())
    with pytest.warns(UserWarning, match=r"damaged \(.*\).*deleted"):
        found = step(toy.model(), context(loader()))
    assert fingerprint(found.model.state_dict()) == before
    assert [each.name for each in tmp_path.glob("*.safetensors")] == [shard.name]  # the same answers, the same seal


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), min_size=1, max_size=6))
def test_what_is_kept_is_found_by_number(batches: list[list[int]]) -> None:
    import tempfile

    def answers(index: Tensor) -> dict[str, Tensor]:
        return {"a": index[:, None] * torch.ones(1, 3), "b": index.double()}

    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), "key")
        for batch in batches:
            index = torch.tensor(batch)
            cache.keep(index, torch.stack([index, index, index], 1).double(), answers(index))
            cache.flush()
        again = TeacherCache(Path(folder), "key")
        kept = torch.tensor(sorted({each for batch in batches for each in batch}))
        for each in (cache, again):
            check = torch.stack([kept, kept, kept], 1).double()
            found = each.find(kept, check)
            assert found is not None
            for name, value in answers(kept).items():
                assert torch.equal(found[name], value)
        assert again.find(torch.tensor([31]), torch.zeros(1, 3)) is None
        assert TeacherCache(Path(folder), "other").find(kept, check) is None


@pytest.mark.slow
def test_indexed_batches_are_the_loaders_own() -> None:
    for batches in (loader(), loader(num_workers=1), loader(shuffle=False, drop_last=True)):
        torch.manual_seed(3)
        plain = list(batches)
        torch.manual_seed(3)
        numbered = list(indexed(batches, lambda batch: len(batch[0])))
        assert len(plain) == len(numbered)
        for one, two in zip(plain, numbered, strict=True):
            assert isinstance(two, Indexed)
            assert torch.equal(one[0], two.batch[0])
            assert torch.equal(two.batch[0], toy.images(40, 1)[0][two.places])
    assert sample_count(loader(), lambda batch: len(batch[0])) == 40
    assert sample_count([torch.zeros(3), torch.zeros(2)], len) == 5


@given(st.integers(0, 10_000))
def test_a_changed_sample_shows_in_its_check_and_no_other(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, generator=generator)
    changed = x.clone()
    changed[2] = changed[2].flip(-1)
    before, after = checks((x,)), checks({"x": changed})
    moved = (before - after)[:, 0].abs() > 1e-4 * before[:, 1]
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.slow
def test_a_cached_run_can_be_killed_between_epochs(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: ts.Event) -> None:
        if event.values["epoch"] == 2:
            raise Killed

    step = ts.Distill(epochs=2, cache=tmp_path / "cache")
    with pytest.raises(Killed):
        step(toy.model(), context(loader(), progress=kill, state=tmp_path))
    again, whole = toy.model(), toy.model()
    step(again, context(loader(), state=tmp_path))
    step(whole, context(loader()))
    assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict())


@given(st.integers(0, 10_000))
def test_one_token_that_changes_is_noticed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(30_000, (3, 128), generator=generator)
    changed = tokens.clone()
    changed[1, seed % 128] += 1
    one, two = checks({"input_ids": tokens}), checks({"input_ids": changed})
    assert (one[:, 2] != two[:, 2]).tolist() == [False, True, False]


class Scaled(nn.Module):
    """Answers that its weights alone do not tell."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net, self.scale = toy.model(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x)


def test_equal_weights_with_another_forward_are_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ts.Distill(epochs=1, cache=tmp_path)
    for scale in (1.0, -5.0):
        ctx = replace(context(loader()), teacher=Scaled(scale))
        with monkeypatch.context() as patch:
            assert sum(forwards(step, ctx, patch)) == 40


class Sentences(torch.utils.data.Dataset[Any]):
    """Sequences of several lengths."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(place)
        return torch.randn(2 + place % 5, 3, generator=generator), place % 4


def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    rows, labels = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), torch.tensor(labels)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def reading(*, shuffle: bool, **fields: Any) -> ts.Context:
    loader = DataLoader(Sentences(), batch_size=5, shuffle=shuffle, collate_fn=padded, **fields)
    batch = padded([Sentences()[place] for place in range(4)])
    task = ts.Task(train=loader, val=[batch], metric="accuracy")
    return ts.Context(task=task, teacher=Reader(), model=Reader(), example_inputs=batch[:1])


def test_batches_padded_by_themselves_are_kept_in_order_and_refused_when_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ts.Distill(feature="token_mse", taps={"layer": "layer"}, epochs=2, cache=tmp_path)
    with pytest.raises(DistillError, match="pads.*longest sample"):
        step.check(reading(shuffle=True))
    ctx = reading(shuffle=False)
    step.check(ctx)
    assert forwards(step, ctx, monkeypatch) == [5, 5, 5, 5, 4]
    assert forwards(step, ctx, monkeypatch) == []


def test_samples_padded_to_other_lengths_are_an_error_that_says_so(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, "key")
    for first, length in ((0, 3), (4, 5)):
        index = torch.arange(first, first + 4)
        cache.keep(index, torch.zeros(4, 3, dtype=torch.float64), {"feature_0": torch.zeros(4, 2, length)})
    cache.flush()
    assert len(cache.files) == 2
    with pytest.raises(DistillError, match="padded.*lengths"):
        cache.find(torch.tensor([0, 5]), torch.zeros(2, 3, dtype=torch.float64))


def test_a_sample_is_kept_once(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, "key")
    for index in (torch.arange(4), torch.arange(2, 8)):
        cache.keep(index, torch.zeros(len(index), 3, dtype=torch.float64), {"logits_0": index[:, None].float()})
        cache.flush()
    assert sorted(len(shard["logits_0"]) for shard in cache.shards) == [4, 4]
    found = cache.find(torch.arange(8), torch.zeros(8, 3, dtype=torch.float64))
    assert found is not None
    assert found["logits_0"].flatten().tolist() == list(range(8))


class Keys(torch.utils.data.Sampler[str]):
    def __iter__(self) -> Any:
        yield from "abcdefgh"

    def __len__(self) -> int:
        return 8


class Named(torch.utils.data.Dataset[Any]):
    def __getitem__(self, key: str) -> tuple[Tensor, int]:
        return Sentences()[5 * (ord(key) - 97)]

    def __len__(self) -> int:
        return 8


def test_samples_with_names_are_numbered_by_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = reading(shuffle=False)
    loader = DataLoader(Named(), batch_size=4, sampler=Keys())
    ctx = replace(ctx, task=replace(ctx.task, train=loader))
    step = ts.Distill(epochs=2, cache=tmp_path)
    step.check(ctx)
    assert forwards(step, ctx, monkeypatch) == [4, 4]


def test_a_collate_that_drops_samples_is_refused(tmp_path: Path) -> None:
    ctx = reading(shuffle=False)
    loader = DataLoader(Sentences(), batch_size=6, collate_fn=lambda samples: padded(samples[1:]))
    step = ts.Distill(epochs=1, cache=tmp_path)
    with pytest.raises(DistillError, match="collate_fn.*5 of 6 samples"):
        step(Reader(), replace(ctx, task=replace(ctx.task, train=loader)))
