"""Padding does not count: in no loss, for no layer, and whichever of several sequences a mask is of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.distilled import seeded
from torchslim.distill.features.padding import DECODER_MASK, masks_of, resized_mask
from torchslim.distill.features.probe import answer_padding, observe
from torchslim.distill.features.taps import Tap, dry
from torchslim.distill.losses.registry import FEATURES, RELATIONS

LENGTH, WORDS, CLASSES = 12, 30, 5


class Tagger(nn.Module):
    """Tokens, each by itself; a mean over those that count; an answer for the sample, or for each token."""

    def __init__(self, width: int, *, tokens: bool = False, class_token: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.tokens = tokens
        self.embed = nn.Embedding(WORDS, width)
        self.first = nn.Parameter(torch.randn(1, 1, width)) if class_token else None
        self.conv = nn.Conv1d(width, width, stride, stride)
        self.block = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.pool = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.conv(self.embed(input_ids).mT).mT
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)
        x = self.second(self.block(x))
        mask = attention_mask if x.shape[1] == attention_mask.shape[1] else torch.ones_like(x[:, :, 0])
        pooled = self.pool((x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
        answers: Tensor = self.head(x if self.tokens else pooled)
        return answers


def padded(seed: int, samples: int = 6, even: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH // 2, (samples, 1), generator=generator) * 2
    mask = (torch.arange(LENGTH) < (lengths if even else lengths + 1)).long()
    return {
        "input_ids": torch.randint(WORDS, (samples, LENGTH), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.arange(samples) % CLASSES,
    }


def with_other_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    other = torch.randint(WORDS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(9))
    return batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], other)}


def losses(step: ts.Distill, student: nn.Module, teacher: nn.Module, batches: list[Any], **fields: Any) -> list[Any]:
    """Of some batches, after a lesson whose dry run sees the first."""
    task = ts.Task(train=batches[:1], val=batches[:1], metric="accuracy", **fields)
    ctx = ts.Context(task=task, teacher=teacher, model=student, example_inputs=())
    with step.lesson(student, ctx) as lesson, dry(student):
        assert lesson.companion is not None
        lesson.companion.eval()
        return [{name: float(value) for name, value in lesson.objective(student, each).items()} for each in batches]


STUDENTS = {
    "tokens": (lambda: Tagger(8), {"block": "block", "second": "second"}),
    "strided": (lambda: Tagger(8, stride=2), {"block": "block", "second": "second"}),
    "class token": (lambda: Tagger(8, class_token=True), {"block": "block", "second": "second"}),
    "vector": (lambda: Tagger(8), {"block": "block", "pool": "second"}),
}
RANKLESS = {"fsp", "review_kd", "attention_transfer"}  # compare positions, which a vector has none of


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("loss", [*FEATURES, *RELATIONS])
def test_no_loss_sees_padding(student: str, loss: str) -> None:
    make, taps = STUDENTS[student]
    if student == "vector" and loss in RANKLESS:
        taps = {"block": "block", "second": "second"}
    kind = "feature" if loss in FEATURES else "relation"
    step = ts.Distill(response=None, label_weight=0, taps=taps, **{kind: loss})
    batch = padded(1)
    found = losses(step, seeded(make), seeded(Tagger, 16), [batch, with_other_padding(batch)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert all(value > 0 for value in found[0].values())


@pytest.mark.parametrize("teacher", [{"stride": 2}, {"class_token": True}])
def test_the_teachers_padding_does_not_count_either(teacher: dict[str, Any]) -> None:
    batch = padded(2)
    for taps in ({"pool": "second"}, {"second": "second"}):
        step = ts.Distill(response=None, label_weight=0, taps=taps, feature="token_mse", relation=["crd", "pkt"])
        found = losses(step, seeded(Tagger, 8), Tagger(16, **teacher), [batch, with_other_padding(batch)])
        assert found[0] == pytest.approx(found[1], rel=1e-5)


@given(st.integers(0, 100))
@settings(max_examples=10)
def test_logits_at_padding_do_not_count(seed: int) -> None:
    student, teacher = seeded(lambda: Tagger(8, tokens=True)), seeded(lambda: Tagger(16, tokens=True))
    step = ts.Distill(response=ts.KD(alpha=1))
    batch = padded(seed, even=False)
    found = losses(step, student, teacher, [batch, with_other_padding(batch)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    kept = batch["attention_mask"].bool()
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    expected = ts.KD(alpha=1).soft(student(**inputs)[kept], teacher(**inputs)[kept])
    assert found[0]["response"] == pytest.approx(expected.item(), rel=1e-5)


class Translator(nn.Module):
    """An encoder and a decoder that looks at its mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, WORDS)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Any = None
    ) -> Tensor:
        mask = attention_mask[:, :, None]
        source = (self.encoder(self.embed(input_ids)) * mask).sum(1) / mask.sum(1)
        answers: Tensor = self.head(self.decoder(self.embed(decoder_input_ids) + source[:, None]))
        return answers


