"""Start LoRA-GA from the gradients of a run's first batches."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from torch import nn

from data.instructions import Instructions
from data.windows import Windows
from lora.variants.lora_ga import lora_ga_layers, weight_gradients
from training.ranks import Ranks

BATCHES = 8


def start_along_gradient(
    model: nn.Module,
    batches: Iterator[np.ndarray],
    data: Windows | Instructions,
    backward: Callable[[np.ndarray, int], object],
    ranks: Ranks,
) -> None:
    """Start each layer from dL/dW, the mean over the tokens of the first batches.

    `backward(batch, tokens)` adds the gradients of this rank's share of the batch's loss / tokens.
    """
    first = list(islice(batches, BATCHES))
    tokens = sum(data.scored_tokens(batch) for batch in first)
    with weight_gradients(model) as gradients:
        for batch in first:
            backward(batch, tokens)
    model.zero_grad()  # B's, which were computed, too

    ranks.all_reduce(list(gradients.values()))
    for name, layer in lora_ga_layers(model).items():
        start = layer.along(gradients[name])
        ranks.broadcast(start)  # another machine may choose other signs
        layer.start_at(*start)
