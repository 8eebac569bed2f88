"""Set up how a step is launched: the device, `--compile`, `--cuda-graph`.

Without a CUDA graph the CPU launches some 600 kernels per micro-batch, one by one, and a fast GPU
waits for it (docs/scaling.md). A graph is captured once, by running the Python code on a stream
that records its kernels instead of running them. A replay runs them on the same memory. Python
control flow is frozen at capture. So everything that changes from step to step must change in
place: weights, gradients, the scaler's scale, the random generator's state, inputs and targets.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import Device
from common.errors import UserError, first_line
from model.gpt2 import GPT2, KVCache
from training.options import Options

WARM_UP = 3  # runs before the capture, as in PyTorch's documentation
# (inputs, targets, num_tokens) -> the loss, summed over the tokens
AddGradients = Callable[[Tensor, Tensor, int], Tensor]


def prepare_device(options: Options, device: Device) -> None:
    """Set the device up for a run. Raises UserError for what it cannot do."""
    device.set_tf32(options.allow_tf32)
    kind = device.torch_device.type
    if options.compile:
        if kind == "cpu":
            raise UserError("--compile: on a CPU it makes steps slower (docs/speed.md); omit it")
        device.check_compiler()
    if options.gradient_checkpointing and kind == "mps":  # pytorch#127676
        raise UserError(
            "--gradient-checkpointing: on MPS, dropouts would draw other masks the "
            "second time; use --grad-accum to save memory"
        )
    if options.cuda_graph and kind != "cuda":
        raise UserError("--cuda-graph: needs a CUDA GPU")
    if options.cuda_graph and (options.data or options.gradient_checkpointing):
        raise UserError(
            "--cuda-graph: cannot be combined with --data, whose examples differ in length, nor "
            "with --gradient-checkpointing, which reads the random generator's state"
        )


def compile_hidden(model: GPT2, rows: int) -> None:
    """Compile the model's hidden states, which take most of a step.

    The loss stays: the compiler would unroll its loop over chunks. In training, a batch of fewer
    rows is padded to `rows`, to avoid recompilation.
    """
    plain = model.hidden
    compiled = torch.compile(plain)

    def hidden(idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if not model.training:
            return plain(idx, cache)
        padded = F.pad(idx, (0, 0, 0, max(0, rows - len(idx))))
        return compiled(padded)[: len(idx)]

    model.hidden = hidden  # type: ignore[method-assign]


class GraphedGradients:
    """Compute what `eager` does, by a CUDA graph if the micro-batch is full.

    `eager(inputs, targets, num_tokens)` adds the gradients of a micro-batch's loss / num_tokens to
    permanent buffers, and returns the loss. Inputs and targets (B, T) come from the CPU. A
    micro-batch is full if it has `shape` and belongs to a batch of `num_tokens`. The first full one
    is captured. If the capture fails, a warning says why, and `eager` computes every micro-batch.
    """

    def __init__(
        self, eager: AddGradients, model: nn.Module, shape: tuple[int, int], num_tokens: int
    ):
        self.eager = eager
        self.shape = shape
        self.num_tokens = num_tokens
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tried = False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        # Where the graph reads and writes:
        device = self.parameters[0].device
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def __call__(self, inputs: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        if inputs.shape != self.shape or num_tokens != self.num_tokens:
            return self.eager(inputs, targets, num_tokens)
        if not self.tried:
            self.tried = True
            self.try_to_capture()
        if self.graph is None:
            return self.eager(inputs, targets, num_tokens)
        self.inputs.copy_(inputs.pin_memory(), non_blocking=True)
        self.targets.copy_(targets.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.loss

    def try_to_capture(self) -> None:
        """Capture the graph. Afterwards gradients and the random generator are as before, even if
        the capture fails.
        """
        gradients = [p.grad.clone() for p in self.parameters if p.grad is not None]
        state = torch.cuda.get_rng_state()
        failure = self._capture()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        torch.cuda.set_rng_state(state)
        if failure:
            self.graph = None
            torch.cuda.empty_cache()
            print(f"warning: training without a CUDA graph ({failure})", file=sys.stderr)

    def _capture(self) -> str:
        """Warm up, so that nothing is compiled or chosen during the capture, then capture.

        Return why it failed, or "". No local may keep the exception: its frames would keep the
        activations alive.
        """
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.eager(self.inputs, self.targets, self.num_tokens)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # NCCL's own thread may look for its messages meanwhile. By default that is an error.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.loss = self.eager(self.inputs, self.targets, self.num_tokens)
        except Exception as error:  # whatever it is, the run does not need a graph
            return _reason(error)
        return ""


def _reason(error: Exception) -> str:
    cause = error.__context__ or error  # the end of the capture fails too
    return first_line(cause) or type(cause).__name__
