"""Repeat the reference run. Print the published table beside ours, and the next-token losses.

`python -m benchmarks.reference` trains LoRA and then the whole base by the protocol of the
reference. The command scores both models by the reference's measure and by next-token loss. Without
`--book`, the text is pseudo-Latin, because the reference used filler text. All options of
`train.py` are accepted, to show how the figures depend on the protocol (docs/reference-run.md).

The reference's windows are x = tokens[i : i+128] with labels tokens[i+1 : i+129], for every i. The
reference's library shifts the labels once more. So position t is scored on token t + 2 for
t = 0 ... 126, and the last position is not scored. No position sees a later position, so such a
window equals a window of 127 tokens with `--label-shift 2`.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from benchmarks import ours
from benchmarks.parity_report import machine
from common.cli import BASE_OPTION, Parser, number, print_table
from common.device import Device
from common.errors import run_command
from common.files import write_json
from data.tokens import load_tokens
from data.windows import Windows, check_block_size, split
from evaluation.scores import perplexity
from storage.hub import find_base
from storage.weights import load_config
from training.options import ROOT

BLOCK = 128  # tokens per window in the reference run
SCORED = 127  # scored tokens per window
SHIFT = 2
COMMON = (
    f"--epochs 3 --block-size {SCORED} --stride 1 --label-shift {SHIFT} --precision fp32 "
    "--val-fraction 0.1 --weight-decay 0.01 --warmup-ratio 0.06 --clip 0"
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
FACTS = ("trainable_parameters", "trainable_percent", "steps", "seconds")  # of run.json
RUN_LENGTH = 16  # tokens of a sequence that is looked up in the training part
TEXT = Path(__file__).with_name("pseudo-latin.txt")  # 5,000 words: 12 sentences in random order


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_args(argv)
    tokens = load_tokens(opts.book, ours.tokenizer(opts.directory))
    training, validation = split(tokens, opts.val_fraction)
    seen = share_seen(training.ids, validation.ids)
    print(
        f"base {Path(opts.base).name}, {opts.book.name}: {len(tokens):,} tokens, {machine()}\n"
        f"{seen:.1%} of the validation part's runs of {RUN_LENGTH} tokens are in the training "
        "part as well",
        flush=True,
    )

    runs: dict[str, dict] = {"base": {}}
    for method in opts.only:
        runs[method] = ours.run(arguments(opts, method))

    windows = Windows(validation.ids, SCORED, 1, SHIFT, validation.byte_counts)
    count = min(opts.val_windows or len(windows), len(windows))
    scored = np.linspace(0, len(windows) - 1, count).astype(int)  # evenly spaced
    figures = {}
    for method, run in runs.items():
        figures[method] = score(opts, method, windows, scored)
        figures[method] |= {key: run.get(key, 0) for key in FACTS}  # 0 for the base

    report(opts, figures, count, len(windows))
    write_json(
        opts.out / "reference.json",
        {
            "command": command(opts),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine(),
            "device": opts.device.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tokens": len(tokens),
            "seen_before": seen,
            "val_windows": {"scored": count, "all": len(windows)},
            "here": figures,
        },
    )


def command(opts: Namespace) -> str:
    """Return a command with the same results. It names the base and the book without their
    directories.
    """
    words = ["--only", *opts.only]
    if opts.val_windows:
        words += ["--val-windows", str(opts.val_windows)]
    more = " ".join([*words, *opts.more])
    return f"make reference BASE={Path(opts.base).name} BOOK={opts.book.name} ARGS='{more}'"


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(
        prog="benchmarks.reference",
        description=__doc__,
        epilog="Other options go to train.py.",
    )
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument(
        "--book", type=Path, default=TEXT, help="UTF-8 text file (default: pseudo-Latin)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "reference",
        metavar="DIR",
        help="directory for the runs lora/ and full/, and for the figures",
    )
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument(
        "--val-windows",
        type=number(int, 1),
        metavar="N",
        help="score only this many validation windows by the reference's measure, "
        "evenly spaced (default: all)",
    )
    opts, more = parser.parse_known_args(argv)

    opts.more = more
    opts.base, opts.directory = find_base(opts.base)
    chosen = ours.options(opts.only[0], *METHODS[opts.only[0]].split(), *more)
    opts.val_fraction = chosen.val_fraction
    opts.device = Device.pick(chosen.device, chosen.precision, train=True)
    check_block_size(BLOCK, load_config(opts.directory))
    return opts


def arguments(opts: Namespace, method: str) -> list[str]:
    """Return the arguments of `train.py`, with `--resume` only if the run has begun."""
    out = opts.out / method
    more = opts.more
    if not out.exists():
        more = [option for option in more if option != "--resume"]
    protocol = METHODS[method].split()
    return ours.command_line(method, *protocol, *more, base=opts.base, book=opts.book, out=out)


def score(opts: Namespace, method: str, windows: Windows, scored: np.ndarray) -> dict:
    """Score the base or a run's model by the reference's measure and by this project's measure.
    This project scores each token once, in consecutive windows, and averages over tokens.
    """
    base = opts.directory
    adapter = None
    if method == "full":
        base = opts.out / method
    elif method == "lora":
        adapter = opts.out / method
    model = ours.load(base, adapter, opts.device)

    # The reference averages the means of the batches, so a smaller last batch has the same weight.
    size = BATCH_SIZE[method]
    losses = []
    for batch in np.split(scored, range(size, len(scored), size)):
        inputs, targets = map(opts.device.to_device, windows.inputs_and_targets(batch))  # (B, T)
        with torch.no_grad(), opts.device.autocast():
            losses.append(model.token_losses(inputs, targets)[0].mean().item())
    loss = float(np.mean(losses))

    next_token = ours.evaluate(model, windows, opts.device, BLOCK)
    return {
        "reference": {"loss": loss, "perplexity": perplexity(loss)},
        "next_token": asdict(next_token) | {"perplexity": next_token.perplexity},
    }


def share_seen(training: np.ndarray, validation: np.ndarray) -> float:
    """Return which share of the validation part's token sequences the training part contains."""

    def sequences(ids: np.ndarray) -> list[bytes]:
        starts = range(len(ids) - RUN_LENGTH + 1)
        return [ids[i : i + RUN_LENGTH].tobytes() for i in starts]

    known = set(sequences(training))
    seen = [sequence in known for sequence in sequences(validation)]
    return sum(seen) / max(1, len(seen))


def report(opts: Namespace, figures: dict[str, dict], count: int, windows: int) -> None:
    """Print the table, and that `count` of `windows` were measured."""
    rows: list[tuple[str, ...]] = []
    for method, here in figures.items():
        if method in PUBLISHED:
            rows.append((f"{method}, published", *PUBLISHED[method]))
        rows.append(
            (
                f"{method}, here",
                f"{here['trainable_parameters']:,}",
                f"{here['trainable_percent']:.4f} %",
                f"{here['reference']['loss']:.4f}",
                f"{here['reference']['perplexity']:.4f}",
                f"{here['next_token']['loss']:.4f}",
                f"{here['next_token']['perplexity']:.4f}",
            )
        )
    print()
    print_table(COLUMNS, rows)

    part = "all" if count == windows else f"only {count:,} of the"
    print(
        f"\nbest val loss: by the reference's measure, on {part} {windows:,} validation "
        "windows at stride 1\nnext-token loss: each token of the validation part once, the mean"
    )
    if opts.more:
        print(f"{' '.join(opts.more)}: not the whole protocol; do not compare with the published")


if __name__ == "__main__":
    run_command(main)
