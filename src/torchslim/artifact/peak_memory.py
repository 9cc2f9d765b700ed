"""Measure the memory that a deployed model takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from torchslim.artifact.storage import write_artifact
from torchslim.errors import DeployError
from torchslim.runtimes import Deployed

RUNS = 3

PROGRAM = """
import json, resource, sys

def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024

import torchslim as ts
from torchslim.artifact.opened import open_artifact
from torchslim.artifact.latency import resized

folder, threads, runtime, runs = json.loads(sys.argv[1])
warm = ts.deploy(__import__("torch").nn.Linear(1, 1), (__import__("torch").ones(1, 1),), runtime=runtime)
warm.run(list(warm.example))  # the runtime's own code and arenas are there before
before = peak()
deployed = ts.load(folder, threads=threads, trusted=True)
leaves = resized(deployed, inputs=deployed.largest)
for _ in range(runs):
    deployed.run(leaves)
print(json.dumps(peak() - before))
"""


def peak_memory(deployed: Deployed) -> int:
    """Bytes by which loading a deployed model and running it, a sample a call, raises the peak of a fresh process.

    Where sizes vary, it runs on the largest example. The runtime itself is loaded before, with a model of one weight.

    Raises:
        DeployError: the process failed; names its last message.
    """
    with tempfile.TemporaryDirectory(prefix="torchslim-") as folder:
        write_artifact(folder, deployed=deployed)
        arguments = json.dumps([folder, deployed.threads, deployed.runtime, RUNS])
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=False
        )
    if process.returncode:
        last = (process.stderr.strip() or "no message").splitlines()[-1]
        raise DeployError(f"the memory of the model could not be measured: its process ended with {last}")
    return int(json.loads(process.stdout.strip().splitlines()[-1]))
