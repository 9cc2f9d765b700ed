"""TOML that is written is TOML that is read."""

import datetime
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchslim.core.toml_writer import dumps
from torchslim.errors import RecipeError

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
LEAVES = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXT
    | st.datetimes()
    | st.datetimes(timezones=st.just(datetime.UTC))
    | st.dates()
    | st.times()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=12
)
DOCUMENTS = st.dictionaries(TEXT | st.sampled_from(["search", "do", "step"]), VALUES, max_size=4)


@pytest.mark.slow
@given(DOCUMENTS)
def test_what_is_written_is_read_as_the_same(document):
    text = dumps(document)
    assert tomllib.loads(text) == document
    assert dumps(tomllib.loads(text)) == text


def test_not_a_number_stays_one():
    assert math.isnan(tomllib.loads(dumps({"a": math.nan}))["a"])


def test_a_recipe_looks_as_people_write_it():
    document = {
        "step": [
            {"do": "prune", "sparsity": {"search": [0.2, 0.8], "step": 0.1}, "skip": {"search": [True, False]}},
            {"do": "quantize", "train": {"do": "distill", "epochs": 2}},
        ],
        "budget": {"metric_drop": 0.5, "minimize": ("latency",)},
        "runtime": {"search": ["onnxruntime", "openvino"]},
        "model": "a.b:c",
    }
    assert dumps(document) == (
        'runtime = { search = ["onnxruntime", "openvino"] }\n'
        'model = "a.b:c"\n'
        "\n"
        "[[step]]\n"
        'do = "prune"\n'
        "sparsity = { search = [0.2, 0.8], step = 0.1 }\n"
        "skip = { search = [true, false] }\n"
        "\n"
        "[[step]]\n"
        'do = "quantize"\n'
        'train = { do = "distill", epochs = 2 }\n'
        "\n"
        "[budget]\n"
        "metric_drop = 0.5\n"
        'minimize = ["latency"]\n'
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"step": [{"threads": None}]}, "threads: .*type.*None"),
        ({"a": {1: 2}}, "key.*text.*got 1"),
        ({"a": {"b": object}}, "b: .*type.*<class 'object'>"),
        ({"a": "\ud800"}, "no valid Unicode"),
    ],
)
def test_what_toml_cannot_hold_is_refused(document, message):
    with pytest.raises(RecipeError, match=message):
        dumps(document)
