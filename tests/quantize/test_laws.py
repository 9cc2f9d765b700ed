"""Whatever the network: what is converted equals its fake-quantized twin, and ONNX Runtime equals what is converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchslim as ts
from tests.support.random_networks import conv_networks, token_networks
from torchslim.core.batches import call
from torchslim.quantize import convert, prepare, sqnr

TWIN_DB = 60.0  # but for float rounding that turns a half the other way, it is the same computation
RUNTIME_DB = 40.0


@pytest.mark.slow
@settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(conv_networks(), token_networks()), st.sampled_from(["int8", "int8", "int8-weights"]))
def test_twin_graph_and_runtime_agree(network: tuple[Any, Any], scheme: str) -> None:
    model, inputs = network
    model.eval()
    prepared = prepare(model, inputs, scheme=scheme, qat=True)
    if scheme == "int8":
        prepared.calibrate([inputs])
    prepared.eval()
    with torch.no_grad():
        twin = call(prepared, inputs)
        converted = convert(prepared)
        found = call(converted, inputs)
    assert sqnr(twin, found) > TWIN_DB
    assert sqnr(found, call(ts.deploy(converted, inputs), inputs)) > RUNTIME_DB
