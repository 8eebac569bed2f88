"""The reference implementation: transformers' GPT-2, PEFT's LoRA, and a plain training loop.

The loop takes the options (`args`, the options of `train.py`), the token ids and the order of the
windows from this project. It has separate code for the model, adapter, windows, loss and schedule.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.device import PRECISIONS
from training.options import Options

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

StockModel = Any  # of transformers or PEFT, whose classes do not declare all methods


def load(directory: Path, adapter: Path | None = None, dropout: float | None = None) -> StockModel:
    """Load transformers' GPT-2 in fp32 and, if given, an adapter file. If `dropout` is None, the
    config sets the dropouts.

    transformers has several implementations of gelu_new and of attention, which agree up to
    rounding. The loop uses the same implementations as this project.
    """
    dropouts = {}
    if dropout is not None:
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)

    config = AutoConfig.from_pretrained(directory, attn_implementation="sdpa", **dropouts)
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"

    base = AutoModelForCausalLM.from_pretrained(directory, config=config).float()
    if adapter is None:
        return base
    return PeftModel.from_pretrained(base, adapter)


def build(args: Options) -> StockModel:
    """Build the trained model: the base, and for LoRA a new adapter or `--init-adapter`."""
    model = load(Path(args.base), dropout=args.base_dropout)
    torch.manual_seed(args.seed)  # seeds A, and then the dropouts
    if args.init_adapter:
        return PeftModel.from_pretrained(model, args.init_adapter, is_trainable=True)
    if args.method == "lora":
        return add_lora(model, args)
    return model


def add_lora(base: StockModel, args: Options) -> PeftModel:
    """Add a new PEFT adapter to the base."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.r,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type]  # PEFT also takes a float
        lora_dropout=args.lora_dropout,
        target_modules=list(args.target_modules),
        fan_in_fan_out=True,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=args.init_lora_weights,  # type: ignore[arg-type]
    )
    return get_peft_model(base, config)


def mean_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    precision: str,
    sums: list[float] | None = None,
) -> Tensor:
    """Return the mean of `cross_entropy` under autocast. Append sum / number of tokens to `sums`.

    `inputs` and `targets` are (B, T).
    """
    with torch.autocast(inputs.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        logits = model(input_ids=inputs).logits  # (B, T, V)
    logits = logits.float().flatten(0, 1)
    targets = targets.flatten()

    if sums is not None:
        summed = F.cross_entropy(logits.detach(), targets, reduction="sum")
        sums.append(summed.item() / len(targets))
    return F.cross_entropy(logits, targets)


def make_step(model: nn.Module, args: Options, precision: str) -> Callable[..., float]:
    """Return a function that trains on one batch and returns its mean loss."""
    assert args.lr is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=args.precision == "fp16")
    model.train()

    def step(inputs: Tensor, targets: Tensor, lr: float, sums: list[float] | None = None) -> float:
        loss = mean_loss(model, inputs, targets, precision, sums)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, args.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    return step


def train(
    model: nn.Module, args: Options, tokens: np.ndarray, batches: list[np.ndarray]
) -> tuple[list[float], list[float]]:
    """Train on windows of `tokens`. Return each step's loss twice: as a sum divided by the number
    of tokens, and as the mean of `cross_entropy`, which is minimised.
    """
    device = next(model.parameters()).device
    step = make_step(model, args, args.precision)
    losses: list[float] = []
    means: list[float] = []

    for i, batch in enumerate(batches):
        inputs, targets = windows(tokens, batch * args.stride, args.block_size, device)
        lr = learning_rate(i, len(batches), args)
        means.append(step(inputs, targets, lr, losses))
    return losses, means


def windows(
    tokens: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `block_size` tokens from each start, and the tokens one place later: both (B, T)."""
    spans = [tokens[start : start + block_size + 1] for start in starts]
    rows = torch.from_numpy(np.stack(spans).astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


def learning_rate(step: int, steps: int, args: Options) -> float:
    """Return the learning rate: linear warm-up, then half a cosine to zero."""
    assert args.lr is not None
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def adapter_tensors(model: StockModel) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in PEFT's file, or {} without an adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return get_peft_model_state_dict(model)


@torch.no_grad()
def evaluate(model: StockModel, tokens: np.ndarray, block_size: int) -> float:
    """Return the loss of transformers, averaged over all tokens except the first."""
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, block_size):
        ids = tokens[start : start + block_size + 1].astype(np.int64)
        window = torch.from_numpy(ids)[None].to(model.device)  # (1, T + 1)
        loss = model(input_ids=window, labels=window).loss
        total += loss.item() * (len(ids) - 1)
    return total / (len(tokens) - 1)
