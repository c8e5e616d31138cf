"""CUDA's streams and graphs on a CPU: a graph runs again what it has recorded, and a stream knows what it has waited for."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_softvalue.execution import captured, optimizers

# Of the operations on all streams
_NUMBERS = itertools.count()


class Stream:
    """Knows the operations after which everything on it runs."""

    current: "Stream"

    def __init__(self) -> None:
        self.before: set[int] = set()

    def record_event(self) -> frozenset[int]:
        return frozenset(self.before)

    def wait_event(self, event: frozenset[int]) -> None:
        self.before |= event

    def wait_stream(self, stream: "Stream") -> None:
        self.before |= stream.before


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    yield
    Stream.current = before


def storages(values: Any) -> set[int]:
    """Addresses of all tensors."""
    return {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(values) if isinstance(tensor, th.Tensor)} - {0}


class Recorder(TorchDispatchMode):
    """Records all operations. Fails where one reads what its stream has not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, tuple[Callable[..., Any], Sequence[Any], dict[str, Any], Any]] = {}
        self.streams: dict[int, Stream] = {}
        self._written: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # so that Dynamo runs what it has compiled also here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results, number, stream = func(*args, **(kwargs or {})), next(_NUMBERS), Stream.current
        read = storages((args, kwargs))
        unseen = {self._written[place] for place in read if place in self._written} - stream.before
        assert not unseen, (
            f"{func} reads what {self.calls[unseen.pop()][0]} writes on another stream, and does not wait for it"
        )
        written = read | storages(results) if func._schema.is_mutable else storages(results) - read
        self._written |= dict.fromkeys(written, number)
        stream.before.add(number)
        self.calls[number] = func, args, kwargs or {}, results
        self.streams[number] = stream
        return results

    @th.no_grad()
    def replay(self) -> None:
        """Everything once more, from and to where it was."""
        for func, args, kwargs, results in self.calls.values():
            new, read = func(*args, **kwargs), storages((args, kwargs))
            for old, tensor in zip(tree_leaves(results), tree_leaves(new), strict=True):
                if isinstance(old, th.Tensor) and not storages(old) & read:
                    old.copy_(tensor)


class Graph:
    """What is captured on it, see ``FakeCuda``."""

    recorder: Recorder

    def replay(self) -> None:
        self.recorder.replay()

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'CUDAGraph' object")


class FakeCuda:
    """
    Stands for ``torch.cuda`` in this test.

    :param monkeypatch: of the test
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs: list[Recorder] = []
        """What was captured"""
        self.fails = False
        """Whether a capture fails"""
        Stream.current = Stream()
        for name, value in dict(
            Stream=Stream,
            stream=on_stream,
            current_stream=lambda: Stream.current,
            device=lambda _: nullcontext(),
            CUDAGraph=Graph,
            graph=self._capture,
        ).items():
            monkeypatch.setattr(th.cuda, name, value)
        for module in (captured, optimizers):
            monkeypatch.setattr(module, "is_capturable", lambda device: device.type == "cpu")

    def _capture(self, graph: Graph, stream: Stream, capture_error_mode: str) -> AbstractContextManager[Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        graph.recorder = Recorder()
        self.graphs.append(graph.recorder)
        return graph.recorder
