"""Start a command of training: join the processes of `torchrun`, and set up the device."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.device import Device, tune_process
from common.errors import UserError
from common.processes import Processes
from training.options import Options


@contextmanager
def launch(options: Options) -> Iterator[tuple[Device, Processes]]:
    """Join the processes that `torchrun` started, and yield the device and the processes."""
    processes = Processes.from_environment()
    device = Device.pick(options.device, options.precision, train=True)
    tune_process(device)
    with processes.joined(device.torch_device):
        prepare_device(options, device)
        yield device, processes


def prepare_device(options: Options, device: Device) -> None:
    """Set up the device for a run. Raises UserError for options that do not fit the device."""
    device.set_tf32(options.allow_tf32)
    kind = device.torch_device.type
    if device.precision == "fp16" and kind == "cpu" and options.kernels == "fast":
        raise UserError(  # the scaler would multiply the gradient of the logits after its rounding
            "--precision fp16: on a CPU, the fast loss loses small gradients; use bf16 or fp32, or "
            "--kernels plain"
        )
    if options.compile:
        if kind == "cpu":
            raise UserError("--compile: makes steps slower on a CPU (docs/speed.md); omit it")
        device.check_compiler()
    if options.gradient_checkpointing and kind == "mps":  # pytorch#127676
        raise UserError(
            "--gradient-checkpointing: on MPS, the second forward pass would draw other dropout "
            "masks; use --grad-accum to save memory"
        )
