"""Small random models of the library transformers, and sentences of several lengths for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WORDS, CLASSES = 40, 3


def _config(**options: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, **{"num_labels": CLASSES, **options},
    )  # fmt: skip


def _made(name: str, seed: int, **options: Any) -> Any:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(_config(**options)).eval()


def classifier(seed: int = 0) -> Any:
    """Of sentences."""
    return _made("BertForSequenceClassification", seed)


def tagger(seed: int = 0) -> Any:
    """Of tokens."""
    return _made("BertForTokenClassification", seed)


def masked(seed: int = 0) -> Any:
    """Predicts words."""
    return _made("BertForMaskedLM", seed)


def causal(seed: int = 0) -> Any:
    """Predicts the next word."""
    return _made("BertLMHeadModel", seed, is_decoder=True)


def reader(seed: int = 0) -> Any:
    """Finds the first and the last word of an answer."""
    return _made("BertForQuestionAnswering", seed, num_labels=2)


def samples(count: int, seed: int, kind: str = "classifier") -> list[dict[str, Any]]:
    """Sentences of 4 to 9 words with a class, or with a class or word for every token."""
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        length = int(torch.randint(4, 10, (1,), generator=generator))
        words = torch.randint(1, WORDS, (length,), generator=generator)
        labels: Any = {"classifier": int(words[0]) % CLASSES, "tagger": words % CLASSES}.get(kind, words.clone())
        made.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return made


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded to its longest sentence."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name: str, fill: int) -> Tensor:
        rows = [torch.as_tensor(item[name]) for item in items]
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows])

    batch = {name: padded(name, 0) for name in ("input_ids", "attention_mask")}
    scalar = torch.as_tensor(items[0]["labels"]).dim() == 0
    labels = torch.tensor([int(item["labels"]) for item in items]) if scalar else padded("labels", -100)
    return {**batch, "labels": labels}
