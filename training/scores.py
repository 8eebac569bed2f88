"""The scores of a model on a text."""

import math
from dataclasses import dataclass


def perplexity(loss: float) -> float:
    """Return exp(loss)."""
    return math.exp(min(loss, 700.0))  # e^700 is near the largest float


@dataclass(frozen=True)
class Scores:
    """Scores on `tokens` tokens, `bytes` bytes of UTF-8. `loss` is the mean per token, in nats."""

    tokens: int
    bytes: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )
