"""What the accuracy benchmark quantizes: three trained models, each with its data and the ways that suit it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import torchslim as ts
from benchmarks.accuracy_data import CHANNELS, encoder_folder, snippets, vowels
from examples.fashion_mnist import resnet, task
from examples.fashion_mnist.data import Batches, locate
from torchslim.quantize.schemes import OBSERVERS

SEEDS = range(5)
QAT_IMAGES = 8_000  # of the training set, once over
LENGTH, SENTENCES = 40, {"train": 2_000, "val": 500, "test": 1_000}
CALIBRATION = 256  # sentences
EPOCHS, HIDDEN = 60, 64  # of the recurrent network
Quantize = ts.Quantize


@dataclass(frozen=True, slots=True)
class Loaded:
    """A trained model with its task, and how outputs become an accuracy in percent."""

    model: nn.Module
    task: ts.Task
    accuracy: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the benchmark.

    Args:
        about: what it is, for the page.
        load: the trained model of a seed.
        ways: steps by name; None is the float model.
        seeded: does the model itself depend on the seed? If not, only what is trained runs with all seeds.
        on_runtime: the ways that are measured on ONNX Runtime, too.
    """

    about: str
    load: Callable[[int], Loaded]
    ways: Mapping[str, Quantize | None]
    seeded: bool = False
    on_runtime: frozenset[str] = field(default_factory=frozenset)

    def seeds(self, way: str) -> Iterable[int]:
        """The seeds that a way runs with."""
        step = self.ways[way]
        trained = step is not None and step.mode == "qat"
        return SEEDS if self.seeded or trained else (0,)


# images ---------------------------------------------------------------------------------------------------------------


def _images(seed: int) -> Loaded:
    if locate() is None:
        raise RuntimeError("Fashion-MNIST is missing; get it with: apt-get install dataset-fashion-mnist")
    data = task()
    assert isinstance(data.train, Batches)
    train = Batches((data.train.images[:QAT_IMAGES], data.train.labels[:QAT_IMAGES]), 128, augment=True)
    return Loaded(resnet(), replace(data, train=train), _top_1)


def _qat(scheme: str, **options: Any) -> Quantize:
    return Quantize(scheme, mode="qat", train=ts.Distill(epochs=1, lr=1e-4), **options)


HELPERS: Mapping[str, Mapping[str, Any]] = {
    "equalize": {"equalize": True},
    "smooth": {"smooth": 0.5},
    "correct_biases": {"correct_biases": True},
    "gptq": {"rounding": "gptq"},
    "adaround": {"rounding": "adaround"},
}
IMAGES: Mapping[str, Quantize | None] = {
    "float": None,
    "int8": Quantize("int8"),
    **{f"int8, {name}": Quantize("int8", observer=name) for name in OBSERVERS if name != "mse"},
    **{f"int8 + {name}": Quantize("int8", **options) for name, options in HELPERS.items()},
    "int8 + gptq + correct_biases": Quantize("int8", rounding="gptq", correct_biases=True),
    "int8 + all": Quantize("int8", equalize=True, smooth=0.5, rounding="gptq", correct_biases=True),
    "int8-dynamic": Quantize("int8-dynamic"),
    "int8-weights": Quantize("int8-weights"),
    "int4-weights": Quantize("int4-weights"),
    "int4-weights + gptq": Quantize("int4-weights", rounding="gptq"),
    "int4-weights + adaround": Quantize("int4-weights", rounding="adaround"),
    "int4-weights + gptq + correct_biases": Quantize("int4-weights", rounding="gptq", correct_biases=True),
    "int8, qat": _qat("int8"),
    "int8, qat, learned_step": _qat("int8", learned_step=True),
    "int4-weights, qat": _qat("int4-weights"),
    "int4-weights, qat, learned_step": _qat("int4-weights", learned_step=True),
}

# sentences ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens and mask, (batch, length) each -> mean-pooled embeddings (batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel

        self.bert = AutoModel.from_pretrained(encoder_folder(), add_pooling_layer=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1)  # type: ignore[no-any-return]


class Rows:
    """Batches of tensors cut along their first dimension, re-iterable; with `shuffle` in an order drawn each time."""

    def __init__(self, *parts: Tensor, size: int = 50, shuffle: bool = False) -> None:
        self.parts, self.size, self.shuffle = parts, size, shuffle

    def __len__(self) -> int:
        return (len(self.parts[0]) + self.size - 1) // self.size

    def __iter__(self) -> Any:
        count = len(self.parts[0])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        return (tuple(part[index] for part in self.parts) for index in order.split(self.size))


