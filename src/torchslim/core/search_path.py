"""Search the current folder last for modules, when torchslim runs from the command line.

`python -m` puts the current folder first, so a `json.py` or `torch.py` in a folder from elsewhere would run in place of
the installed one. This file imports only modules that Python has loaded at its start.
"""

import os
import sys


def started_as_module() -> bool:
    """Whether `python -m torchslim` is importing the package, before any of its code has run."""
    command = sys.orig_argv
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    return sys.argv[:1] == ["-m"] and module in (["torchslim"], ["torchslim.__main__"])


def current_folder_last() -> None:
    """Move the current folder from the front of the path, where `python -m` puts it, to the end, or add it there.

    If PYTHONPATH names the folder, that entry keeps its place.
    """
    folder = os.getcwd()  # noqa: PTH109 - pathlib is not imported here
    if sys.path and sys.path[0] in ("", folder) and not sys.flags.safe_path:
        del sys.path[0]
    if folder not in sys.path:
        sys.path.append(folder)
