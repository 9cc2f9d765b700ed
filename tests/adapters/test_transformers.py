"""A Hugging Face model or Trainer as a task: its own loss, and the figures that its Trainer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchslim as ts
from tests.support import sentences
from torchslim.core.batches import predictor
from torchslim.errors import TaskError

transformers = pytest.importorskip("transformers")


def accuracy(prediction: Any) -> dict[str, float]:
    """As users write it, with logits and labels of all samples as arrays."""
    assert isinstance(prediction.predictions, np.ndarray)
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    counted = prediction.label_ids != -100
    return {"accuracy": float(right[counted].mean()), "samples": float(counted.sum())}


def task(**options: Any) -> ts.Task:
    given: dict[str, Any] = {
        "train": sentences.samples(24, 0), "val": sentences.samples(14, 1), "compute_metrics": accuracy,
        "metric": "accuracy", "batch_size": 8,
    }  # fmt: skip
    return ts.Task.from_transformers(sentences.classifier(), **{**given, **options})


def first(batches: Any) -> Any:
    return next(iter(batches))


def test_batches_are_padded_to_their_longest_and_labels_are_no_input() -> None:
    made = task(batch_size=4)
    for batch in made.train or ():
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == (len(lengths), int(lengths.max()))
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
        assert set(made.inputs(batch)) == {"input_ids", "attention_mask"}
        assert made.target(batch) is batch["labels"]
        assert made.mask(batch) is batch["attention_mask"]
    shapes = {batch["input_ids"].shape[1] for batch in made.train or ()}
    assert len(shapes) > 1


SINGLE = "single_label_classification"
LOSSES = [(kind, SINGLE) for kind in ("classifier", "tagger", "masked", "causal")] + [
    ("classifier", "regression"),
    ("classifier", "multi_label_classification"),
]


@pytest.mark.parametrize(("kind", "problem"), LOSSES)
def test_the_loss_is_the_models_own(kind: str, problem: str) -> None:
    """Costs 0.1 s."""
    model = getattr(sentences, kind)()
    data = sentences.samples(8, 0, kind)
    if problem != SINGLE:
        model.config.problem_type, model.config.num_labels = problem, sentences.CLASSES
        data = [{**sample, "labels": torch.rand(sentences.CLASSES).round()} for sample in data]
    made = ts.Task.from_transformers(model, train=data, val=data, metric=lambda predict, batches: 1.0)
    batch = first(made.train)
    other = getattr(sentences, kind)(seed=1)
    other.config.problem_type, other.config.num_labels = model.config.problem_type, model.config.num_labels
    expected = other(**batch).loss
    outputs = made.forward(other, batch)
    assert outputs.get("loss") is None
    loss = made.compute_loss(outputs, batch)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert other.get_input_embeddings().weight.grad.abs().sum() > 0


def test_answers_of_two_columns_of_labels() -> None:
    model = sentences.reader()
    data = [{**sample, "start_positions": 1, "end_positions": 2} for sample in sentences.samples(8, 0)]
    for sample in data:
        del sample["labels"]
    names = ["start_positions", "end_positions"]
    made = ts.Task.from_transformers(
        model,
        train=data,
        val=data,
        label_names=names,
        metric="exact",
        compute_metrics=lambda p: {"exact": float((p.predictions[0].argmax(-1) == p.label_ids[0]).mean())},
    )
    batch = first(made.train)
    torch.testing.assert_close(made.compute_loss(made.forward(model, batch), batch), model.eval()(**batch).loss)
    assert not set(names) & set(made.inputs(batch))
    assert 0 <= made.evaluate(predictor(model)) <= 1


def trainer(folder: Any, kind: str = "classifier", **options: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    return transformers.Trainer(
        getattr(sentences, kind)(), arguments, data_collator=sentences.collate, compute_metrics=accuracy,
        train_dataset=sentences.samples(24, 0, kind), eval_dataset=sentences.samples(14, 1, kind), **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["classifier", "tagger"])
def test_a_trainer_is_taken_as_it_is_and_gives_the_same_figures(kind: str, tmp_path: Any) -> None:
    """Costs 1 s."""
    owner = trainer(tmp_path, kind)
    shown = owner.evaluate()
    made = ts.Task.from_transformers(owner)
    assert made.as_metric().name == "accuracy"
    assert made.as_metric().higher_is_better
    assert (first(made.train)["input_ids"].shape[0], first(made.val)["input_ids"].shape[0]) == (4, 8)
    assert made.evaluate(predictor(owner.model)) == pytest.approx(shown["eval_accuracy"])
    count = ts.Task.from_transformers(owner, metric="eval_samples", higher_is_better=False)
    assert count.evaluate(predictor(owner.model)) == shown["eval_samples"]
    assert not count.as_metric().higher_is_better
    half = trainer(tmp_path, kind, preprocess_logits_for_metrics=lambda logits, labels: logits[..., :1])
    assert ts.Task.from_transformers(half).evaluate(predictor(owner.model)) == pytest.approx(
        half.evaluate()["eval_accuracy"]
    )


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    data = [{**sample, "text": "words", "label": sample["labels"]} for sample in sentences.samples(8, 0)]
    for sample in data:
        del sample["labels"]
    made = task(train=data, val=data)
    assert set(first(made.val)) == {"input_ids", "attention_mask", "labels"}
    seen: list[Any] = []

    def collator(samples: list[Any]) -> Any:
        seen.extend(samples)
        return sentences.collate([{**sample, "labels": sample["label"]} for sample in samples])

    made = task(train=data, val=data, data_collator=collator)
    first(made.val)
    assert set(seen[0]) == {"input_ids", "attention_mask", "label"}


def test_a_data_set_of_the_library_datasets_will_do() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**sample, "text": "words"} for sample in sentences.samples(8, 0)]
    plain = [
        {name: getattr(value, "tolist", lambda value=value: value)() for name, value in row.items()} for row in rows
    ]
    columns = {name: [row[name] for row in plain] for name in plain[0]}
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="fixed")
    made = task(train=data, val=data.with_format("torch"))
    assert set(first(made.val)) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(first(made.val)["input_ids"], pad(rows))
    assert 0 <= made.evaluate(predictor(sentences.classifier())) <= 1


def pad(rows: list[dict[str, Any]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)


def test_loaders_and_metrics_may_be_given() -> None:
    batches = DataLoader(sentences.samples(8, 0), batch_size=4, collate_fn=sentences.collate)  # type: ignore[arg-type]
    made = ts.Task.from_transformers(sentences.classifier(), val=batches, metric="accuracy")
    assert made.val is batches
    assert made.train is None
    assert made.loss is None
    assert made.as_metric().unit == "%"


@pytest.mark.slow
def test_a_run_prunes_distills_and_quantizes() -> None:
    """Costs 10 s."""
    made = task()
    steps = [
        ts.Prune(sparsity=0.3, pattern="channel", of="channels", round_to=1, min_channels=2),
        ts.Distill(epochs=1),
        ts.Quantize("int8"),
    ]
    result = ts.compress(sentences.classifier(), made, steps, runtime="eager", threads=1)
    before, *_, after = result.run["rows"]
    assert after["parameters"]["value"] < before["parameters"]["value"]
    assert after["metric"]["val"]["value"] == pytest.approx(made.evaluate(result.deployed))
    batch = first(replace(made, train=None).val)
    assert result.deployed(**made.inputs(batch)).logits.shape == (len(batch["labels"]), sentences.CLASSES)


class Odd(nn.Module):
    """Computes another loss than its class, with a penalty on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sentences.classifier()
        self.config, self.loss_function = self.inner.config, self.inner.loss_function

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        outputs = self.inner(input_ids, attention_mask, labels=labels)
        if labels is not None:
            outputs["loss"] = outputs.loss + 1
        return outputs


