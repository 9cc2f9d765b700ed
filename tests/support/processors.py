"""Processors that tests simulate, so that every machine tests what depends on the instruction set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from torchslim.core.hardware import instruction_set

# what torch.cpu.get_capabilities tells of each, by the name that `instruction_set` gives it
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "avx2": {"architecture": "x86_64", "avx2": True},
    "avx512": {"architecture": "x86_64", "avx2": True, "avx512_f": True},
    "avx-vnni": {"architecture": "x86_64", "avx2": True, "avx_vnni": True},
    "avx512-vnni": {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_vnni": True},
    "amx": {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_vnni": True, "amx_int8": True},
    "aarch64": {"architecture": "aarch64", "neon": True, "dot": True},
}
SATURATING = frozenset({"avx2", "avx512"})  # sums of two 8-bit products stay in 16 bits


@contextmanager
def detected(name: str) -> Iterator[str]:
    """Let torchslim detect a processor of `PROCESSORS`; kernels still run on the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: PROCESSORS[name], raising=False)
        instruction_set.cache_clear()
        try:
            yield name
        finally:
            patch.undo()
            instruction_set.cache_clear()
