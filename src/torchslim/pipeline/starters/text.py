"""The model, the data and the metric of recipe.toml, for text: replace the three functions by your own."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchslim as ts

CLASSES, WORDS, LENGTH = 2, 200, 24


class Sentences(Dataset[dict[str, Tensor]]):
    """Your dataset, as a tokenizer gives it. Here words below 100 speak for class 0, the others for class 1."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        words = torch.randint(2, 100, (count, LENGTH), generator=generator) + 98 * self.labels[:, None]
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.words = words * self.mask  # 0 is the padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """Your network: forward takes the keys of a batch except the labels, by name."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return logits


def model() -> nn.Module:
    """Your trained network: build it and load its weights."""
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)  # in place of: network.load_state_dict(...)
    for batch in DataLoader(Sentences(512, 1), batch_size=32):
        optimizer.zero_grad()
        logits = network(batch["input_ids"], batch["attention_mask"])
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
    return network.eval()


def task() -> ts.Task:
    """The loaders and the metric. `val` chooses, `test` is only reported."""
    return ts.Task(
        train=DataLoader(Sentences(512, 1), batch_size=32, shuffle=True),
        val=DataLoader(Sentences(128, 2), batch_size=32),
        test=DataLoader(Sentences(128, 3), batch_size=32),
        metric="accuracy",  # or ts.Metric(...), or a function (predict, batches) -> float
    )
