"""Attention with masks: captured without PyTorch's fused kernel, and right for masks that were not captured with."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

import torchslim as ts
from torchslim.core.isolation import unfused_attention

WIDTH, LENGTH = 8, 5


class Encoder(nn.Module):
    def __init__(self, *, is_causal: bool | None = None, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)
        nested = not layer.norm_first  # PyTorch warns of the other combination
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)
        self.is_causal = is_causal

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.is_causal)


class Sequences(nn.Module):
    """All masks that `nn.Transformer` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, *masks: Tensor) -> Tensor:
        return self.transformer(source, target, *masks)


class LanguageModel(nn.Module):
    """The mask is made in forward, as in PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.encoder(self.embedding(tokens), mask=mask)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(query, memory, memory, key_padding_mask=padding)  # type: ignore[no-any-return]


def hidden(rows: int, columns: int, seed: int) -> Tensor:
    """A mask that leaves the first key to every query."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask[:, 0] = False
    return mask


def infinite(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


def padded(batch: int, length: int, seed: int) -> Tensor:
    sizes = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) >= sizes[:, None]


def normal(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
CASES: dict[str, tuple[Any, Any]] = {
    "float mask": (Encoder, lambda n, s: (normal(n), infinite(hidden(LENGTH, LENGTH, s)) if s else CAUSAL)),
    "bool mask": (lambda: Encoder(norm_first=True), lambda n, s: (normal(n), hidden(LENGTH, LENGTH, s))),
    "is_causal": (lambda: Encoder(is_causal=True), lambda n, s: (normal(n), CAUSAL)),
    "padding": (lambda: Encoder(activation="gelu"), lambda n, s: (normal(n), None, padded(n, LENGTH, s))),
    "both": (Encoder, lambda n, s: (normal(n), hidden(LENGTH, LENGTH, s), padded(n, LENGTH, s))),
    "six masks": (
        Sequences,
        lambda n, s: (
            normal(n), normal(n, 4), hidden(LENGTH, LENGTH, s), hidden(4, 4, s), hidden(4, LENGTH, s),
            padded(n, LENGTH, s), padded(n, 4, s + 1), padded(n, LENGTH, s),
        ),
    ),
    "made in forward": (LanguageModel, lambda n, s: (torch.randint(20, (n, LENGTH)),)),
    "weights": (CrossAttention, lambda n, s: (normal(n, 3), normal(n), padded(n, LENGTH, s))),
}  # fmt: skip


# OpenVINO reads the ONNX model that ONNX Runtime runs: three kinds are enough
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runtime"),
    [(name, runtime) for name in CASES for runtime in ("eager", "onnxruntime")]
    + [(name, "openvino") for name in ("float mask", "padding", "six masks")],
)
def test_masks_stay_inputs_and_the_batch_stays_free(name: str, runtime: str) -> None:
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    deployed = ts.deploy(model, inputs(2, 0), runtime=runtime)
    assert deployed.spec.batch_axis == 0, deployed.spec.notes
    for batch, seed in ((2, 1), (4, 2), (1, 3)):
        given = inputs(batch, seed)
        wanted = model(*given)  # with gradients, so that PyTorch takes no fused kernel either
        torch.testing.assert_close(deployed(*given), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "inductor"])
def test_the_layers_of_an_encoder_are_quantized(runtime: str) -> None:
    torch.manual_seed(0)
    prepared = ts.quantize.prepare(LanguageModel().eval(), (torch.randint(20, (2, LENGTH)),), runtime=runtime)
    quantized = {record.layer for record in prepared.records if record.action == "quantized"}
    assert {"encoder.layers.0.linear1", "encoder.layers.0.linear2", "encoder.layers.0.self_attn"} <= quantized


@pytest.mark.slow
def test_a_mask_of_infinities_is_calibrated_with() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    batches = [(normal(4), infinite(hidden(LENGTH, LENGTH, seed))) for seed in range(3)]
    quantized = ts.quantize.static(model, batches, runtime="eager")
    given = (normal(4), infinite(hidden(LENGTH, LENGTH, 9)))
    assert ts.quantize.sqnr(model(*given), quantized(*given)) > 20


def switches() -> tuple[bool, Any]:
    return torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask


@pytest.mark.parametrize("enabled", [True, False])
def test_the_switches_are_set_back_after_an_error(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    before = switches()
    try:
        with pytest.raises(ZeroDivisionError), unfused_attention(), unfused_attention():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise ZeroDivisionError
        assert switches() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_threads_that_overlap_set_the_switches_back() -> None:
    before = switches()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with unfused_attention():
            inside.set()
            leave.wait(10)

    with unfused_attention():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert not torch.backends.mha.get_fastpath_enabled()  # the other thread is inside
    leave.set()
    thread.join()
    assert switches() == before


def test_outside_of_a_capture_a_causal_mask_is_still_found() -> None:
    with unfused_attention():
        assert transformer._detect_is_causal_mask(CAUSAL, None, LENGTH)
        assert not transformer._detect_is_causal_mask(infinite(hidden(LENGTH, LENGTH, 1)), None, LENGTH)
