"""What a recipe names is imported and never called by a check; failures of its code are one clear error with the line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchslim.core.imports import foreign, own_line, resolve
from torchslim.errors import RecipeError, TaskError
from torchslim.pipeline.recipe import check_names, made, parse_document

ROOT = Path(__file__).parents[2]
SHADOWS = ("json", "torch", "numpy", "click", "tomllib", "rich", "pydantic", "optuna", "onnx", "logging")


def document(**changes: Any) -> dict[str, Any]:
    return {
        "model": "tests.support.toy:model",
        "task": "tests.support.toy:task",
        "step": [{"do": "prune", "sparsity": 0.5}],
        **changes,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "'package.module:name'.*None"),
        ("", "must be written"), ("os", "must be written"), ("os:", "must be written"), (":system", "must be written"),
        ("os:a:b", "must be written"), ("os :system", "must be written"), ("../evil:name", "must be written"),
        ("os:system()", "must be written"), ("a" * 20_000 + ":b", "must be written"), ("os:1", "must be written"),
        ("tests.support.toy:Net.__init__.__globals__", "'__init__' is internal to Python"),
        ("builtins:__import__", "'__import__' is internal to Python"),
        ("tests.support.toy:nothing", "module 'tests.support.toy' has no 'nothing'"),
        ("tests.support.toy:Net.nothing", "has no 'Net.nothing'"),
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(spec, "model")


CODE = {
    "exits": "import sys\n\nsys.exit(3)\n",
    "raises": "\n\n1 / 0\n",
    "syntax": "\n\ndef (\n",
    "missing": "import no_such_module_anywhere\n",
    "recurses": "def f():\n    f()\nf()\n",
    "escapes": "raise ValueError('\\x1b[2J')\n",
}


@pytest.mark.parametrize("name", CODE)
def test_code_that_fails_is_one_error_with_its_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"users_{name}.py").write_text(CODE[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TaskError, match=rf"task 'users_{name}:task'.*imported.*users_{name}\.py, line \d") as caught:
        resolve(f"users_{name}:task", "task", TaskError)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_factory_that_exits_is_one_error_and_an_interrupt_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_factories.py").write_text("import sys\ndef exits():\n    sys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_names(document(model="users_factories:exits"))
    with pytest.raises(RecipeError, match=r"model .* cannot be made: SystemExit: 3 \(.*users_factories\.py, line 3\)"):
        made(document(model="users_factories:exits"))
    with pytest.raises(KeyboardInterrupt), foreign("it", RecipeError):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "do",
    ["os:system", "subprocess:Popen", "builtins:print", "sys:exit", "tests.support.toy:Net", "tests.support.toy:model"],
)
@pytest.mark.parametrize("place", ["step", "train", "response", "feature"])
def test_a_recipe_calls_no_function_that_it_names(do: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it was called"))
    table: dict[str, Any] = {"do": do, "command": "touch pwned", "args": ["false"]}
    steps = {
        "step": [table],
        "train": [{"do": "prune", "sparsity": 0.5, "train": table}],
        "response": [{"do": "distill", "response": table}],
        "feature": [{"do": "distill", "feature": [table]}],
    }
    with pytest.raises(RecipeError, match="frozen dataclass"):
        parse_document(document(step=steps[place]))


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "torchslim"], ["-c", "from torchslim.cli import main; main()"]])
def test_files_of_the_current_folder_do_not_come_before_installed_packages(command: list[str], tmp_path: Path) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("import os\nos.write(2, b'shadowed')\nos._exit(9)\n")
    (tmp_path / "my_own_code.py").write_text((ROOT / "tests" / "support" / "toy.py").read_text())
    (tmp_path / "recipe.toml").write_text(
        'model = "my_own_code:model"\ntask = "my_own_code:task"\n[[step]]\ndo = "prune"\nsparsity = 0.5\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    safe = [] if command[0] == "-m" else ["-P"]  # a console script has its own folder first, as -P has none
    done = subprocess.run([sys.executable, *safe, *command, "check", "recipe.toml"], cwd=tmp_path, capture_output=True,
                          text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    assert "shadowed" not in done.stderr


def own_code() -> None:
    torch.nn.functional.linear(torch.ones(2, 3), torch.ones(2, 4))  # fails inside of PyTorch


def test_the_line_of_the_users_code_is_outside_of_torchslim_pytorch_and_python() -> None:
    for fails, line in ((own_code, own_code.__code__.co_firstlineno + 1), (lambda: json.loads("{"), None)):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            fails()
        found = own_line(caught.value)
        assert found.startswith(f"{__file__}, line ")
        assert line is None or found.endswith(f"line {line}")


def test_an_error_of_torchslim_alone_has_no_line_of_the_user() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("", "model")
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # type: ignore[union-attr]  # without this test
    assert own_line(caught.value) == ""
