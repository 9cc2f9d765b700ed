"""Trains the demo's baseline and writes `baseline.safetensors`: python -m examples.fashion_mnist.baseline"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.fashion_mnist import WEIGHTS, task
from examples.fashion_mnist.model import ResNet
from torchslim.core.batches import predictor
from torchslim.core.step import Context, Event
from torchslim.training.finetune import Finetune


def main() -> None:
    """Train with SGD and a cosine schedule, keep the epoch that is best on validation, report on test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path(".data/baseline"), help="a killed run resumes from here")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model, data = ResNet(), task()
    started = time.time()

    def show(event: Event) -> None:
        if event.current % 100 == 0:
            print(
                f"{time.time() - started:6.0f} s  {event.current}/{event.total}  {dict(event.values)}",
                flush=True,
            )

    training = Finetune(
        epochs=arguments.epochs, optimizer="sgd", lr=0.1, weight_decay=1e-3, warmup=0.05, schedule="cosine"
    )
    ctx = Context(
        task=data,
        teacher=model,
        example_inputs=(torch.zeros(2, 1, 28, 28),),
        seed=arguments.seed,
        progress=show,
        state=arguments.state,
    )
    report = training.fit(model, ctx)
    for row in report.history:
        print(json.dumps(row))
    save_file(model.state_dict(), WEIGHTS)
    print(f"best epoch {report.best_epoch}: {report.best_value:.2f} % on validation")
    print(f"test accuracy {data.evaluate(predictor(model), 'test'):.2f} %, {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
