"""The examiner: GPT-2 by transformers, LoRA by PEFT, and a plain loop that trains them.

Of this project it takes the options (`args`, those of `train.py`), the token ids and the order of
the windows; the model, the adapter, the windows, the loss and the schedule are not ours.
"""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_base(directory: Path, dropout: float | None = None) -> nn.Module:
    """transformers' GPT-2 in fp32; `dropout` None keeps its config's.

    transformers has more than one way to compute GELU and attention, equal up to rounding: take
    the same as this project, tanh GELU in one operation and `scaled_dot_product_attention`.
    """
    dropouts = {} if dropout is None else dict.fromkeys(DROPOUTS, dropout)
    return AutoModelForCausalLM.from_pretrained(
        directory, activation_function="gelu_pytorch_tanh", attn_implementation="sdpa", **dropouts,
    ).float()


def load(directory: Path, adapter: Path | None = None) -> nn.Module:
    """The base in fp32 and, if given, an adapter file on it."""
    base = load_base(directory)
    return PeftModel.from_pretrained(base, adapter) if adapter else base


def build(args: Namespace) -> nn.Module:
    """What `args` trains: the base, for LoRA with PEFT's new adapter or `--init-adapter`."""
    base = load_base(args.base, args.base_dropout)
    if args.method == "full":
        return base
    if args.init_adapter:
        return PeftModel.from_pretrained(base, args.init_adapter, is_trainable=True)
    return add_lora(base, args)


def add_lora(base: nn.Module, args: Namespace) -> PeftModel:
    """The base with PEFT's new adapter in it, seeded."""
    torch.manual_seed(args.seed)
    return get_peft_model(base, LoraConfig(
        task_type="CAUSAL_LM", r=args.r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout, target_modules=args.target_modules, fan_in_fan_out=True))


def train(model: nn.Module, args: Namespace, tokens: np.ndarray,
          batches: list[np.ndarray]) -> tuple[list[float], list[float]]:
    """Train on windows of `tokens`. Returns each step's loss twice: the sum over its tokens
    divided by their number, and `cross_entropy`'s own mean, which is what is minimised.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    losses, means = [], []
    model.train()
    for step, batch in enumerate(batches):
        inputs, targets = windows(tokens, batch * args.stride, args.block_size, device)
        with torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "fp32"):
            logits = model(input_ids=inputs).logits
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, args.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), args)
        scaler.step(optimizer)
        scaler.update()
        summed = F.cross_entropy(logits.detach(), targets, reduction="sum")
        losses.append(summed.item() / len(targets))
        means.append(loss.item())
    return losses, means


def windows(tokens: np.ndarray, starts: np.ndarray, block_size: int,
            device: torch.device) -> tuple[Tensor, Tensor]:
    """`block_size` tokens from each start, and for each of them the token after it: (B, T) both."""
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1], rows[:, 1:]


def learning_rate(step: int, steps: int, args: Namespace) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, or all of GPT-2's by its checkpoint's, (out, in)."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model)
    transposed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    return {name.removeprefix("transformer."): p.t() if name in transposed else p
            for name, p in model.named_parameters()}


@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, block_size: int) -> float:
    """The mean loss over all tokens but the first, by transformers' own loss and label shift."""
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, block_size):
        window = torch.from_numpy(tokens[start : start + block_size + 1].astype(np.int64))[None]
        window = window.to(model.device)
        total += model(input_ids=window, labels=window).loss.item() * (window.numel() - 1)
    return total / (len(tokens) - 1)
