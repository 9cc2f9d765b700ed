"""The wheel in an environment of its own: the README's examples run there, in an empty folder, without any extra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from torchslim import __version__

ROOT = Path(__file__).parents[2]
EXTRAS = (
    "executorch",
    "openvino",
    "optuna",
    "scipy",
    "psycopg",
    "cryptography",
    "sklearn",
    "torchvision",
    "timm",
    "transformers",
    "tests",
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel; the packages that it depends on are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", next(folder.glob("*.whl")), cwd=folder)
    own = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # the .pth files there are not followed
    absent = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))"  # importing one of them fails
    (own / "extras.pth").write_text(absent)
    return python


def test_the_readme_runs_with_nothing_but_the_package(python: Path, tmp_path: Path) -> None:
    """Costs 40 s: the blocks but those of a budget, which need the extra "search"."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    where = "import torchslim; print('from', torchslim.__file__)\n"
    out = run(python, "-c", "\n".join([*blocks, where]), cwd=tmp_path)
    assert f"from {python.parents[1]}" in out
    assert " dB" in out
    assert "artifact" in out
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_writes_a_starter_and_checks_it(python: Path, tmp_path: Path) -> None:
    command = python.with_name("torchslim")
    assert __version__ in run(command, "--version", cwd=tmp_path)
    run(command, "init", ".", cwd=tmp_path)
    assert run(command, "check", "recipe.toml", cwd=tmp_path).rstrip().endswith("ok")
