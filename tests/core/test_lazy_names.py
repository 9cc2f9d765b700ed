"""Packages import their public names when these are first read."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import torchslim

SOURCE = Path(torchslim.__file__).parent
PACKAGES = ("torchslim", "torchslim.prune", "torchslim.quantize", "torchslim.distill")
OPTIONAL = [
    "torchao",
    "onnx",
    "onnxruntime",
    "lightning_fabric",
    "plotly",
    "jinja2",
    "optuna",
    "scipy",
    "transformers",
    "torch._dynamo",
]
HEAVY = [*OPTIONAL, *["torch", "numpy", "sympy", "pydantic", "click"]]


def typed_homes(package: str) -> dict[str, str]:
    """Full names of the modules from which type checkers import the names of a package."""
    path = SOURCE.joinpath(*package.split(".")[1:], "__init__.py")
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    (block,) = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.name: node.module or "" for node in imports for alias in node.names if alias.asname is None}


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_those_that_type_checkers_see(package: str) -> None:
    module = importlib.import_module(package)
    homes = typed_homes(package)
    assert sorted(homes) == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    public = {name for name in dir(module) if not name.startswith("_")}
    assert set(module.__all__) <= public
    assert all(inspect.ismodule(getattr(module, name)) for name in public - set(module.__all__))


@pytest.mark.parametrize("package", PACKAGES)
def test_other_names_are_modules_or_errors(package: str) -> None:
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'absent'"):
        module.absent  # noqa: B018 - reading it raises
    assert not hasattr(module, "__wrapped__")
    assert torchslim.errors.TorchslimError is torchslim.TorchslimError


def test_a_missing_dependency_of_a_module_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torchslim.cli")  # so that there is something to forget, whichever test runs first
    monkeypatch.delitem(sys.modules, "torchslim.cli")
    monkeypatch.delattr(torchslim, "cli", raising=False)
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(ModuleNotFoundError, match="click"):
        torchslim.cli  # noqa: B018 - reading it raises


def test_importing_torchslim_loads_only_pythons_own_modules() -> None:
    code = f"import sys, torchslim; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.slow  # 4 s: a fresh process imports torch
def test_the_public_names_load_no_optional_dependency() -> None:
    code = (
        "import sys, torchslim as ts; names = [getattr(part, name) for part in (ts, ts.prune, ts.quantize, ts.distill)"
        f" for name in part.__all__]; print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
