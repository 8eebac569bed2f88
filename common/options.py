"""Declare the options of evaluate.py and generate.py. See `training/options.py` for train.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import (
    KERNELS_OPTION,
    Parser,
    add_device_options,
    add_model_options,
    number,
)
from common.errors import UserError


def parse_evaluate(
    description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read `evaluate.py`'s command line. Raises UserError for options that are wrong or clash."""
    parser = Parser(prog="evaluate.py", description=description)
    add_model_options(parser)
    _add_sources(parser)
    parser.add_argument(
        "--val-fraction",
        type=number(float, 0.001, 1.0),
        help="score only this share of the text or data, taken from the end",
    )
    parser.add_argument(
        "--block-size",
        type=number(int, 1),
        default=128,
        help="tokens per window (default: %(default)s)",
    )
    parser.add_argument(
        "--stride",
        type=number(int, 1),
        help="tokens from the start of a window to the start of the next (default: the block size)",
    )
    parser.add_argument(
        "--label-shift",
        type=number(int, 1, 2),
        default=1,
        metavar="{1,2}",
        help="1: predict the next token (default). 2: the token after that",
    )
    parser.add_argument(
        "--forgotten",
        action="store_true",
        help="also measure forgetting: the mean KL(base || adapter), and the share of tokens where "
        "the likeliest token changed",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    add_device_options(parser)
    parser.add_argument("--kernels", **KERNELS_OPTION)
    args = parser.parse_args(argv)

    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.compare and given != ["compare"]:
        raise UserError("--compare reads finished runs, and takes no other option")
    if args.forgotten and (args.choices or not args.adapter):
        raise UserError("--forgotten compares an adapter with its base on a text: give --adapter")
    if (args.data or args.choices) and (args.stride or args.label_shift > 1):
        raise UserError("--stride and --label-shift are for texts: an example is one row")
    if args.stride and args.stride > args.block_size:
        raise UserError(
            f"--stride {args.stride}: above the block size, some tokens would not be scored"
        )
    return args


def _add_sources(parser: Parser) -> None:
    """Add the options that name the data to score. A command takes at most one of them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts, or directories of .txt files. Whole texts are scored (default: the "
        "validation part of data/book.txt)",
    )
    source.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="conversations in JSON lines. Only the completions are scored",
    )
    source.add_argument(
        "--choices",
        type=Path,
        metavar="FILE",
        help="questions in JSON lines, each answered by its likeliest choice "
        "(docs/classification.md)",
    )
    source.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="compare finished runs and their bases in a table and a picture",
    )


def parse_generate(
    description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read `generate.py`'s command line. Raises UserError for options that are wrong or clash."""
    parser = Parser(prog="generate.py", description=description)
    add_model_options(parser, nargs="+")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="one text or several texts. Each is continued separately",
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="answer each line of standard input, in the chat format of data/instructions.py",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, 1),
        default=200,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0.0, 100.0),
        default=0.8,
        help="0 always takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=number(int, 0),
        default=50,
        help="draw from the k likeliest tokens. 0: from all tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 1e-9, 1.0),
        default=1.0,
        help="draw from the likeliest tokens that together reach this probability (default: all)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=42, help="default: %(default)s"
    )
    parser.add_argument(
        "--with-base",
        action="store_true",
        help="first show the continuation by the base, for comparison",
    )
    add_device_options(parser)
    parser.add_argument("--kernels", **KERNELS_OPTION)
    args = parser.parse_args(argv)

    if not all(prompt.strip() for prompt in args.prompt or ()):
        raise UserError("--prompt is empty: give the text to continue")
    if args.with_base and not (args.adapter and args.prompt):
        raise UserError("--with-base compares with an adapter: give --adapter and --prompt")
    if args.chat and args.adapter and len(args.adapter) > 1:
        raise UserError("--chat answers with one adapter: give one --adapter")
    return args
