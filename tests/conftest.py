"""Settings that every test runs under: one thread, derandomized hypothesis, a fixed seed."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.command import call  # noqa: F401 - a fixture
from tests.support.exports import shared_tables
from tests.support.processors import PROCESSORS, detected
from tests.support.rehearsals import skip
from tests.support.timing import shorten

settings.register_profile(
    "laws", deadline=None, derandomize=True, database=None, max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("laws")

GPU_TESTS = Path(__file__).parent / "gpu"


if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise torch looks for a driver again in every capture


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a browser, a database or a GPU, by its fixtures, parameters and folder."""
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
        if "postgresql" in item.nodeid:
            item.add_marker(pytest.mark.database)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--processor avx2` runs all tests as if torchslim had detected that processor."""
    parser.addoption("--processor", choices=[*PROCESSORS], help="the processor that torchslim detects in all tests")
    parser.addoption("--gpu-device", choices=["cuda", "cpu"], default="cuda", help="the device of tests/gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Before the test modules are imported: some of them compute expected ranges then."""
    if name := config.getoption("--processor"):
        os.environ["TORCHSLIM_PROCESSOR"] = name  # for the processes that tests start
        forced = detected(name)
        forced.__enter__()
        config.add_cleanup(lambda: forced.__exit__(None, None, None))


@pytest.fixture(params=[*PROCESSORS])
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once for each simulated processor."""
    with detected(request.param) as name:
        yield name


@pytest.fixture(autouse=True, scope="session")
def _shared_tables() -> Iterator[None]:
    with shared_tables():
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_timings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_rehearsals() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        skip(patch)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_stays_on() -> Iterator[None]:
    """No test leaves the process's logging off, which would hide what later tests look for."""
    yield
    assert not logging.root.manager.disable


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves figures of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def children_end_as_before() -> Iterator[None]:
    """A loader with workers leaves a handler for the end of any child, which ends a test process at the next one."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
