"""Ridge regression on running sums, against numpy's least squares."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchslim.prune.reconstruction.solve import Sums, masked, solve

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4))


def data(sizes: tuple[int, int, int], rows: int, seed: int) -> tuple[Tensor, Tensor]:
    groups, features, outputs = sizes
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, groups, features, generator=generator, dtype=torch.float64)
    truth = torch.randn(groups, features, outputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, groups, outputs, generator=generator, dtype=torch.float64)
    return inputs, torch.einsum("rgf,gfo->rgo", inputs, truth) + 0.3 * noise


def sums(inputs: Tensor, residual: Tensor) -> Sums:
    total = Sums.empty(*inputs.shape[1:], residual.shape[-1], torch.device("cpu"))
    for part in zip(inputs.split(9), residual.split(9), strict=True):
        total.add(*part, part[1])
    return total


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_the_update_is_that_of_least_squares(sizes: tuple[int, int, int], seed: int) -> None:
    inputs, residual = data(sizes, 60, seed)
    total = sums(inputs, residual)
    support = torch.ones_like(total.cross, dtype=torch.bool)
    for update in (torch.linalg.solve(total.gram, total.cross), masked(total.gram, total.cross, support)):
        for group in range(sizes[0]):
            expected = np.linalg.lstsq(inputs[:, group].numpy(), residual[:, group].numpy(), rcond=None)[0]
            np.testing.assert_allclose(update[group].numpy(), expected, rtol=1e-7, atol=1e-7)
    update = solve(total, sums(inputs, residual)).update  # held-out rows that are the fitted ones: no penalty is best
    assert update is not None
    torch.testing.assert_close(update, torch.linalg.solve(total.gram, total.cross), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_masked_elements_do_not_change_and_the_others_are_least_squares(sizes: tuple[int, int, int], seed: int) -> None:
    inputs, residual = data(sizes, 60, seed)
    total = sums(inputs, residual)
    support = torch.rand(total.cross.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    update = masked(total.gram, total.cross, support)
    assert not update[~support].any()
    for group in range(sizes[0]):
        for output in range(sizes[2]):
            kept = support[group, :, output].numpy()
            given_, wanted = inputs[:, group].numpy()[:, kept], residual[:, group, output].numpy()
            expected = np.linalg.lstsq(given_, wanted, rcond=None)[0]
            np.testing.assert_allclose(
                update[group, support[group, :, output], output].numpy(), expected, rtol=1e-6, atol=1e-6
            )


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, rows=st.integers(2, 12), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_error_never_rises(sizes: tuple[int, int, int], rows: int, seed: int, share: float) -> None:
    inputs, residual = data(sizes, 2 * rows, seed)
    fit, held = sums(inputs[:rows], residual[:rows]), sums(inputs[rows:], residual[rows:])
    support = torch.rand(fit.cross.shape, generator=torch.Generator().manual_seed(seed)) <= share
    solution = solve(fit, held, None if share == 1 else support)
    assert solution.after <= solution.before
    if solution.update is not None:
        left = residual - torch.einsum("rgf,gfo->rgo", inputs, solution.update)
        total = fit.plus(held)
        assert abs(total.error(solution.update) - float(left.square().sum())) <= 1e-9 * total.squares
        assert float(left.square().sum()) <= total.squares * (1 + 1e-12)


def test_an_update_that_hurts_elsewhere_is_not_made() -> None:
    inputs, residual = data((1, 4, 2), 40, 0)
    assert solve(sums(inputs, residual), sums(inputs, -residual)).update is None
