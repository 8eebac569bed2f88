"""Do the findings hold on SmolLM2-135M-Instruct? `python -m lesson.experiments.smollm2`

Varied: full fine-tuning or LoRA, LoRA's layers, rank and alpha, and the task.
Fixed: fp32, 32 steps of 4 of 128 conversations or windows of 128 tokens, AdamW with weight decay
0.01, 6 % warm-up, cosine, clipping at 1, no dropout. The rate is searched with seed 0.
Measured: the perplexity on the validation part, the KL from the base on this part, and the KL from
the base on 16 texts of 128 tokens that the base wrote. For two choices, these are also measured
after a multiplication of the whole change by 0.7 and by 0.5.

`make example` installs the weights. Results are kept in runs/experiments. A run with a known result
is not repeated.
"""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.device import Device, tune_process
from evaluation.scores import kl_divergence
from lesson.examples.any_model import book, conversations, loss
from lesson.examples.smollm2 import load
from lesson.experiments import sweep
from lesson.experiments.common import as_command, experiment, settings, spread
from lesson.experiments.sweep import best_rate, scored, search_with_first_seed
from lora import LoRAConfig, inject
from model.gpt2 import IGNORE_INDEX
from train import learning_rate
from training.options import ROOT

EXAMPLES = 128  # of a run
BATCH = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FULL = {"method": "full"}
LORA = {
    "method": "lora",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
SHRINK = {"scales": (0.7, 0.5)}

# The first rate to try, and the options. Attention of rank 33 and the MLP of rank 20 train the same
# number of parameters.
CHOICES: dict[str, tuple[float, dict[str, Any]]] = {
    "LoRA": (4e-3, LORA | SHRINK),
    "full": (2e-4, FULL | SHRINK),
    "r = 1, alpha 16": (4e-3, LORA | {"r": 1}),
    "r = 64, alpha 16": (4e-3, LORA | {"r": 64}),
    "attention, r = 33": (4e-3, LORA | {"r": 33, "target_modules": ATTENTION}),
    "MLP, r = 20": (4e-3, LORA | {"r": 20, "target_modules": MLP}),
    "LoRA, book": (4e-3, LORA | {"task": "book"}),
    "full, book": (4e-4, FULL | {"task": "book"}),
    "r = 64, alpha 128": (1e-3, LORA | {"r": 64, "lora_alpha": 128}),
}
DEVICE = Device.pick("cpu", "fp32", train=True)


@cache
def base() -> tuple[Any, Any]:
    """Return SmolLM2 and the tokenizer."""
    tune_process(DEVICE)
    return load(None)


@cache
def load_task(name: str) -> tuple[Any, Any]:
    """Return the training part and the validation part."""
    tokenizer = base()[1]
    if name == "book":
        task = book(tokenizer)
    else:
        task = conversations(ROOT / "data" / "instructions.jsonl", tokenizer)
    return task.training, task.validation


@torch.no_grad()
def log_probabilities(model: nn.Module, texts: Tensor) -> Tensor:
    """Return log p of every next token, (texts, tokens, V)."""
    return model(input_ids=texts).logits.log_softmax(-1)


@cache
def base_texts() -> tuple[Tensor, Tensor]:
    """Let the base write texts (16, 128). Return them, and the base's log p on them."""
    model, tokenizer = base()
    start = torch.full((16, 1), tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    torch.manual_seed(0)
    texts = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=127,
        min_new_tokens=127,
    )
    return texts, log_probabilities(model, texts)


def on_task(model: nn.Module, task: str) -> tuple[Tensor, Tensor]:
    """Return log p of every next token (N, V) at the scored tokens of the validation part, and the
    tokens (N,).
    """
    log_p, tokens = [], []
    for inputs, targets in load_task(task)[1].evaluation_batches(8):
        scored = targets != IGNORE_INDEX
        log_p.append(log_probabilities(model, inputs)[scored])
        tokens.append(targets[scored])
    return torch.cat(log_p), torch.cat(tokens)


@cache
def base_on_task(task: str) -> Tensor:
    return on_task(base()[0], task)[0]


def scores(model: nn.Module, task: str) -> dict[str, float]:
    """Return the perplexity, and the mean KL(base || model) per token in nats, on the texts of the
    base and on the validation part.
    """
    model.eval()
    texts, base_log_p = base_texts()
    log_p, tokens = on_task(model, task)
    loss = -log_p.gather(-1, tokens.unsqueeze(-1)).mean().item()
    return {
        "perplexity": math.exp(loss),
        "kl": kl_divergence(base_log_p, log_probabilities(model, texts)).mean().item(),
        "task_kl": kl_divergence(base_on_task(task), log_p).mean().item(),
    }


def train(model: nn.Module, data: Any, lr: float, seed: int, count: int) -> None:
    """Train on the first `count` examples of an epoch, in batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    batches = np.split(data.epoch_order(seed, 0)[:count], count // BATCH)
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), lr, warmup_ratio=0.06)
        inputs, targets = data.inputs_and_targets(indices)
        mean = loss(model.train(), inputs, targets, DEVICE)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.no_grad()
def scale_change(model: nn.Module, scale: float) -> None:
    """Multiply the change of the weights by a number. LoRA's change is linear in B."""
    start = base()[0].state_dict()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.mul_(scale)
        elif p.requires_grad and "lora_A" not in name:
            p.copy_(start[name].lerp(p, scale))


def finetune(
    lr: float,
    seed: int,
    task: str = "instructions",
    scales: Sequence[float] = (),
    method: str = "lora",
    **adapter: Any,
) -> list[dict[str, float]]:
    """Train. Return the scores of the model, then with each scale of the change."""
    model = deepcopy(base()[0])
    torch.manual_seed(seed)
    if method == "lora":
        inject(model, LoRAConfig(**adapter))
    training, _ = load_task(task)
    train(model, training, lr, seed, EXAMPLES)
    found = [scores(model, task)]
    previous = 1.0
    for scale in scales:
        scale_change(model, scale / previous)
        found.append(scores(model, task))
        previous = scale
    return found


def run(options: dict[str, Any], lr: float, seeds: Sequence[int]) -> list[list[dict[str, float]]]:
    """Return the result with each seed. A stored result is returned at once."""
    measured = []
    for seed in seeds:
        decides = {"measure": "smollm2", "lr": lr, "seed": seed}
        key = json.dumps(decides | options | settings())
        train_once = partial(finetune, lr, seed, **options)
        measured.append(sweep.remembered(key, train_once))
    return measured


def at_full_change(result: list[dict[str, float]]) -> float:
    return result[0]["perplexity"]


def measure() -> dict[str, Any]:
    """Return the results by choice and rate, and the base's scores."""
    data: dict[str, Any] = {}
    for task in ("instructions", "book"):
        data[f"base, {task}"] = scores(base()[0], task)
    for label, (guess, options) in CHOICES.items():
        found = search_with_first_seed(partial(run, options), guess, at_full_change)
        best = best_rate(found, at_full_change)
        print(
            f"{label}: {spread([at_full_change(r) for r in found[best]])} at {best:g}", flush=True
        )
        data[label] = found
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw a bar for each choice on the instructions at the best rate."""
    runs: dict[str, Any] = {}
    for label, (_, options) in CHOICES.items():
        if label in data and "task" not in options:
            runs[describe(options)] = scored(data[label], at_full_change)
    caption = (
        "fp32, 32 steps of 4 conversations. Attention and MLP train the same number of parameters. "
        f"The base has a perplexity of {data['base, instructions']['perplexity']:.1f}."
    )
    title = "LoRA and full fine-tuning of SmolLM2-135M-Instruct on instructions"
    return sweep.draw(title, caption, runs)


def describe(options: dict[str, Any]) -> str:
    """Return the name of a choice in the picture."""
    if options["method"] == "full":
        return "full fine-tuning"
    layers = {"all-linear": "all linear layers", ATTENTION: "attention", MLP: "MLP"}
    where = layers[options["target_modules"]]
    return f"LoRA, {where}:\nr = {options['r']}, alpha {options['lora_alpha']}"


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("smollm2", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
