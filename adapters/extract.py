"""Turn full fine-tuning into an adapter: `python -m adapters.extract --full DIR --out DIR`."""

import argparse
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters.factors import Factors, truncate, write_factors
from common.cli import BASE_OPTION, Parser, number, print_table
from common.errors import UserError, run_command
from common.files import brief, file_sha256, new_directory, read_json, refuse_existing
from lora import LoRAConfig, inject, lora_layers
from lora.peft_view import peft_view
from lora.save import BASE_SHA256, base_fields
from lora.targets import target_modules
from lora.variants.qkv import SlicedLoRALinear
from model.gpt2 import GPT2
from storage.hf_compat import stock_name
from storage.hub import find_base, split_revision
from storage.weights import load_config, read_parameters, weights_path

RUN = "run.json"  # train.py writes this file beside a model


def refuse_another_base(full: Path, base: str, base_sha256: str) -> None:
    """Raise UserError if `full` is a run of train.py whose base had other weights than `base`."""
    report = full / RUN
    if not os.path.exists(report):  # train.py did not write this model
        return
    recorded = read_json(report).get("base_sha256", {}).get("weights")
    if recorded not in (None, base_sha256):
        raise UserError(
            f"{report}: the run began from another base than {base} (weights sha256 "
            f"{brief(recorded)}, not {brief(base_sha256)}); give the base of the run to --base"
        )


def find_layers(model: GPT2, rank: int, targets: Sequence[str]) -> set[str]:
    """Inject LoRA into a model on the meta device, and return the names of the adapted layers."""
    try:
        inject(model, LoRAConfig(rank, target_modules=target_modules(targets)))
    except ValueError as error:
        raise UserError(f"--rank, --target-modules: {error}") from error
    layers = lora_layers(model)
    if any(isinstance(layer, SlicedLoRALinear) for layer in layers.values()):
        raise UserError("--target-modules: cannot extract a slice of c_attn; name c_attn")
    return set(layers)


def extract(
    changes: Iterable[tuple[str, Tensor]], layers: Collection[str], rank: int
) -> tuple[dict[str, Factors], list[list[str]], float]:
    """Approximate each layer's change by the nearest matrix of rank `rank`. Return the factors, the
    rows of the table to print, and the share of the change that lies outside `layers`, by squared
    norm.
    """
    factors = {}
    rows = []
    whole = 0.0
    outside = 0.0
    for name, change in changes:
        squares = change.square().sum().item()
        whole += squares
        layer = name.removesuffix(".weight")
        if layer not in layers:
            outside += squares
            continue
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        factors[layer] = truncate(u, s, vh, rank)
        explained = s[:rank].square().sum().item() / (squares or 1.0)
        rows.append([layer, f"{squares**0.5:.4g}", f"{explained:.2%}"])
    return factors, rows, outside / (whole or 1.0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.extract", description=__doc__)
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument(
        "--full",
        type=Path,
        required=True,
        metavar="DIR",
        help="the fine-tuned model, a Hugging Face GPT-2 directory",
    )
    parser.add_argument(
        "--rank", type=number(int, 1), default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--target-modules", nargs="+", default=["c_attn"], metavar="NAME", help="default: c_attn"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    refuse_existing(args.out)
    base, directory = find_base(args.base)
    base_weights = weights_path(directory)
    base_sha256 = file_sha256(base_weights)
    refuse_another_base(args.full, base, base_sha256)
    with torch.device("meta"):
        model = GPT2(load_config(directory))
    needed = dict(model.named_parameters())
    layers = find_layers(model, args.rank, args.target_modules)

    before = read_parameters(base_weights, needed)
    after = read_parameters(weights_path(args.full), needed)
    pairs = zip(before, after, strict=True)
    changes = ((name, new.double() - old) for (name, old), (_, new) in pairs)
    found, rows, outside = extract(changes, layers, args.rank)
    prefix = peft_view(model).prefix
    factors = {prefix + layer: change for layer, change in found.items()}
    fields = base_fields(model, *split_revision(stock_name(base)))
    with new_directory(args.out) as directory:
        write_factors(factors, directory, fields, {BASE_SHA256: base_sha256})

    print_table(["layer", "norm of the change", f"rank {args.rank} explains"], rows)
    print(
        f"{outside:.2%} of the whole change's squared norm is outside these layers\n"
        f"{base} + {args.out} approximates {args.full} in these layers at rank {args.rank}"
    )


if __name__ == "__main__":
    run_command(main)
