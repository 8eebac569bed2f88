"""Sample tokens from GPT-2, one after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import RunError
from model.gpt2 import GPT2, KVCache


@torch.inference_mode()
def generate(
    model: GPT2,
    ids: Tensor,
    max_new_tokens: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_tokens: Tensor | None = None,
) -> Iterator[int]:
    """Yield `max_new_tokens` tokens, drawn after `ids` (T,), T >= 1. The caller may stop early.

    Tokens that are True in `suppress_tokens`, bool (V,), are not drawn. Keys and values of past
    tokens are cached. When the context is full, the older half is dropped. The newer half moves to
    other positions, whose embeddings differ, so the model reads it again to replace the cached keys
    and values.

    Raises RunError for logits that are not finite.
    """
    context = model.config.n_positions
    window = ids[-context:]
    new = window  # the tokens that the cache lacks
    cache = KVCache()

    for _ in range(max_new_tokens):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
            new = window
            cache = KVCache()
        hidden = model.hidden(new[None], cache)[:, -1]  # (1, C): the last token
        logits = model.logits(hidden)[0].float()  # (V,)
        finite = torch.isfinite(logits).all()
        logits = torch.where(finite, logits, 0)  # CUDA ends a process that draws from NaN
        if suppress_tokens is not None:
            logits = logits.masked_fill(suppress_tokens, -torch.inf)

        new = next_token(logits, generator, temperature, top_k, top_p)
        window = torch.cat((window, new))
        token, is_finite = torch.stack((new[0], finite)).tolist()  # the only wait for a GPU
        if not is_finite:
            raise RunError(
                "the model's logits are not finite numbers; try --precision fp32, or train with "
                "a lower --lr"
            )
        yield token


def next_token(
    logits: Tensor, generator: torch.Generator | None, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Draw the next id, (1,), from logits (V,).

    If the temperature is 0 or too small to divide by, return the likeliest id.
    """
    if temperature < 1e-6:
        return logits.argmax(-1, keepdim=True)
    p = probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(p, 1, generator=generator)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Turn logits (V,) into probabilities (V,) by temperature, top-k and nucleus (top-p) sampling
    (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).

    The likeliest token is never removed.
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # total probability of all likelier tokens
        rare = torch.zeros_like(before, dtype=torch.bool).scatter(0, index, before >= top_p)
        logits = logits.masked_fill(rare, -torch.inf)
    return logits.softmax(-1)
