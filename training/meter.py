"""Measure the training loop without making a step wait for the GPU."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError

MOST_SKIPS = 20  # the run ends after this many skipped fp16 steps in a row
COUNTED = ("loss", "tokens", "seconds", "all_tokens", "all_seconds", "skipped", "skips_in_a_row")


class Meter:
    """Sum loss, tokens and time since the last line of metrics, and find the first faulty step.

    The loss and the gradient norm of a step stay on the device until a line is due. So counting a
    step neither launches a kernel nor waits for a kernel.

    A step is faulty if the loss or the gradient is not finite. In fp16, a gradient may overflow.
    The scaler then skips the step and halves the loss scale. Only `MOST_SKIPS` skipped steps in a
    row are a fault.
    """

    def __init__(self, fp16: bool):
        self.fp16 = fp16
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # step, loss, gradient norm
        self.grad_norm = 0.0  # of the last step
        self.fault = ""  # describes the first faulty step
        self.began: float | None = None  # when the clock was started, or None during a pause
        # Counted since the last line of metrics:
        self.loss = 0.0
        self.tokens = 0
        self.seconds = 0.0
        # Counted over the whole run:
        self.all_tokens = 0
        self.all_seconds = 0.0
        self.skipped = 0
        self.skips_in_a_row = 0

    def start(self) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, and add the time since `start`."""
        if self.began is not None:
            self.seconds += time.perf_counter() - self.began
        self.began = None

    def count(self, step: int, loss: Tensor, tokens: int, grad_norm: Tensor) -> None:
        """Count a step. `loss` is summed over the tokens. `grad_norm` is the norm before
        clipping."""
        self.tokens += tokens
        self.unread.append((step, loss, grad_norm))

    def check(self) -> None:
        """Copy the losses and gradient norms of unread steps from the device, and check them.

        Raises RunError, naming the first faulty step.
        """
        if self.unread:
            steps, losses, grad_norms = zip(*self.unread, strict=True)
            self.unread = []
            numbers = torch.stack([*losses, *grad_norms]).view(2, -1)
            for step, loss, grad_norm in zip(steps, *numbers.tolist(), strict=True):
                self._read(step, loss, grad_norm)
        if self.fault:
            raise RunError(f"{self.fault}; lower --lr or use --precision fp32")

    def _read(self, step: int, loss: float, grad_norm: float) -> None:
        self.loss += loss
        self.grad_norm = grad_norm
        fault = ""
        if math.isfinite(grad_norm):
            self.skips_in_a_row = 0
        elif self.fp16:
            self.skipped += 1
            self.skips_in_a_row += 1
            if self.skips_in_a_row == MOST_SKIPS:
                fault = f"the gradient overflowed in {MOST_SKIPS} steps in a row"
        else:
            fault = "the gradient is not finite"
        if not math.isfinite(loss):
            fault = "the loss is not a finite number"
        if fault and not self.fault:
            self.fault = f"step {step}: {fault}"

    def measure(self) -> dict[str, Any]:
        """Stop the clock. Return the metrics since the last line, and start to count for the next
        line. Raises RunError as `check` does.
        """
        self.check()
        self.pause()
        metrics: dict[str, Any] = {
            "loss": self.loss / self.tokens,
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens / self.seconds,
        }
        if self.fp16:
            metrics["skipped_steps"] = self.skipped
        self.all_tokens += self.tokens
        self.all_seconds += self.seconds
        self.loss = 0.0
        self.tokens = 0
        self.seconds = 0.0
        return metrics

    def report(self) -> dict[str, Any]:
        """Return the speed and the skipped steps of the whole run, for `run.json`."""
        report: dict[str, Any] = {"tokens_per_second": self.all_tokens / self.all_seconds}
        if self.fp16:
            report["skipped_steps"] = self.skipped
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run. Raises RunError as `check` does."""
        self.check()
        return {name: getattr(self, name) for name in COUNTED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in COUNTED:
            setattr(self, name, state[name])
