"""Description of this machine, and instruction set of its processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torchslim", "torch", "torchao", "onnxruntime", "onnx", "lightning-fabric", "numpy")


@cache
def instruction_set() -> str:
    """Instruction set for int8: "amx", "avx512-vnni", "avx-vnni", "avx512", "avx2", or the architecture."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities:  # versions of torch without get_capabilities
        capabilities = {
            "avx512_vnni": torch.cpu._is_vnni_supported(),
            "avx512_f": torch.cpu._is_avx512_supported(),
            "avx2": torch.cpu._is_avx2_supported(),
        }
    for name, flag in (
        ("amx", "amx_int8"),
        ("avx512-vnni", "avx512_vnni"),
        ("avx-vnni", "avx_vnni"),
        ("avx512", "avx512_f"),
        ("avx2", "avx2"),
    ):
        if capabilities.get(flag):
            return name
    return str(capabilities.get("architecture") or platform.machine())


def saturates() -> bool:
    """Whether sums of two u8 x s8 products saturate at 16 bits (x86 without VNNI): weights must stay within 7 bits.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and why do I need to
    try U8U8".
    """
    return instruction_set() in ("avx2", "avx512", "x86_64", "AMD64")


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, memory, system and versions, for reports."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        if hasattr(os, "sysconf")
        else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Folder for cached data of this machine: `torchslim` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchslim"