def translated(*, length: int, own_mask: bool) -> dict[str, Tensor]:
    batch = padded(3)
    del batch["labels"]
    batch["decoder_input_ids"] = torch.randint(WORDS, (6, length), generator=torch.Generator().manual_seed(4))
    if own_mask:
        batch[DECODER_MASK] = (torch.arange(length) < torch.arange(2, 8)[:, None]).long()
    return batch


@pytest.mark.parametrize("length", [LENGTH, 9])
@pytest.mark.parametrize("own_mask", [True, False])
def test_an_encoders_mask_is_not_taken_for_the_decoders(length: int, own_mask: bool) -> None:
    batch, model = translated(length=length, own_mask=own_mask), seeded(Translator, 8)
    task = ts.Task(train=[batch], val=[batch], metric="accuracy")
    masks = masks_of(task, batch)
    found = {tap.path: tap.padding for tap in observe(model, task, batch)}
    encoder, decoder, answer = found["encoder"], found["decoder"], answer_padding(model, task, batch)
    assert encoder is not None
    assert masks[encoder.mask] is batch["attention_mask"]
    if not own_mask:
        assert decoder is answer is None
        return
    assert decoder is not None
    assert answer is not None
    assert masks[decoder.mask] is masks[answer.padding.mask] is batch[DECODER_MASK]


def test_a_sequence_model_of_labels_in_a_custom_batch_keeps_its_padding() -> None:
    """The distillation of a translator counts the labels that are not ignored, though the lengths are equal."""
    batch = translated(length=LENGTH, own_mask=False)
    batch["labels"] = torch.randint(WORDS, (6, LENGTH), generator=torch.Generator().manual_seed(5))
    batch["labels"][:, -3:] = -100
    student, teacher = seeded(Translator, 8), seeded(Translator, 16)
    found = losses(ts.Distill(response=ts.KD(alpha=1)), student, teacher, [batch])[0]["response"]
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    kept = batch["labels"] != -100
    expected = ts.KD(alpha=1).soft(student(**inputs)[kept], teacher(**inputs)[kept])
    assert found == pytest.approx(expected.item(), rel=1e-5)


class Captioner(nn.Module):
    """Images and text in one network, with as many patches as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patches = nn.Embedding(WORDS, 8), nn.Conv2d(3, 8, 4, 4)
        self.see, self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.see(self.patches(pixel_values).flatten(2).mT)
        read = self.read(self.embed(input_ids)) * attention_mask[:, :, None]
        answers: Tensor = self.head(torch.cat([seen.mean(1), read.mean(1)], 1))
        return answers


def test_a_mask_of_words_is_not_one_of_patches() -> None:
    batch = {name: each for name, each in padded(1).items() if name != "labels"}
    batch["pixel_values"] = torch.randn(6, 3, 12, 16)  # 12 patches
    task = ts.Task(train=[batch], val=[batch], metric="accuracy")
    found: dict[str, Tap] = {tap.path: tap for tap in observe(Captioner(), task, batch)}
    assert found["see"].positions == found["read"].positions == (LENGTH,)
    assert found["see"].padding is None
    assert found["read"].padding is not None


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_a_resized_mask_has_what_counts_in_the_place_where_it_was(old: int, new: int, seed: int) -> None:
    mask = torch.rand(3, old, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = resized_mask(mask, (new,))
    assert found.shape == (3, new)
    assert torch.equal(found.any(1), mask.any(1)) or new > old
    if new == old:
        assert torch.equal(found, mask)
    elif new < old:  # a position stands for the ones from floor(i * old / new) to ceil((i + 1) * old / new)
        expected = [mask[:, i * old // new : -(-(i + 1) * old // new)].any(1) for i in range(new)]
        assert torch.equal(found, torch.stack(expected, 1))
