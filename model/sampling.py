"""Draw tokens from GPT-2, one after the other, for one text or for several at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError
from model.gpt2 import GPT2, KVCache


def generate(
    model: GPT2,
    ids: Tensor,
    max_new_tokens: int,
    *,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """Draw tokens one by one after `ids` (T,), T >= 1; the caller decides when to stop."""
    for tokens in generate_rows(model, [ids], max_new_tokens, [generator], **sampling):
        yield int(tokens.item())


@torch.inference_mode()
def generate_rows(
    model: GPT2,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    generators: Sequence[torch.Generator | None],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_tokens: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield ids (n,) step by step: the next token of each of n prompts (T_i,), drawn with the row's
    own generator. Tokens marked in `suppress_tokens`, bool (V,), are not drawn.

    No row is padded. The first forward pass reads as many tokens as the shortest prompt has; the
    rest of a longer prompt is fed one token per step, in place of a drawn one, and until its end
    the row yields -1. The longest prompt gets `max_new_tokens` tokens, the others more.

    Keys and values of past tokens are cached. When the context is full, its older half is
    forgotten and the rest is read again: learned positions cannot be shifted in the cache.

    Raises RunError for logits that are not finite.
    """
    context = model.config.n_positions
    prompts = [prompt[-context:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    ends = torch.tensor(lengths, device=prompts[0].device)  # (n,)
    window = torch.stack([prompt[: min(lengths)] for prompt in prompts])  # (n, tokens so far)
    new = window  # the tokens that the cache lacks
    cache = KVCache()

    for position in range(min(lengths), max(lengths) + max_new_tokens):
        if window.size(1) > context:
            window = window[:, -max(1, context // 2) :]
            new = window
            cache = KVCache()
        hidden = model.hidden(new, cache)[:, -1]  # (n, C); the other tokens need no logits
        logits = model.logits(hidden).float()  # (n, V)
        if not torch.isfinite(logits).all():
            raise RunError(
                "the model's logits are not finite numbers; try --precision fp32, or train with "
                "a lower --lr"
            )
        if suppress_tokens is not None:
            logits = logits.masked_fill(suppress_tokens, -torch.inf)

        given = [prompt[position : position + 1] for prompt in prompts]  # empty after its end
        new = next_tokens(logits, given, generators, temperature, top_k, top_p)
        window = torch.cat((window, new), 1)
        yield new[:, 0].masked_fill(position < ends, -1)


def next_tokens(
    logits: Tensor,
    given: Sequence[Tensor],
    generators: Sequence[torch.Generator | None],
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Return the next id of each row, (n, 1): the one in `given` (1,) or, where that is empty, one
    drawn from logits (n, V) with the row's own generator.

    A temperature of 0, or too small to divide by, takes the likeliest.
    """
    greedy = temperature < 1e-6
    if not greedy:
        logits = probabilities(logits, temperature, top_k, top_p)
    tokens = []
    for token, row, generator in zip(given, logits, generators, strict=True):
        if len(token):
            tokens.append(token)
        elif greedy:
            tokens.append(row.argmax(-1, keepdim=True))
        else:
            tokens.append(torch.multinomial(row, 1, generator=generator))
    return torch.stack(tokens)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return what each row of logits (n, V) is drawn by: temperature, top-k and nucleus (top-p)
    sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).

    The likeliest token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        rare = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(rare, -torch.inf)
    return logits.softmax(-1)
