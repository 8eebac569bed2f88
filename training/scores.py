"""The scores of a model on a text."""

import math
from dataclasses import dataclass

from torch import Tensor


def perplexity(loss: float) -> float:
    """Return exp(loss)."""
    return math.exp(min(loss, 700.0))  # e^700 is near the largest float


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum over v of p(v) (log p(v) - log q(v)) for each token, in nats.

    The last dimension of `log_p` and `log_q` runs over the vocabulary.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Scores:
    """Scores on a text of `tokens` tokens and `bytes` bytes. `loss` is in nats per token."""

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
