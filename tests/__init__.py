"""The tests. Processes that a test starts with one of its modules detect the processor that `--processor` names."""

import os

if _name := os.environ.get("TORCHSLIM_PROCESSOR"):
    from tests.support.processors import detected

    detected(_name).__enter__()
