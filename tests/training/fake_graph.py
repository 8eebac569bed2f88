"""A CUDA graph on a CPU: it records PyTorch's operations and their memory, and runs them again.

As on a GPU, a capture computes nothing: changed memory is restored, and new tensors are NaN until
the first replay. A replay runs the same operations with the same numbers on the same memory, and
none of the model's Python code. An operation that would wait for the GPU raises. A failed capture
leaves the stream and the random generator in the same state as an old torch.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2")
MAKES_NO_NUMBERS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def storages(tree: object) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_flatten(tree)[0] if isinstance(t, Tensor)}


def new_tensors(result: object, arguments: object) -> list[Tensor]:
    """Return the tensors of a result that do not share memory with an argument."""
    given = storages(arguments)
    tensors = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    return [t for t in tensors if t.untyped_storage()._cdata not in given]


class Recorder(TorchDispatchMode):
    """Record every operation inside the `with`: its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = []
        self.written = {}  # each older storage that may be written to, with its content

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        # The storage, not the tensor: a parameter may get other memory later.
        arguments = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if operation._schema.is_mutable:
            ours = storages(self.made)
            for tensor in tree_flatten(arguments)[0]:
                if isinstance(tensor, Tensor) and not storages(tensor) & ours:
                    storage = tensor.untyped_storage()
                    self.written.setdefault(storage._cdata, (storage, storage.clone()))
        result = operation(*args, **kwargs)
        made = [tensor.detach() for tensor in new_tensors(result, arguments)]
        self.made += made
        if name not in MAKES_NO_NUMBERS:
            self.calls.append((operation, *arguments, made))
        return result

    def forget_numbers(self):
        """Restore memory as if nothing had been computed."""
        for storage, content in self.written.values():
            storage.copy_(content)
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


class FakeGraph:
    """A fake `torch.cuda.CUDAGraph`."""

    replayed = 0  # counts the replays of all graphs

    @torch.no_grad()
    def replay(self):
        FakeGraph.replayed += 1
        for operation, args, kwargs, made in self.calls:
            result = operation(*args, **kwargs)
            for tensor, value in zip(made, new_tensors(result, (args, kwargs)), strict=True):
                tensor.copy_(value)


class FakeGenerator:
    """The CPU's generator with CUDA's interface: its state is an object that a graph may own."""

    capturing = False

    def clone_state(self):
        state = torch.get_rng_state()
        return SimpleNamespace(get_state=lambda: state)

    def set_state(self, state):
        torch.set_rng_state(state)

    def graphsafe_set_state(self, state):
        torch.set_rng_state(state.get_state())
        self.capturing = False


def install(monkeypatch) -> SimpleNamespace:
    """Replace the functions of torch.cuda that `make_graphed_callables` and training/launch.py call
    with fakes. Return the machine, with its `generator` and its current `stream`.
    """
    FakeGraph.replayed = 0
    machine = SimpleNamespace(generator=FakeGenerator(), stream="default")

    @contextmanager
    def on_stream(stream):
        before, machine.stream = machine.stream, stream
        try:
            yield
        finally:
            machine.stream = before

    @contextmanager
    def capture(graph, pool):
        machine.generator.capturing = True
        before, machine.stream = machine.stream, "capture"
        state = torch.get_rng_state()
        with Recorder() as recorder:
            yield
        torch.set_rng_state(state)
        recorder.forget_numbers()
        graph.calls = recorder.calls
        machine.stream = before
        machine.generator.capturing = False

    doubles = {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": lambda: "warm-up",
        "current_stream": lambda: machine.stream,
        "stream": on_stream,
        "current_device": lambda: 0,
        "default_generators": [machine.generator],
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    return machine
