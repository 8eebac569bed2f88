"""Set up the device, `--compile` and `--cuda-graph`.

Without a CUDA graph, the CPU launches about 600 kernels per micro-batch, one by one, and a fast GPU
waits for the CPU (docs/scaling.md). A graph is captured once, by running the Python code on a
stream that records kernels instead of running them. Python control flow is frozen at capture. A
replay runs the recorded kernels on the same memory addresses. So weights and random state must
change in place.
"""

import sys
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import Device
from common.errors import UserError, first_line
from model.gpt2 import GPT2, KVCache
from training.options import Options


def prepare_device(options: Options, device: Device) -> None:
    """Set up the device for a run. Raises UserError for options that do not fit the device."""
    device.set_tf32(options.allow_tf32)
    kind = device.torch_device.type
    if options.compile:
        if kind == "cpu":
            raise UserError("--compile: makes steps slower on a CPU (docs/speed.md); omit it")
        device.check_compiler()
    if options.gradient_checkpointing and kind == "mps":  # pytorch#127676
        raise UserError(
            "--gradient-checkpointing: on MPS, the second forward pass would draw other dropout "
            "masks; use --grad-accum to save memory"
        )
    if options.cuda_graph and kind != "cuda":
        raise UserError("--cuda-graph: needs a CUDA GPU")
    if options.cuda_graph and (options.data or options.gradient_checkpointing):
        raise UserError(
            "--cuda-graph: cannot be combined with --data, whose examples differ in length, nor "
            "with --gradient-checkpointing, which reads the random generator's state"
        )


def compile_hidden(model: GPT2, rows: int) -> None:
    """Compile `model.hidden`, which takes most of the time of a step.

    The loss is not compiled, because the compiler would unroll the loop over chunks. In training, a
    batch of fewer rows is padded to `rows`, to avoid recompilation.
    """
    plain = model.hidden
    compiled = torch.compile(plain)

    def hidden(idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if not model.training:
            return plain(idx, cache)
        padded = F.pad(idx, (0, 0, 0, max(0, rows - len(idx))))
        return compiled(padded)[: len(idx)]

    model.hidden = hidden  # type: ignore[method-assign]


class GraphedLoss:
    """`model.loss(inputs, targets)` as two CUDA graphs, for the forward and the backward pass.

    The graphs run in training, on micro-batches (B, T) of the captured shape. Other calls run
    `eager`, the original loss. Each trained parameter gets a permanent gradient buffer. Otherwise
    the gradient would be in the graph's memory, which the next replay overwrites. If the capture
    fails, a warning gives the reason, and every call runs `eager`. The capture does not change the
    state of the random generator.
    """

    def __init__(self, model: GPT2, shape: tuple[int, int], device: Device):
        self.model = model
        self.eager = model.loss
        self.shape = shape
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        self.graphed, failure = _capture(model, shape, device)
        if not failure:
            generator.set_state(before.get_state())  # in place: graphs read this object
        else:
            # Install a copy of the state, because torch 2.8 leaves the original in capture mode.
            generator.graphsafe_set_state(before)
            torch.cuda.empty_cache()
            print(f"warning: training without a CUDA graph ({failure})", file=sys.stderr)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.graphed and self.model.training and inputs.shape == self.shape:
            return self.graphed(inputs, targets)
        return self.eager(inputs, targets)


class _Loss(nn.Module):
    """The loss as a module, so that PyTorch finds the parameters that need gradients."""

    def __init__(self, model: GPT2):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets)


def _capture(
    model: GPT2, shape: tuple[int, int], device: Device
) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """Return the graphed loss and "". If the capture fails, return None and the reason.

    No local variable may keep the exception, because its traceback keeps the activations alive.
    """
    ids = torch.zeros(shape, dtype=torch.int64, device=device.torch_device)
    # If ending the capture raises an error, PyTorch stays on the capture's stream. `here` switches
    # back to the caller's stream.
    here = torch.cuda.stream(torch.cuda.current_stream())
    try:
        # Autocast caches weights after casting them. A replay would not update this cache, so it is
        # off.
        with here, device.autocast(cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(_Loss(model), (ids, ids.clone()))
    except Exception as error:  # after any error, train without a graph
        return None, _reason(error)
    return cast(nn.Module, graphed), ""


def _reason(error: Exception) -> str:
    # After the first error, the end of the capture raises a second error.
    cause = error.__context__ or error
    return first_line(cause) or type(cause).__name__
