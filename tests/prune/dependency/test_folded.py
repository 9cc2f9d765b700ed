"""Channels and something else folded into one dimension, as spline layers fold theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.channel_laws import assert_runs, remove


class Spline(nn.Module):
    """A Kolmogorov-Arnold layer: functions of each input by coefficients over a basis."""

    def __init__(self, inside: int, out: int, count: int = 4, order: int = 2, *, einsum: bool = False) -> None:
        super().__init__()
        self.out, self.order, self.einsum, step = out, order, einsum, 2 / count
        knots = torch.arange(-order, count + order + 1) * step - 1
        self.register_buffer("grid", knots.expand(inside, -1).contiguous())
        self.base = nn.Parameter(torch.randn(out, inside) * 0.2)
        self.spline = nn.Parameter(torch.randn(out, inside, count + order) * 0.1)

    def basis(self, x: Tensor) -> Tensor:
        grid, x = self.grid, x.unsqueeze(-1)
        found = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)])
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
            found = left * found[:, :, :-1] + right * found[:, :, 1:]
        return found

    def forward(self, x: Tensor) -> Tensor:
        base, found = F.linear(F.silu(x), self.base), self.basis(x)
        if self.einsum:
            return base + torch.einsum("nic,oic->no", found, self.spline)
        return base + F.linear(found.reshape(x.size(0), -1), self.spline.view(self.out, -1))


class Radial(nn.Module):
    """The same with a basis of Gaussians around shared centers, the coefficients folded the other way around."""

    def __init__(self, inside: int, out: int, count: int = 5) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(-1, 1, count))
        self.spline = nn.Parameter(torch.randn(count, inside, out) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        found = (-(x[:, None] - self.centers[:, None]).square() * 4).exp()
        return found.flatten(1) @ self.spline.flatten(0, 1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["folded", "einsum", "radial"])
def test_spline_layers_lose_their_hidden_channels(kind: str, seed: int) -> None:
    torch.manual_seed(seed)

    def layer(inside: int, out: int) -> nn.Module:
        return Radial(inside, out) if kind == "radial" else Spline(inside, out, einsum=kind == "einsum")

    model, inputs = nn.Sequential(layer(5, 12), layer(12, 9), layer(9, 3)).eval(), (torch.randn(4, 5) * 0.5,)
    _, done = remove(model, inputs, seed, 0.5)
    dims = (1, 2) if kind == "radial" else (1, 0)
    for one, two, width in ((0, 1, 12), (1, 2, 9)):
        left = done.model[one].spline.shape[dims[1]]
        assert left == done.model[two].spline.shape[dims[0]]
        assert left <= width
    assert sum(each.spline.shape[dims[1]] for each in done.model) <= 3 + 11
    assert_runs(model, done.model, inputs)
