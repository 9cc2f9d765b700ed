"""Depth pruning of published architectures, small and with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from torchslim.core.trees import tensors
from torchslim.prune.depth.plan import analyze_depth

IDS = {"input_ids": torch.arange(14).reshape(2, 7)}


def vision(name: str, size: int = 32, **fields: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        models = pytest.importorskip("torchvision.models")
        return getattr(models, name)(weights=None, num_classes=5, **fields), (torch.randn(2, 3, size, size),)

    return make


def vit() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision.models")
    fields = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(**fields, num_classes=5), (torch.randn(2, 3, 32, 32),)


def language(name: str, inputs: dict[str, Any], **fields: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        library = pytest.importorskip("transformers")
        model = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(vocab_size=50, **fields))
        return model, inputs

    return make


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], list[str], str]] = {
    "resnet18": (vision("resnet18"), ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], "layer3.1"),
    "mobilenet_v2": (
        vision("mobilenet_v2"),
        [f"features.{n}" for n in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
        "features.9",
    ),
    "vit": (
        vit,
        [f"encoder.layers.encoder_layer_{n}{part}" for n in (0, 1) for part in ("", ".self_attention", ".mlp")],
        "encoder.layers.encoder_layer_1",
    ),
    "bert": (
        language("Bert", IDS, **SIZES),
        [f"encoder.layer.{n}{part}" for n in (0, 1) for part in ("", ".attention", ".intermediate")],
        "encoder.layer.1.attention",
    ),
    "gpt2": (
        language("GPT2", {**IDS, "use_cache": False}, **GPT2),
        [f"h.{n}{part}" for n in (0, 1) for part in ("", ".attn", ".mlp")],
        "h.0.attn",
    ),
    "t5": (
        language("T5", {**IDS, "decoder_input_ids": IDS["input_ids"], "use_cache": False}, **T5),
        [
            f"{side}.block.{n}{part}"
            for side, branches in (("encoder", 2), ("decoder", 3))
            for n in (0, 1)
            for part in ("", *(f".layer.{place}" for place in range(branches)))
        ],
        "encoder.block.1",
    ),
}


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_published_models_are_found_by_name_and_go(name: str) -> None:
    make, names, block = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    assert list(analyze_depth(model, inputs).blocks) == names
    smaller = ts.prune.blocks(model, inputs, blocks=block)
    inside = {each for each in dict(model.named_parameters()) if each.startswith(f"{block}.")}
    assert not inside & set(dict(smaller.named_parameters())) - {each for each in inside if "LayerNorm" in each}
    results = run(smaller, inputs)
    assert [each.shape for each in results] == [each.shape for each in run(model, inputs)]
    again = ts.prune.apply_surgery(copy.deepcopy(model), ts.surgery(smaller))  # type: ignore[arg-type]
    assert all(map(torch.equal, run(again.eval(), inputs), results))


@pytest.mark.slow
def test_a_layer_that_fills_a_returned_cache_keeps_what_fills_it() -> None:
    make, _, _ = MODELS["gpt2"]
    model, _ = make()
    with pytest.raises(ts.errors.PruneError, match=r"an output would be lost.*use_cache=False"):
        ts.prune.blocks(model.eval(), IDS, blocks="h.0")
    smaller = ts.prune.blocks(model, IDS, blocks="h.0.attn")
    assert "h.0.attn.c_attn.weight" in smaller.state_dict()
    assert "h.0.attn.c_proj.weight" not in smaller.state_dict()
