"""The boundary for JSON: whatever comes in, a checked value or the one error comes out."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from torchslim.core.schema import Limits, Schema, parse_json, read_file, shorten
from torchslim.errors import ArtifactError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: Annotated[int, Field(ge=0, le=10)]
    name: str = ""


POINT = Schema[Point](Point, "point.json", ArtifactError, also=lambda point: "x is 7" if point.x == 7 else None)


@given(JSON)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value), "file", ArtifactError) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "file", ArtifactError) == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_anything_else_is_the_error(data: bytes | str) -> None:
    assume(not _is_json(data))
    for parse in (POINT.parse, lambda given: parse_json(given, "file", ArtifactError)):
        with pytest.raises(ArtifactError, match=r"(?s)damaged: .*; copy it again$"):
            parse(data)


def _is_json(data: bytes | str) -> bool:
    with suppress(ValueError):
        json.loads(data)
        return True
    return False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        ("NaN", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "a number is too large"),
        (str(2**63), "beyond 64 bits"),
        ("9" * 5000, "digits"),
        ("[" * 66 + "]" * 66, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("[0" + ",0" * 2_000_000 + "]", "more than 1,000,000 values"),
        ('"' + "a" * 2**24 + '"', "larger than 16,777,216 bytes"),
        ('{"a"', "Expecting"),
    ],
    ids=range(12),
)
def test_each_kind_of_damage_is_named(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_json(text, "file", ArtifactError)


def test_as_deep_and_as_large_as_is_allowed() -> None:
    assert parse_json("[[1]]", "f", ArtifactError, limits=Limits(depth=2, values=2, size_bytes=5)) == [[1]]
    for limits in (Limits(depth=1), Limits(values=1), Limits(size_bytes=4)):
        with pytest.raises(ArtifactError):
            parse_json("[[1]]", "f", ArtifactError, limits=limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": 3, "y": 1}', "point.json.*damaged: y: Extra inputs are not permitted, got 1.*copy"),
        ("{}", "x: Field required; copy"),
        ('{"x": "3"}', "x: Input should be a valid integer, got '3'"),
        ('{"x": true}', "x: Input should be a valid integer, got True"),
        ('{"x": 3.0}', "x: Input should be a valid integer, got 3.0"),
        ('{"x": 11}', "less than or equal to 10, got 11"),
        ('{"x": 7}', "x is 7; copy"),
        ("[]", "got 'list'"),
        ('{"x": 1, "\\u001b[2J": 1}', r"damaged: \\x1b\[2J: Extra"),
    ],
)
def test_a_schema_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        POINT.parse(text)
    assert str(caught.value).isprintable()
    with pytest.raises(ArtifactError, match=message):
        POINT.check(json.loads(text))


def test_a_file_is_read_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text('{"x": 2}')
    assert POINT.read(path) == Point(x=2)
    assert read_file(path, ArtifactError, size_bytes=8) == b'{"x": 2}'
    with pytest.raises(ArtifactError, match="larger than 7 bytes"):
        read_file(path, ArtifactError, size_bytes=7)
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "pipe": "not an ordinary",
        ".": "not an ordinary|cannot be",
        "no": "not exist",
        "a\0": "cannot",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            POINT.read(tmp_path / name)


@given(st.text() | st.integers() | st.lists(st.integers()))
def test_what_goes_into_a_message_is_short_and_printable(value: Any) -> None:
    text = shorten(value)
    assert len(text) <= 60
    assert text.isprintable()
