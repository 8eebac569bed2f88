"""The reference run's protocol: its options, given to `train.py`, and its measure.

A window there is x = tokens[i : i+128] with labels tokens[i+1 : i+129], for every i, and its
library shifts the labels once more. So position t is scored on token t + 2 for t = 0 ... 126, and
the last position on nothing. As no position sees a later one, that is to the letter a window of
127 tokens with `--label-shift 2`.
"""

import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from cli import parse_train_args
from data.windows import Windows
from errors import UserError
from evaluate import evaluate
from hardware import autocast
from lora.adapter import load_adapter
from model.checkpoint import load_config, load_gpt2
from model.gpt2 import GPT2
from training.directory import read_run

BLOCK, SCORED, SHIFT, EPOCHS, VAL_FRACTION = 128, 127, 2, 3, 0.1
COMMON = (f"--epochs {EPOCHS} --block-size {SCORED} --stride 1 --label-shift {SHIFT} "
          f"--val-fraction {VAL_FRACTION} --weight-decay 0.01 --warmup-ratio 0.06 --clip 0").split()
BATCH_SIZE = {"lora": 16, "full": 64}
METHODS = {
    "lora": [*COMMON, *f"--batch-size {BATCH_SIZE['lora']} --lr 3e-4 --r 8 --lora-alpha 16 "
                       "--lora-dropout 0.05 --target-modules c_attn".split()],
    "full": [*COMMON, *f"--batch-size {BATCH_SIZE['full']} --lr 3e-5".split()],
}


def train_arguments(opts: Namespace, method: str, out: Path, *more: str) -> list[str]:
    """`train.py`'s arguments for one run by the protocol; `more` come last and win."""
    steps = ["--max-steps", str(opts.max_steps)] if opts.max_steps else []
    return [method, "--base", opts.base, "--book", str(opts.book), "--out", str(out),
            "--device", str(opts.device), "--precision", opts.precision, "--seed", str(opts.seed),
            *METHODS[method], *steps, *more]


def run_train(arguments: list[str]) -> dict:
    """`python train.py ARGUMENTS`, in this process; returns what it wrote to `run.json`."""
    argv = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["train.py", *arguments]  # it parses them, and repeats them when interrupted
    try:
        train.main()
        return read_run(parse_train_args("-", arguments).out)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_base(opts: Namespace) -> None:
    """Raises UserError if the base cannot see a window of the protocol."""
    positions = load_config(opts.directory).n_positions
    if positions < BLOCK:
        raise UserError(f"--base {opts.base}: sees {positions} tokens at most, and the protocol's "
                        f"windows have {BLOCK}; use another base")


def load_best(opts: Namespace, method: str, out: Path) -> GPT2:
    """The base, or what the run in `out` kept of it; in evaluation mode, on the device."""
    model = load_gpt2(out if method == "full" else opts.directory)
    if method == "lora":
        load_adapter(model, out)
    return model.to(opts.device)


def window_indices(tokens: np.ndarray, count: int | None) -> np.ndarray:
    """All of the protocol's windows over `tokens`, or `count` of them, evenly spaced."""
    total = len(Windows(tokens, SCORED, 1, SHIFT))
    return np.linspace(0, total - 1, min(count or total, total)).astype(int)


@torch.no_grad()
def reference_loss(model: GPT2, tokens: np.ndarray, batch_size: int, count: int | None = None,
                   precision: str = "fp32") -> float:
    """The reference's validation loss, nats: the mean over batches of each batch's mean loss.

    The batches hold windows at stride 1, in order; a last, smaller batch counts like the others.
    `model` is in evaluation mode. With a `count`, only so many windows are scored.
    """
    device = model.wte.weight.device
    windows, indices = Windows(tokens, SCORED, 1, SHIFT), window_indices(tokens, count)
    losses = []
    for start in range(0, len(indices), batch_size):
        inputs, targets = windows.batch(indices[start : start + batch_size])  # (B, 127) each
        with autocast(device, precision):
            logits = model(inputs.to(device)).flatten(0, 1)  # (B * 127, V)
        losses.append(F.cross_entropy(logits.float(), targets.to(device).flatten()).item())
    return sum(losses) / len(losses)


def token_scores(model: GPT2, tokens: np.ndarray, label_shift: int, precision: str = "fp32"):
    """This project's measure: each token once, in consecutive windows, the mean over tokens."""
    return evaluate(model, tokens, block_size=BLOCK, label_shift=label_shift, precision=precision)
