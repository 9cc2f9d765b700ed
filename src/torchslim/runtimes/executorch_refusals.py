"""Why XNNPACK's partitioner leaves operations to ExecuTorch's portable kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LOGGER = "executorch.backends.xnnpack.partition"
NO_KERNEL = "XNNPACK has no kernel for it"


class _Reasons(logging.Handler):
    """Collects the reasons that the partitioner logs for its developers: the first of each node."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.by_node: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take the reason out of a record of `executorch.exir.backend.utils.WhyNoPartition`."""
        node, reason = getattr(record.msg, "node", None), getattr(record.msg, "reason", "")
        if node is not None and reason:
            self.by_node.setdefault(str(node.name), str(reason))


@contextmanager
def refusals() -> Iterator[Mapping[str, str]]:
    """Yield the reasons for nodes that a lowering in the block refuses, by name; filled while it runs."""
    logger, handler = logging.getLogger(LOGGER), _Reasons()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.by_node
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
