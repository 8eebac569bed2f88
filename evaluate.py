"""Score a text: loss, perplexity, bits per byte and greedy accuracy; compare finished runs."""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import interrupts
    interrupts.end_in_one_line()

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import (
    BOOK,
    Parser,
    add_device_options,
    add_model_options,
    load_model,
    number,
    print_table,
)
from data.tokens import load_tokens, token_bytes
from data.windows import NOT_SCORED, evaluation_batches, split
from errors import RunError, UserError, run_command
from files import write_json
from hardware import (
    autocast,
    cast_frozen,
    keep_freed_memory,
    pick_device,
    pick_precision,
    to_device,
)
from lora.adapter import WEIGHTS as ADAPTER_WEIGHTS
from model import ops
from model.checkpoint import WEIGHTS as MODEL_WEIGHTS
from model.gpt2 import GPT2, GPT2Config
from plots import draw_comparison
from training.directory import read_run
from training.parallel import ALONE, Ranks


@dataclass(frozen=True)
class Scores:
    """What a model makes of a text. `loss` is in nats, the mean over scored tokens."""

    tokens: int
    bytes: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, "
                f"{self.bits_per_byte:.4f} bits per byte")


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^700 is near the largest float


@torch.no_grad()
def evaluate(
    model: GPT2, tokens: np.ndarray, *, block_size: int, stride: int | None = None,
    label_shift: int = 1, batch_size: int = 16, precision: str = "fp32",
    ranks: Ranks = ALONE,
) -> Scores:
    """Score each of `tokens` but the first `label_shift` once, in windows of `block_size`.

    Raises RunError when the loss is not finite.
    """
    device = next(model.parameters()).device
    # The loss and the greedy hits, both as sums over tokens.
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64,
                       device=device)
    was_training = model.training
    model.eval()
    try:
        for inputs, targets in ranks.every(evaluation_batches(
                tokens, block_size, stride or block_size, label_shift, batch_size)):
            inputs, targets = to_device(inputs, device), to_device(targets, device).flatten()
            with autocast(device, precision):
                hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
                losses, hits = ops.score(hidden, model.wte.weight, targets)
            scored = targets != NOT_SCORED
            sums += torch.stack([x[scored].sum(dtype=sums.dtype) for x in (losses, hits)])
    finally:
        model.train(was_training)
    ranks.add_up([sums])
    loss, hits = sums.tolist()
    if not math.isfinite(loss):
        raise RunError(f"the loss on the text is {loss}; try --precision fp32, or train "
                       "with a lower --lr")
    scored = tokens[label_shift:]
    return Scores(
        tokens=len(scored),
        bytes=int(token_bytes(model.config.vocab_size)[scored].sum()),
        loss=loss / len(scored),
        accuracy=hits / len(scored),
    )


def check_block_size(block_size: int, config: GPT2Config) -> None:
    if block_size > config.n_positions:
        raise UserError(f"--block-size {block_size}: the base sees {config.n_positions} tokens "
                        "at most")


def parse_args():
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--text", type=Path, default=None, metavar="FILE",
                        help="UTF-8 text to score whole (default: data/book.txt's validation part)")
    parser.add_argument("--val-fraction", type=number(float, 0.001, 1.0), default=None,
                        help="score only this last part of the text")
    parser.add_argument("--block-size", type=number(int, 1), default=128)
    parser.add_argument("--stride", type=number(int, 1), default=None,
                        help="a window starts every so many tokens (default: the block size)")
    parser.add_argument("--label-shift", type=number(int, 1, 2), default=1, metavar="{1,2}")
    parser.add_argument("--batch-size", type=number(int, 1), default=16)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--compare", type=Path, nargs="+", default=None, metavar="RUN",
                        help="table and picture of finished runs, their base included")
    add_device_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.compare:
        return compare(args.compare)
    if args.stride and args.stride > args.block_size:
        raise UserError(f"--stride {args.stride}: above the block size, some tokens go unscored")
    device = pick_device(args.device)
    keep_freed_memory()
    precision = pick_precision(args.precision, device)
    name, model = load_model(args)
    check_block_size(args.block_size, model.config)
    cast_frozen(model.requires_grad_(False), precision)
    text = args.text or BOOK
    fraction = args.val_fraction or (1.0 if args.text else 0.1)
    tokens = load_tokens(text, model.config.vocab_size)
    tokens = split(tokens, fraction)[1]
    if len(tokens) <= args.label_shift:
        raise UserError(f"{text}: {len(tokens)} tokens; too short to score")
    scores = evaluate(model.to(device), tokens, block_size=args.block_size, stride=args.stride,
                      label_shift=args.label_shift, batch_size=args.batch_size,
                      precision=precision)
    part = "" if fraction == 1 else f", the last {fraction:.0%}"
    print(f"{text}{part}: {scores.tokens:,} tokens, {scores.bytes:,} bytes\n"
          f"{scores}, accuracy {scores.accuracy:.2%}")
    if args.json:
        write_json(args.json, {
            "base": name, "adapter": str(args.adapter) if args.adapter else None,
            "text": str(text), "val_fraction": fraction, "tokens": scores.tokens,
            "bytes": scores.bytes, "loss": scores.loss, "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte, "accuracy": scores.accuracy,
        })


COLUMNS = ("", "trainable", "share", "val loss", "perplexity", "bits/byte", "seconds", "tokens/s",
           "peak MB", "MB on disk")
COMPARABLE = ("book", "val_fraction", "block_size", "label_shift")  # else losses do not compare


def compare(directories: list[Path]) -> None:
    """Print the table of finished runs and their bases, and draw it beside the first run."""
    runs = [(directory, read_run(directory)) for directory in directories]
    measures = {str([run["base"], *map(run["options"].get, COMPARABLE)]) for _, run in runs}
    if len(measures) > 1:
        print("note: these runs differ in base, book, split, block or label shift; "
              "their losses do not compare")
    rows = [("base " + base, None, run) for base, run in {r["base"]: r for _, r in runs}.items()]
    rows += [(run["method"], directory, run) for directory, run in runs]
    print_table(COLUMNS, [_cells(*row) for row in rows])
    picture = directories[0].resolve().parent / "compare.png"
    base = runs[0][1]
    if draw_comparison(base["base"], perplexity(base["base_val_loss"]), runs, picture):
        print(f"drawn in {picture}")


def _cells(name: str, directory: Path | None, run: dict) -> list[str]:
    """One row of the table; without a directory, that of the run's base."""
    if directory is None:
        loss = run["base_val_loss"]
        bits = run["best_val_bits_per_byte"] * loss / run["best_val_loss"]  # over the same bytes
        return [name, "0", "0 %", f"{loss:.4f}", f"{perplexity(loss):.2f}", f"{bits:.4f}", *"----"]
    weights = directory / (ADAPTER_WEIGHTS if run["method"] == "lora" else MODEL_WEIGHTS)
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; the run is not whole")
    return [name, f"{run['trainable_parameters']:,}", f"{run['trainable_percent']:.4f} %",
            f"{run['best_val_loss']:.4f}", f"{run['best_val_perplexity']:.2f}",
            f"{run['best_val_bits_per_byte']:.4f}", f"{run['seconds']:,.0f}",
            f"{run['tokens_per_second']:,.0f}", f"{run['peak_memory_mb']:,.0f}",
            f"{weights.stat().st_size / 1e6:,.2f}"]


if __name__ == "__main__":
    run_command(main)
