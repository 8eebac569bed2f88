"""The reference run, repeated: its table beside ours, and what the same models really predict.

`python -m benchmarks.reference` trains LoRA and then the whole base by the reference's protocol,
and scores both by its measure and as language models, by the next token. Without `--book` the text
is pseudo-Latin, as the reference's was filler. Further options are `train.py`'s: those that change
the protocol show what its figures depend on (docs/reference-run.md).

A window there is x = tokens[i : i+128] with labels tokens[i+1 : i+129], for every i, and its
library shifts the labels once more. So position t is scored on token t + 2 for t = 0 ... 126, and
the last position on nothing. As no position sees a later one, that is to the letter a window of
127 tokens with `--label-shift 2`.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks import ours
from benchmarks.parity_report import machine
from common.cli import BASE, Parser, number, print_table
from common.device import Device
from common.errors import run_command
from common.files import write_json
from data.tokens import load_tokens
from data.windows import Windows, check_block_size, split
from model.hub import find_base
from model.weights import load_config
from training.options import ROOT
from training.report import perplexity

BLOCK, SCORED, SHIFT, VAL_FRACTION = 128, 127, 2, 0.1
COMMON = (
    f"--epochs 3 --block-size {SCORED} --stride 1 --label-shift {SHIFT} --precision fp32 "
    f"--val-fraction {VAL_FRACTION} --weight-decay 0.01 --warmup-ratio 0.06 --clip 0"
)
BATCH_SIZE = {"base": 16, "lora": 16, "full": 64}
METHODS = {
    "lora": f"{COMMON} --batch-size 16 --lr 3e-4 --r 8 --lora-alpha 16 --lora-dropout 0.05 "
    "--target-modules c_attn",
    "full": f"{COMMON} --batch-size 64 --lr 3e-5",
}
PUBLISHED = {
    "lora": ("294,912", "0.2364 %", "0.2261", "1.2537", "-", "-"),
    "full": ("about 124.7 million", "-", "-", "1.1211", "-", "-"),
}
COLUMNS = ("", "trainable", "share", "best val loss", "perplexity", "next-token loss", "perplexity")
RUN_LENGTH = 16  # tokens in a row, looked for in the training part
TEXT = Path(__file__).with_name("pseudo-latin.txt")  # 5,000 words: 12 sentences, drawn at random


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_args(argv)
    tokens = load_tokens(opts.book, ours.tokenizer(opts.directory))
    training, validation = split(tokens, VAL_FRACTION)
    windows = Windows(validation, SCORED, 1, SHIFT)
    count = min(opts.val_windows or len(windows), len(windows))
    scored = np.linspace(0, len(windows) - 1, count).astype(int)  # evenly spaced
    seen = share_seen(training, validation)
    print(
        f"base {Path(opts.base).name}, {opts.book.name}: {len(tokens):,} tokens, {machine()}\n"
        f"{seen:.1%} of the validation part's runs of {RUN_LENGTH} tokens are in the training "
        "part as well",
        flush=True,
    )
    runs = {"base": {}} | {method: ours.run(arguments(opts, method)) for method in opts.only}
    figures = {method: score(opts, method, run, windows, scored) for method, run in runs.items()}
    report(figures)
    part = "all" if count == len(windows) else f"only {count:,} of the"
    print(
        f"\nbest val loss: by the reference's measure, on {part} {len(windows):,} validation "
        "windows at stride 1\nnext-token loss: each token of the validation part once, the mean"
    )
    if opts.more:
        print(f"{' '.join(opts.more)}: not the whole protocol; do not compare with the published")
    write_json(
        opts.out / "reference.json",
        {
            "base": Path(opts.base).name,
            "book": opts.book.name,
            "tokens": len(tokens),
            "seen_before": seen,
            "val_windows": {"scored": count, "all": len(windows)},
            "options": " ".join(opts.more),
            "here": figures,
            "device": opts.device.name,
            "machine": machine(),
            "torch": torch.__version__,
        },
    )


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(
        prog="benchmarks.reference",
        description=__doc__,
        epilog="Further options are those of train.py.",
    )
    parser.add_argument("--base", **BASE)
    parser.add_argument(
        "--book", type=Path, default=TEXT, help="UTF-8 text file (default: pseudo-Latin)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "reference",
        metavar="DIR",
        help="where the runs lora/ and full/ go, and the figures",
    )
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument(
        "--val-windows",
        type=number(int, 1),
        metavar="N",
        help="score only so many validation windows by the reference's measure, "
        "evenly spaced (default: all)",
    )
    opts, opts.more = parser.parse_known_args(argv)
    opts.base, opts.directory = find_base(opts.base)
    chosen = ours.options(opts.only[0], *METHODS[opts.only[0]].split(), *opts.more)
    opts.device = Device.pick(chosen.device, chosen.precision, train=True)
    check_block_size(BLOCK, load_config(opts.directory))
    return opts


def arguments(opts: Namespace, method: str) -> list[str]:
    """Return `train.py`'s, with `--resume` only for a run that has begun."""
    out = opts.out / method
    return [
        method,
        "--base",
        opts.base,
        "--book",
        str(opts.book),
        "--out",
        str(out),
        *METHODS[method].split(),
        *(x for x in opts.more if x != "--resume" or out.exists()),
    ]


def score(opts: Namespace, method: str, run: dict, windows: Windows, scored: np.ndarray) -> dict:
    """Score the base, or what a run kept of it, by the reference's measure and by this project's:
    each token once, in consecutive windows, the mean over tokens.
    """
    out = opts.out / method
    base = out if method == "full" else opts.directory
    model = ours.load(base, out if method == "lora" else None, opts.device)
    # The mean over batches of each batch's mean; a last, smaller batch counts like the others.
    batches = np.split(scored, range(BATCH_SIZE[method], len(scored), BATCH_SIZE[method]))
    loss = np.mean(
        [
            ours.score(
                model, [windows.batch(batch)], ours.tokenizer(opts.directory), opts.device
            ).loss
            for batch in batches
        ]
    )
    next_token = ours.evaluate(model, windows.tokens, opts.directory, opts.device, BLOCK)
    return {
        "reference": {"loss": float(loss), "perplexity": perplexity(loss)},
        "next_token": asdict(next_token) | {"perplexity": next_token.perplexity},
        **{
            key: run.get(key, 0)
            for key in ("trainable_parameters", "trainable_percent", "steps", "seconds")
        },
    }


def share_seen(training: np.ndarray, validation: np.ndarray) -> float:
    """Return the share of the validation part's runs of tokens that the training part has."""
    known, runs = (
        [tokens[i : i + RUN_LENGTH].tobytes() for i in range(len(tokens) - RUN_LENGTH + 1)]
        for tokens in (training, validation)
    )
    return sum(map(set(known).__contains__, runs)) / max(1, len(runs))


def report(figures: dict[str, dict]) -> None:
    rows = []
    for method, here in figures.items():
        if method in PUBLISHED:
            rows.append((f"{method}, published", *PUBLISHED[method]))
        losses = [
            here[key][what]
            for key in ("reference", "next_token")
            for what in ("loss", "perplexity")
        ]
        rows.append(
            (
                f"{method}, here",
                f"{here['trainable_parameters']:,}",
                f"{here['trainable_percent']:.4f} %",
                *(f"{x:.4f}" for x in losses),
            )
        )
    print()
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    run_command(main)
