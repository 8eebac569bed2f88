"""Count what the training loop reports, so that no step waits for the GPU."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError

MOST_SKIPS = 20  # so many skipped fp16 steps in a row end the run; each halves the scaler's scale
MOST_UNREAD = 1000  # so many steps' numbers, a KB each, stay on the device


@dataclass
class Progress:
    """Hold how far a run has come, and its losses so far."""

    step: int = 0
    base_val_loss: float = math.nan
    start_val_loss: float = math.nan  # the base's, or the initial adapter's
    best_val_loss: float = math.inf
    best_val_bits_per_byte: float = math.inf

    def report(self) -> dict[str, Any]:
        """Return the fields for `run.json`."""
        report = asdict(self)
        return {"steps": report.pop("step"), **report}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Meter:
    """Sum loss, tokens and time since `restart`, and find the run's first faulty step.

    A step's loss and gradient norm stay on the device until somebody asks: to count a step there
    neither launches a kernel nor waits for one.

    A step is faulty if its loss or gradient is not finite. In fp16 such a gradient is normal: the
    scaler skips the step and halves its scale; only `MOST_SKIPS` skips in a row are a fault.
    Tokens are those that are scored: all of a window, the completions of an example.
    """

    def __init__(self, fp16: bool):
        self.fp16 = fp16
        # Of the training steps measured so far:
        self.all_tokens = 0
        self.all_seconds = 0.0
        self.skipped = 0
        self.skips_in_a_row = 0
        self.fault = ""  # of the first faulty step
        self.restart()

    def restart(self, loss: float = 0.0, tokens: int = 0, seconds: float = 0.0) -> None:
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # steps, losses and gradient norms
        self.loss = np.float32(loss)
        self.grad_norm = 0.0  # of the last step
        self.tokens = tokens
        self.began = time.perf_counter() - seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that is spent inside the `with`: it is not training time."""
        paused_at = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused_at

    def end_step(self, step: int, loss: Tensor, tokens: int, grad_norm: Tensor) -> None:
        """Count a step: `loss` is summed over `tokens`; `grad_norm` is from before clipping."""
        self.tokens += tokens
        self.unread.append((step, loss, grad_norm))
        if len(self.unread) == MOST_UNREAD:
            self._read()

    def _read(self) -> None:
        """Wait for the steps that were not read yet, and copy all their numbers at once."""
        unread = self.unread
        self.unread = []
        if not unread:
            return
        steps, losses, grad_norms = zip(*unread, strict=True)
        numbers = torch.stack([*losses, *grad_norms]).view(2, -1)
        for step, loss, grad_norm in zip(steps, *numbers.tolist(), strict=True):
            self._count(step, loss, grad_norm)

    def _count(self, step: int, loss: float, grad_norm: float) -> None:
        self.loss += np.float32(loss)
        self.grad_norm = grad_norm
        finite = math.isfinite(grad_norm)
        fault = ""
        if not math.isfinite(loss):
            fault = "the loss is not a finite number"
        elif not finite and not self.fp16:
            fault = "the gradient is not finite"

        if self.fp16 and finite:
            self.skips_in_a_row = 0
        elif self.fp16:
            self.skipped += 1
            self.skips_in_a_row += 1
            if self.skips_in_a_row >= MOST_SKIPS:
                fault = fault or f"the gradient overflowed in {MOST_SKIPS} steps in a row"
        if fault and not self.fault:
            self.fault = f"step {step}: {fault}"

    def check(self) -> None:
        """Raise RunError that names the first faulty step, if there was one."""
        self._read()
        if self.fault:
            raise RunError(f"{self.fault}; lower --lr or use --precision fp32")

    def measure(self) -> dict[str, Any]:
        """Return the metrics of the steps since `restart`, and start again."""
        self.check()
        seconds = time.perf_counter() - self.began
        metrics: dict[str, Any] = {
            "loss": float(self.loss) / self.tokens,
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.fp16:
            metrics["skipped_steps"] = self.skipped
        self.all_tokens += self.tokens
        self.all_seconds += seconds
        self.restart()
        return metrics

    def report(self) -> dict[str, Any]:
        """Return the whole run's fields for `run.json`."""
        report: dict[str, Any] = {"tokens_per_second": self.all_tokens / self.all_seconds}
        if self.fp16:
            report["skipped_steps"] = self.skipped
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs. Raises RunError as `check` does."""
        self.check()
        return {
            "loss": float(self.loss),
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.began,
            "all_tokens": self.all_tokens,
            "all_seconds": self.all_seconds,
            "skipped": self.skipped,
            "skips_in_a_row": self.skips_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restart(state["loss"], state["tokens"], state["seconds"])
        self.all_tokens = state["all_tokens"]
        self.all_seconds = state["all_seconds"]
        self.skipped = state["skipped"]
        self.skips_in_a_row = state["skips_in_a_row"]
