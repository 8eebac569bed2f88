"""A CUDA graph on a CPU: it notes PyTorch's operations and their memory, and runs them again.

As on a GPU, a capture computes nothing: what it writes is put back, and what it makes is NaN until
the first replay. A replay runs the same operations with the same numbers on the same memory; no
Python code of the model's runs. What would wait for the GPU raises.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2")
MAKES_NO_NUMBERS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Note every operation inside the `with`: its arguments, and what it makes."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = {}  # a tensor of each storage that is new, by storage
        self.before = {}  # each older storage that is written to, and its content

    @classmethod
    def ignore_compile_internals(cls):
        """Let compiled code run inside the `with`."""
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")

        # Memory, not the tensor: a parameter may be given other memory later.
        held = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        given = {storage_of(tensor) for tensor in tensors_in(held)}
        self.keep_what_is_written(operation, args, kwargs)
        result = operation(*args, **kwargs)
        made = [t for t in tensors_in(result) if storage_of(t) not in given]
        made = [t.detach() for t in made]
        for tensor in made:
            self.made[storage_of(tensor)] = tensor
        if name not in MAKES_NO_NUMBERS:
            self.calls.append((operation, *held, made))
        return result

    def keep_what_is_written(self, operation, args, kwargs):
        for i, argument in enumerate(operation._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tensors_in(value):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.made and storage._cdata not in self.before:
                    self.before[storage._cdata] = (storage, storage.clone())

    def forget_numbers(self):
        """Leave memory as if nothing had been computed."""
        for storage, content in self.before.values():
            storage.copy_(content)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


class FakeGraph:
    """`torch.cuda.CUDAGraph`."""

    captured = 0  # by all of them
    replayed = 0

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        FakeGraph.replayed += 1
        for operation, args, kwargs, made in self.calls:
            result = operation(*args, **kwargs)
            given = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
            fresh = [t for t in tensors_in(result) if storage_of(t) not in given]
            for tensor, value in zip(made, fresh, strict=True):
                tensor.copy_(value)


def install(monkeypatch) -> None:
    """Put doubles in the place of what `make_graphed_callables` calls of torch.cuda."""
    FakeGraph.captured = 0
    FakeGraph.replayed = 0

    @contextmanager
    def capture(graph, pool):
        state = torch.get_rng_state()
        with Recorder() as recorder:
            yield
        torch.set_rng_state(state)
        recorder.forget_numbers()
        graph.calls = recorder.calls
        FakeGraph.captured += 1

    doubles = {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
        "empty_cache": lambda: None,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
