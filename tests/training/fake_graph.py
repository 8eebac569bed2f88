"""A CUDA graph on a CPU: it notes PyTorch's operations and their memory, and runs them again.

As on a GPU, a capture computes nothing: what it writes is put back, and what it makes is NaN until
the first replay. A replay runs the same operations with the same numbers on the same memory; no
Python code of the model's runs. What would wait for the GPU raises.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

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


class FakeGenerator:
    """The GPU's random generator; after a failed capture it raises, as in older versions."""

    def __init__(self):
        self.get_state = torch.get_rng_state
        self.set_state = torch.set_rng_state
        self.captured = False
        self.open_pools = []  # of captures that go on

    def clone_state(self):
        return torch.get_rng_state()

    def graphsafe_set_state(self, state):
        torch.set_rng_state(state)
        self.captured = False


def install(monkeypatch, free=80e9, largest=1e9):
    """Put doubles in the place of what training/graph.py calls; return the generator.

    The card has `free` bytes, and a part takes `largest`.
    """
    generator = FakeGenerator()
    pools = generator.open_pools
    FakeGraph.captured = 0
    FakeGraph.replayed = 0

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert stream is side and (pool, capture_error_mode) == ("pool", "thread_local")
        state = torch.get_rng_state()
        generator.captured = True
        pools.append(pool)
        with Recorder() as recorder:
            yield
        generator.captured = False
        pools.remove(pool)
        torch.set_rng_state(state)
        recorder.forget_numbers()
        graph.calls = recorder.calls
        FakeGraph.captured += 1

    def end_allocate(device, pool):
        pools.remove(pool)  # raises if it is closed

    main = SimpleNamespace(wait_stream=lambda other: None)
    side = SimpleNamespace(wait_stream=lambda other: None)
    doubles = {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": lambda: side,
        "current_stream": lambda: main,
        "graph_pool_handle": lambda: "pool",
        "stream": lambda stream: nullcontext(),
        "current_device": lambda: 0,
        "default_generators": (generator,),
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (free, 80e9),
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "max_memory_allocated": lambda: largest,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    return generator
