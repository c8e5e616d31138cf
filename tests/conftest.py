"""Fixtures of the whole suite."""

from typing import Any

import pytest
import torch as th

# Ways in which a gradient step can run, with the keywords of SACV that choose it. A test that takes the ``execution``
# fixture is run once for each of them. Compiling takes seconds each time: test_execution.py compares the compiled and the
# captured executions with the eager one, in scenarios that hold what these tests vary.
EXECUTIONS: dict[str, dict[str, Any]] = {"eager": {"execution": "eager"}}


@pytest.fixture(params=EXECUTIONS)
def execution(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keywords of SACV that choose how a gradient step runs."""
    return EXECUTIONS[request.param]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are so small that a second thread only costs; sums have one order then."""
    th.set_num_threads(1)