def _sentences(seed: int) -> Loaded:
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoTokenizer

    model = Encoder().eval()
    texts, labels = snippets()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    parts, start = {}, 0
    for name, count in SENTENCES.items():
        index = order[start : start + count]
        found = tokenizer(
            [texts[each] for each in index], padding="max_length", truncation=True, max_length=LENGTH,
            return_tensors="pt",
        )  # fmt: skip
        parts[name] = Rows(found["input_ids"], found["attention_mask"], labels[index])
        start += count
    data = ts.Task(
        train=parts["train"], val=parts["val"], test=parts["test"],
        calibration=Rows(*(each[:CALIBRATION] for each in parts["train"].parts), size=32),
        inputs=lambda batch: batch[:2], target=lambda batch: batch[2], metric=lambda predict, batches: 0.0,
    )  # fmt: skip
    embedded = {name: embed(model, data, name)[0] for name in ("train", "val")}
    truth = {name: part.parts[2] for name, part in parts.items()}
    probes = [
        LogisticRegression(C=c, max_iter=2_000).fit(embedded["train"].numpy(), truth["train"].numpy())
        for c in (0.1, 1.0, 10.0, 100.0)
    ]
    probe = max(probes, key=lambda probe_: probe_.score(embedded["val"].numpy(), truth["val"].numpy()))
    return Loaded(model, data, lambda outputs, target: 100 * float(probe.score(outputs.numpy(), target.numpy())))


SENTENCE_WAYS: Mapping[str, Quantize | None] = {
    "float": None,
    "int8": Quantize("int8"),
    "int8-dynamic": Quantize("int8-dynamic"),
    "int8 + smooth": Quantize("int8", smooth=0.5),
    "int8-weights": Quantize("int8-weights"),
    "int4-weights": Quantize("int4-weights"),
    "int4-weights + gptq": Quantize("int4-weights", rounding="gptq"),
    "int8 + gptq": Quantize("int8", rounding="gptq"),
    "int8 + correct_biases": Quantize("int8", correct_biases=True),
    "int8 + smooth + gptq + correct_biases": Quantize("int8", smooth=0.5, rounding="gptq", correct_biases=True),
}

# series ---------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Series (batch, steps, channels) and mask (batch, steps) -> logits of nine speakers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(CHANNELS, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 9)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.lstm(x)[0] * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def _series(seed: int) -> Loaded:
    train, test = vowels("TRAIN"), vowels("TEST")
    held = torch.arange(len(train[2])) % 5 == 4
    kept = [part[~held] for part in train]
    data = ts.Task(
        train=Rows(*kept, size=32, shuffle=True), val=Rows(*(part[held] for part in train)), test=Rows(*test),
        calibration=Rows(*kept), inputs=lambda batch: batch[:2], target=lambda batch: batch[2], metric="accuracy",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Recurrent()
    ctx = ts.Context(task=data, teacher=model, example_inputs=(kept[0][:2], kept[1][:2]), seed=seed)
    ts.Finetune(epochs=EPOCHS, lr=3e-3, keep="last").fit(model, ctx)
    return Loaded(model.eval(), data, _top_1)


SERIES_WAYS: Mapping[str, Quantize | None] = {
    "float": None,
    "int8-dynamic": Quantize("int8-dynamic"),
    "int8-weights": Quantize("int8-weights"),
    "int4-weights": Quantize("int4-weights"),
}

# ----------------------------------------------------------------------------------------------------------------------


def _top_1(outputs: Tensor, labels: Tensor) -> float:
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def embed(model: Callable[..., Tensor], data: ts.Task, split: str) -> tuple[Tensor, Tensor]:
    """A model's outputs over a split, and the labels."""
    outputs, labels = [], []
    with torch.no_grad():
        for batch in getattr(data, split):
            outputs.append(model(*data.inputs(batch)))
            labels.append(data.target(batch))
    return torch.cat(outputs), torch.cat(labels)  # type: ignore[arg-type]


SUBJECTS: Mapping[str, Subject] = {
    "series": Subject(
        f"two bidirectional LSTM layers of {HIDDEN}, trained here with each seed to tell the nine speakers of "
        "JapaneseVowels apart (216 series to train on, 54 to validate, 370 to test)",
        _series, SERIES_WAYS, seeded=True, on_runtime=frozenset({"int8-dynamic"}),
    ),
    "images": Subject(
        "the demo's residual network on Fashion-MNIST (5,000 images to validate, 10,000 to test); training on the grid "
        f"takes one epoch of {QAT_IMAGES:,} images, distilling the float model",
        _images, IMAGES, on_runtime=frozenset({"int8"}),
    ),
    "sentences": Subject(
        "all-MiniLM-L6-v2, 22.7 M parameters; whether a sentence of a film review is kind, told by a logistic "
        "regression on its mean-pooled embedding, fitted on float embeddings of "
        f"{SENTENCES['train']:,} sentences and never again ({SENTENCES['val']:,} to validate, "
        f"{SENTENCES['test']:,} to test, {LENGTH} tokens, {CALIBRATION} sentences to calibrate)",
        _sentences, SENTENCE_WAYS, on_runtime=frozenset({"int8", "int8-dynamic"}),
    ),
}  # fmt: skip
