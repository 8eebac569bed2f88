"""Measure how much a model forgot: the KL from the base, on texts that the base wrote.

This repository does not contain the base's corpus, so the base writes the texts.
"""

from functools import cache

import torch
from torch import Tensor

from evaluation.scores import kl_divergence
from lesson.experiments.common import trainer
from model.gpt2 import GPT2


@torch.no_grad()
def log_probabilities(model: GPT2, texts: Tensor) -> Tensor:
    """Return log p of every next token at every token of the texts, (texts, tokens, V)."""
    return model(texts).log_softmax(-1)


@cache
def base_texts() -> tuple[Tensor, Tensor]:
    """Let mini write 16 texts of 128 tokens that start with the end-of-text token.

    Returns the texts (16, 128), and the base's log p (16, 128, V) on them.
    """
    made = trainer()  # the base, as B is zero
    end_of_text = made.data.tokenizer.end_of_text
    assert end_of_text is not None  # mini has an end-of-text token
    texts = torch.full((16, 1), end_of_text)
    while texts.size(1) < 128:
        last = log_probabilities(made.model, texts)[:, -1]  # (16, V)
        drawn = torch.multinomial(last.exp(), 1)  # (16, 1)
        texts = torch.cat((texts, drawn), dim=1)
    return texts, log_probabilities(made.model, texts)


def forgotten(model: GPT2) -> float:
    """Return the mean KL(base || model) per token, in nats. The KL of the base is 0."""
    texts, base_log_p = base_texts()
    log_p = log_probabilities(model, texts)
    return kl_divergence(base_log_p, log_p).mean().item()
