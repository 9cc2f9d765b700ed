"""Mutated recipes and search recipes: parsed as `torchslim check` parses them."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from tests.mutations.base import Kind, absurd, garbled, mutated
from tests.support.searches import NAMES, SPACE
from torchslim.core.budget import Budget
from torchslim.pipeline.document import parse_toml
from torchslim.pipeline.recipe import KEYS, KINDS, parse_document
from torchslim.tuning import make_space
from torchslim.tuning.space import has_ranges

PLAIN = (
    """
    runtime = "onnxruntime"
    threads = 2
    seed = 3
    [[step]]
    do = "prune"
    sparsity = 0.5
    of = "macs"
    pattern = "channel"
    criterion = "taylor"
    round_to = 4
    exclude = ["head"]
    train = { do = "finetune", epochs = 2, lr = 1e-3 }
    schedule = "iterative"
    rounds = 2
    [[step]]
    do = "distill"
    epochs = 5
    optimizer = "sgd"
    response = { do = "kd", temperature = 4.0, alpha = 0.9 }
    feature = [{ do = "hint", weight = 2.0 }, "attention_transfer"]
    relation = [{ do = "rkd" }]
    taps = { "conv1" = "conv1" }
    [[step]]
    do = "quantize"
    scheme = "int8"
    mode = "qat"
    train = { do = "distill", epochs = 2 }
    layers = { "head" = "float" }
    """,
    """
    teacher = "tests.support.toy:model"
    engine = { accelerator = "cpu", devices = 1, strategy = "auto", precision = "32-true" }
    sensitivity = "runs/x/sensitivity.json"
    [[step]]
    do = "prune"
    sparsity = { "conv1" = 0.3, "head*" = 0.8 }
    include = "type:Conv2d"
    [[step]]
    do = "prune"
    sparsity = 0.5
    schedule = "gradual"
    until = 0.5
    train = { do = "finetune" }
    [[step]]
    do = "finetune"
    epochs = 1
    weight_decay = 0.0
    clip_norm = 1.0
    accumulate = 2
    average = 0.9
    patience = 1
    lr_scale = { "conv?" = 0.5 }
    [[step]]
    do = "tests.support.toy:Shift"
    by = 1.0
    [[step]]
    do = "quantize"
    scheme = "int8-dynamic"
    """,
    """
    [[step]]
    do = "prune"
    pattern = "slice"
    n = 1.0
    dim = 0
    threshold = 0.01
    [[step]]
    do = "distill"
    response = "dkd"
    teacher = "tests.support.toy:model"
    label_weight = 0.5
    [[step]]
    do = "quantize"
    layers = "auto"
    metric_drop = 0.5
    accuracy = "best"
    smooth = 0.5
    rounding = "gptq"
    """,
)
RANGES = (
    SPACE.removeprefix(NAMES)
    .replace("[budget]", "threads = 1\n[budget]")
    .replace(
        "= 1.0", '= 1.0\nlatency_ms = 3.0\nminimize = ["latency", "size"]\ntrials = 10\nfinalists = 2\nhours = 1.5', 1
    )
    .replace(
        "sparsity = { search = [0.2, 0.8] }", 'pattern = "channel"\nsparsity = { search = [0.2, 0.8], step = 0.1 }'
    ),
    """
    [budget]
    size_mb = 1.0
    [[step]]
    do = "prune"
    sparsity = { search = [0.1, 0.2, 0.4] }
    criterion = { search = ["l1", "l2", "taylor"] }
    train = { do = "finetune", epochs = { search = [1, 4] }, optimizer = { search = ["sgd", "adamw"] } }
    [[step]]
    do = "quantize"
    mode = { search = ["ptq", "qat"] }
    learned_step = { search = [false, true] }
    """,
)


def documents(texts: tuple[str, ...]) -> list[Any]:
    """Good recipes."""
    return [tomllib.loads(NAMES + text) for text in texts]


FIELDS = sorted(
    {each.name for kind in (*KINDS.values(), Budget) for each in fields(kind)} | {*KEYS, "do", "search", "log", "step", "skip"}
)  # fmt: skip
VALUES = absurd(
    *KINDS, {"do": "os:system", "command": "false"}, {"do": "subprocess:Popen", "args": ["false"]}, {"do": "kd"},
    {"do": "finetune", "epochs": 1}, {"search": [0.1, 0.2]}, {"search": [1e308, 1e309]}, {"search": [-1, 10**30]},
    {"search": ["int8", "float"]}, {"search": [{"do": "os:system"}, {"do": "kd"}]}, {"search": []}, {"search": {}},
    {"search": [1, 2], "log": 3}, {"search": [1, 9], "step": 0}, {"search": [{"search": [1, 2]}, 3]}, {"do": 1},
    {"search": list(range(5_000))}, {"search": [1e-300, 1e300], "log": True},
)  # fmt: skip


def check(document: Any) -> object:
    """As `torchslim check` does."""
    if has_ranges(document):
        space = make_space(document)
        return [space.recipe(values) for values in space.starts]
    return parse_document(document)


def check_text(text: str) -> object:
    """A file's text."""
    return check(parse_toml(text))


RECIPES = mutated(documents(PLAIN), keys=FIELDS, values=VALUES)
SEARCHES = mutated(documents(RANGES), keys=FIELDS, values=VALUES)

KINDS_OF_RECIPES = (
    Kind(name="recipe", group="recipes", examples=RECIPES, attempt=check),
    Kind(name="search recipe", group="recipes", examples=SEARCHES, attempt=check),
    Kind(name="recipe text", group="recipes", examples=garbled(st.sampled_from([NAMES + each for each in (*PLAIN, *RANGES)])),
         attempt=check_text),
)  # fmt: skip
