"""Fixtures of the whole suite."""

from typing import Any

import pytest
import torch as th


@pytest.fixture
def execution() -> dict[str, Any]:
    """
    Keywords of SACV for tests of what an update computes. Eager is the execution by which it is defined; test_execution.py
    compares every other one with it, since compiling here would take seconds for each test.
    """
    return {"execution": "eager"}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are so small that a second thread only costs; sums have one order then."""
    th.set_num_threads(1)
