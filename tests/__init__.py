"""The tests. Processes that a test starts with one of its modules detect the processor that `--processor` names."""

import os

if _name := os.environ.get("TORCHSLIM_PROCESSOR"):
    from tests.support.processors import detected

    _forced = detected(_name)  # held: what it has set is undone with it
    _forced.__enter__()
