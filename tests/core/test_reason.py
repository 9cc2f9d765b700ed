"""Reasons are told apart by their member, whatever details follow."""

from __future__ import annotations

import json
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from torchslim.core.reason import Reason


@given(st.sampled_from(Reason), st.text())
def test_a_reason_is_found_in_its_text_alone(reason: Reason, detail: str) -> None:
    text = reason.with_detail(detail)
    assert [each for each in Reason if each.given_in(text)] == [reason]
    assert json.loads(json.dumps([reason, text])) == [reason.value, text]


def test_no_reason_begins_another() -> None:
    assert not any(a.value.startswith(b.value) for a, b in permutations(Reason, 2))
