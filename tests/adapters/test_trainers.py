"""Models that torchslim has pruned or prepared go through the Trainer of the library transformers, its files and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

import torchslim as ts
from tests.support import sentences

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow


def example(count: int = 2, length: int = 8) -> dict[str, Any]:
    words = torch.arange(count * length).reshape(count, length) % sentences.WORDS
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def pruned() -> Any:
    return ts.prune.channels(sentences.classifier(), example(), 0.4, of="channels", round_to=1, min_channels=2)


def prepared() -> Any:
    return ts.quantize.prepare(pruned(), [example(), example(3, 5)], runtime="onnxruntime", qat=True)


def entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    """Two epochs of three steps, with a checkpoint after each."""
    given = options.pop("given", {})
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=8, save_strategy="epoch", eval_strategy="epoch",
        learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, data_collator=sentences.collate, train_dataset=sentences.samples(24, 0),
        eval_dataset=sentences.samples(8, 1), **given,
    )  # fmt: skip


QAT: dict[str, Any] = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "given": {"compute_loss_func": entropy},
}


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest of any entry of the state dicts."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**example(3, 6)).logits  # type: ignore[no-any-return]


def test_a_pruned_model_is_trained_saved_and_loaded_again(tmp_path: Path) -> None:
    """Costs 2 s."""
    model = pruned()
    record = ts.surgery(model)
    before = copy.deepcopy(model)
    model.config.torchslim_surgery = record
    trainer(model, tmp_path).train()
    assert difference(model, before) > 1e-4
    assert ts.surgery(model) == record
    folder = tmp_path / "checkpoint-6"
    with pytest.raises(RuntimeError):  # the library builds the architecture before pruning
        transformers.BertForSequenceClassification.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    fresh = transformers.AutoModelForSequenceClassification.from_config(config)
    again = ts.prune.apply_surgery(fresh, config.torchslim_surgery)
    assert load_model(again, folder / "model.safetensors") == (set(), [])
    assert torch.equal(logits(again), logits(model))
    assert ts.surgery(again) == record
    smaller = ts.prune.channels(again, example(), 0.3, of="channels", round_to=1, min_channels=2)
    assert len(ts.surgery(smaller)["rounds"]) == 2  # type: ignore[index]


def test_training_resumes_from_the_trainers_own_checkpoint(tmp_path: Path) -> None:
    """Costs 2 s."""
    model = pruned()
    trainer(model, tmp_path).train()
    (tmp_path / "surgery.json").write_text(json.dumps(ts.surgery(model)))
    again = ts.prune.apply_surgery(sentences.classifier(seed=1), tmp_path / "surgery.json")
    trainer(again, tmp_path / "more").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(model, again) == 0


def test_a_model_prepared_for_training_is_trained_saved_loaded_converted_and_deployed(tmp_path: Path) -> None:
    """Costs 10 s."""
    model = prepared()
    start = copy.deepcopy(model)
    owner = trainer(model, tmp_path, **QAT)
    owner.train()
    assert difference(model, start) > 1e-4
    assert {"eval_loss", "train_loss"} <= {key for entry in owner.state.log_history for key in entry}
    again = prepared()
    again.load_state_dict(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))
    resumed = prepared()
    trainer(resumed, tmp_path / "more", **QAT).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(resumed, model) < 1e-5
    quantized = ts.quantize.convert(again.eval())
    assert ts.quantize.sqnr(logits(model), logits(quantized)) > 40
    deployed = ts.deploy(quantized, [example(), example(3, 5)], runtime="onnxruntime")
    assert ts.quantize.sqnr(logits(quantized), deployed(**example(3, 6)).logits) > 30
