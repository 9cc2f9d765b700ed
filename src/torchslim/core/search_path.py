"""Where the command line looks for modules: the current folder comes last.

`python -m` puts the current folder first, so that a `json.py` or `torch.py` in a folder from elsewhere would run in
place of the installed one. This file imports nothing that Python has not loaded at its start.
"""

import os
import sys


def started_as_module() -> bool:
    """Is `python -m torchslim` just importing the package, before anything of ours has run?"""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    return sys.argv[:1] == ["-m"] and module in (["torchslim"], ["torchslim.__main__"])


def current_folder_last() -> None:
    """Move the current folder from the front of the path, where `python -m` has put it, to its end, or add it there.

    A folder that PYTHONPATH names stays where it stands.
    """
    here = os.getcwd()  # noqa: PTH109 - pathlib is not imported here
    if sys.path and sys.path[0] in ("", here) and not sys.flags.safe_path:
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)
