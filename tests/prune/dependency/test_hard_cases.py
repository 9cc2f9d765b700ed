"""Small versions of models that have resisted structured pruning: each is verified, is smaller, and runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision as tv
import transformers as tf
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

import torchslim as ts
from tests.support import channel_networks as net
from tests.support.channel_laws import assert_runs, assert_untouched, run, state
from torchslim.artifact import model_size

Made = tuple[nn.Module, Any]


def image(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def words(length: int = 7) -> Tensor:
    return torch.randint(50, (2, length))


def from_timm(name: str, **fields: Any) -> Callable[[], Made]:
    return lambda: (timm.create_model(name, num_classes=5, **fields), (image(),))


def swin(**fields: Any) -> Made:
    return SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **fields), (image(32),)


TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def causal(kind: str, **fields: Any) -> Callable[[], Made]:
    def make() -> Made:
        config = getattr(tf, f"{kind}Config")(**TEXT, num_key_value_heads=2, **fields)
        return getattr(tf, f"{kind}ForCausalLM")(config), {"input_ids": words()}

    return make


def gpt2() -> Made:
    config = tf.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config), {"input_ids": words()}


def t5() -> Made:
    config = tf.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), {"input_ids": words(), "decoder_input_ids": words(5)}


def detr() -> Made:
    backbone = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = tf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=6,
    )  # fmt: skip
    return tf.DetrForObjectDetection(config), {"pixel_values": image()}


def clip() -> Made:
    config = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return tf.CLIPVisionModel(config), {"pixel_values": image(32)}


class Mixed(nn.Module):
    """Weight norm, a fixed slice, an LSTM and torch's own attention in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 24))
        self.second = nn.Linear(20, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()[..., :20]).relu()
        x = self.lstm(x)[0]
        return self.head(self.attention(x, x, x)[0].mean(1))


CASES: dict[str, tuple[Callable[[], Made], float]] = {  # with the least ratio of parameters that half of them asks for
    "swin": (swin, 1.9),
    "swin v2": (lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 1.7),
    "coat": (from_timm("coat_tiny", img_size=64, embed_dims=(24, 40, 40, 40), serial_depths=(1, 1, 1, 1), parallel_depth=1), 1.7),
    "gcvit": (from_timm("gcvit_xxtiny", img_size=64, window_size=2, embed_dim=16), 1.7),
    "coatnet": (from_timm("coatnet_pico_rw_224", img_size=64, depths=(1, 1, 1, 1), embed_dim=(16, 32, 32, 64), stem_width=16), 1.8),
    "halonet": (lambda: (timm.create_model("halonet26t", num_classes=5), (image(256, 1),)), 1.8),
    "nfnet": (from_timm("nfnet_l0"), 1.8),
    "tiny_vit": (lambda: (timm.create_model("tiny_vit_5m_224", num_classes=5, embed_dims=(16, 32, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)), (image(224, 1),)), 1.6),
    "dinov3": (from_timm("vit_small_patch16_dinov3", img_size=64, embed_dim=32, depth=2, num_heads=2), 1.3),
    "levit": (from_timm("levit_128s", img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1), key_dim=8), 1.8),
    "gpt2": (gpt2, 1.8),
    "t5": (t5, 1.8),
    "detr": (detr, 1.8),
    "clip": (clip, 1.8),
    "llama": (causal("Llama"), 1.8),
    "qwen": (causal("Qwen3", head_dim=16), 1.8),
    "mistral": (causal("Mistral", sliding_window=4), 1.8),
    "googlenet": (lambda: (tv.models.GoogLeNet(num_classes=5, aux_logits=True, init_weights=False), (image(),)), 1.8),
    "talking heads": (lambda: (net.Tokens(32, [net.Normed(32, net.Attention(32, 4, 8, sdpa=False, mix=True), "layer")], tied=False, norm="layer"), (torch.randint(11, (2, 5)),)), 1.8),
    "mixed": (lambda: (Mixed(), (torch.randn(2, 5, 4),)), 1.0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_half_of_a_hard_model(name: str) -> None:
    make, least = CASES[name]
    model, inputs = make()
    before = state(model.eval())
    shrunk = ts.prune.channels(model, inputs, 0.5, round_to=1, min_channels=1)
    done = ts.surgery(shrunk)["rounds"][0]
    assert done["cuts"]
    assert done["about"]["verified"]
    assert done["about"]["largest_error"] < 1e-6
    assert model_size.parameters(model) / model_size.parameters(shrunk) >= least
    assert_untouched(model, before)
    assert_runs(model, shrunk, inputs)


@pytest.mark.slow
def test_heads_used_only_in_training_are_cut_as_well() -> None:
    model = tv.models.GoogLeNet(num_classes=5, aux_logits=True, init_weights=False).eval()
    shrunk = ts.prune.channels(model, (image(),), 0.5).train()
    main, one, two = shrunk(image())
    assert main.shape == one.shape == two.shape == (2, 5)
    assert any(cut["weight"].startswith("aux1") for cut in ts.surgery(shrunk)["rounds"][0]["cuts"])


def backbone() -> nn.Module:
    return _resnet_fpn_extractor(tv.models.resnet18(), 5)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster r-cnn": lambda: detection.FasterRCNN(backbone(), num_classes=3, min_size=64, max_size=64),
    "retinanet": lambda: detection.RetinaNet(backbone(), num_classes=3, min_size=64, max_size=64),
    "fcos": lambda: detection.FCOS(backbone(), num_classes=3, min_size=64, max_size=64),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_whose_number_of_boxes_depends_on_data(name: str) -> None:
    model = DETECTORS[name]().eval()
    pictures = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    shrunk = ts.prune.channels(model, (pictures,), 0.5)
    assert model_size.parameters(model) / model_size.parameters(shrunk) > 1.8
    with torch.no_grad():
        for count in (1, 2):
            assert run(shrunk, (pictures[:count],))
