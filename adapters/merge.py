"""Merge an adapter into the base: `python -m adapters.merge --adapter DIR --out DIR`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from adapters.load import Loaded, load_with_adapter
from common.cli import Parser, add_model_options
from common.device import PRECISIONS
from common.errors import run_command
from common.files import new_directory, open_file, refuse_existing
from data.tokenizer import TEMPLATE
from lora import lora_layers, merge, unwrap
from lora.quantised import dequantise
from storage.hf_compat import save_tokenizer
from storage.hub import find_adapter
from storage.weights import save_gpt2


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
        help="precision of the file. Below fp32, rounding changes the update, and the relative "
        "error is printed. Without --adapter, only the base is written",
    )
    args = parser.parse_args(argv)
    refuse_existing(args.out)

    dtype = PRECISIONS[args.precision]
    base, model, tokenizer = load_merged(args.base, args.adapter, dtype, args.quantise)
    template = chat_template(args.adapter)
    with new_directory(args.out) as directory:
        save_gpt2(model, directory, dtype, tokenizer.end_of_text)
        save_tokenizer(tokenizer, directory, model.config.n_positions, template)
    merged = f"{base} + {args.adapter}" if args.adapter else base
    print(f"{merged} -> {args.out}")


def load_merged(
    base: str, adapter: Path | None, dtype: torch.dtype, quantise: str | None
) -> Loaded:
    """Load a base in fp32 with the adapter merged. Print by how much rounding to `dtype` changes
    the update."""
    loaded = load_with_adapter(base, adapter, quantise=quantise)
    dequantise(loaded.model)  # the adapter was trained on the dequantised weights
    merge(loaded.model)
    if adapter and dtype != torch.float32:
        share = rounding_cost(loaded.model, dtype)
        print(f"{dtype}: rounding changes the update by {share:.1%} of its norm; fp32 keeps it all")
    unwrap(loaded.model)
    return loaded


def chat_template(adapter: Path | None) -> str | None:
    """Return the chat template that was saved with the adapter, or None."""
    if not adapter:
        return None
    path = find_adapter(str(adapter)) / TEMPLATE
    if not path.exists():
        return None
    with open_file(path) as file:
        return file.read().decode(errors="replace")


def rounding_cost(model: nn.Module, dtype: torch.dtype) -> float:
    """Return the relative error of the updates after the weights are rounded to `dtype`: the norm
    of the errors in all updates, divided by the norm of all updates.
    """
    squared_error = 0.0
    squared_norm = 0.0
    for layer in lora_layers(model).values():
        merged = layer.base_layer.weight.detach()
        delta = layer.delta_weight()
        base = merged - delta
        kept = merged.to(dtype).float() - base.to(dtype).float()
        squared_error += (kept - delta).square().sum().item()
        squared_norm += delta.square().sum().item()
    if squared_norm == 0:
        return 0.0
    return (squared_error / squared_norm) ** 0.5


if __name__ == "__main__":
    run_command(main)
