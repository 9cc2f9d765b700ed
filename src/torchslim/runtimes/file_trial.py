"""Tries files in a child process first, where a runtime may crash instead of raising an error.

The files of an artifact may come from anyone, so they are tried once whatever their operations are. Files that ran are
recorded in the cache folder, in a subfolder for each package, under a seal of this user's secret, so that no other user
can vouch for them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import indent

import numpy as np
from torch import Tensor

from torchslim.core.hardware import cache_folder, instruction_set
from torchslim.core.schema import shorten
from torchslim.core.seals import own_secret, seal
from torchslim.errors import ArtifactError
from torchslim.runtimes.base import as_array

LIMIT_S = 900.0  # to read, compile and run a model once
RAN, UNREADY, RAISED, NO_MEMORY = 0, 1, 3, 4  # exit statuses of a child that ends by itself
GROWTH = 2**30
RELATIVE = 64
"""Bytes of memory to read, compile and run a model: `GROWTH` and `RELATIVE` times its files and inputs; on Linux."""
STACK = 2**23  # bytes of a thread's stack; a runtime has one thread for each processor core
# a child leaves no core file; `imports` stand before the limit of memory, which counts from there on
_CHILD = """
import json, sys
folder, path = sys.argv[1], json.loads(sys.argv[2])
sys.path[:] = path
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    resource = None
{imports}
growth = int(sys.argv[5])
if growth and resource is not None and sys.platform == "linux":
    about = dict(line.split(":", 1) for line in open("/proc/self/status"))
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [int(about["VmData"].split()[0]) * 1024 + growth, before, most]
    resource.setrlimit(resource.RLIMIT_DATA, (min(each for each in limits if each >= 0), most))
names, file = json.loads(sys.argv[3]), sys.argv[4]
values = [numpy.load(f"{{folder}}/{{index}}.npy", allow_pickle=False) for index in range(len(names))]
try:
{run}
except Exception as error:
    memory = isinstance(error, MemoryError) or "bad_alloc" in str(error)
    sys.stdout.buffer.write(str(error).encode("utf-8", "replace")[:100_000])
    sys.exit(4 if memory else 3)
"""


def child_program(imports: str, run: str) -> str:
    """The program of a child that tries a file.

    Args:
        imports: lines that import numpy and the runtime.
        run: lines that run `file` in `folder` on `values`, arrays by the order of `names`.
    """
    return _CHILD.format(imports=imports.strip(), run=indent(run.strip(), "    "))


def try_files(
    files: Mapping[str, bytes],
    inputs: Sequence[Tensor],
    *,
    child: str,
    engine: str,
    package: str,
    limit_s: float = LIMIT_S,
) -> str:
    """Read, compile and run a model of an artifact once in a child process, unless this user has run it before.

    Args:
        files: the runtime's files by suffix, such as `.xml` and `.bin`; the child reads the first.
        inputs: tensors in the order of the model's inputs.
        child: the program that the child runs, as `child_program` gives it.
        engine: name of the runtime, for messages.
        package: the runtime's package, whose version the record of files that ran names.
        limit_s: the time that the child may take, in seconds.

    Returns:
        the runtime's error message; empty if the model runs.

    Raises:
        ArtifactError: the child crashed, could not begin, did not end in time, or ran out of memory.
    """
    mark = _mark(files, package)
    if mark is not None and mark.exists():
        return ""
    advice = "the file is damaged or malicious; load it with runtime='eager', which reads its program instead"
    size = sum(map(len, files.values())) + sum(input_.numel() * input_.element_size() for input_ in inputs)
    growth = GROWTH + RELATIVE * size
    named_files = {f"model{suffix}": data for suffix, data in files.items()}
    try:
        result = run_child(named_files, inputs, range(len(inputs)), child, limit_s, growth=growth)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"{engine} did not compile and run the model within {limit_s:g} s in a child process; {advice}"
        ) from error
    if result.returncode == RAISED:
        return result.stdout.decode(errors="replace") or "an error without a message"
    if result.returncode == NO_MEMORY:
        raise ArtifactError(f"the {engine} model takes more than {growth:,} bytes to compile and run; {advice}")
    if result.returncode == UNREADY:
        raise ArtifactError(
            f"the child process that tries the {engine} model did not start: "
            f"{shorten(result.stderr.decode(errors='replace')[-300:], 300)}; load it with trusted=True if you trust it"
        )
    if result.returncode != RAN:
        raise ArtifactError(
            f"{engine} crashes on the model: a child process that ran it ended {ending(result.returncode)}; {advice}"
        )
    if mark is not None:
        _remember(mark)
    return ""


def run_child(
    files: Mapping[str, bytes],
    inputs: Sequence[Tensor],
    names: Sequence[str | int],
    child: str,
    limit_s: float,
    *,
    growth: int,
) -> subprocess.CompletedProcess[bytes]:
    """Run a child on files, of which it reads the first, and inputs by name or position; return its result.

    The child may take `growth` bytes on top of those at its start; 0 sets no limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        for index, input_ in enumerate(inputs):
            np.save(Path(folder) / f"{index}.npy", as_array(input_))
        limit = growth and growth + STACK * (os.cpu_count() or 1)
        arguments = [folder, json.dumps(sys.path), json.dumps(list(names)), next(iter(files)), str(limit)]
        command = [sys.executable, "-W", "ignore", "-c", child, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)


def _mark(files: Mapping[str, bytes], package: str) -> Path | None:
    """Path that records that these files ran here with this version of a runtime; None without a secret."""
    secret = own_secret()
    if secret is None:
        return None
    content = [part for suffix in sorted(files) for part in (suffix, files[suffix])]
    return cache_folder() / package / seal(secret, package, version(package), instruction_set(), *content)


def _remember(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return  # the cache cannot be written: the files are tried again next time


def ending(status: int) -> str:
    """How a child ended, from its exit status."""
    if status < 0 and -status in {int(number) for number in signal.Signals}:
        return f"by {signal.Signals(-status).name}"
    return f"with status {status}"
