"""Apply the variants of LoRA that change each step."""

from torch.optim import Optimizer

from lora.variants.riemannian import precondition
from model.gpt2 import GPT2
from training.run import Run


def start_variant(model: GPT2, optimizer: Optimizer, run: Run) -> None:
    """With --riemannian, precondition the gradients of each step."""
    if run.options.riemannian:
        optimizer.register_step_pre_hook(lambda *_: precondition(model))
