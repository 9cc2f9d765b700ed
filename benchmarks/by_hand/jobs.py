"""The jobs that are compared: what they load, in small, and who runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

import torchslim as ts
from torchslim.pipeline.recipe import load_recipe

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
OURS, FLOAT = "torchslim", "float"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of the gallery with the scripts of other libraries.

    Args:
        recipe: of torchslim's side.
        load: the trained model, and the task with the data that all sides train on.
        epochs: of training, in all, of the other sides; torchslim's are in its recipe.
        task: a file, and the functions in it that a user writes for torchslim alone; they count as its lines.
        scripts: modules of other sides, by their names in the table.
    """

    recipe: Path
    load: Callable[[], tuple[nn.Module, ts.Task]]
    epochs: int
    task: tuple[Path, frozenset[str]]
    scripts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of all sides."""
        return (OURS, *self.scripts)


def compress(job: Job, model: nn.Module, task: ts.Task, seed: int, folder: Path) -> Path:
    """The file that torchslim's recipe makes; `test` is kept from it, as from the others."""
    recipe = load_recipe(job.recipe)
    training = dataclasses.replace(task, test=None)
    runtime = recipe.target.runtime
    result = ts.compress(model, training, recipe.steps, runtime=runtime, threads=1, seed=seed, workdir=folder / "work")
    return result.save(folder / "artifact") / "model.onnx"


def _images(train: int = 4_000, val: int = 1_000) -> tuple[nn.Module, ts.Task]:
    from examples.fashion_mnist import resnet, task
    from examples.fashion_mnist.data import Batches, splits

    (images, labels), (val_images, val_labels) = splits()["train"], splits()["val"]
    small = Batches((images[:train], labels[:train]), 128, augment=True)
    return resnet(), dataclasses.replace(task(), train=small, val=Batches((val_images[:val], val_labels[:val]), 500))


def _sentences() -> tuple[nn.Module, ts.Task]:
    from examples.sentences.task import model, task

    return model(), task()


def _series() -> tuple[nn.Module, ts.Task]:
    from examples.series.task import model, task

    return model(), task()


JOBS: Mapping[str, Job] = {
    "images": Job(
        recipe=EXAMPLES / "fashion_mnist" / "recipe.toml",
        load=_images,
        epochs=4,
        task=(EXAMPLES / "fashion_mnist" / "__init__.py", frozenset({"task"})),
        scripts={"by hand": "images", "fasterai": "images_fasterai"},
    ),
    "sentences": Job(
        recipe=EXAMPLES / "sentences" / "recipe.toml",
        load=_sentences,
        epochs=0,
        task=(EXAMPLES / "sentences" / "task.py", frozenset({"task", "split"})),
        scripts={"by hand": "sentences", "fasterai": "sentences_fasterai"},
    ),
    "series": Job(
        recipe=HERE / "series.toml",
        load=_series,
        epochs=0,
        task=(EXAMPLES / "series" / "task.py", frozenset({"task", "loaders"})),
        scripts={"by hand": "series", "fasterai": "series_fasterai"},
    ),
}
