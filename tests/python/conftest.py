"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as the command line does

import pytest
from hypothesis import HealthCheck, settings

from models_for_tests import threads

# The same examples on every run, and no time limits: a busy machine must not turn a test red.
settings.register_profile(
    "tutelage", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tutelage")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small steps: two threads on a busy machine wait for each other. No bit depends on it."""
    with threads(1):
        yield
