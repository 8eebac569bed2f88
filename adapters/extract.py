"""Turn full fine-tuning into an adapter: `python -m adapters.extract --full DIR --out DIR`."""

from pathlib import Path

import torch

from adapters.factors import truncate, write_factors
from common.cli import BASE, Parser, number, print_table
from common.errors import UserError, run_command
from common.files import file_sha256, refuse_existing
from lora.inject import inject, lora_layers
from lora.layer import LoRAConfig
from lora.slices import SlicedLoRALinear
from lora.targets import target_modules
from lora.variants import make_layer
from model.gpt2 import GPT2
from model.hub import find_base
from model.weights import load_config, read_parameters, weights_path


def main() -> None:
    parser = Parser(prog="adapters.extract", description=__doc__)
    parser.add_argument("--base", **BASE)
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
    args = parser.parse_args()
    refuse_existing(args.out)
    base, directory = find_base(args.base)
    with torch.device("meta"):
        model = GPT2(load_config(directory))
    needed = dict(model.named_parameters())
    try:
        inject(
            model,
            LoRAConfig(args.rank, target_modules=target_modules(args.target_modules)),
            make_layer,
        )
    except ValueError as error:
        raise UserError(f"--rank, --target-modules: {error}") from error
    targets, factors, rows, whole, outside = lora_layers(model), {}, [], 0.0, 0.0
    ranks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < args.rank] + [args.rank]
    if any(isinstance(layer, SlicedLoRALinear) for layer in targets.values()):
        raise UserError("--target-modules: a slice of c_attn is not extracted; name c_attn")
    for (name, before), (_, after) in zip(
        read_parameters(weights_path(directory), needed),
        read_parameters(weights_path(args.full), needed),
        strict=True,
    ):
        change, layer = after.double() - before, name.removesuffix(".weight")
        squares = change.square().sum().item()
        whole += squares
        if layer not in targets:
            outside += squares
            continue
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        factors[layer] = truncate(u, s, vh, args.rank)
        explained = (s[:k].square().sum().item() / (squares or 1.0) for k in ranks)
        rows.append((layer, f"{squares**0.5:.4g}", *(f"{share:.2%}" for share in explained)))
    write_factors(factors, args.out, base, file_sha256(weights_path(directory)))
    print_table(("layer", "norm of the change", *(f"rank {k} explains" for k in ranks)), rows)
    print(
        f"{outside / (whole or 1.0):.2%} of the whole change's squared norm is outside these "
        f"layers\n{base} + {args.out} approximates {args.full} in these layers at rank "
        f"{args.rank}"
    )


if __name__ == "__main__":
    run_command(main)
