"""Count how much of a GPU's memory training takes: `python -m benchmarks.gpu_memory`.

The command adds up the tensors that a step keeps, for each base, method and precision, and runs no
model. The table adds 0.5 GB for the CUDA context and the allocator's reserve.

Shapes: B windows of T tokens, n = B T, C = n_embd, L = n_layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.cli import Parser, number, print_table
from common.errors import run_command
from model.gpt2 import GPT2Config
from model.kernels.cuda_loss import SHARE, aligned

BASES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes per weight: docs/qlora.md
CARDS = (8, 12, 16, 24)  # GB
CONTEXT = 0.5e9  # for the CUDA context and the allocator's reserve


@dataclass(frozen=True)
class Case:
    """One way to train: a row of the table."""

    name: str
    method: str  # lora or full
    item: int  # bytes per number in the run's precision
    nf4: bool = False
    checkpointing: bool = False


CASES = (
    Case("LoRA, fp32", "lora", 4),
    Case("LoRA, bf16 or fp16", "lora", 2),
    Case("LoRA, bf16, checkpointing", "lora", 2, checkpointing=True),
    Case("LoRA, bf16, NF4", "lora", 2, nf4=True),
    Case("LoRA, bf16, NF4, checkpointing", "lora", 2, nf4=True, checkpointing=True),
    Case("full, fp32", "full", 4),
    Case("full, bf16", "full", 2),
    Case("full, bf16, checkpointing", "full", 2, checkpointing=True),
)


def step_bytes(
    config: GPT2Config, case: Case, windows: int, length: int, rank: int = 8, card: float = 16e9
) -> dict[str, float]:
    """Return the bytes of each part of a step's memory, at the peak."""
    tokens = windows * length
    blocks = block_bytes(config, case, rank)
    kept = config.n_layer * blocks
    if case.checkpointing:  # one input per block, and all tensors of a single block
        kept = config.n_layer * 4 * config.n_embd + blocks
    parts = weight_bytes(config, case, rank)
    parts["activations"] = tokens * (kept + around_bytes(config))
    parts["loss"] = loss_bytes(config, case, tokens, card)
    if case.method == "full":  # once all gradients exist, activations and loss are freed
        gradients = 4 * parameters(config)
        in_backward = gradients - parts["activations"] - parts["loss"]
        parts["gradients"] = max(0.0, in_backward)
    return parts


def parameters(config: GPT2Config) -> int:
    C = config.n_embd
    return config.n_layer * (12 * C**2 + 13 * C) + (config.vocab_size + config.n_positions + 2) * C


def weight_bytes(config: GPT2Config, case: Case, rank: int) -> dict[str, float]:
    """Return the bytes of the weights, of the adapter and AdamW, and of copies of weights."""
    C = config.n_embd
    matrices = config.n_layer * 12 * C**2
    others = parameters(config) - matrices
    if case.method == "full":
        return {
            "weights": 4.0 * parameters(config),
            "AdamW": 8.0 * parameters(config),
            "copies": 0.0 if case.item == 4 else case.item * matrices,  # made by autocast
        }

    adapter = config.n_layer * 4 * C * rank  # A (r, C) and B (3 C, r)
    frozen = float(case.item * (matrices + others))
    copies = 0.0
    if case.nf4:
        frozen = NF4_BYTES * matrices + case.item * others
        copies = 4 * C**2 * (2 + 4 + case.item)  # of one layer at a time: codes, levels, weights
    return {"weights": frozen, "adapter and AdamW": 16.0 * adapter, "copies": copies}


def block_bytes(config: GPT2Config, case: Case, rank: int) -> float:
    """Return the bytes per token that one block keeps for its backward pass.

    A block keeps the inputs of two norms in fp32 and the bool masks of the dropouts. In the run's
    precision, a block keeps q, k, v, and the outputs of the attention and of c_fc. LoRA also keeps
    the input of A. Full fine-tuning also keeps the inputs of the matmuls. The output of the
    attention is the input of c_proj and counts once.
    """
    C = config.n_embd
    norms = 2 * 4 + 16 / C
    attention = (3 + 1) * case.item + 4 * config.n_head / C  # plus the log of the softmax's sums
    inner = 4 * case.item
    if case.method == "lora":
        return C * (norms + attention + inner + 3 + case.item + rank * case.item / C)
    return C * (norms + attention + inner + 2 + (1 + 1 + 4) * case.item)


def around_bytes(config: GPT2Config) -> float:
    """Return the bytes per token outside the blocks: the embedding's mask, and the last norm's
    input and output.
    """
    return config.n_embd * (1 + 4 + 4)


def loss_bytes(config: GPT2Config, case: Case, tokens: int, card: float) -> float:
    """Return the loss's bytes: hidden states, their gradient, and two chunks of fp32 logits."""
    columns = aligned(config.vocab_size)
    most = max(1, int(card // SHARE // (8 * columns)))
    chunk = math.ceil(tokens / math.ceil(tokens / most))
    total = 8.0 * columns * chunk + 2 * case.item * config.n_embd * tokens
    if case.method == "full":  # the gradient of the head, and a product to add to the gradient
        total += (4 + 2 * case.item) * columns * config.n_embd
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.gpu_memory", description=__doc__)
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="windows a step")
    parser.add_argument("--block-size", type=number(int, 1, 1024), default=128)
    parser.add_argument("--card", type=number(float, 1), default=16, help="memory, GB")
    args = parser.parse_args(argv)

    rows = []
    for case in CASES:
        cells = [case.name]
        for config in BASES.values():
            parts = step_bytes(config, case, args.batch_size, args.block_size, card=1e9 * args.card)
            total = sum(parts.values()) + CONTEXT
            cells.append(f"{total / 1e9:.1f} ({smallest_card(total)})")
        rows.append(cells)
    print_table(("GB (the smallest card)", *BASES), rows)


def smallest_card(total: float) -> str:
    """Return the smallest card, in GB, that the total fills to at most 95 %."""
    for card in CARDS:
        if total <= 0.95e9 * card:
            return str(card)
    return "more"


if __name__ == "__main__":
    run_command(main)
