"""Score a text or conversations. Compare adapters or finished runs."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.load import load_with_adapter
from common.cli import KERNELS_OPTION, Parser, add_device_options, add_model_options, number
from common.device import Device, tune_process
from common.errors import UserError, run_command
from common.files import write_json
from data.instructions import Instructions, read_examples
from data.tokenizer import Tokenizer
from data.tokens import load_books, text_files
from data.windows import Dataset, Windows, check_block_size, split
from evaluation.compare import compare
from evaluation.scores import RowLosses, evaluate, forgetting, paired_difference, row_losses
from lora.quantised import quantisation
from model.gpt2 import GPT2
from model.kernels.fast import set_kernels
from storage.weights import PICKLED_WEIGHTS
from training.directory import RUN_FILES
from training.options import BOOK


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_model_options(parser, nargs="+")
    source = parser.add_mutually_exclusive_group()
    about = "UTF-8 texts, or directories of .txt files (default: the last tenth of data/book.txt)"
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=about)
    about = "conversations in JSON lines. Only the completions are scored"
    source.add_argument("--data", type=Path, metavar="FILE", help=about)
    about = "compare finished runs and their bases in a table and a picture"
    source.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help=about)
    about = "score only this share of the text or data, taken from the end"
    parser.add_argument("--val-fraction", type=number(float, 0.001, 1.0), help=about)
    about = "tokens per window (default: 128)"
    parser.add_argument("--block-size", type=number(int, 1), default=128, help=about)
    about = "tokens from the start of a window to the start of the next (default: the block size)"
    parser.add_argument("--stride", type=number(int, 1), help=about)
    about = "1: predict the next token (default). 2: the token after that"
    parser.add_argument("--label-shift", type=number(int, 1, 2), default=1, help=about)
    about = "also measure the KL from the base, and the share of tokens where the choice changed"
    parser.add_argument("--forgotten", action="store_true", help=about)
    about = "also write the scores to FILE"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    add_device_options(parser)
    parser.add_argument("--kernels", **KERNELS_OPTION)
    args = parser.parse_args(argv)

    others = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    if args.compare and others != ["compare"]:
        others.remove("compare")
        raise UserError(f"--compare: takes no --{others[0].replace('_', '-')}, only runs")
    if args.forgotten and not args.adapter:
        raise UserError("--forgotten compares an adapter with its base on a text: give --adapter")
    if args.data and (args.stride or args.label_shift > 1):
        raise UserError("--stride and --label-shift are for texts: an example is one row")
    if (args.stride or 1) > args.block_size:
        raise UserError(
            f"--stride {args.stride}: above the block size, some tokens would not be scored"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        compare(args.compare)
        return

    refuse_input_as_output(args)
    device = Device.pick(args.device, args.precision)
    tune_process(device)
    adapters: list[Path | None] = args.adapter or [None]
    reports = []
    first: RowLosses | None = None
    for adapter in adapters:  # one after the other
        report, losses = score(adapter, args, device)
        if first and losses:
            found = paired_difference(first, losses)
            print(
                f"loss minus the loss of {adapters[0]}: {found.difference:+.4f} nats per token, "
                f"standard error {found.standard_error:.4f}"
            )
            report |= asdict(found)
        first = first or losses
        reports.append(report)
    if args.json:
        write_json(args.json, {"adapters": reports} if first else reports[0])


def score(
    adapter: Path | None, args: argparse.Namespace, device: Device
) -> tuple[dict[str, Any], RowLosses | None]:
    """Score the base, with the adapter if any. Print the scores and return them. If `args` names
    several adapters, also return the losses, to compare them."""
    base, model, tokenizer = load_with_adapter(args.base, adapter, device.dtype, args.quantise)
    check_block_size(args.block_size, model.config)
    kind = quantisation(model)
    model.to(device.torch_device)
    set_kernels(model, args.kernels)
    report: dict[str, Any] = {"base": base, "adapter": str(adapter) if adapter else None}
    if kind:
        report["quantise"] = kind
    several = args.adapter and len(args.adapter) > 1
    if several:
        print(f"=== {adapter}")
    found, data = score_text(args, model, tokenizer, device)
    return report | found, row_losses(model, data, device) if several else None


def refuse_input_as_output(args: argparse.Namespace) -> None:
    """Raise UserError if --json names a text, or a file of the base or the adapter."""
    if not args.json or not os.path.exists(args.json):
        return
    inputs = text_files(texts_of(args))
    for directory in (args.base, *(args.adapter or ())):
        inputs += [Path(directory) / name for name in (*RUN_FILES, PICKLED_WEIGHTS)]
    for path in filter(None, inputs):
        if os.path.exists(path) and os.path.samefile(path, args.json):
            raise UserError(f"--json {args.json}: is an input ({path}); name another file")


def texts_of(args: argparse.Namespace) -> list[Path]:
    return [args.data] if args.data else args.text or [BOOK]


def score_text(
    args: argparse.Namespace, model: GPT2, tokenizer: Tokenizer, device: Device
) -> tuple[dict[str, Any], Dataset]:
    """Score a text or conversations. Print the scores. Return them and the scored data."""
    texts = texts_of(args)
    source = ", ".join(map(str, texts))
    fraction = args.val_fraction or 1.0
    if not (args.val_fraction or args.data or args.text):
        fraction = 0.1  # the book's validation part
    part = "" if fraction == 1 else f", the last {100 * fraction:g} %"

    data = load_dataset(args, tokenizer, texts, fraction)
    scores = evaluate(model, data, device)
    print(f"{source}{part}: {scores.tokens:,} tokens, {scores.bytes:,} bytes")
    print(f"{scores}, accuracy {scores.accuracy:.2%}")
    found = {
        "text": source,
        "val_fraction": fraction,
        **asdict(scores),
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
    }
    if args.forgotten:
        forgotten = forgetting(model, data, device)
        print(
            f"forgotten: KL(base || adapter) {forgotten['kl_from_base']:.4f} nats per token, "
            f"the likeliest token changed at {forgotten['changed_choices']:.2%} of the tokens"
        )
        found |= forgotten
    return found, data


def load_dataset(
    args: argparse.Namespace, tokenizer: Tokenizer, texts: Sequence[Path], fraction: float
) -> Dataset:
    """Load the texts or conversations to score. Raises UserError if the data are too short."""
    if args.data:
        examples = read_examples(args.data, tokenizer, args.block_size)
        chosen = split(examples, fraction)[1]
        if not chosen:
            raise UserError(f"{args.data}: 0 examples; too short to score")
        return Instructions(chosen)

    tokens = split(load_books(texts, tokenizer), fraction)[1]
    if len(tokens) <= args.label_shift:
        raise UserError(f"{texts[0]}: {len(tokens)} tokens; too short to score")
    stride = args.stride or args.block_size
    return Windows(tokens.ids, args.block_size, stride, args.label_shift, tokens.byte_counts)


if __name__ == "__main__":
    run_command(main)
