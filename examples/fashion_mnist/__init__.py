"""The demo: a trained residual network on Fashion-MNIST, compressed by `recipe.toml`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import torchslim as ts
from examples.fashion_mnist.data import Batches, locate, splits
from examples.fashion_mnist.model import ResNet

WEIGHTS = Path(__file__).parent / "baseline.safetensors"


def resnet() -> nn.Module:
    """The trained baseline, in eval mode (`make baseline` trained it); on the digits, one trained here in seconds."""
    if locate() is None:
        return trained_on_digits()
    model = ResNet().eval()
    model.load_state_dict(load_file(WEIGHTS))
    return model


def trained_on_digits() -> nn.Module:
    """A baseline for the data that needs no download."""
    data = task()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet()
    ctx = ts.Context(task=data, teacher=model, example_inputs=(torch.zeros(2, 1, 28, 28),))
    ts.Finetune(epochs=10, optimizer="sgd", lr=0.05).fit(model, ctx)
    return model.eval()


def task(batch_size: int = 128) -> ts.Task:
    """Train on 55,000 augmented images, select on 5,000, report on 10,000."""
    data = splits()
    return ts.Task(
        train=Batches(data["train"], batch_size, augment=True),
        val=Batches(data["val"], 500),
        test=Batches(data["test"], 500),
        calibration=Batches((data["train"][0][:512], data["train"][1][:512]), 128),
        metric="accuracy",
    )
