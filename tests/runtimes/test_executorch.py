"""ExecuTorch: bounds of free sizes, threads, layers without an integer kernel, and files that others wrote."""

from __future__ import annotations

import functools
import struct

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.compiled import deploy
from torchslim.errors import ArtifactError, DeployError
from torchslim.quantize import sqnr
from torchslim.runtimes import Deployed, executorch, kernels
from torchslim.runtimes.executorch_trial import check_pte, survive_pte

pytestmark = pytest.mark.slow


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x)).mean(1))


@functools.cache
def small() -> Deployed:
    torch.manual_seed(0)
    return deploy(Tokens().eval(), (torch.randn(2, 5, 4),), runtime="executorch", threads=1)


def test_a_free_size_is_bounded_by_the_examples_and_the_batch_by_64() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    examples = [(torch.randn(2, length, 4),) for length in (3, 9)]
    found = deploy(model, examples, runtime="executorch", dynamic_shapes="auto")  # type: ignore[arg-type]
    for shape in ((1, 9, 4), (64, 3, 4), (64, 9, 4)):
        x = torch.randn(shape)
        assert torch.allclose(found(x), model(x), atol=1e-5)
    for shape, words in (((65, 9, 4), "at most 64"), ((2, 10, 4), "at most 9")):
        with pytest.raises(DeployError, match=words):
            found(torch.randn(shape))


def test_programs_of_different_numbers_of_threads_take_turns() -> None:
    """ExecuTorch has one pool of threads; a program that keeps a replaced pool crashes the process."""
    first, x = small(), torch.randn(3, 5, 4)
    expected = first(x)
    second = executorch.RUNTIME.read(first.payload, first.spec, 2)  # type: ignore[misc, arg-type]
    for _ in range(2):
        assert torch.allclose(second([x])[0], expected, atol=1e-6)
        assert torch.allclose(first(x), expected, atol=1e-6)


def test_weights_without_an_integer_kernel_become_floats_and_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    quantized, x = ts.quantize.weights(model, (torch.randn(2, 3, 6, 6),), bits=4), torch.randn(2, 3, 6, 6)
    found = deploy(quantized, (x,), runtime="executorch", threads=1)
    assert sqnr(quantized(x), found(x)) >= 100
    assert not any(kernel.integer for kernel in kernels(found))
    assert any("0, 2" in note for note in found.notes)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.one(x)), torch.relu(self.three(3 * x))], 1))


def test_a_concatenation_of_values_on_different_grids_is_computed_on_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    quantized = ts.quantize.static(Joined().eval(), [(x,)], runtime="executorch")
    found = deploy(quantized, (x,), runtime="executorch", threads=1)
    assert sqnr(quantized(x), found(x)) >= 30
    assert any("cat" in kernel.type and kernel.integer for kernel in kernels(found))


def test_what_is_no_whole_file_is_refused() -> None:
    good = small().payload
    assert good is not None
    check_pte(good)
    for bad in (b"", good[:20], b"\0" * 100, good[: len(good) // 2], good[:4] + b"PK" + good[6:]):
        with pytest.raises(ArtifactError, match=r"no \.pte file, or not whole"):
            check_pte(bad)


def test_a_file_that_crashes_or_fails_ends_nothing() -> None:
    good, inputs = small().payload, [torch.randn(2, 5, 4)]
    assert good is not None
    assert survive_pte({".pte": good}, inputs) == ""
    root = struct.unpack_from("<I", good)[0]
    damaged = good[:root] + bytes(byte ^ 0x55 for byte in good[root : root + 400]) + good[root + 400 :]
    try:
        message = survive_pte({".pte": damaged}, inputs)
    except ArtifactError as error:
        message = str(error)
    assert message


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.padded, self.head = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.padded(torch.relu(self.layer(x)))))


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_with_integer_weights_alone_round_their_rows(bits: int) -> None:
    """The file stores the integers; a padded group of 4 bits has no kernel. Costs 8 s each."""
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    model = Wide().eval()
    quantized = ts.quantize.weights(model, (x,), bits=bits)
    found, floats = deploy(quantized, (x,), runtime="executorch", threads=1), deploy(model, (x,), runtime="executorch")
    assert sqnr(quantized(x), found(x)) >= 35
    integer = {kernel.layer for kernel in kernels(found) if kernel.integer}
    assert integer == {"layer", "head"} | ({"padded"} if bits == 8 else set())
    assert any("padded" in note for note in found.notes) == (bits == 4)
    assert found.size_bytes < floats.size_bytes  # type: ignore[operator]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.layer(x)).cumsum(1)


def test_operations_on_portable_kernels_have_a_reason() -> None:
    torch.manual_seed(0)
    found = deploy(Odd().eval(), (torch.randn(2, 4),), runtime="executorch", threads=1)
    portable = {kernel.type: kernel.why for kernel in kernels(found) if kernel.type.startswith("portable")}
    assert set(portable) == {"portable: erf", "portable: cumsum"}
    assert all(portable.values())
    assert any("erf" in note and "cumsum" in note and "XNNPACK" in note for note in found.notes)
    assert not any(kernel.why for kernel in kernels(found) if kernel.type.startswith("xnnpack"))


class Bottleneck(nn.Module):
    """Several layers between the two readers of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.deep, self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return x + self.narrow(torch.relu(self.deep(torch.relu(self.wide(x)))))


def test_a_residual_block_is_one_program_on_integers() -> None:
    """Readers that shared a conversion made a group that depended on itself: the lowering failed."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    quantized = ts.quantize.static(Bottleneck().eval(), [(x,)], runtime="executorch", observer="min-max")
    found = deploy(quantized, (x,), runtime="executorch", threads=1)
    assert sqnr(quantized(x), found(x)) >= 30
    work = [kernel for kernel in kernels(found) if "conv" in kernel.type or "add" in kernel.type]
    assert len(work) == 5
    assert all(kernel.integer for kernel in work)
