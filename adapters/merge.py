"""Fold an adapter into its base: `python -m adapters.merge --adapter DIR --out DIR`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from adapters.load import add_model_options, load_model
from common.cli import Parser
from common.device import PRECISIONS
from common.errors import UserError, run_command
from common.files import refuse_existing
from lora.inject import lora_layers
from lora.pissa import PiSSALinear
from model.tokenizer_files import save_tokenizer
from model.weights import save_gpt2


def merge(model: nn.Module) -> None:
    """Set W to W + scaling * B A in every LoRA layer, which then costs what a plain one does.

    W must be in fp32: a sum in bf16 rounds a small update away. Raises ValueError for another
    precision or a disabled adapter.
    """
    for name, layer in lora_layers(model).items():
        if not layer.enabled or layer.base_layer.weight.dtype != torch.float32:
            raise ValueError(f"{name}: only an enabled adapter is merged, and into fp32 weights")
        if not layer.merged:
            layer.base_layer.weight.data += layer.delta_weight()
            layer.merged = True


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, up to rounding."""
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.base_layer.weight.data -= layer.delta_weight()
            layer.merged = False


def unwrap(model: nn.Module) -> None:
    """Put the plain linear layers, with what was merged into them, back in place. Raises ValueError
    for PiSSA's that are not merged: their W lacks its largest part.
    """
    for name, layer in lora_layers(model).items():
        if isinstance(layer, PiSSALinear) and not layer.merged:
            raise ValueError(f"{name}: PiSSA took the largest part of W out; merge it first")
        model.set_submodule(name, layer.base_layer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="adapters.merge", description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the new Hugging Face GPT-2 directory",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the file; below fp32, rounding loses a part of the update, and "
        "the share is printed; without --adapter, the base alone is written",
    )
    args = parser.parse_args(argv)
    if not args.adapter and args.precision == "fp32":
        raise UserError("--adapter is missing: there is nothing to merge")
    refuse_existing(args.out)
    base, model, tokenizer = load_model(args.base, args.adapter)
    merge(model)
    if args.adapter and args.precision != "fp32":
        print(rounding_cost(model, PRECISIONS[args.precision]))
    unwrap(model)
    save_gpt2(model, args.out, PRECISIONS[args.precision], tokenizer.end_of_text)
    save_tokenizer(tokenizer, args.out)
    print(f"{base}{f' + {args.adapter}' if args.adapter else ''} -> {args.out}")


def rounding_cost(model: nn.Module, dtype: torch.dtype) -> str:
    """Return a line that says how much of all layers' updates a file in `dtype` rounds away."""
    error = size = 0.0
    for layer in lora_layers(model).values():
        merged, delta = layer.base_layer.weight.data, layer.delta_weight()
        base = merged - delta
        kept = merged.to(dtype).float() - base.to(dtype).float()  # against the base in `dtype`
        error += (kept - delta).square().sum().item()
        size += delta.square().sum().item()
    share = (error / size) ** 0.5 if size else 0.0
    return f"{dtype}: rounding changes the update by {share:.1%} of its norm; fp32 keeps it whole"


if __name__ == "__main__":
    run_command(main)
