"""Start a run on its device: join the other processes, and check options that need the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import Device, tune_process
from common.errors import UserError
from common.processes import Processes
from model.gpt2 import GPT2, KVCache
from training.options import Options


@contextmanager
def launch(options: Options) -> Iterator[tuple[Device, Processes]]:
    """Join the processes that `torchrun` started, and yield the device and the processes."""
    tune_process()
    processes = Processes.from_environment()
    device = Device.pick(options.device, options.precision, train=True)
    with processes.joined(device.torch_device):
        prepare_device(options, device)
        yield device, processes


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
