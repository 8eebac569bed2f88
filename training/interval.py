"""What the training loop adds up on the device, so that no step waits for it."""

import time

import torch
from torch import Tensor

MOST_SKIPS = 20  # fp16 steps in a row that the scaler may skip: it halves its scale at each


class Interval:
    """Sums over the steps since `restart`, and the first faulty step since the run began.

    Faulty is a step whose loss or gradient is not finite. In fp16 such a gradient is normal: the
    scaler skips the step and halves its scale; `MOST_SKIPS` skips in a row are a fault.
    """

    def __init__(self, device: torch.device, fp16: bool = False):
        self.device, self.fp16 = device, fp16
        self.skipped, self.skips_in_a_row = self._number(0), self._number(0)
        self.faulty_step, self.faulty_loss = self._number(0), self._number(0)  # 0: none
        self.restart()

    def _number(self, value: int) -> Tensor:
        return torch.tensor(value, device=self.device)

    def restart(self, loss: float = 0.0, tokens: int = 0, seconds: float = 0.0) -> None:
        self.loss = torch.tensor(loss, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)  # of the last step
        self.tokens = tokens
        self.began = time.perf_counter() - seconds

    def end_step(self, step: int, tokens: int, grad_norm: Tensor) -> None:
        """Count a step whose loss has been added to `loss`."""
        self.tokens += tokens
        self.grad_norm = grad_norm
        bad_loss, bad_gradient = ~torch.isfinite(self.loss), ~torch.isfinite(grad_norm)
        if self.fp16:
            self.skipped += bad_gradient
            self.skips_in_a_row = (self.skips_in_a_row + 1) * bad_gradient
            bad_gradient = self.skips_in_a_row >= MOST_SKIPS
        first = (bad_loss | bad_gradient) & (self.faulty_step == 0)
        self.faulty_step += first * step
        self.faulty_loss += first & bad_loss

    def fault(self) -> tuple[int, str] | None:
        """The first faulty step, from 1, and what is wrong with it."""
        step = int(self.faulty_step.item())
        if not step:
            return None
        if self.faulty_loss.item():
            return step, "the loss is not a finite number"
        return step, (f"the gradient overflowed in {MOST_SKIPS} steps in a row" if self.fp16
                      else "the gradient is not finite")

    def sums(self) -> tuple[float, int, float]:
        """What `restart` takes to go on: loss summed over tokens, tokens, seconds."""
        return self.loss.item(), self.tokens, time.perf_counter() - self.began

    def state(self) -> dict:
        """All that `load_state` needs to go on."""
        return {"sums": self.sums(), "skipped": int(self.skipped.item()),
                "skips_in_a_row": int(self.skips_in_a_row.item())}

    def load_state(self, state: dict) -> None:
        self.restart(*state["sums"])
        self.skipped = self._number(state["skipped"])
        self.skips_in_a_row = self._number(state["skips_in_a_row"])