class Silent(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids, attention_mask)


def cases() -> Iterator[tuple[str, Callable[[], Any], str]]:
    make, data = ts.Task.from_transformers, sentences.samples(8, 0)
    model = sentences.classifier()
    yield (
        "no model",
        lambda: make(nn.Linear(2, 2), val=data, metric="accuracy"),
        "source must be.*PreTrainedModel.*Linear",
    )
    yield "a name", lambda: make("bert", val=data, metric="accuracy"), "source must be.*'bert'"
    yield "no val", lambda: make(model, train=data, metric="accuracy"), "val is None; give val="
    yield "no metric", lambda: make(model, val=data), "metric is None; give metric="
    yield "a generator", lambda: make(model, val=iter(data), metric="accuracy"), "val must be a data set.*length"
    yield "empty", lambda: make(model, val=[], metric="accuracy"), "val is an empty data set"
    yield "unknown", lambda: make(model, val=data, metric="f1"), "'f1'"
    yield "other loss", lambda: make(Odd(), train=data, val=data, metric="accuracy"), "loss of Odd is.*loss=function"
    yield "no loss", lambda: make(Silent(), train=data, val=data, metric="accuracy"), "Silent returns no loss.*loss="
    yield (
        "no dicts",
        lambda: make(model, train=[(1, 2)], val=data, metric="accuracy"),
        "sample must be a dict.*collator",
    )
    yield (
        "labels",
        lambda: make(model, train=[{**sample, "labels": 99} for sample in data], val=data, metric="accuracy"),
        "loss of BertForSequenceClassification cannot be used.*loss=",
    )


@pytest.mark.parametrize(("about", "make", "message"), [*cases()], ids=[about for about, _, _ in cases()])
def test_wrong_arguments_are_named(about: str, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()


def test_a_key_that_compute_metrics_lacks_is_named_with_those_that_it_has() -> None:
    made = task(metric="f1")
    with pytest.raises(TaskError, match="'f1'.*accuracy, samples"):
        made.evaluate(predictor(sentences.classifier()))
