"""Whole jobs of others' models, random and small: what they generate and detect is computed by deployed parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchslim as ts
from tests.support.parted import Counted

pytestmark = pytest.mark.slow

SMALL = {
    "d_model": 32,
    "vocab_size": 100,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def t5(transformers: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(transformers: Any) -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(max_position_embeddings=64, **SMALL))


def whisper(transformers: Any) -> Any:
    config = transformers.WhisperConfig(
        max_source_positions=50, max_target_positions=64, num_mel_bins=16, pad_token_id=1, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=4, suppress_tokens=None, begin_suppress_tokens=None, **SMALL,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = 99
    model.generation_config.is_multilingual = False
    return model


def sentences(batch: int, length: int, steps: int = 6) -> dict[str, Any]:
    ids = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(length))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": steps,
        "do_sample": False,
    }


def sounds(batch: int, _: int, steps: int = 6) -> dict[str, Any]:
    features = torch.randn(batch, 16, 100, generator=torch.Generator().manual_seed(batch))
    return {"input_features": features, "max_new_tokens": steps, "do_sample": False}


MODELS = {
    "t5": (t5, sentences, ["encoder", "decoder"]),
    "bart": (bart, sentences, ["model.encoder", "model.decoder"]),
    "whisper": (whisper, sounds, ["model.encoder", "model.decoder"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generate_the_same_with_deployed_parts(name: str) -> None:
    """Costs 20 to 40 s."""
    make, inputs, parts = MODELS[name]
    torch.manual_seed(0)
    model = make(pytest.importorskip("transformers")).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None  # all steps are taken
    examples: Any = [{"method": "generate", "kwargs": inputs(batch, length)} for batch, length in ((2, 9), (3, 6))]
    deployed: Any = ts.deploy(model, examples, part=parts, threads=1)
    counted = Counted(deployed)
    for batch, length, steps in ((2, 9, 6), (1, 7, 10), (4, 5, 3)):
        counted.calls.update(dict.fromkeys(deployed.parts, 0))
        call = inputs(batch, length, steps)
        expected, generated = model.generate(**call), deployed.generate(**call)
        assert torch.equal(generated, expected)
        encoder, decoder = parts
        expected_calls = {encoder: 1, decoder: steps - 1, f"{decoder}#2": 1}
        assert counted.calls == expected_calls, "the first step, with its empty cache, has a program of its own"


def test_a_detector_detects_the_same_with_its_backbone_on_a_runtime() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, score_thresh=0.0
    ).eval()
    pictures = [torch.rand(3, 320, 320)]
    deployed: Any = ts.deploy(model, (pictures,), part="backbone", threads=1)
    counted = Counted(deployed)
    with torch.no_grad():
        for picture in (torch.rand(3, 200, 300), torch.rand(3, 320, 320)):
            expected, found = model([picture])[0], deployed([picture])[0]
            assert found["boxes"].shape == expected["boxes"].shape
            assert torch.allclose(found["scores"], expected["scores"], atol=1e-4)
    assert counted.calls == {"backbone": 2}


def test_the_encoder_of_t5_is_quantized_by_a_metric_that_generates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = t5(pytest.importorskip("transformers")).eval()
    batches = [sentences(2, length) for length in (5, 9, 7)]
    references = [model.generate(**batch) for batch in batches]

    def agreement(predict: Any, given: Any) -> float:
        hits = total = 0
        for batch in given:
            generated = predict.generate(**batch)
            reference = next(own for own, known in zip(references, batches, strict=True) if known is batch)
            length = min(generated.shape[1], reference.shape[1])
            hits += int((generated[:, :length] == reference[:, :length]).sum())
            total += reference.numel()
        return 100 * hits / total

    def inputs(batch: dict[str, Any]) -> dict[str, Any]:
        start = torch.zeros(len(batch["input_ids"]), 1, dtype=torch.long)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": start}

    task = ts.Task(train=batches, val=batches, metric=ts.Metric(fn=agreement, unit="%"), inputs=inputs)
    result = ts.compress(model, task, [ts.Quantize("int8")], part="encoder", threads=1, workdir=tmp_path / "work")
    rows = result.run["rows"]
    assert rows[0]["metric"]["val"]["value"] == 100
    assert rows[-1]["metric"]["val"]["value"] > 60
    layers = [layer for layer in rows[1]["layers"] if layer["action"] == "quantized"]
    assert layers
    assert all(layer["layer"].startswith("encoder.") for layer in layers)
