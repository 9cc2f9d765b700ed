"""Models that users prune, from torchvision, timm and transformers, with random weights: python -m benchmarks.zoo

Lists the zoo; `--families` chooses the smallest model of each timm family anew (some ten minutes) and writes it to
benchmarks/zoo_timm.json. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = Path(__file__).parent / "zoo_timm.json"
MAX_PARAMETERS = 120_000_000
LARGE_IMAGE = 331
SUITES = ("torchvision", "timm", "transformers")
Inputs = tuple[Any, ...] | dict[str, Any]
Built = tuple[nn.Module, Inputs]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the zoo; `build()` gives it in eval mode with its example inputs, the same ones every time."""

    name: str
    suite: str
    make: Callable[[], Built]

    def build(self) -> Built:
        """The model and its inputs, with weights and inputs from a seed of the name's own."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model, inputs = self.make()
            _enliven(model)
        return model.eval(), inputs


def zoo(suite: str | None = None) -> list[Entry]:
    """Every entry, or those of one suite; building is left to the entries."""
    suites = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    return [entry for name in SUITES if suite in (None, name) for entry in suites[name]()]


def find(name: str) -> Entry:
    """The entry called "suite/model"."""
    suite, _, _ = name.partition("/")
    return next(entry for entry in zoo(suite) if entry.name == name)


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Move what starts as exactly zero or one: else whole branches are silent, and nothing shows what goes wrong."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            if parameter.dim() <= 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif not parameter.any():
                parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)


def _images(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size)


# torchvision ----------------------------------------------------------------------------------------------------------

# detectors scale their images up to 800 pixels unless told, and find nothing above their thresholds when untrained
_RCNN = {"min_size": 320, "max_size": 320, "box_score_thresh": 0.0, "box_detections_per_img": 20}
_RPN = {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 50}
_DENSE = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 100}
DETECTION: Mapping[str, Mapping[str, Any]] = {
    "rcnn": {**_RCNN, **_RPN},
    "fcos": {**_DENSE, "min_size": 320, "max_size": 320},
    "retinanet": {**_DENSE, "min_size": 320, "max_size": 320},
    "ssd": _DENSE,
}


def _torchvision() -> Iterator[Entry]:
    from torchvision import models

    makers = ((models, _classifier), (models.segmentation, _segmenter), (models.detection, _detector))
    for module, make in makers:
        for name in models.list_models(module=module):
            if models.get_model_weights(name).DEFAULT.meta["num_params"] < MAX_PARAMETERS:
                yield Entry(f"torchvision/{name}", "torchvision", partial(make, name))


def _classifier(name: str) -> Built:
    from torchvision import models

    # these two would load weights to know how their auxiliary heads start
    more = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **more), (_images(299 if name == "inception_v3" else 224),)


def _segmenter(name: str) -> Built:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None), (_images(128),)


def _detector(name: str) -> Built:
    from torchvision import models

    more = next(more for part, more in DETECTION.items() if part in name)
    model = models.get_model(name, weights=None, weights_backbone=None, **more)
    return model, ([torch.rand(3, 320, 320)],)


# timm -----------------------------------------------------------------------------------------------------------------


def _timm() -> Iterator[Entry]:
    rows = sorted(json.loads(FAMILIES.read_text())["families"].values(), key=lambda row: row["model"])
    for row in rows:
        yield Entry(f"timm/{row['model']}", "timm", partial(_timm_model, row["model"], tuple(row["input_size"])))


def _timm_model(name: str, size: tuple[int, ...]) -> Built:
    import timm

    return timm.create_model(name, pretrained=False), (torch.randn(1, *size),)


def _input_size(name: str) -> tuple[int, ...]:
    """The default one; a smaller one where the default is large and not fixed. Raises what the model raises."""
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    default = tuple(model.pretrained_cfg["input_size"])
    large = max(default) > LARGE_IMAGE and not model.pretrained_cfg.get("fixed_input_size")
    sizes = [*((3, side, side) for side in (256, 224) if large), default]
    for size in sizes:
        try:
            with torch.no_grad():
                model(torch.randn(1, *size))
        except Exception:
            if size == default:
                raise
        else:
            return size
    raise AssertionError("the default size comes last")


def choose_families() -> dict[str, Any]:
    """The smallest model of each timm module that builds and runs, but for the `test_` models of timm's own tests."""
    import timm

    families: dict[str, list[tuple[int, str]]] = {}
    for name in timm.list_models():
        if name.startswith("test_"):
            continue
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError, AttributeError, ValueError, TypeError):
            size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        families.setdefault(family, []).append((size, name))
    chosen, without = {}, {}
    for family, models in sorted(families.items()):
        reason = ""
        for size, name in sorted(models)[:3]:
            try:
                shape = list(_input_size(name))
            except Exception as error:  # noqa: BLE001 - whatever stops it, the next one is tried and the reason kept
                reason = reason or f"{name}: {type(error).__name__}: {error}".splitlines()[0]
                continue
            chosen[family] = {"model": name, "parameters": size, "input_size": shape}
            break
        else:
            without[family] = reason
    return {"timm": timm.__version__, "command": "python -m benchmarks.zoo --families", "families": chosen,
            "without": without}  # fmt: skip


# transformers ---------------------------------------------------------------------------------------------------------

