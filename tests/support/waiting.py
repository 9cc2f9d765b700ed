"""Wait until something holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 400.0  # seconds; a busy machine takes minutes to import torch in several processes


def until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `holds` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
    return value
