"""Count on the device what the training loop reports, so that no step waits for the GPU."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError

MOST_SKIPS = 20  # so many skipped fp16 steps in a row end the run; each halves the scaler's scale


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
    """Sum loss, tokens and time since `restart`, and remember the run's first faulty step.

    A step is faulty if its loss or gradient is not finite. In fp16 such a gradient is normal: the
    scaler skips the step and halves its scale; only `MOST_SKIPS` skips in a row are a fault.
    Tokens are those that are scored: all of a window, the completions of an example.
    """

    def __init__(self, device: torch.device, fp16: bool):
        self.device = device
        self.fp16 = fp16
        # Of the training steps measured so far:
        self.all_tokens = 0
        self.all_seconds = 0.0
        self.skipped = self._number(0)
        self.skips_in_a_row = self._number(0)
        # 0: none.
        self.faulty_step = self._number(0)
        self.faulty_loss = self._number(0)
        self.restart()

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)

    def restart(self, loss: float = 0.0, tokens: int = 0, seconds: float = 0.0) -> None:
        self.loss = self._number(loss)
        self.grad_norm = self._number(0.0)  # of the last step
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
        self.loss += loss
        self.tokens += tokens
        self.grad_norm = grad_norm
        bad_loss = ~torch.isfinite(self.loss)
        bad_gradient = ~torch.isfinite(grad_norm)
        if self.fp16:
            self.skipped += bad_gradient
            self.skips_in_a_row = (self.skips_in_a_row + 1) * bad_gradient
            bad_gradient = self.skips_in_a_row >= MOST_SKIPS
        first = (bad_loss | bad_gradient) & (self.faulty_step == 0)
        self.faulty_step += first * step  # arithmetic: an `if` would wait for the GPU
        self.faulty_loss += first & bad_loss

    def check(self) -> None:
        """Raise RunError that names the first faulty step, if there was one."""
        step = int(self.faulty_step.item())
        if not step:
            return
        if self.faulty_loss.item():
            what = "the loss is not a finite number"
        elif self.fp16:
            what = f"the gradient overflowed in {MOST_SKIPS} steps in a row"
        else:
            what = "the gradient is not finite"
        raise RunError(f"step {step}: {what}; lower --lr or use --precision fp32")

    def measure(self) -> dict[str, Any]:
        """Return the metrics of the steps since `restart`, and start again."""
        self.check()
        seconds = time.perf_counter() - self.began
        metrics: dict[str, Any] = {
            "loss": self.loss.item() / self.tokens,
            "grad_norm": self.grad_norm.item(),
            "tokens_per_second": self.tokens / seconds,
        }
        if self.fp16:
            metrics["skipped_steps"] = int(self.skipped.item())
        self.all_tokens += self.tokens
        self.all_seconds += seconds
        self.restart()
        return metrics

    def report(self) -> dict[str, Any]:
        """Return the whole run's fields for `run.json`."""
        report: dict[str, Any] = {"tokens_per_second": self.all_tokens / self.all_seconds}
        if self.fp16:
            report["skipped_steps"] = int(self.skipped.item())
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs. Raises RunError as `check` does."""
        self.check()
        return {
            "loss": self.loss.item(),
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.began,
            "all_tokens": self.all_tokens,
            "all_seconds": self.all_seconds,
            "skipped": int(self.skipped.item()),
            "skips_in_a_row": int(self.skips_in_a_row.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restart(state["loss"], state["tokens"], state["seconds"])
        self.all_tokens = state["all_tokens"]
        self.all_seconds = state["all_seconds"]
        self.skipped = self._number(state["skipped"])
        self.skips_in_a_row = self._number(state["skips_in_a_row"])