VOCABULARY, LENGTH, LABELS, IMAGE = 128, 16, 10, 64
# what each family of configurations calls its sizes
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64, "num_labels": LABELS,
}  # fmt: skip
GPT = {**SPECIAL, "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
VISION = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": IMAGE, "patch_size": 16, "num_labels": LABELS,
}  # fmt: skip
STAGES = {"image_size": IMAGE, "num_labels": LABELS, "depths": [2, 2], "num_stages": 2}
SEQ2SEQ = {
    **SPECIAL, "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
SPEECH = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": LABELS,
    "conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32,
    "vocab_size": 32,
}  # fmt: skip


def _tokens(length: int = LENGTH) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, VOCABULARY, (1, length)), "attention_mask": torch.ones(1, length).long()}


def _pairs() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": torch.randint(5, VOCABULARY, (1, LENGTH // 2))}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": _images(IMAGE)}


def _image_and_text() -> tuple[Tensor, Tensor]:
    return _tokens()["input_ids"], _images(IMAGE)


def _image_with_text() -> dict[str, Tensor]:
    return {**_tokens(), **_pixels()}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 1600)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 16, 64), "decoder_input_ids": torch.randint(5, VOCABULARY, (1, 8))}


# name -> model class, configuration class, configuration, inputs
TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any], Callable[[], Inputs]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, _tokens),
    "bert_masked_lm": ("BertForMaskedLM", "BertConfig", TEXT, _tokens),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, _tokens),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "num_labels": LABELS},
        _tokens,
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 32}, _tokens),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 32}, _tokens),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        _tokens,
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", {**TEXT, "pad_token_id": 1}, _tokens),
    "mobilebert": (
        "MobileBertForSequenceClassification", "MobileBertConfig",
        {**TEXT, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
        _tokens,
    ),
    "xlm_roberta": ("XLMRobertaForTokenClassification", "XLMRobertaConfig", TEXT, _tokens),
    "modernbert": (
        "ModernBertForSequenceClassification", "ModernBertConfig", {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        _tokens,
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, _tokens),
    "gpt_neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {**SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
         "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        _tokens,
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, _tokens),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, _tokens),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, _tokens),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, _tokens),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TEXT, "n_layer": 2, "n_head": 4}, _tokens),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TEXT, "alibi": False}, _tokens),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, _tokens),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}, _tokens),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, _tokens),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, _tokens),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, _tokens),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "sliding_window": 8}, _tokens),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "sliding_window": 8}, _tokens),
    "phi": ("PhiForCausalLM", "PhiConfig", {**TEXT, "num_key_value_heads": 2}, _tokens),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**TEXT, "num_key_value_heads": 2}, _tokens),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**TEXT, "num_key_value_heads": 2}, _tokens),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**TEXT, "num_key_value_heads": 2}, _tokens),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, _tokens,
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, _tokens,
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
         "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        _pairs,
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, _pairs),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ, _pairs),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, _pixels),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION, _pixels),
    "beit": ("BeitForImageClassification", "BeitConfig", {**VISION, "use_relative_position_bias": True}, _pixels),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, _pixels),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {**STAGES, "patch_size": 4, "embed_dim": 32, "num_heads": [2, 4], "window_size": 4}, _pixels,
    ),
    "convnext": (
        "ConvNextForImageClassification", "ConvNextConfig", {**STAGES, "hidden_sizes": [32, 64]}, _pixels,
    ),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic",
         "num_labels": LABELS},
        _pixels,
    ),
    "mobilevit": (
        "MobileViTForImageClassification", "MobileViTConfig",
        {"image_size": IMAGE, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96],
         "num_labels": LABELS},
        _pixels,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [4, 2], "hidden_sizes": [32, 64],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 64, "num_labels": LABELS},
        _pixels,
    ),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32}, _image_and_text,
    ),
    "clip_text": ("CLIPTextModelWithProjection", "CLIPTextConfig", {**TEXT, "projection_dim": 32}, _tokens),
    "clip_vision": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VISION, "projection_dim": 32}, _pixels,
    ),
    "vilt": ("ViltForQuestionAnswering", "ViltConfig", {**TEXT, **VISION}, _image_with_text),
    "detr": (
        "DetrForObjectDetection", "DetrConfig",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10,
         "num_labels": LABELS, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
        _pixels,
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}, _speech,
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", SPEECH, _wave),
    "hubert": ("HubertForCTC", "HubertConfig", SPEECH, _wave),
}  # fmt: skip


def _transformers() -> Iterator[Entry]:
    for name in TRANSFORMERS:
        yield Entry(f"transformers/{name}", "transformers", partial(_transformers_model, name))


def _transformers_model(name: str) -> Built:
    import transformers

    model_class, config_class, sizes, inputs = TRANSFORMERS[name]
    if name == "detr":
        backbone = transformers.ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        sizes = {**sizes, "backbone_config": backbone}
    config = getattr(transformers, config_class)(**sizes)
    return getattr(transformers, model_class)(config), inputs()


@cache
def names() -> tuple[str, ...]:
    """Every name, in the order of the suites."""
    return tuple(entry.name for entry in zoo())


def main() -> None:
    """List the zoo, or choose the timm families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", action="store_true")
    if parser.parse_args().families:
        FAMILIES.write_text(json.dumps(choose_families(), indent=1) + "\n")
        print(FAMILIES)
    else:
        print("\n".join(names()))


if __name__ == "__main__":
    main()
