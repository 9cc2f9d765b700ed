"""Uses of weights: every product and convolution is the linear regression that it is taken for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from torchslim.prune.dependency.trace import elementary
from torchslim.prune.reconstruction.uses import Others, Use, Watch


def uses(
    model: nn.Module, *inputs: Tensor, others: Others | None = None, heard: Callable[[Use], None] | None = None
) -> list[Use]:
    found: list[Use] = []

    def note(use: Use) -> None:
        if heard is not None:
            heard(use)  # at once: later operations may work in place
        found.append(use)

    with elementary(model.eval()), Watch(model, note, others=others):
        model(*inputs)
    return found


def check(model: nn.Module, *inputs: Tensor) -> list[Use]:
    """Features times weights are the outputs, in any order of rows; written weights are read again."""
    parameters = dict(model.double().named_parameters())

    def regress(use: Use) -> None:
        rows = torch.randperm(use.rows)[: max(use.rows // 2, 1)]
        weight = use.matrix(parameters[use.weight].detach())
        made = torch.einsum("rgf,gfo->rgo", use.features(rows), weight).flatten(1)
        if use.bias is not None:
            made = made + parameters[use.bias]
        torch.testing.assert_close(made, use.outputs(rows))

    found = uses(model, *(value.double() for value in inputs), heard=regress)
    for use in found:
        weight = torch.randn_like(use.matrix(parameters[use.weight].detach()))
        use.write(weight)
        assert torch.equal(use.matrix(parameters[use.weight].detach()), weight)
    return found


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(CONVOLUTIONS),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
    extra=st.integers(0, 1),
)
def test_convolutions(
    kind: type[nn.Module],
    groups: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    bias: bool,
    mode: str,
    extra: int,
) -> None:
    options: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }
    if "Transpose" in kind.__name__:
        options["output_padding"] = min(extra, stride - 1)
    else:
        options["padding_mode"] = mode
    spatial = int(kind.__name__[-2])
    (use,) = check(kind(4, 8, kernel, **options), torch.randn(2, 4, 7, 6, 5)[(..., *[0] * (3 - spatial))])
    assert (use.bias is not None) == bias


class Functional(nn.Module):
    """Products as user code writes them: either side, batched, with slices of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 5))
        self.fused = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:  # (2, 5, 6)
        mixed = self.left @ (x @ self.right)  # (2, 3, 4)
        query, key = self.fused.chunk(2)
        return functional.linear(mixed, query) + mixed.transpose(0, 1).reshape(3, 2, 4).transpose(0, 1) @ key.T


@pytest.mark.parametrize(
    ("model", "inputs", "weights"),
    [
        (nn.Linear(5, 3), (torch.randn(4, 2, 5),), ["weight"]),
        (nn.Linear(5, 3), (torch.randn(2, 5, 4).mT,), ["weight"]),
        (Functional(), (torch.randn(2, 5, 6),), ["right", "left", "fused", "fused"]),
        (nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3, ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(8, 2),
            (torch.randn(3, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)),
            ["in_proj_weight"] * 3 + ["out_proj.weight"],
        ),
        (nn.LSTM(4, 3), (torch.randn(2, 1, 4),), ["weight_ih_l0", "weight_hh_l0", "weight_hh_l0"]),
        (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), (torch.randn(2, 3, 5, 5),), ["weight"]),
    ],
    ids=["linear", "strided", "functional", "attention", "cross attention", "lstm", "channels last"],
)
def test_products(model: nn.Module, inputs: Sequence[Tensor], weights: list[str]) -> None:
    names = [use.weight for use in check(model, *inputs)]
    assert sorted(set(names)) == sorted(set(weights))
    if not isinstance(model, nn.LSTM):  # the number of products per step is torch's choice
        assert len(names) >= len(set(weights))


def test_other_operations_are_noted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.T

    others = Others()
    uses(Tied(), torch.arange(3), others=others)
    assert others.reasons == {"table.weight": "embedding reads it"}
