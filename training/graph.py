"""Launch a part's forward and backward pass as one CUDA graph: the same kernels, in one launch.

Else the CPU launches some 600 kernels a part, one by one, and a fast GPU waits for it
(docs/scaling.md). A graph is captured once, by running the Python code on a stream that notes its
kernels in place of running them. A replay runs them again, on the same memory and with the same
numbers. So what changes from step to step must change in place, as weights do, the scaler's scale
and the random generator's state; inputs and targets are copied to where the graph reads them. What
Python decides stays as it was at the capture.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from common.device import Device
from common.errors import first_line
from training.options import Options

WARM_UP = 3  # runs before the capture, as PyTorch's documentation has it
Backward = Callable[[Tensor, Tensor, int], Tensor]


def can_capture(options: Options, device: Device) -> bool:
    """Return whether this run's full parts are all computed by the same kernels, without a wait.

    The examples of --data have odd lengths. Checkpointing reads the random generator's state on the
    CPU.
    """
    if not device.is_cuda or options.no_cuda_graph:
        return False
    return not options.data and not options.gradient_checkpointing


class GraphedBackward:
    """Compute what `eager` does: full parts by a CUDA graph, which the first one makes.

    `eager(inputs, targets, tokens)` adds the gradients of a part's loss / `tokens` and returns the
    loss. Inputs and targets (B, T) come from the CPU, or are on the GPU already.

    A part is full if it has `shape` and belongs to a batch of `tokens`. If the capture fails, a
    warning says why, and all parts are computed by `eager`.
    """

    def __init__(
        self,
        eager: Backward,
        parameters: Iterable[nn.Parameter],
        shape: tuple[int, int],
        tokens: int,
    ):
        self.eager = eager
        self.parameters = list(parameters)
        self.shape = shape
        self.tokens = tokens
        self.tried = False
        self.graph: torch.cuda.CUDAGraph | None = None
        # Where the graph reads and writes:
        device = self.parameters[0].device
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.gradients: list[Tensor | None] = []

    def __call__(self, inputs: Tensor, targets: Tensor, tokens: int) -> Tensor:
        if inputs.shape != self.shape or tokens != self.tokens:
            return self.eager(inputs, targets, tokens)
        if not self.tried:
            self.tried = True
            self.try_to_capture()
        if self.graph is None:
            return self.eager(inputs, targets, tokens)

        self.inputs.copy_(inputs.pin_memory(), non_blocking=True)
        self.targets.copy_(targets.pin_memory(), non_blocking=True)
        earlier = [p.grad.clone() for p in self.parameters if p.grad is not None]
        self.graph.replay()  # it overwrites its gradients
        self.hand_out_gradients()
        self.add(earlier)
        return self.loss

    def hand_out_gradients(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def add(self, earlier: list[Tensor]) -> None:
        """Add the sum of the step's earlier parts, if there are any."""
        if not earlier:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient, of_earlier in zip(gradients, earlier, strict=True):
            gradient.add_(of_earlier)

    def try_to_capture(self) -> None:
        """Capture the graph. Whether this succeeds or not, the run goes on as if it were not tried:
        gradients and the random generator are as before.
        """
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        unused = generator.clone_state()
        pool = torch.cuda.graph_pool_handle()
        earlier = [p.grad for p in self.parameters]
        failure = ""
        try:
            # A capture that fails leaves its stream current; this context does not.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self.capture(generator, pool)
        except Exception as error:  # whatever it is, the run does not need a graph
            cause = error.__context__ or error  # the capture's end fails, too
            failure = first_line(cause) or type(cause).__name__
        for parameter, gradient in zip(self.parameters, earlier, strict=True):
            parameter.grad = gradient

        if failure:
            # In older versions of torch the generator still believes that it is captured, and its
            # next draw raises; a clone has its numbers alone.
            generator.graphsafe_set_state(unused)
            give_back(pool)
            print(f"warning: training without a CUDA graph ({failure})", file=sys.stderr)

    def capture(self, generator: torch.Generator, pool: Any) -> None:
        """Run a part a few times, so that nothing is compiled, chosen or moved during the capture;
        then capture it.
        """
        state = generator.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.drop_gradients()
        generator.set_state(state)

        if not has_room(self.parameters):
            raise RuntimeError("the GPU's memory is too small for one")
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may look for its messages meanwhile: by default, that is an error.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            self.loss = self.run()
        self.gradients = [p.grad for p in self.parameters]
        self.graph = graph

    def run(self) -> Tensor:
        """Compute the gradients anew, in new memory."""
        self.drop_gradients()
        return self.eager(self.inputs, self.targets, self.tokens)

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def give_back(pool: Any) -> None:
    """Give back the memory of a capture that failed, as its end would; nothing here ends the run.

    Else PyTorch's allocator takes it for one that still goes on. If no capture is open, the first
    call raises, and the graph gives back its pool by itself.
    """
    with suppress(Exception):
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with suppress(Exception):
        torch.cuda.empty_cache()


def has_room(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether the GPU has room for a graph beside everything else.

    A graph keeps its memory, about what one part takes. Odd parts and evaluation must still find as
    much again, and AdamW its two states, which the first step makes.
    """
    free, total = torch.cuda.mem_get_info()
    in_use = torch.cuda.memory_allocated()
    unused = torch.cuda.memory_reserved() - in_use
    largest = torch.cuda.max_memory_allocated() - in_use  # what was needed for a while, so far
    states = 2 * sum(parameter.nbytes for parameter in parameters)
    return 2 * largest + states + total // 8 <= free + unused
