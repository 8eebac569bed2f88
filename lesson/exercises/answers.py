"""Your answers to docs/exercises.md. Change an answer, and run `python -m lesson.exercises N`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRAConfig, LoRALinear


def count_lora(n_layer: int, n_embd: int, r: int, target_modules: tuple[str, ...]) -> int:
    """1. Count by hand the trained numbers, for these targets out of c_attn, c_proj and c_fc."""
    raise NotImplementedError


def swap_the_zero(layer: LoRALinear) -> None:
    """2. Set A to zero and draw B at random, in place."""
    raise NotImplementedError


def alpha_for(scaling: float, r: int, use_rslora: bool) -> float:
    """3. Return the lora_alpha that makes `LoRAConfig.scaling` equal `scaling` at every rank."""
    raise NotImplementedError


def merge_into_file(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """4. Add scaling * B A, with A (r, in) and B (out, r), to GPT-2's weight (in, out). Repair."""
    return weight + scaling * b @ a


class LoRAEmbedding(nn.Module):
    """5. Add scaling * B A[:, i] to row i of a frozen table: A (r, rows), B (width, r)."""

    def __init__(self, table: nn.Embedding, config: LoRAConfig):
        super().__init__()
        self.table = table
        self.scaling = config.scaling
        self.lora_A = nn.Parameter(torch.zeros(config.r, table.num_embeddings))
        self.lora_B = nn.Parameter(torch.zeros(table.embedding_dim, config.r))

    def forward(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def gradients(x: Tensor, g: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """6. Return dA and dB of y = scaling * B A x from x (N, in) and g = dL/dy (N, out)."""
    raise NotImplementedError


def dropout_after_a(layer: LoRALinear, x: Tensor) -> Tensor:
    """7. Return y (..., out) with dropout on the r numbers A x instead of on x."""
    raise NotImplementedError


def lost_in_bf16(weight: Tensor, delta: Tensor) -> float:
    """8. Return the error of merging fp32 `delta` into bf16 `weight`, relative to delta's norm."""
    raise NotImplementedError


def accumulate(parts: list[Tensor]) -> None:
    """9. Go backward from the mean over tokens. Each part has the losses of its tokens. Repair."""
    for losses in parts:
        (losses.mean() / len(parts)).backward()


def clipped_step(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    loss: Tensor,
    clip: float,
) -> None:
    """10. Take a step whose gradient has at most the norm `clip`. Repair the order of the lines."""
    scaler.scale(loss).backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """11. Return the mean of -log p(target). `inputs_and_targets` shifts the targets. Repair."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


RANK = None  # 12. the smallest power of two where LoRA reaches full fine-tuning


def quantise_by_absmax(weight: Tensor, levels: Tensor, block: int | None) -> Tensor:
    """13. Return the weight rounded to levels, with one absmax per `block` numbers. Repair."""
    absmax = weight.abs().max()
    distances = (weight[..., None] / absmax - levels).abs()  # (out, in, levels)
    return levels[distances.argmin(-1)] * absmax


def bits_per_weight(block: int, double: bool) -> float:
    """14. Return NF4's bits per weight, scales included, with or without double quantisation."""
    return 4.0


def smallest_block(bits: float, double: bool) -> int:
    """14. Return the smallest block, a power of two, that costs at most `bits` per weight."""
    raise NotImplementedError
