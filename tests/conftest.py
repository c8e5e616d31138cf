"""Fixtures of the whole suite."""

import signal
from collections.abc import Callable, Sequence
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


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """
    Dynamo traces as ever, and Inductor, which takes ten seconds for each graph, leaves it as it is: the numbers are those of
    eager updates to the bit. Gives the number of inputs of each graph that was compiled.
    """
    import torch._inductor

    made: list[int] = []

    def compile_nothing(graph: th.fx.GraphModule, inputs: Sequence[th.Tensor], options: Any = None) -> Callable[..., Any]:
        made.append(len(inputs))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    return made


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are so small that a second thread only costs; sums have one order then."""
    th.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts background jobs with Ctrl-C ignored; processes that tests interrupt would inherit that and never end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
