"""Score a model on a text, and compare it with its base."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from common.device import Device
from common.errors import LossNotFinite, UserError
from common.processes import ALONE, Processes
from data.windows import Dataset
from lora import adapter_disabled
from model.gpt2 import GPT2, IGNORE_INDEX

EVAL_BATCH = 16  # windows per forward pass
LOGITS_CHUNK = 128  # tokens whose logits are in memory at the same time


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


@torch.no_grad()
def evaluate(
    model: GPT2,
    dataset: Dataset,
    device: Device,
    processes: Processes = ALONE,
    batch_size: int = EVAL_BATCH,
) -> Scores:
    """Score a whole text, or conversations. Several processes share the batches.

    Raises LossNotFinite, and UserError if all targets are end-of-text tokens.
    """
    scored_bytes = dataset.scored_bytes
    if not scored_bytes:
        raise UserError("the text contains only end-of-text tokens: nothing to score")
    sums = zero_sums(device)  # sum of losses, number of hits
    count = torch.zeros(1, dtype=torch.int64)

    was_training = model.training
    model.eval()
    batches = dataset.evaluation_batches(batch_size)
    for inputs, targets in islice(batches, processes.number, None, processes.count):
        count += (targets != IGNORE_INDEX).sum()
        with device.autocast():
            losses, right = model.token_losses(device.to_device(inputs), device.to_device(targets))
        sums += torch.stack([losses.sum(dtype=sums.dtype), right.sum(dtype=sums.dtype)])
    model.train(was_training)
    processes.all_reduce(sums)
    processes.all_reduce(count)

    tokens = int(count)
    loss, hits = sums.tolist()
    if not math.isfinite(loss):
        raise LossNotFinite(
            f"the loss on the text is {loss}; try --precision fp32, or train with a lower --lr"
        )
    return Scores(tokens, scored_bytes, loss / tokens, hits / tokens)


def zero_sums(device: Device) -> Tensor:
    """Return two sums of 0 on the device, in fp64, or in fp32 on MPS, which has no fp64."""
    dtype = torch.float32 if device.torch_device.type == "mps" else torch.float64
    return torch.zeros(2, device=device.torch_device, dtype=dtype)


@torch.no_grad()
def forgetting(model: GPT2, dataset: Dataset, device: Device) -> dict[str, float]:
    """Return the mean KL(base || adapter) per scored token, in nats, and the share of scored tokens
    where base and adapter differ in the likeliest token. The base is the model with the adapter
    switched off. The model must be in evaluation mode.
    """
    sums = zero_sums(device)  # sum of KLs, number of changed choices
    tokens = 0
    for inputs, targets in dataset.evaluation_batches(EVAL_BATCH):
        idx = device.to_device(inputs)
        rows = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # (n,), found on the CPU
        tokens += len(rows)
        scored = device.to_device(rows)
        with device.autocast():
            after = model.hidden(idx).flatten(0, 1)[scored]  # (n, C)
            with adapter_disabled(model):
                before = model.hidden(idx).flatten(0, 1)[scored]
            for both in zip(before.split(LOGITS_CHUNK), after.split(LOGITS_CHUNK), strict=True):
                log_p, log_q = (model.logits(hidden).float().log_softmax(-1) for hidden in both)
                kls = kl_divergence(log_p, log_q)
                changes = log_p.argmax(-1) != log_q.argmax(-1)
                sums += torch.stack([kls.sum(dtype=sums.dtype), changes.sum(dtype=sums.dtype)])
    kl, changed = sums.tolist()
    return {"kl_from_base": kl / tokens, "changed_choices": changed / tokens}


class RowLosses(NamedTuple):
    """The losses of N rows: the windows of a text, or conversations."""

    sums: Tensor  # (N,) fp64: nats, summed over the scored tokens of a row
    tokens: Tensor  # (N,) int64: the number of scored tokens of a row


@torch.no_grad()
def row_losses(model: GPT2, dataset: Dataset, device: Device) -> RowLosses:
    """Return the losses of each row. The model must be in evaluation mode."""
    sums = []
    tokens = []
    for inputs, targets in dataset.evaluation_batches(EVAL_BATCH):
        with device.autocast():
            losses, _ = model.token_losses(device.to_device(inputs), device.to_device(targets))
        sums.append(losses.cpu().double().sum(1))
        tokens.append((targets != IGNORE_INDEX).sum(1))
    return RowLosses(torch.cat(sums), torch.cat(tokens))


@dataclass(frozen=True)
class Difference:
    """A difference of two mean losses, in nats per token, with its standard error."""

    difference: float
    standard_error: float


def paired_difference(first: RowLosses, second: RowLosses) -> Difference:
    """Return the loss of the second model minus the loss of the first, on the same tokens.

    Row i has n_i tokens, and the summed losses of its tokens differ by d_i. With n = sum_i n_i,
    the difference is d = sum_i d_i / n, and its standard error is

        sqrt(N / (N - 1) * sum_i (d_i - n_i d)^2) / n.

    Tokens of a row depend on each other, so the rows are the clusters of Miller 2024
    (arXiv:2411.00640). The factor N / (N - 1) is for few rows. Raises UserError if the tokens
    differ, or for one row.
    """
    if not torch.equal(first.tokens, second.tokens):
        raise UserError("the adapters' bases have different tokenizers: compare bits per byte")
    rows = len(first.tokens)
    if rows < 2:
        raise UserError("to compare adapters, score more than one window or conversation")
    n = first.tokens.sum()
    differences = second.sums - first.sums  # d_i
    mean = differences.sum() / n
    errors = differences - first.tokens * mean
    variance = rows / (rows - 1) * errors.square().sum() / n**2
    return Difference(mean.item(), variance.sqrt().item())
