"""Write an adapter as plain LoRA: `python -m adapters.export --plain ADAPTER --out DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.factors import read_factors, write_factors
from adapters.quantisation import recorded_quantisation
from common.cli import Parser
from common.errors import run_command
from common.files import new_directory, refuse_existing
from lora.files import base_hash
from lora.peft_config import base_name, stored_fields
from storage.hub import find_adapter


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.export", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="lora_alpha = r, one rank for all layers, no variant; so far the only form",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    refuse_existing(args.out)
    adapter = find_adapter(str(args.adapter))
    factors = read_factors(adapter)
    rank = max(change.rank for change in factors.values())
    padded = {layer: change.pad(rank) for layer, change in factors.items()}

    fields = stored_fields(adapter)
    base = str(base_name(adapter) or "")
    sha256 = base_hash(adapter) or ""
    kind = recorded_quantisation(adapter)
    with new_directory(args.out) as directory:
        write_factors(padded, fields, directory, base, sha256, kind)
    print(f"{adapter} -> {args.out}: plain LoRA, r = lora_alpha = {rank}, {len(padded)} layers")


if __name__ == "__main__":
    run_command(main)
