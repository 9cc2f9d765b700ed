"""Recipes: what is accepted, and that every mistake names the file, the step, the key and the way out."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch import nn

import torchslim as ts
from torchslim.core.fingerprint import canonical
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import load_recipe, parse_recipe

HEAD = 'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\n'


def steps(text: str) -> tuple[ts.Step, ...]:
    return parse_recipe(HEAD + text, "my.toml").steps


def test_a_recipe_and_python_make_the_same_steps() -> None:
    made = steps(
        """
        [[step]]
        do = "prune"
        sparsity = { "conv1" = 0.3, "head*" = 0.8 }
        exclude = ["conv2", "type:BatchNorm2d"]
        [[step]]
        do = "prune"
        sparsity = 0.5
        schedule = "gradual"
        train = { do = "distill", epochs = 2, response = { do = "kd", temperature = 2, alpha = 1.0 } }
        [[step]]
        do = "quantize"
        scheme = "int8"
        """
    )
    assert made == (
        ts.Prune(sparsity={"conv1": 0.3, "head*": 0.8}, exclude=("conv2", "type:BatchNorm2d")),
        ts.Prune(
            sparsity=0.5,
            schedule="gradual",
            train=ts.Distill(epochs=2, response=ts.KD(temperature=2.0, alpha=1.0)),
        ),
        ts.Quantize("int8"),
    )


def test_every_field_of_every_step_survives_the_recipe() -> None:
    made = steps('[[step]]\ndo = "finetune"\nepochs = 7\nlr = 1e-2\nkeep = "last"\noptimizer = "sgd"')
    assert made == (ts.Finetune(epochs=7, lr=1e-2, keep="last", optimizer="sgd"),)


def test_top_level_keys_reach_the_run() -> None:
    recipe = parse_recipe(
        HEAD + 'runtime = "eager"\nthreads = 2\nseed = 3\nengine = { precision = "32-true" }\n'
        '[[step]]\ndo = "prune"\nsparsity = 0.5'
    )
    assert recipe.target == ts.Target(runtime="eager", threads=2)
    assert recipe.seed == 3
    assert recipe.engine == ts.Engine(precision="32-true")
    model, task, teacher = recipe.load()
    assert isinstance(model, nn.Module)
    assert isinstance(task, ts.Task)
    assert teacher is None


def test_free_sizes_are_a_word_or_lists_of_dimensions() -> None:
    step = '[[step]]\ndo = "prune"\nsparsity = 0.5'
    for text, expected in (
        ("", "auto"),
        ('dynamic_shapes = "fixed"\n', "fixed"),
        ("dynamic_shapes = { input_ids = [0, 1] }\n", {"input_ids": (0, 1)}),
    ):
        assert parse_recipe(HEAD + text + step).dynamic_shapes == expected
    for text in ('"every"', "3", "{ input_ids = [] }", '{ input_ids = ["batch"] }'):
        with pytest.raises(RecipeError, match="dynamic_shapes.*'auto', 'batch', 'fixed'"):
            parse_recipe(HEAD + f"dynamic_shapes = {text}\n" + step)


def test_a_step_of_the_users_own_needs_no_registration() -> None:
    (made,) = steps('[[step]]\ndo = "tests.support.toy:Shift"\nby = 1')
    assert (type(made).__name__, made.by) == ("Shift", 1.0)
    with pytest.raises(RecipeError, match=r"my\.toml: step 1 .*unknown key 'bye'.*'by'"):
        steps('[[step]]\ndo = "tests.support.toy:Shift"\nbye = 1')


PRUNE = '[[step]]\ndo = "prune"\nsparsity = 0.5\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[step]]\ndo = "prune"\nsparsty = 0.5', r"my\.toml: step 1 \('prune'\): unknown key 'sparsty'.*'sparsity'"),
        ('[[step]]\ndo = "prun"', r"my\.toml: step 1 \('prun'\).*not known.*'prune'"),
        ("[[step]]\nsparsity = 0.5", r"my\.toml: step 1 needs a key 'do'"),
        ('[[step]]\ndo = "prune"\nsparsity = "half"', r"my\.toml: step 1 \('prune'\), key 'sparsity': got 'half'"),
        ('[[step]]\ndo = "distill"\nepochs = 1.5', r"step 1 \('distill'\), key 'epochs': got 1\.5"),
        ('[[step]]\ndo = "distill"\nepochs = true', r"step 1 \('distill'\), key 'epochs': got True"),
        ('[[step]]\ndo = "prune"\nsparsity = 1.0', r"my\.toml: step 1 \('prune'\): sparsity must be in \[0, 1\).*got 1\.0"),
        ('[[step]]\ndo = "prune"\nsparsity = nan', r"my\.toml: step 1 \('prune'\), key 'sparsity': got nan.*finite"),
        ('[[step]]\ndo = "prune"\nsparsity = -0.1', r"sparsity must be in \[0, 1\).*got -0\.1"),
        ('[[step]]\ndo = "distill"\nresponse = { do = "kd", temprature = 1 }', r"key 'response' \('kd'\): unknown key 'temprature'.*'temperature'"),
        ('[[step]]\ndo = "distill"\nresponse = { do = "kd", temperature = 0 }', r"key 'response' \('kd'\): temperature must be"),
        ('[[step]]\ndo = "kd"', r"step 1.*is a loss"),
        ('[[step]]\ndo = "prune"\nsparsity = 0.5\ntrain = { do = "kd" }', r"key 'train': got KD"),
        ('[[step]]\ndo = "quantize"\n' + PRUNE, r"step 2 \('prune'\).*'module'.*step 1 \('quantize'\).*'quantized'.*step 2 before step 1"),
        ('[[step]]\ndo = "distill"\nfeature = [{ do = "hnt" }]', r"\('hnt'\).*not known.*'hint'.*hint, attention_transfer, fsp, vid, review_kd, token_mse, token_cosine"),
        ('[[step]]\ndo = "quantize"\nscheme = "int9"', r"scheme 'int9'.*not known.*'int8'"),
        ('[[step]]\ndo = "no.such.module:Step"', r"cannot be imported: ModuleNotFoundError"),
        ('[[step]]\ndo = "tests.support.toy:Missing"', r"module 'tests\.support\.toy' has no 'Missing'"),
        ('runtime = "tpu"\n' + PRUNE, r"runtime 'tpu'.*not known.*eager"),
        ("threads = 0\n" + PRUNE, r"key 'threads': got 0.*whole number from 1 to 1024"),
        ("thread = 1\n" + PRUNE, r"unknown key 'thread'.*'threads'"),
        ('engine = { device = "cpu" }\n' + PRUNE, r"engine: unknown key 'device'.*'devices'"),
        ("[step]\ndo = 1", r"steps.*\[\[step\]\]"),
        ("seed = ", r"my\.toml is not valid TOML"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_place_and_the_way_out(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        steps(text)


def test_missing_parts_are_named() -> None:
    with pytest.raises(RecipeError, match="the key 'task' is missing"):
        parse_recipe('model = "tests.support.toy:model"\n' + PRUNE)
    with pytest.raises(RecipeError, match="nowhere.toml.*not exist.*recipe"):
        load_recipe(Path("nowhere.toml"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tests.nothing:model", "model 'tests.nothing:model' cannot be imported: ModuleNotFoundError"),
        ("tests.support.toy", "model.*'package.module:name'.*'tests.support.toy'"),
        ("tests.support.toy:task", "model 'tests.support.toy:task'.*Module.*got Task"),
        ("tests.support.toy:CLASSES", "model 'tests.support.toy:CLASSES'.*Module.*got int"),
    ],
)
def test_what_a_recipe_names_must_be_what_it_says(model: str, message: str) -> None:
    recipe = parse_recipe(f'model = "{model}"\ntask = "tests.support.toy:task"\n{PRUNE}')
    with pytest.raises(RecipeError, match=message):
        recipe.load()


def test_steps_that_differ_are_told_apart_and_equal_ones_are_not() -> None:
    def one(weight: object, statistics: object) -> object:
        return weight

    def other(weight: object, statistics: object) -> object:
        return None

    assert canonical(ts.Prune(sparsity=0.5)) == canonical(ts.Prune(sparsity=0.5))
    different = [ts.Prune(sparsity=0.5), ts.Prune(sparsity=0.6), ts.Prune(sparsity=0.5, criterion=one)]
    different += [ts.Prune(sparsity=0.5, criterion=other), ts.Prune(sparsity=0.5, train=ts.Finetune())]
    assert len({str(canonical(step)) for step in different}) == len(different)


class Threshold:
    """A criterion that is an object."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, weight: object, statistics: object) -> object:
        return weight


def scaled(weight: object, statistics: object, level: float = 0.0) -> object:
    return weight


def test_what_a_function_captures_tells_it_apart() -> None:
    def make(level: float) -> object:
        return lambda weight, statistics: weight * level

    for kind in (make, Threshold, lambda level: functools.partial(scaled, level=level)):
        one, same, other = (canonical(ts.Prune(sparsity=0.5, criterion=kind(level))) for level in (1.0, 1.0, 2.0))
        assert one == same
        assert one != other
